"""Do two answers say the same? For a reader's own problems (recipes/problems.py).

An answer is right that is the reference's text, number, tuple, set, interval or equation in any
usual spelling: 1/2, .5, \\frac12. No sum is done: where 42 is asked for, 6 * 7 is no answer. Nor
is a unit read: 18 cm is not 18 m, and 5% is not 5.

With the package math-verify, expressions that algebra alone finds equal are the same, too:
\\sqrt{8} and 2\\sqrt{2}. It computes with sympy, on what a policy wrote. So it runs in a process of
its own, sees short texts of few kinds, and is stopped after SECONDS.
"""

import atexit
import importlib.util
import json
import queue
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from tasks import DIGITS, MAX_RESPONSE, number

ROOT = Path(__file__).resolve().parent.parent
MAX_TEXT = 20 * MAX_RESPONSE  # characters of a response or a solution; a longer one is not read
MAX_LINE = 200  # characters behind ####
MAX_DEPTH = 12  # braces in braces
MAX_NESTING = 3  # tuples in sets in tuples
MAX_PARTS = 50  # of a tuple
MAX_EXPRESSION = 120  # characters of what math-verify is shown
SECONDS = 3  # of computing, for a reference and an answer
START_SECONDS = 90  # to import sympy, on a machine that is busy
MAX_STOPPED = 20  # answers that took longer: then math-verify is asked no more

# --- Where a text states its answer ---
def stated(text):
    """The answer in the last box; without one, what is behind the last ####; None without."""
    if len(text) > MAX_TEXT:
        return None
    boxed = in_box(text)
    return boxed if boxed is not None else behind_hashes(text)

def in_box(text):
    """What the last \\boxed{...} or \\fbox{...} holds, or the word behind \\boxed; None without."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    box = re.match(r"\\(?:boxed|fbox)\s*", text[start:])
    rest = text[start + box.end():][:MAX_RESPONSE + 1]
    if rest.startswith("{"):
        return in_braces(rest)
    word = re.match(r"[+-]?[\w/]+(?:[.,][\w/]+)*", rest)
    follows = re.match(r"[^\W\d_]", rest) and box[0][-1:].isalpha()  # \boxedx is another command
    return word[0] if word and not follows else None

def in_braces(text):
    """The inside of the braces that text begins with; None if they are not closed."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ is no brace, \\ no half of one
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[1:brace.start()]
    return None

def behind_hashes(text):
    """What follows the last #### on its line, as in GSM8K. Above other lines only a number counts:
    anything else may be a heading."""
    _, found, rest = text.rpartition("####")
    line, _, later = rest.lstrip(" \t").partition("\n")
    if not found or len(line) > MAX_LINE:
        return None
    if later.strip() and value_of(line) is None:
        return None
    return line.strip()

# --- One spelling of what LaTeX typesets alike ---
CHARACTERS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ",
    "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ",
    "\u00b2": "^{2}", "\u00b3": "^{3}", "\u2260": "\\ne ", "\u222a": "\\cup ", "\u2208": "\\in "})
SAME = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le", "\\geq": "\\ge",
    "\\neq": "\\ne", "\\lt": "<", "\\gt": ">", "\\%": "%", "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\degree": "\u00b0", "~": " "}
SAME.update(dict.fromkeys(  # 1$8 is not 18
    r"\, \; \: \quad \qquad \space \$ $ \( \) \[ \]".split() + ["\\ "], " "))
SAME.update(dict.fromkeys(
    r"\text \textbf \textit \textrm \textsf \textnormal \mathrm \mathbf \mathit \mathsf \mbox "
    r"\hbox \operatorname \rm \bf \it \boxed \fbox \left \right \big \bigl \bigr \Big \Bigl \Bigr "
    r"\displaystyle \textstyle \!".split(), ""))
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\s+|[0-9]+|.", re.DOTALL)
# 70{,}000 and 70\,000, but not 1\,2
THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9]{3}(?![0-9]))")
# A space stays between two letters and between two digits: 1 2 is not 12.
NEEDLESS = re.compile(r"(?<!\w) | (?!\w)|(?<=\d) (?!\d)|(?<!\d) (?=\d)")

