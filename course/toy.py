"""A world small enough to enumerate: what Eqs. 4-6 do, with U exact. Seconds to a minute on one core.

    python toy.py bias       # question 1: advantages divided by their prompt's own deviation
    python toy.py shift      # question 2: adding 5 to all rewards
    python toy.py adam       # question 3: the step that is taken, and the step of Eq. 5
    python toy.py signal     # question 4: what one meta-gradient tells
    python toy.py lam        # question 5: lambda below 1
    python toy.py starts     # question 6: where mu goes, and whether it pays; a minute
    python toy.py --plot     # the meta-gradient in one picture: meta-gradient.png beside this file

--student ID draws a world of one's own, --short makes less of it. The algorithm is amft.py's own: Batch, Rollouts,
adamw_step, step_sensitivity, meta_gradient, update_mu and so on; what is enumerated here shares nothing with it.

Shapes: X prompts of 3 tokens, V tokens, responses of exactly T = 2 tokens, Y = V * V of them; D width, N parameters.
"""

import argparse
import hashlib
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE if (HERE / "amft.py").exists() else HERE.parent))
import amft  # noqa: E402

X, V, T, D = 4, 5, 2, 8
RESPONSES = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (Y, T)
EXPERT = 0.75  # share of its demonstrations that are right


class Policy(torch.nn.Module):
    """As much of a causal language model as amft.py asks for: each (place, token) adds a vector to the state."""
    config, device = SimpleNamespace(), torch.device("cpu")
    dtype = property(lambda self: self.table.dtype)

    def __init__(self, generator):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3 + T, V, D, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(D, V, generator=generator) * 0.7)

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.table[0])

    def forward(self, input_ids, logits_to_keep=slice(None), **_):
        words = self.table[torch.arange(input_ids.shape[1]), input_ids]  # (B, S, D)
        states = words.cumsum(1).tanh()
        return SimpleNamespace(logits=(states @ self.head)[:, logits_to_keep], hidden_states=(words, states))


class World:
    """Prompts, which responses are right, an expert, a policy. Everything follows from the student's id."""

    def __init__(self, student=""):
        torch.set_default_dtype(torch.float64)  # finite differences need it
        digest = hashlib.sha256(f"toy {student}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.name = digest.hex()[:6]
        self.prompts = torch.randint(V, (X, 3), generator=self.generator)
        # From hard to easy: of the 25 responses to a prompt 3, 6, 9 and 12 are right.
        order = torch.rand(X, V * V, generator=self.generator).argsort(1)
        self.right = (order < torch.tensor([3, 6, 9, 12]).unsqueeze(1)).double()  # (X, Y)
        # The expert's answers: one right and one wrong response to each prompt.
        self.expert = torch.stack([order.argmin(1), order.argmax(1)], 1)  # (X, 2)
        self.model = Policy(self.generator)
        self.start = amft.flatten(self.model)

    # --- exact, by enumeration: plain functions of theta (N,)

    def token_logps(self, theta):
        """log pi of each token of each response (X, Y, T), by the chain rule."""
        table, head = theta.split([self.model.table.numel(), self.model.head.numel()])
        table, head = table.view(3 + T, V, D), head.view(D, V)
        prompt = sum(table[place][self.prompts[:, place]] for place in range(3))  # (X, D)
        first = (prompt.tanh() @ head).log_softmax(-1)  # (X, V)
        second = ((prompt.unsqueeze(1) + table[3]).tanh() @ head).log_softmax(-1)  # (X, V, V)
        return torch.stack([first.unsqueeze(2).expand(X, V, V), second], -1).flatten(1, 2)

    def probabilities(self, theta):  # (X, Y)
        return self.token_logps(theta).sum(-1).exp()

    def utility(self, theta):  # Eq. 4
        return (self.probabilities(theta) * self.right).sum() / X

    def utility_gradient(self, theta):  # (N,)
        return torch.func.grad(self.utility)(theta)

    def scores(self, theta, tangent):
        """<grad log pi(y|x), tangent> of each response (X, Y)."""
        return torch.func.jvp(lambda theta: self.token_logps(theta).sum(-1), (theta,), (tangent,))[1]

    # --- sampled, for amft's own functions

    def batch(self, which, said):
        """Batch of responses `said` (B,) to prompts `which` (B,)."""
        ids = torch.cat([self.prompts[which], RESPONSES[said]], 1)
        return amft.Batch(ids, torch.ones_like(ids), torch.ones(len(ids), T), [[]] * len(ids))

    def draw(self, theta, P, G):
        """(prompts (P,), responses (P, G)) that the policy samples."""
        which = torch.randint(X, (P,), generator=self.generator)
        return which, torch.multinomial(self.probabilities(theta)[which], G, True, generator=self.generator)

    def rollouts(self, theta, P, G):
        """amft.Rollouts of the policy; leaves theta in the model."""
        amft.set_theta(self.model, theta.clone())
        which, said = self.draw(theta, P, G)
        batch, logps = self.batch(which.repeat_interleave(G), said.flatten()), self.token_logps(theta)
        first = logps[:, ::V, 0]  # (X, V); entropy of both places, in nats a token
        second = logps[..., 1].view(X, V, V)
        entropy = -((first.exp() * first).sum(-1) + (first.exp() * (second.exp() * second).sum(-1)).sum(-1)).mean() / T
        return amft.Rollouts([], batch, self.right[which.unsqueeze(1), said], torch.zeros(P * G, T), entropy.item(), 0.0)

    def demos(self, n):
        which = torch.randint(X, (n,), generator=self.generator)
        wrong = (torch.rand(n, generator=self.generator) > EXPERT).long()
        return self.batch(which, self.expert[which, wrong])

    def gradients(self, theta, config, P=8, G=4):
        """(g_rl, g_sft, rollouts, scale of the advantages) of one step at theta."""
        seen = self.rollouts(theta, P, G)
        advantages = amft.advantages_of(self.model, None, seen, config)
        weights = partial(amft.Method(config).token_weights, None)  # as --imitation says
        return (amft.rl_gradient(self.model, seen.batch, advantages, config)[0],
                amft.sft_gradient(self.model, self.demos(16), config, weights)[0], seen, advantages.scale)

    def mixed_steps(self, n, mu=0.5, lr=0.02):
        """(theta, Adam's state) after n steps on the mixed loss."""
        theta, state = self.start, fresh(self.start)
        for _ in range(n):
            g_rl, g_sft, *_ = self.gradients(theta, settings())
            theta, state = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, lr=lr)
        return theta, state

    def look_ahead(self, steps=10, mu=0.5, lr=0.05):
        """(theta', d theta'/d mu) of one more step."""
        theta, state = self.mixed_steps(steps)
        g_rl, g_sft, *_ = self.gradients(theta, settings())
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, lr=lr)[0]
        return amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, lr=lr)[0], tangent


