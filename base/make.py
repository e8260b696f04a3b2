"""Make the base policies from nothing: a word-level tokenizer, a small Llama, and a small LLaVA on top of it.

    python base/make.py --families gp --steps 9000 --compile --out first    # General Points is the slow one to learn
    python base/make.py --init first --steps 2700 --compile                 # all three families: writes base/
    python base/make.py --pictures --init base --steps 1100 --tokens 8000   # with eyes: writes base-vl/
    python base/make.py --families math --steps 700 --tokens 5000 --out base/early   # mathematics, early in its pretraining
    python base/make.py --init base --noise 0.45 --steps 0 --out base/worn  # one that has forgotten nearly all of it
    python base/make.py --steps 20 --out some/folder                        # a trial

51, 43 and 27 minutes (the last on one core of two) for the shipped ones, 4 on one core for base/early. The first
stage was run with this script as it was at commit 90dd5a8, when General Points was all there was: 9,000 steps of 128
examples, rows not packed.

The text is the tasks' own conversations, played by their experts, with all that a task fixes drawn at random:
    gp    random cards, any value 1..13 for each face, a random formula, and as target whatever the formula makes
    virl  other cities, every name, both frames of action, turns told in both frames or in one; but no landmark is
          ever seen before it is reached, as it is in the task: something is left to learn
    math  1 to 5 steps, half of the problems with an operator that the prompt explains
So the base learns to read the stated rule, whatever it is, and sometimes to answer again after a failure. Problems that
an evaluation split or the controller's validation split uses never occur here (`gp`, `virl`, `mathematics` below drop
them); operators of `ood_rule` in math do not occur either. Pictures come in every suit and every look.
"""

import argparse
import copy
import math
import random
import sys
import time
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import (AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration,
                          PreTrainedTokenizerFast, SiglipVisionConfig)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tasks  # noqa: E402

WIDTH, VIEW_WIDTH = 352, 448  # tokens of a row of packed conversations; the longest conversation fits
PATCH = 12  # pixels: a picture is 16 tokens
IGNORED = -100  # a label that is not learned
FRAMES = [  # of V-IRL: (actions', what the directions are told in)
    ("absolute", "both"), ("absolute", "absolute"), ("relative", "both"),
    ("relative", "absolute"), ("relative", "absolute"), ("relative", "relative")]

SPECIALS = ["<pad>", "<eos>", "<unk>"]
# Text that never varies is one token, so that following the original's formats costs a few tokens, not hundreds.
FEEDBACK = sorted({tasks.FEEDBACK.format(wrong) for task in tasks.TASKS.values()
                   for _, wrong in task.episode.outcomes.values() if wrong})
GP = [tasks.INSTRUCTION + "\nCards: ", ". J counts as ", ", Q counts as ", ", K counts as ", ". Make ", ".\n",
      '{"cards": ["', '", "', '"], "number": [', '], "formula": "', '"}', ", ", "=", "+", "-", "*", "/", "(", ")"]
VIRL = [tasks.GUIDE, "." + tasks.VIEWS[:-1], ".\nYou face ", "First, turn ", "Turn ", " to face ", "to face ", ".",
        "Move forward until you reach next intersection", "Move forward until you reach destination", " where ",
        " is on your ", tasks.NOTHING, tasks.CROSSING, "You observe an image of 4 views", '{"current observation": "',
        '", "action": "', "turn_direction(", ')"}', tasks.FORWARD, tasks.HALT,
        *(f"{dot}\n{i}. " for i in range(1, 7) for dot in ("", ".")),
        *(f'", "current instruction": "{i}. ' for i in range(1, 7)),
        *(f"{dot}\nO_{i}: " for i in range(1, 11) for dot in ("", ".")), *(f"\nA_{i}: " for i in range(1, 11)),
        *tasks.NAMES, *tasks.HEADINGS, *dict.fromkeys(tasks.BEARINGS + tasks.ACTION_WORDS["relative"])]
MATH = ["? " + tasks.REQUEST, ". How many ", ". ", "\n", " = ", " means ", "a", "b", "Answer: \\boxed{", "}",
        *(f" {operator} " for operator in "+-*/" + "".join(tasks.SYMBOLS)), *tasks.THINGS]
FRAGMENTS = list(dict.fromkeys(GP + FEEDBACK + [tasks.IMAGE] + VIRL + MATH))
WORDS = FRAGMENTS + ["A", "J", "Q", "K"] + [str(n) for n in range(301)]


def make_tokenizer():
    """Every fragment, operator, bracket and integer 0..300 is a token; decoding gives back the text."""
    longest_first = sorted(FRAGMENTS, key=len, reverse=True)
    pattern = "|".join([*map(escaped, longest_first), "[0-9]+", "."])
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False)


def escaped(text):
    """For the tokenizer's own regular expressions, which know fewer escapes than Python's."""
    return "".join("\\" + c if c in r"\.[]{}()*+-/|^$?&~#" else c for c in text)