def plain(text):
    """A text in one spelling, single spaces where it had any; None if its braces do not fit."""
    text = THOUSANDS.sub(",", text.translate(CHARACTERS))
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ")
    text = re.sub(r" ?\bpercent\b", "%", text)
    tokens = [SAME.get(token, token) for token in TOKEN.findall(text)]
    groups = grouped(tokens)
    if groups is None:
        return None
    text = " ".join(rendered(groups).split()).replace("^{\\circ}", "\u00b0")
    return text.removesuffix(".").strip()

def grouped(tokens):
    """Tokens as nested lists, one for each pair of braces; None if they do not fit."""
    open_groups = [[]]
    for token in tokens:
        if token == "{":
            open_groups.append([])
        elif token == "}":
            group = open_groups.pop()
            if not open_groups:
                return None
            open_groups[-1].append(group)
        elif token:
            open_groups[-1].append(token)
        if len(open_groups) > MAX_DEPTH:
            return None
    return open_groups[0] if len(open_groups) == 1 else None

def rendered(group):
    """A group as text: braces only where they typeset something, and there always."""
    waiting = group[::-1]
    text = []
    argued = False  # behind a command or its argument, where {12}{3} is not {1}{23}
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            inside = rendered(item)
            text.append("{" + inside + "}" if argued and len(inside) > 1 else inside)
            continue
        argued = argued and item.isspace()
        if item in ("^", "_"):
            text.append(item + argument(waiting))
        elif item == "\\frac":
            top = argument(waiting, one_digit=True)
            text.append(item + top + argument(waiting, one_digit=True))
        elif item == "\\sqrt":
            text.append(item + root(waiting) + argument(waiting))
        elif re.fullmatch(r"\\[a-zA-Z]+", item):
            text.append(item + " ")  # \pi{r} is not \pir
            argued = True
        else:
            text.append(item)
    return "".join(text)

def root(waiting):
    """The [3] of \\sqrt[3]{8}, if the items that wait begin with one."""
    if waiting[-1:] != ["["] or "]" not in waiting:
        return ""
    inside = []
    while waiting[-1] != "]":
        inside.append(waiting.pop())
    return rendered(inside) + waiting.pop()

def argument(waiting, one_digit=False):
    """What a command takes of the items that wait, in braces: of \\frac12 a digit, of x^10 all."""
    while waiting and isinstance(waiting[-1], str) and waiting[-1].isspace():
        waiting.pop()
    if not waiting:
        return "{}"
    item = waiting.pop()
    if isinstance(item, list):
        return "{" + rendered(item).strip() + "}"
    if one_digit and item.isdigit() and len(item) > 1:
        waiting.append(item[1:])
        item = item[0]
    if item == "-" and waiting and str(waiting[-1]).isdigit():
        item += waiting.pop()
    return "{" + item + "}"

def tight(text):
    """A plain text without the spaces that say nothing."""
    return NEEDLESS.sub("", text)

# --- Numbers ---
SCIENTIFIC = re.compile(
    r"([0-9.,]+) ?(?:\\times|\\cdot|\*|x) ?10\^\{ ?([+-]?) ?([0-9]{1,2}) ?\}")
FRACTION = re.compile(rf"\\frac\{{([+-]?) ?({DIGITS})\}}\{{([+-]?) ?({DIGITS})\}}")
MIXED = re.compile(
    rf"([0-9]{{1,20}})(?: ?\\frac\{{({DIGITS})\}}\{{({DIGITS})\}}| ({DIGITS}) ?/ ?({DIGITS}))")
MEASURED = re.compile(
    rf"([+-]? ?(?:(?:{DIGITS})(?:\.[0-9]{{1,20}})?|\.[0-9]{{1,20}}|{FRACTION.pattern})) ?"
    r"([^0-9 .,/].*)")

def numeral(text):
    """The exact value of a number in a plain text; None of anything else, a sum or 6 * 7."""
    match = re.fullmatch(r"([+-]?) ?([^ +-].*)", text) if len(text) <= 100 else None
    if not match:
        return None
    value = without_sign(match[2])
    return -value if value is not None and match[1] == "-" else value