def fresh(theta):
    return amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)


def settings(**changed):
    return amft.Config(**{**dict(device="cpu", advantage="group", imitation="nll"), **changed})


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


def interval(values):
    """(mean, half the 95% interval) of independent values, by Student's t."""
    t = {4: 2.776, 8: 2.306, 12: 2.179, 16: 2.120}
    values, n = torch.as_tensor(values), len(values)
    quantile = next((q for df, q in t.items() if n - 1 <= df), 1.96) if n > 4 else 12.7 if n == 2 else 4.303 if n == 3 else 3.182
    return values.mean().item(), quantile * values.std().item() / math.sqrt(n)


# --- The questions. Each returns what it prints: {heading: figure} ---


def own_deviation(rewards):
    """((r - its prompt's mean) / its prompt's standard deviation, 1): the common normaliser. (P, G) -> (P, G), 1."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6), 1.0


def bias(world, short=False):
    """Exact expectation of the meta-gradient over all samples of G, as a ratio to the truth."""
    theta, tangent = world.look_ahead()
    p, scores = world.probabilities(theta), world.scores(theta, tangent)
    hit = (p * world.right).sum(1)  # (X,): success of each prompt
    high = (p * world.right * scores).sum(1) / hit  # mean score of a right response, of a wrong one
    low = (p * (1 - world.right) * scores).sum(1) / (1 - hit)
    truth, out = (world.utility_gradient(theta) @ tangent).item(), {}
    print("success of each prompt:", *(f"{x:.3f}" for x in hit.tolist()), f"  dU/dmu exactly: {truth:.3e}")
    print("its share in dU/dmu:   ", *(f"{x:.3f}" for x in ((high - low) * hit * (1 - hit) / X / truth).tolist()))
    for name, rule in (("amft.group_advantages", amft.group_advantages), ("own_deviation", own_deviation)):
        for G in (2, 4, 8, 16):
            expected = 0.0
            for k in range(1, G):  # right ones among the G; at 0 and G all advantages are 0
                advantages, scale = rule(torch.tensor([[1.0] * k + [0.0] * (G - k)]))
                chance = math.comb(G, k) * hit ** k * (1 - hit) ** (G - k)
                slope = (k * advantages[0, 0] * high + (G - k) * advantages[0, -1] * low) * scale / G
                expected += (chance * slope).sum().item() / X
            out[name, G] = expected / truth
            print(f"{name:24} G {G:2}  expected estimate / truth {expected / truth:7.4f}")
    return out


def shift(world, short=False, P=12, G=4):
    """Spread of the estimate when a constant is added to every reward."""
    theta, tangent = world.look_ahead()
    scores, truth = world.scores(theta, tangent), (world.utility_gradient(theta) @ tangent).item()
    which, said = world.draw(theta, P, G)
    rollouts = amft.Rollouts([], world.batch(which.repeat_interleave(G), said.flatten()),
                             world.right[which.unsqueeze(1), said], None, 0.0, 0.0)
    amft.set_theta(world.model, theta.clone())
    own = amft.meta_gradient(world.model, tangent, rollouts, settings())[0]
    advantages, scale = amft.group_advantages(rollouts.success)
    here = (advantages * scale * scores[which.unsqueeze(1), said]).mean().item()
    print(f"dU/dmu exactly: {truth:.3e}; one estimate by amft.meta_gradient {own:.6e}, by the table of scores {here:.6e}")
    names = ("others of the prompt", "none")
    repetitions, found, out = 500 if short else 4000, {}, {}
    for _ in range(repetitions):
        which, said = world.draw(theta, P, G)
        score, success = scores[which.unsqueeze(1), said], world.right[which.unsqueeze(1), said]
        for c in (0.0, 5.0):
            advantages, scale = amft.group_advantages(success + c)
            for name, weight in zip(names, (advantages * scale, success + c)):
                found.setdefault((name, c), []).append((weight * score).mean())
    for (name, c), values in found.items():
        values = torch.stack(values)
        out[name, c] = values.std().item()
        print(f"baseline: {name:21} rewards + {c:.0f}:  mean {values.mean():9.2e} +- "
              f"{values.std() / math.sqrt(repetitions):.1e}   sd of one estimate {values.std():.2e}")
    return out


def adam(world, short=False):
    """Cosine of d theta'/d mu through the step that is taken with that of plain SGD, -lr (g_SFT - g_RL)."""
    out, counts = {}, (0, 1, 2, 5, 10, 30)
    for history in ("noise", "own"):
        theta, state = world.start, fresh(world.start)
        for step in range(max(counts) + 1):
            g_rl, g_sft, *_ = world.gradients(theta, settings())
            if step in counts:
                tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.02, max_norm=1e9)[0]
                out[history, step] = cosine(tangent, g_rl - g_sft)
                print(f"history: {history:6} after {step:2} steps  cosine {out[history, step]:5.2f}   "
                      f"|d theta'/d mu| {tangent.norm():.1e}")
            if history == "noise":  # each entry's gradient of one size, as if all parameters mattered alike
                g = torch.randn(len(theta), generator=world.generator)
                state = amft.adamw_step(theta, g, state, lr=0.02, max_norm=1e9)[1]
            else:
                theta, state = amft.adamw_step(theta, (g_rl + g_sft) / 2, state, lr=0.02, max_norm=1e9)
    return out