# --- The text: conversations of the tasks, with all that a task fixes drawn at random ---------------


def gp(rng, pictures=False):
    while True:
        ranks = tuple(rng.choices(tasks.RANKS, k=4))
        rule = random_rule(rng)
        numbers = tasks.values_of(ranks, rule)
        (formula, _), value = tasks.random_formula(rng.sample(numbers, 4), rng)
        if value is None or value.denominator != 1 or not 1 <= value <= 100:
            continue
        if value == tasks.TARGET and tasks.ROLES[tuple(sorted(numbers))] != "train":
            continue  # kept for evaluation: this deal is never seen making 24
        deal = dict(ranks=ranks, stated=rule, numbers=numbers, formula=formula, target=int(value))
        if pictures:
            deal = tasks.PictureDeal(**deal, suits="".join(rng.choices("SCHD", k=4)))
        else:
            deal = tasks.Deal(**deal)
        deal.attempts = 2
        if rng.random() < 0.15:  # it fails first
            (wrong, _), other = tasks.random_formula(rng.sample(numbers, 4), rng)
            deal.slips = {0: deal.respond(wrong)} if other != value else {}
        return deal


def random_rule(rng):
    """What the faces count as: half of the time the same."""
    same = rng.randint(1, 13)
    own = [rng.randint(1, 13) for _ in tasks.FACES]
    return dict(zip(tasks.FACES, [same] * 3 if rng.random() < 0.5 else own))


@lru_cache(maxsize=None)
def city(seed):
    return tasks.City(f"pretraining {seed}", tasks.NAMES)  # tasks.VIRL's seeds name a role: never this


def virl(rng, pictures=False):
    frame, told = rng.choice(FRAMES)
    number = rng.randrange(2000)
    parts = tasks.route_parts(city(number), rng, rng.choice((2, 3)), frame, told)
    if pictures:
        route = tasks.PictureRoute(city=number, **parts, look=rng.randrange(len(tasks.LOOKS)))
    else:
        route = tasks.Route(city=number, **parts)
    if rng.random() < 0.3:  # it fails first at one point
        point = rng.randrange(route.points)
        right = route.stops[point].action
        wrong = rng.choice([action for action in route.actions if action != right])
        there = copy.copy(route)
        there.point = point
        route.slips = {point: there.respond(wrong)}
    return route


def mathematics(rng, pictures=False):
    allowed = [meaning for meaning in tasks.MEANINGS if meaning not in tasks.OOD_MEANINGS]
    while True:
        explained = rng.random() < 0.5
        rule = (rng.choice(allowed), rng.choice(tasks.SYMBOLS)) if explained else ()
        problem = tasks.chain(rng, rng.randint(1, 5), *rule)
        if tasks.role_of(problem.unit) == "train":
            return problem


FAMILIES = {"gp": (gp, 0.4), "virl": (virl, 0.3), "math": (mathematics, 0.3)}  # share of the tokens


# --- Rows of packed conversations -----------------------------------------------------------------


def encode(tokenizer, episode):
    """(ids, labels, pictures) of an expert's conversation: only what it says well carries loss."""
    ids, labels, images = [], [], []
    for turn in episode.demonstration():
        shown = turn.shown.replace(tasks.IMAGE, tasks.IMAGE * (tasks.SIDE // PATCH) ** 2)
        read = tokenizer(shown)["input_ids"]
        said = tokenizer(turn.response)["input_ids"] + [tokenizer.eos_token_id]
        ids += read + said
        labels += [IGNORED] * len(read)
        labels += said if turn.learn else [IGNORED] * len(said)
        if turn.image is not None:
            images.append(turn.image)
    return ids, labels, images


class Rows:
    """A batch of `count` rows of `width` tokens, which are filled with whole conversations."""

    def __init__(self, count, width, pad):
        self.ids = np.full((count, width), pad)
        self.labels = np.full((count, width), IGNORED)
        self.positions = np.zeros((count, width), int)
        self.documents = np.zeros((count, width), int)  # 0: nothing; 1, 2, ... in each row
        self.images = []
        self.filled = [0] * count

    def add(self, row, ids, labels, images):
        """Put a conversation into a row; False where it does not fit."""
        start = self.filled[row]
        end = start + len(ids)
        if end > self.ids.shape[1]:
            return False
        self.ids[row, start:end] = ids
        self.labels[row, start:end] = labels
        self.labels[row, start] = IGNORED  # not predicted from another conversation
        self.positions[row, start:end] = range(len(ids))
        self.documents[row, start:end] = self.documents[row].max() + 1
        self.images += images
        self.filled[row] = end
        return True

    def tensors(self):
        """ids, labels, positions, documents (count, width); pixels, or None."""
        pixels = None
        if self.images:
            pixels = torch.from_numpy(np.array(self.images)).permute(0, 3, 1, 2) / 127.5 - 1
        arrays = self.ids, self.labels, self.positions, self.documents
        return *map(torch.from_numpy, arrays), pixels


def make_rows(tokenizer, count, width, families, pictures, rng, used):
    """The tensors of a batch; used: {family: tokens so far}, to keep their shares."""
    rows = Rows(count, width, tokenizer.pad_token_id)
    for row in range(count):
        fits = True
        while fits:  # what does not fit any more is dropped, and the row is done
            family = min(families, key=lambda name: used[name] / FAMILIES[name][1])  # lags behind
            draw, _ = FAMILIES[family]
            conversation = encode(tokenizer, draw(rng, pictures))
            used[family] += len(conversation[0])
            fits = rows.add(row, *conversation)
    return rows.tensors()


# --- The policies ---------------------------------------------------------------------------------


def build(tokenizer, pictures):
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    if not pictures:
        return LlamaForCausalLM(text)
    vision = SiglipVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        image_size=tasks.SIDE, patch_size=PATCH, vision_use_head=False)
    return LlavaForConditionalGeneration(LlavaConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids(tasks.IMAGE),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))