def without_sign(text):
    if text.startswith("(") and text.endswith(")"):  # (1,000) is a pair
        return None if "," in text else numeral(text[1:-1].strip())
    if match := SCIENTIFIC.fullmatch(text):
        factor = without_sign(match[1])
        power = int(match[2] + match[3])
        return None if factor is None else factor * Fraction(10) ** power
    if match := FRACTION.fullmatch(text):
        return ratio(match[1] + match[2], match[3] + match[4])
    if match := MIXED.fullmatch(text):
        part = ratio(match[2] or match[4], match[3] or match[5])
        return int(match[1]) + part if part is not None and part < 1 else None
    return number("0" + text if text.startswith(".") else text)

def ratio(top, bottom):
    top, bottom = number(top), number(bottom)  # None of more digits than an answer has
    return top / bottom if top is not None and bottom else None

def measured(text):
    """(value, what follows) of a number with a unit or the like, 18.0 cm; None of anything else."""
    match = MEASURED.fullmatch(text)
    return (numeral(match[1]), tight(match.groups()[-1])) if match else None

def value_of(text):
    """The number that a text is, in any spelling; None if it is none."""
    text = plain(text) if len(text) <= MAX_LINE else None
    return None if text is None else numeral(without_name(unwrapped(text)))

# --- What an answer is made of ---
NAMED = re.compile(r"[^\W\d_](?:_\{\w\})? ?(?:=|\\in(?![a-zA-Z])) ?")
RELATION = re.compile(r" ?(\\(?:le|ge|ne)(?![a-zA-Z])|[<>=]) ?")
MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
SLASHED = re.compile(r"([+-]?)((?:[0-9]|[^\W\d_]|\\pi ?)+)/([0-9]+|[^\W\d_])")

def unwrapped(text):
    """Without the brackets around one thing: (A) is A, (x + 1) is x + 1; (2, 3) stays."""
    for _ in range(MAX_NESTING):
        pair = brackets(text)
        if not pair or pair[:2] != ("(", ")") or len(divided(pair[2], ",")) > 1:
            break
        text = pair[2].strip()
    return text

def without_name(text):
    """Without what is only its name: x = 5 is 5."""
    named = NAMED.match(text)
    return text[named.end():] if named else text

def brackets(text):
    """(left, right, inside) of a text that one pair of brackets holds; None of any other."""
    opens = re.match(r"\\\{|[(\[]", text)
    closes = re.search(r"(?:\\\}|[)\]])$", text)
    if not opens or not closes or closes.start() < opens.end():
        return None
    inside = text[opens.end():closes.start()]
    return None if depths(inside)[0] < 0 or depths(inside)[1] else (opens[0], closes[0], inside)

def depths(text):
    """(lowest, last) count of open brackets along a text."""
    lowest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        lowest = min(lowest, depth)
    return lowest, depth

def divided(text, separator):
    """The parts between separators that stand in no brackets."""
    parts = [""]
    depth = 0
    for part in re.split(r"(\\cup(?![a-zA-Z])|[,()\[\]{}])", text):
        depth += (part in tuple("([{")) - (part in tuple(")]}"))
        if part == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += part
    return [part.strip() for part in parts]

def composed(text):
    """(kind, parts) of a union, a list, a tuple, an interval or a set; None of a single thing."""
    text = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup ", text)
    for separator in ("\\cup", ","):
        parts = divided(text, separator)
        if len(parts) > 1:
            return separator, parts
    pair = brackets(text)
    if not pair:
        return None
    left, right, inside = pair
    parts = divided(inside, ",")
    if left == "\\{":
        parts = sorted(parts, key=order)
    return left + right, parts

def order(part):
    """Elements of a set in one order however they are spelled: first numbers, by their size."""
    value = numeral(part)
    return (value is None, value or 0, tight(part))

def related(text):
    """(signs, sides) of an equation or a chain of inequalities, the smaller way round."""
    sides = RELATION.split(text)
    signs = sides[1::2]
    sides = sides[::2]
    mirrored = [MIRRORED[sign] for sign in reversed(signs)]
    if mirrored < signs:
        return mirrored, sides[::-1]
    return signs, sides

# --- The comparison ---
def same(reference, answer):
    """Does an answer say what the reference says?"""
    value = number(reference)
    if reference.split() == answer.split() or (value is not None and value == number(answer)):
        return True
    if max(len(reference), len(answer)) > MAX_RESPONSE:
        return False
    return same_in_any_spelling(reference, answer)