def signal(world, short=False, G=4):
    """Single estimates by amft.meta_gradient against the exact dU/dmu."""
    theta, tangent = world.look_ahead()
    truth, out = (world.utility_gradient(theta) @ tangent).item(), {}
    print(f"dU/dmu exactly: {truth:.3e}")
    for P in (8, 32) if short else (8, 32, 128):
        repetitions = 60 if short else 100 if P > 32 else 200
        pairs = [amft.meta_gradient(world.model, tangent, world.rollouts(theta, P, G), settings())
                 for _ in range(repetitions)]
        slopes, errors = torch.tensor(pairs).T
        sd = slopes.std().item()
        right = ((slopes * truth) > 0).double().mean().item()
        inside = ((slopes - truth).abs() <= 1.96 * errors).double().mean().item()
        needed = P * G * (1.96 * sd / truth) ** 2
        out[P] = dict(ratio=abs(truth) / sd, sign=right, inside=inside, needed=needed, se=errors.mean().item() / sd)
        print(f"P {P:3}, G {G}: sd of an estimate {sd:.2e}  |truth| / sd {abs(truth) / sd:4.2f}  right sign "
              f"{100 * right:3.0f}%  mean reported error / sd {errors.mean() / sd:.2f}  95% interval holds the truth "
              f"{100 * inside:3.0f}%  samples for 1.96 sd {needed:8.0f}")
    return out


