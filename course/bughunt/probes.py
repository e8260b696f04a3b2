"""What each function of the pool gives on drawn inputs: the kit's own tests of a bug and of its fix.

probe(amft, tasks) -> nested lists of numbers and texts. A file with a bug gives something else than the right file.
Inputs are the same for every file: nothing is drawn with the functions under test where it can be avoided.
"""

import argparse
import json
import math
import random
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LOADED = {}


def flat(value):
    """A nested value as one list of floats and texts."""
    if isinstance(value, torch.Tensor):
        return [float(x) for x in value.detach().double().flatten()]
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in [key, *flat(value[key])]]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    return [float(value) if isinstance(value, (bool, int, float)) else str(value)]


def differs(a, b, rel=1e-5):
    """Are two flat lists different? Numbers by their size relative to one another."""
    if len(a) != len(b):
        return True
    for x, y in zip(a, b):
        if isinstance(x, str) or isinstance(y, str):
            if x != y:
                return True
        elif x != y and not (math.isnan(x) and math.isnan(y)) and not abs(x - y) <= rel * max(abs(x), abs(y)) + 1e-12:
            return True
    return False


def generator():
    torch.set_default_dtype(torch.float64)
    return torch.Generator().manual_seed(5)


def holes(g, B=8, T=6):
    """(mask with holes, three tensors), each (B, T)."""
    mask = (torch.rand(B, T, generator=g) < 0.6).double()
    mask[:, 0] = 1.0
    return mask, [torch.randn(B, T, generator=g) for _ in range(3)]


def world():
    import toy  # imports the amft under test
    made = toy.World("probe")
    g = generator()
    which, said = torch.randint(4, (24,), generator=g), torch.randint(25, (24,), generator=g)
    batch = made.batch(which, said)
    mask = (torch.rand(batch.response_mask.shape, generator=g) < 0.7).double()
    mask[:, 0] = 1.0
    batch = batch._replace(response_mask=mask)
    success = (torch.rand(6, 4, generator=g) < 0.4).double()
    success[0], success[1] = 0.0, 1.0
    graded = torch.randn(24, 2, generator=g) * mask
    return made, batch, success, graded, g


def base(amft, tasks):
    torch.set_default_dtype(torch.float32)
    if "base" not in LOADED:
        LOADED["base"] = amft.load_policy(amft.Config(device="cpu"), tasks.GeneralPoints(), amft)
    return LOADED["base"]


def steps(config_of, amft):
    """(theta, state) pairs that a few gradients of different size lead through."""
    g = generator()
    theta = torch.randn(40, generator=g)
    state, out = amft.AdamState(torch.zeros(40), torch.zeros(40), 0), []
    for size in (0.01, 3.0, 0.05, 20.0):
        theta, state = amft.adamw_step(theta, size * torch.randn(40, generator=g), state, lr=0.1, **config_of)
        out.append((theta, state))
    return out


def some_tokens(amft, tokenizer):
    ids = torch.randint(20, len(tokenizer), (3, 12), generator=torch.Generator().manual_seed(1))
    return amft.Batch(ids, torch.ones_like(ids), torch.ones(3, 5), [[]] * 3)


def response_outputs(amft, tasks):
    model, tokenizer = base(amft, tasks)
    with torch.no_grad():
        return [amft.response_outputs(model, some_tokens(amft, tokenizer), hidden=True)]


def logps_of(amft, tasks):
    model, tokenizer = base(amft, tasks)
    with torch.no_grad():
        return [amft.logps_of(model, some_tokens(amft, tokenizer), temperature)
                for temperature in (1.0, 0.5, 1.7, 4.0)]


def deals(tasks, n=6):
    rng = random.Random(3)
    rule = {"J": 10, "Q": 10, "K": 10}
    made = []
    for _ in range(n):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        numbers = (a, b, 1, 2)
        made.append(tasks.Deal(tuple(str(x) if x > 1 else "A" for x in numbers), rule, numbers, f"{a}*{b}-1-2"))
    return made