def warm_start(model, tokenizer, folder):
    """Copy the text weights of a checkpoint; rows of the vocabulary go by word: it may have grown."""
    old = load_file(Path(folder) / "model.safetensors")
    old_words = AutoTokenizer.from_pretrained(folder).get_vocab()
    prefix = "model.language_model." if hasattr(model.config, "vision_config") else "model."
    parameters = dict(model.named_parameters())
    for name, tensor in old.items():
        target = parameters[name.replace("model.", prefix, 1)].data
        if "embed_tokens" not in name:
            target.copy_(tensor)
            continue
        for word, row in tokenizer.get_vocab().items():
            if word in old_words:
                target[row] = tensor[old_words[word]]


def wear(model, share):
    """Add noise to each weight matrix, `share` of its own standard deviation: in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += share * parameter.std() * torch.randn_like(parameter)


# --- Pretraining ----------------------------------------------------------------------------------


def learning_rate(step, steps):
    """Share of the peak: up over 100 steps, then a cosine to 1%."""
    warm = (step + 1) / min(100, steps)
    return min(warm, 0.505 + 0.495 * math.cos(math.pi * step / steps))


def pretrain(model, tokenizer, families, rows, width, args):
    """Train it in place; the running mean of the loss."""
    rng = random.Random(args.seed)
    used = dict.fromkeys(families, 0)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps))
    causal = torch.ones(width, width, dtype=torch.bool, device=args.device).tril()
    device_type = torch.device(args.device).type
    bar = trange(args.steps, desc="pretraining", mininterval=5)
    smooth = None
    for _ in bar:
        batch = make_rows(tokenizer, rows, width, families, args.pictures, rng, used)
        ids, labels, positions, documents, pixels = (
            x if x is None else x.to(args.device) for x in batch)
        # Conversations do not see each other.
        attention = (documents[:, :, None] == documents[:, None, :]) & causal
        extra = {} if pixels is None else dict(pixel_values=pixels)
        with torch.autocast(device_type, torch.bfloat16):
            loss = forward(
                input_ids=ids, labels=labels, position_ids=positions,
                attention_mask=attention[:, None], **extra).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
    return smooth


def arguments(argv):
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pictures", action="store_true",
                        help="a LLaVA that sees the cards and the streets; no math")
    parser.add_argument("--init", help="checkpoint folder whose text weights are the start")
    parser.add_argument("--noise", type=float, default=0.0, metavar="SHARE",
                        help="then add so much of each weight matrix's deviation to it")
    parser.add_argument("--steps", type=int, default=9000, help="optimiser steps; 0: none")
    parser.add_argument("--tokens", type=int, default=11000, help="tokens in a step, about")
    parser.add_argument("--lr", type=float, default=2e-3,
                        help="peak learning rate; 100 steps up, then cosine to 1%%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=here)
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--out", type=Path,
                        help="folder to write; default: base/, with --pictures base-vl/")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    out = args.out or (HERE.parent / "base-vl" if args.pictures else HERE)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    families = [name for name in args.families if not (args.pictures and name == "math")]
    width = VIEW_WIDTH if args.pictures else WIDTH
    rows = max(1, args.tokens // width)
    model = build(tokenizer, args.pictures).to(args.device)
    if args.init:
        warm_start(model, tokenizer, args.init)
    wear(model, args.noise)
    trained = ""
    if args.steps:
        start = time.time()
        loss = pretrain(model, tokenizer, families, rows, width, args)
        minutes = (time.time() - start) / 60
        trained = (f", {args.steps} steps of {rows} rows of {width} tokens, loss {loss:.4f}, {minutes:.1f} minutes on "
                   f"{args.device} ({torch.get_num_threads()} threads)")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {parameters:,} parameters{trained}")


if __name__ == "__main__":
    main()