def lam(world, short=False):
    """Expectation, over all prompts and responses, of what own_meta_gradient estimates when advantages are GAE's."""
    theta, tangent = world.look_ahead()
    amft.set_theta(world.model, theta.clone())
    torch.manual_seed(int(world.name, 16))
    phi = amft.value_function(world.model)  # knows nothing yet
    p = world.probabilities(theta).flatten()
    which, said = torch.arange(X).repeat_interleave(V * V), torch.arange(V * V).repeat(X)
    batch = world.batch(which, said)
    with torch.no_grad():
        _, states = amft.response_outputs(world.model, batch, hidden=True)
        values = 3 * phi(states)  # (X * Y, T)
    slopes = torch.func.jvp(world.token_logps, (theta,), (tangent,))[1].flatten(0, 1)  # of each token
    truth, out = (world.utility_gradient(theta) @ tangent).item(), {}
    print(f"dU/dmu exactly: {truth:.3e}; of rewards that are all 1: 0")
    for lambda_ in (1.0, 0.95, 0.8, 0.5, 0.0):
        for name, reward in (("the world's", world.right), ("all 1", torch.ones(X, V * V))):
            paid = torch.stack([torch.zeros(X * V * V), reward.flatten()], 1)
            advantages, _ = amft.gae(paid, values, batch.response_mask, lam=lambda_)
            expected = (p.unsqueeze(1) * advantages * slopes).sum().item() / X
            exact = truth if name != "all 1" else 0.0
            out[name, lambda_] = (expected - exact) / abs(truth)
            print(f"lambda {lambda_:.2f}  rewards {name:12} expected estimate {expected:10.3e}   bias "
                  f"{100 * out[name, lambda_]:7.1f}% of |dU/dmu|")
    return out


class Row(NamedTuple):
    """A step of Algorithm 1, as its log has it."""
    t: int  # from 1
    theta: torch.Tensor  # (N,), before the step
    g_rl: torch.Tensor  # (N,), of Eq. 1
    g_sft: torch.Tensor  # (N,), of Eq. 2
    mu: float  # that the step was taken with
    entropy: float  # of the step's samples
    scale: float  # of their advantages
    estimates: list  # the step's new pairs (dU/dmu, its standard error)
    evidence: tuple  # after them


def learn(world, seed, config, steps, lr=0.02):
    """Algorithm 1 in this world: (its log, a list with a Row for each step; theta after the last step)."""
    world.generator.manual_seed(seed)
    theta, state = world.start, fresh(world.start)
    mu, evidence, target, sensitivity, log = config.mu, (0.0, 0.0), None, None, []
    for t in range(1, steps + 1):
        g_rl, g_sft, seen, scale = world.gradients(theta, config)
        estimates = []
        if t > config.warmup:
            target = seen.entropy if target is None else target
            if sensitivity and config.eta_mu:
                estimates.append(amft.own_meta_gradient(g_rl, sensitivity[0], seen.batch, scale))
                if (t - config.warmup) % config.meta_every == 0:
                    val = world.rollouts(theta, 8, 4)
                    estimates.append(amft.meta_gradient(world.model, sensitivity[0], val, config))
            mu, evidence, _ = amft.update_mu(mu, seen.entropy, target, estimates, evidence, config)
            sensitivity = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, sensitivity, config.trace, lr=lr)
        taken = mu if t > config.warmup else 1.0
        log.append(Row(t, theta, g_rl, g_sft, taken, seen.entropy, scale, estimates, evidence))
        theta, state = amft.adamw_step(theta, (1 - taken) * g_rl + taken * g_sft, state, lr=lr)
    return log, theta


def run(world, seed, mu, controller, steps):
    """(U at the end, mu at each step) of one run: AMFT from mu, or mu fixed."""
    config = settings(eta_mu=0.45 if controller else 0.0, eta_h=0.0, trace=0.9, mu=mu, warmup=0, meta_every=1)
    log, theta = learn(world, seed, config, steps)
    return world.utility(theta).item(), [row.mu for row in log]