def rollout(amft, tasks):
    out = []
    model, tokenizer = base(amft, tasks)
    for short, temperature in ((40, 1.0), (28, 1.4)):
        torch.manual_seed(1)
        seen = amft.rollout(model, tokenizer, deals(tasks), 4, short, temperature)
        out += [seen.batch.input_ids, seen.batch.response_mask, seen.success, seen.rewards, seen.entropy,
                seen.truncated, [e.responses for e in seen.episodes], [e.history for e in seen.episodes]]
    rng = random.Random(1)  # several turns, of different number
    torch.manual_seed(2)
    episodes = [tasks.TASKS["gp-turns"]().sample("train", rng) for _ in range(4)]
    seen = amft.rollout(model, tokenizer, episodes, 2, 40)
    out += [seen.batch.input_ids, seen.batch.response_mask, seen.success, seen.rewards, seen.entropy, seen.truncated]
    for k in (0, 1):  # more right answers than the policy has
        class Even(tasks.Deal):
            def grade(self, response):
                return "correct" if sum(map(ord, response)) % 2 == k else "wrong_result"
        torch.manual_seed(3)
        seen = amft.rollout(model, tokenizer, [Even(**vars(deal)) for deal in deals(tasks)], 4, 40)
        out += [seen.success, seen.rewards]
    return out


def ppo_loss(amft, tasks):
    mask, (logps, old, advantages) = holes(generator())
    out = []
    for n_tokens in (None, 17):
        for factor in (1.0, 0.3):
            x = (factor * logps).requires_grad_()
            loss = amft.ppo_loss(x, factor * old, advantages, mask, 0.2, n_tokens)
            out += [loss, torch.autograd.grad(loss, x)[0]]
        x = (0.1 * logps).requires_grad_()
        loss = amft.ppo_loss(x, x.detach(), advantages, mask, 0.2, n_tokens)
        out += [loss, torch.autograd.grad(loss, x)[0]]
    return out


def sft_loss(amft, tasks):
    mask, (logps, *_) = holes(generator())
    return [amft.sft_loss(logps, mask), amft.sft_loss(logps, mask, 17)]


def group_advantages(amft, tasks):
    g = generator()
    rows = [(torch.rand(6, 4, generator=g) < 0.3).double(), torch.randn(5, 3, generator=g), torch.ones(3, 4)]
    rare = torch.zeros(16, 4)
    rare[3, 1] = 1.0
    return [amft.group_advantages(x) for x in [*rows, rare]]


def gae(amft, tasks):
    mask, (rewards, values, _) = holes(generator())
    return [amft.gae(rewards * mask, values * mask, mask, *how) for how in ((), (0.9, 0.8), (1.0, 0.5))]


def advantages_of(amft, tasks):
    out = []
    for reward in ("graded", "binary"):
        for advantage in ("group", "gae"):
            made, batch, success, graded, _ = world()
            torch.manual_seed(2)
            phi = amft.value_function(made.model, 0.1) if advantage == "gae" else None
            rollouts = amft.Rollouts([], batch, success, graded, 0.0, 0.0)
            config = amft.Config(device="cpu", reward=reward, advantage=advantage, samples=4)
            out += [amft.advantages_of(made.model, phi, rollouts, config)]
            out += [list(phi.parameters())] if phi else []
    return out


def loss_gradient(amft, tasks):
    made, batch, _, _, g = world()
    used = batch.response_mask * torch.randn(batch.response_mask.shape, generator=g)
    used[3] = 0.0
    return [amft.loss_gradient(made.model, batch, used, lambda logps, rows: (logps * used[rows]).sum(),
                               amft.Config(device="cpu", micro_tokens=n)) for n in (4096, 25)]


def rl_gradient(amft, tasks):
    made, batch, _, _, g = world()
    mask = batch.response_mask
    values = torch.randn(mask.shape, generator=g) * mask
    values[2] = 0.0
    old = -torch.rand(mask.shape, generator=g)
    advantages = amft.Advantages(values, 0.5)
    return [amft.rl_gradient(made.model, batch, advantages, amft.Config(device="cpu", micro_tokens=n), x)
            for n in (4096, 25) for x in (None, old)]


