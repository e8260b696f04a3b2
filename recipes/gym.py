"""Problems that no one here wrote, with verifiers of their own: the package reasoning-gym, as a file for --data.

    pip install reasoning-gym
    python amft.py --task math --data recipes/gym.py --model runs/smollm2 --max-new-tokens 200
    GYM=countdown GYM_SIZE=5000 python amft.py --task math --data recipes/gym.py --model runs/smollm2

GYM: names of KINDS, with commas. The verifier judges what is in the box: of countdown any formula that comes out right,
of fraction_simplification the fraction in its lowest terms alone, where a comparison of values would call the question
itself the answer. Demonstrations: gsm_symbolic brings worked solutions, sums are worked here term by term; of the
others the answer alone is shown, from which imitation learns little but the form.
"""

import os
import re
from functools import lru_cache

REQUEST = "Work it out step by step and put the answer in \\boxed{}."
KINDS = {  # name: its settings
    "chain_sum": dict(max_terms=4, max_digits=2),
    "basic_arithmetic": {},
    "gsm_symbolic": {},
    "countdown": dict(min_numbers=3, max_numbers=4),
    "fraction_simplification": dict(styles=("plain",)),
}
NAMES = os.environ.get("GYM", "chain_sum,gsm_symbolic").split(",")
SIZE = int(os.environ.get("GYM_SIZE", "1000"))  # problems of each kind
# What a verifier is handed: some parse with sympy, which runs what it reads. Numbers and signs alone, and no powers.
ANSWER = re.compile(r"(?!.*(?:\*\*|//))[0-9+\-*/(). ]{1,100}", re.DOTALL)


@lru_cache(maxsize=None)
def dataset(name):
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"reasoning-gym is not here: pip install reasoning-gym ({error})")
    if name not in KINDS:
        raise ValueError(f"GYM={name}: is none of {', '.join(KINDS)}")
    return reasoning_gym.create_dataset(name, size=SIZE, seed=0, **KINDS[name])


def problems():
    rows = []
    for name in NAMES:
        for i in range(SIZE):
            entry = dataset(name)[i]
            prompt = f"{entry['question'].strip()}\n{REQUEST}\n"
            rows.append(dict(prompt=prompt, solution=worked(name, entry), name=name, index=i))
    return rows


def worked(name, entry):
    """A response that is right, with its steps where they are known."""
    end = f"Answer: \\boxed{{{entry['answer']}}}"
    if name == "gsm_symbolic":
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].strip()
        return f"{steps}\n{end}"
    if name == "chain_sum":
        first, *rest = entry["metadata"]["expression"].split()
        total, steps = int(first), []
        for sign, term in zip(rest[::2], rest[1::2]):
            after = total + int(sign + term)
            steps.append(f"{total} {sign} {term} = {after}.")
            total = after
        return " ".join([*steps, end])
    return end


def grade(problem, response):
    from recipes.answers import in_box
    answer = (in_box(response) or "").strip()
    if not ANSWER.fullmatch(answer):
        return False
    data = dataset(problem["name"])
    return data.score_answer(answer, data[problem["index"]]) == 1