def starts(world, short=False):
    """Where mu goes from three starts; then success at the end, paired by seed, AMFT less a fixed mu."""
    steps, seeds, out, ends = (15, 2, {}, {}) if short else (80, 9, {}, {})
    print(f"U at the start {world.utility(world.start):.3f}; {steps} steps, seeds 1 to {seeds}; the expert is right in "
          f"{100 * EXPERT:.0f}% of its demonstrations")
    for controller in (True, False):
        for mu in (0.1, 0.5, 0.9):
            runs = [run(world, seed, mu, controller, steps) for seed in range(1, seeds + 1)]
            ends[controller, mu] = torch.tensor([u for u, _ in runs])
            last = torch.tensor([path[-1] for _, path in runs])
            line = f"{'AMFT from' if controller else 'fixed'} mu {mu}: U at the end {ends[controller, mu].mean():.3f}"
            if controller:
                out["mu", mu] = last.tolist()
                middle = torch.tensor([path[steps // 2] for _, path in runs])
                line += (f"   mu halfway {middle.mean():.2f} [{middle.min():.2f}, {middle.max():.2f}]"
                         f"   at the end {last.mean():.2f} [{last.min():.2f}, {last.max():.2f}]")
            print(line)
    for mu in (0.1, 0.5, 0.9):
        out["paid", mu] = interval(ends[True, 0.5] - ends[False, mu])
        print("AMFT from 0.5 less fixed mu {}: {:+.3f} +- {:.3f}".format(mu, *out["paid", mu]))
    return out


QUESTIONS = dict(bias=bias, shift=shift, adam=adam, signal=signal, lam=lam, starts=starts)


# --- The picture ---


def curve(world, lr=1.0, steps=10):
    """(mu -> theta' of one step from a trained state, mu -> d theta'/d mu there)."""
    theta, state = world.mixed_steps(steps)
    g_rl, g_sft, *_ = world.gradients(theta, settings(), P=64)

    def step(mu):
        return amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, lr=lr)[0]

    def tangent(mu):
        return amft.step_sensitivity(theta, g_rl, g_sft, mu, state, lr=lr)[0]
    return step, tangent


def plot(world, file, at=0.6, P=64, G=8):
    """U(theta'(mu)) by enumeration, Eq. 5's tangent at one mu, and one estimate of it with its standard error."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    step, tangent = curve(world)
    mus = torch.linspace(0, 1, 81)
    us = [world.utility(step(mu)).item() for mu in mus]
    here, direction = step(at), tangent(at)
    u, slope = world.utility(here).item(), (world.utility_gradient(here) @ direction).item()
    estimate, error = amft.meta_gradient(world.model, direction, world.rollouts(here, P, G), settings())
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.plot(mus, us, color="black", label="U(theta'(mu)), by enumeration")
    near = torch.linspace(at - 0.3, at + 0.3, 9)
    axes.plot(near, u + slope * (near - at), "--", color="tab:blue", label=f"Eq. 5, exact: dU/dmu = {slope:.4f}")
    axes.plot(near, u + estimate * (near - at), color="tab:orange",
              label=f"estimate of {P} prompts x {G} samples: {estimate:.4f} ± {error:.4f}")
    low, high = ((u + (estimate + sign * error) * (near - at)) for sign in (-1, 1))
    axes.fill_between(near, torch.minimum(low, high), torch.maximum(low, high), color="tab:orange", alpha=0.25, lw=0)
    axes.plot([at], [u], "o", color="black")
    axes.set(xlabel="mu of the step", ylabel="U, success after the step", title="The meta-gradient")
    span = max(us) - min(us)
    axes.set_ylim(min(us) - 0.15 * span, max(us) + 0.3 * span)
    axes.legend(loc="best", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    print(f"dU/dmu at mu = {at}: exact {slope:.5f}, estimate {estimate:.5f} +- {error:.5f}; wrote {Path(file).name}")
    return slope, estimate, error


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", choices=tuple(QUESTIONS), help="which written question's table")
    parser.add_argument("--student", default="", help="whose world; the handout's figures are of the empty id")
    parser.add_argument("--short", action="store_true", help="fewer repetitions, for a try")
    parser.add_argument("--plot", nargs="?", const=HERE / "meta-gradient.png", help="draw the picture (into this file)")
    given = parser.parse_args(argv)
    if not given.question and not given.plot:
        parser.error("a question or --plot")
    world = World(given.student)
    print(f"world {world.name}")
    if given.question:
        QUESTIONS[given.question](world, given.short)
    if given.plot:
        plot(world, given.plot)


if __name__ == "__main__":
    main()