@lru_cache(maxsize=2 ** 13)
def same_in_any_spelling(reference, answer):
    reference, answer = plain(reference), plain(answer)
    if not reference or not answer:
        return False
    if not RELATION.search(reference):
        answer = without_name(answer)
    if not RELATION.search(answer):
        reference = without_name(reference)
    pairs = unproven(reference, answer)
    return pairs is not None and (not pairs or ALGEBRA.proves(pairs))

def unproven(reference, answer, nesting=0):
    """None if two plain texts differ; else the pairs of expressions whose equality decides."""
    reference, answer = unwrapped(reference), unwrapped(answer)
    value = numeral(reference)
    if value is not None:
        return [] if numeral(answer) == value else None
    if numeral(answer) is not None:
        return None
    if spelled_alike(reference, answer):
        return []
    whole, others = composed(reference), composed(answer)
    if whole or others:
        return all_unproven(whole, others, nesting)
    if RELATION.search(reference) or RELATION.search(answer):
        return equation_unproven(related(reference), related(answer), nesting)
    return [(reference, answer)] if comparable(reference, answer) else None

def spelled_alike(reference, answer):
    if slashes(reference) == slashes(answer):
        return True
    known = measured(reference)
    if known and known == measured(answer):
        return True
    words = reference.casefold(), answer.casefold()
    return words[0] == words[1] and words[0] in ("yes", "no", "true", "false")

def slashes(text):
    """A whole that is a/b as the fraction, \\pi/2 like \\frac{\\pi}{2}."""
    text = tight(text)
    match = SLASHED.fullmatch(text)
    return f"{match[1]}\\frac{{{match[2].strip()}}}{{{match[3]}}}" if match else text

def all_unproven(whole, others, nesting):
    """`unproven` of two composed answers, (kind, parts) each, part by part."""
    if not whole or not others or whole[0] != others[0] or nesting == MAX_NESTING:
        return None
    if len(whole[1]) != len(others[1]) or len(whole[1]) > MAX_PARTS:
        return None
    return joined(whole[1], others[1], nesting + 1)

def equation_unproven(relation, other, nesting):
    """`unproven` of two equations or inequalities, side by side; = may stand either way round."""
    signs, sides = relation
    if signs != other[0] or nesting == MAX_NESTING or len(sides) > MAX_PARTS:
        return None
    pairs = joined(sides, other[1], nesting + 1)
    if pairs is None and signs == [MIRRORED[sign] for sign in reversed(signs)]:
        return joined(sides, other[1][::-1], nesting + 1)
    return pairs

def joined(parts, others, nesting):
    pairs = []
    for part, other in zip(parts, others):
        found = unproven(part, other, nesting)
        if found is None:
            return None
        pairs += found
    return pairs

# --- Algebra, with math-verify ---
FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp"
EXPRESSION = re.compile(
    rf"(?:\\(?:frac|sqrt|times|cdot|pi|alpha|beta|gamma|theta|lambda|mu|phi|omega|{FUNCTIONS})"
    r"(?![a-zA-Z])|\\sqrt\[[0-9]{1,2}\]|[a-zA-Z0-9+*/(){} -]|\.(?=[0-9])"
    # Powers of powers are what hangs a computer: an exponent is short, and holds none.
    r"|\^\{(?:-?[0-9]{1,2}|[a-zA-Z0-9+ -]{1,5}|-?\\frac\{[a-z0-9]{1,2}\}\{[a-z0-9]{1,2}\})\})*")
POWERS = 6  # that an expression may hold
TOO_LARGE = re.compile(r"[0-9]{16}|\^\{[^{}]*[0-9]{3}")
DECIMAL = re.compile(r"([0-9]{0,20})\.([0-9]{1,20})")

def comparable(reference, answer):
    """May math-verify be asked? It takes words for products, listen for silent, and A for a."""
    texts = reference, answer
    if not all(EXPRESSION.fullmatch(text) and len(text) <= MAX_EXPRESSION for text in texts):
        return False
    if any(text.count("^") > POWERS or TOO_LARGE.search(text) for text in texts):
        return False
    letters, commands = zip(*map(symbols, texts))
    if letters[0] != letters[1] or any(letter.swapcase() in letters[0] for letter in letters[0]):
        return False
    logs = {"\\ln", "\\log"}  # whose base is the reader's
    return commands[0] & logs == commands[1] & logs and not any(map(wordy, texts))