def sft_gradient(amft, tasks):
    def alike(logps, rows):
        return torch.ones_like(logps)

    def rectified(logps, rows):
        return logps.exp()
    made, batch, *_ = world()
    return [amft.sft_gradient(made.model, batch, amft.Config(device="cpu", micro_tokens=n), weights)
            for n in (4096, 25) for weights in (alike, rectified)]


def adamw_step(amft, tasks):
    return steps({}, amft) + steps(dict(max_norm=0.3, weight_decay=0.1), amft)


def step_sensitivity(amft, tasks):
    g, out = generator(), []
    theta, g_rl, g_sft, m = torch.randn(4, 40, generator=g)
    v, last = torch.rand(40, generator=g), list(torch.randn(3, 40, generator=g))
    for state in (amft.AdamState(m, v, 7), amft.AdamState(m, v, 30)):
        for mu, before, trace, norm in ((0.3, None, 0.0, 1e9), (0.6, last, 0.7, 1.0), (0.9, last, 0.98, 1e9)):
            out += amft.step_sensitivity(theta, g_rl, g_sft, mu, state, before, trace, lr=0.1, max_norm=norm)
    return out


def meta_gradient(amft, tasks):
    made, batch, success, graded, g = world()
    tangent = torch.randn(made.start.shape, generator=g)
    out = []
    for temperature in (1.0, 0.7):
        rollouts = amft.Rollouts([], batch, success, graded, 0.0, 0.0)
        out += [amft.meta_gradient(made.model, tangent, rollouts, amft.Config(device="cpu", temperature=temperature))]
    return out


def own_meta_gradient(amft, tasks):
    made, batch, _, _, g = world()
    a, b = torch.randn(2, 40, generator=g)
    return [amft.own_meta_gradient(a, b, batch, 0.4), amft.own_meta_gradient(a, -b, batch, 1.3)]


def update_mu(amft, tasks):
    out = []
    for controller in ("evidence", "paper"):
        config = amft.Config(device="cpu", controller=controller, eta_mu=0.1, eta_h=0.5, mu_min=0.1, mu_max=0.9, mu=0.4)
        for mu, h, target, estimates in (
                (0.5, 1.0, 1.2, []), (0.5, 1.0, 1.2, [(-3.0, 1.0)]), (0.5, 0.0, 9.0, []), (0.5, 9.0, 0.0, []), (0.85, 1.0, 1.0, [(50.0, 1.0)]),
                (0.5, 1.0, 1.0, [(3.0, 1.0), (-4.0, 2.0)]), (0.5, 1.0, 1.0, [(0.0, 0.0)]), (0.3, 1.0, 1.3, [(0.3, 0.5), (0.0, 0.0)])):
            for evidence in ((0.0, 0.0), (2.0, 8.0), (-1.5, 0.5)):
                out.append(amft.update_mu(mu, h, target, estimates, evidence, config))
                out.append(amft.update_mu(mu, h, target, estimates, evidence, config, memory=0.5))
    return out


def grade(amft, tasks):
    deal, out = deals(tasks, 1)[0], []
    a, b = deal.numbers[:2]
    deals_ = [deal, tasks.Deal(("8", "4", "3", "A"), deal.stated, (8, 4, 3, 1), "8*(4-1)*..."), tasks.Deal(
        ("4", "8", "2", "J"), deal.stated, (4, 8, 2, 10), "")]
    formulas = ["8*4-8*1", "8*(4-1)", "8*3*(4-3)", "(8-4-1)*8", "8*3/(4-3)", "8*3*1", "8*4-8", "4*8-10+2=24", "4*8-10+2", "4*8-10+2=25",
                "4*8-10+2=2", "4*8-10+2= 24 ", "4*8-10+2=", "4*8-10+2=244", "4*8+10-2", "10+8+4+2", "10+8+4+2=24", "8+8+8", "8+8+4+4", "(8+4)*2",
                "10*8/4+2", "(10+2)*8/4", "(10-8)*4*2", "10/2*4+8", "8*(10-2)/4", "10*4-8*2", "4*2*(10-8)", "10*(4+8)/2", "8/(4-2-2)", "4*(8-2)=24=24",
                "2 4", "1 0+8+4+2", "4*8-1 0+2=24", "4*8-10+2=24=24", "8*4-10+1+1", "8*4*3*1", "8*3+4*1-4", "8*3-4+3+1", "8*3*4/4", "4*(3+8)-10*2",
                "4*8*(10-2)", "8*10-4*2", "4*8-2*10", "(8+4)*10/2", "10+4*8/2", "3*(8+1)-4", "8*4-3-1", "(8+4)*(3-1)", "8*(4-3)*1", "8*(4-1)+3*0",
                "5+6+6+8", "8+10+2+5", "8+1+1+14", "3+4+8+9", "(8*3)/(4-3)", "4*8-3-4", "8*3+1*4-4"]
    formulas += [f"{a}*{b}-1-2", f"{a}*{b}-(2-1)", f"{a}+{b}+2+1", f"{a}*{b}+1-2"]
    for deal in deals_:
        for formula in formulas:
            out.append(deal.grade(json.dumps(dict(formula=formula))))
    return out + [deal.grade("x"), deal.grade('{"formula": 3}')]


def parse(amft, tasks):
    return [tasks.parse(text) for text in ("8-3-2", "2*3-4/2", "(9-4)/2", "7-(2-5)*3", "9/3/3", "1/(2-2)", "5")]


def values_of(amft, tasks):
    return [tasks.values_of(tasks.RANKS, rule) for rule in (tasks.RULE_10, tasks.RULE_11_12_13)]


def encode_demos(amft, tasks):
    model, tokenizer = base(amft, tasks)
    rng, out = random.Random(1), []
    for name in ("gp", "gp-turns"):
        episodes = [tasks.TASKS[name]().sample("train", rng) for _ in range(6)]
        batch = amft.encode_demos(model, tokenizer, episodes)
        out += [batch.input_ids, batch.attention_mask, batch.response_mask]
    return out


def dealt(amft, tasks):
    task, rng = tasks.GeneralPoints(), random.Random(1)
    return [[d.formula, d.numbers] for d in (task.sample("train", rng) for _ in range(30))]


def interval(amft, tasks):
    rng = random.Random(1)
    return [tasks.interval([(rng.random() < p, rng.randrange(units)) for _ in range(60)]) for p in (0.2, 0.7) for units in (5, 40)]


def run(amft, tasks):
    """The log of short runs of the whole algorithm, evaluations left out."""
    out = []
    amft.evaluate = lambda model, tokenizer, task, config, split, temperature, samples: dict(
        split=split, n=1, samples=1, success=0.0, low=0.0, high=1.0, any=0.0, hits=[0], outcomes={})
    tasks.GeneralPoints.defaults = {}
    grade = tasks.Deal.grade
    tasks.Deal.grade = lambda self, text: "correct" if sum(map(ord, text)) % 2 else "no_answer"  # so that RL learns
    try:
        for flags in ("--imitation rectified --advantage group --meta-every 3 --eta-mu 0.2 --steps 6 --warmup 1",
                      "--ppo-epochs 2 --meta-every 2 --trace 0.5 --steps 4 --warmup 1"):
            out += log(amft, f"--task gp --demos 40 --prompts 4 --samples 4 --sft-batch 8 --lr 1e-3 --eta-h 0.1 --max-new-tokens 34 {flags}")
    finally:
        tasks.Deal.grade = grade
    return out


def log(amft, flags):
    """Rows of the log of `amft.py FLAGS`, without times."""
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        amft.main([*flags.split(), "--device", "cpu", "--out", str(Path(folder) / "run")])
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if row["kind"] in ("step", "eval")]


def of(rule):
    """The probe of a rule: the one that it names, or its function's."""
    name = rule.probe or rule.where.split(":")[1].split(".")[-1]
    name = {"chain": "parse", "adamw": "adamw_step"}.get(name, name)
    return globals()[name]


def main():
    """For a try: the probe's values of the files in a folder."""
    import sys
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder")
    parser.add_argument("probe")
    given = parser.parse_args()
    sys.path[:0] = [given.folder, str(HERE.parent)]
    import amft
    import tasks
    print(flat(globals()[given.probe](amft, tasks)))


if __name__ == "__main__":
    main()