def symbols(text):
    """(letters, commands) of an expression."""
    commands = set(re.findall(r"\\[a-zA-Z]+", text))
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text))), commands

def wordy(text):
    """Does it hold a word of three letters or more, or of two beside nothing but numbers: 5 mg?"""
    bare = re.sub(r"\\[a-zA-Z]+", "\\\\", text)
    measure = re.fullmatch(r"[a-zA-Z0-9. ]*", bare) and re.search(r"[a-zA-Z] ?[a-zA-Z]", bare)
    return bool(measure or re.search(r"[a-zA-Z]{3}", bare))

class Algebra:
    """The process in which math-verify computes. It is started when it is needed first."""

    def __init__(self, command=(sys.executable, "-m", "recipes.answers")):
        self.command = command
        self.process = self.replies = None
        self.stopped = 0

    def here(self):
        return importlib.util.find_spec("math_verify") is not None

    def proves(self, pairs):
        """Are the expressions of every pair equal? False, too, if that takes too long."""
        if self.stopped >= MAX_STOPPED or not self.here():
            return False
        if self.process is None and not self.start():
            return False
        reply = self.ask(pairs)
        if reply is None:
            self.close()
            self.count_stopped()
        return reply == "equal"

    def ask(self, pairs):
        try:
            self.process.stdin.write(json.dumps(pairs) + "\n")
        except OSError:  # it has died
            return None
        return self.reply(SECONDS + 2)

    def start(self):
        """Is the process ready? If not now, it never will be."""
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, text=True, bufsize=1, start_new_session=True,  # no Ctrl-C
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.replies = queue.Queue()
        heard = self.process.stdout, self.replies
        threading.Thread(target=listen, args=heard, daemon=True).start()
        if self.reply(START_SECONDS) == "ready":
            return True
        self.close()
        self.stopped = MAX_STOPPED
        tell("math-verify does not start: answers are compared by their spelling alone")
        return False

    def reply(self, seconds):
        """The process's next line; None if it ends, or does not answer in time."""
        try:
            return self.replies.get(timeout=seconds)
        except queue.Empty:
            return None

    def count_stopped(self):
        self.stopped += 1
        if self.stopped == MAX_STOPPED:
            tell(f"math-verify took more than {SECONDS} s for each of {MAX_STOPPED} answers: "
                 "from here on answers are compared by their spelling alone")

    def close(self):
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

ALGEBRA = Algebra()
atexit.register(ALGEBRA.close)

def listen(stream, replies):
    for line in stream:
        replies.put(line.strip())
    replies.put(None)

def tell(text):
    print(text, file=sys.stderr)

def serve():
    """The process: a line of pairs in, "equal" or "different" out; what takes too long ends it."""
    import math_verify  # noqa: F401  before it is ready
    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        start_clock(SECONDS)
        verdict = all(equal(*pair) for pair in json.loads(line))
        start_clock(0)
        print("equal" if verdict else "different", flush=True)

def start_clock(seconds):
    if hasattr(signal, "alarm"):  # elsewhere the other process ends this one
        signal.alarm(seconds)

def limit_memory():
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 ** 32, 2 ** 32))
    except (ImportError, ValueError, OSError):
        pass  # not on every system

def equal(reference, answer):
    """Does math-verify find two expressions equal, and sympy prove that nothing is between them?"""
    from math_verify import LatexExtractionConfig, parse, verify
    from latex2sympy2_extended import NormalizationConfig
    spelling = LatexExtractionConfig(normalization_config=NormalizationConfig(boxed="none"))
    values = []
    for text in (reference, answer):
        found = parse(f"${exact(text)}$", [spelling], "no_fallback", parsing_timeout=None)
        values += found[:1]
    if len(values) < 2 or not verify(*values, timeout_seconds=None):
        return False
    try:
        return (values[0] - values[1]).equals(0) is True  # verify itself rounds to 15 digits
    except Exception:  # sympy's own, of many kinds: then nothing is proven
        return False

def exact(text):
    """Decimals as fractions: math-verify rounds them to six digits."""
    return DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)

if __name__ == "__main__":
    serve()
