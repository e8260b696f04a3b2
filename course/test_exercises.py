"""The tests that grade the exercises. See conftest.py for how to run one exercise's.

Each compares one exercise's function with a reference of its own: a loop over Python numbers, torch's optimiser, a
complex step, a difference quotient, an enumeration. A failure says where, what came and what was expected, and if the
value is a typical mistake's own, which mistake. Every test takes the seed that draws its numbers.
"""

import contextlib
import itertools
import json
import math
import random
import re
import statistics
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

HERE = Path(__file__).resolve().parent
if not {"amft", "tasks"} <= sys.modules.keys():  # the grader has loaded them
    sys.path.insert(0, str(HERE if (HERE / "amft.py").exists() else HERE.parent))
import amft  # noqa: E402
import tasks  # noqa: E402

exercise = pytest.mark.exercise
EXERCISES = tomllib.loads((HERE / "exercises.toml").read_text())["exercise"]
HINTS = {name: text for each in EXERCISES for name, text in each["hints"].items()}

# --- How a test speaks --------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A verdict; its text is what a student reads."""


def fail(text, hint=None):
    __tracebackhide__ = True
    raise Wrong(f"{text}; {HINTS[hint]}" if hint else text)


def near(a, b, rtol, scale):
    return bool(((a - b).abs() <= rtol * scale).all())  # False for nan


def apart(expected, mistakes, margin=1e-3):
    """Does every mistake show with these numbers? If not, a test draws others."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item()
    return scale > 0 and all(not near(torch.as_tensor(wrong, dtype=torch.float64), expected, margin, scale)
                             for wrong in mistakes.values())


def agree(what, actual, expected, mistakes=None, rtol=1e-9, axes=("row", "token"), scale=None):
    """Fail unless `actual` is the tensor `expected`, up to rtol of its largest entry.

    mistakes: {name of a hint: the tensor that this mistake makes, or a list of its forms}, or a function that gives it."""
    __tracebackhide__ = True
    if type(actual) not in (torch.Tensor, torch.nn.Parameter):
        fail(f"{what}: a {type(actual).__name__}, expected a tensor of shape {tuple(expected.shape)}")
    actual = actual.detach()
    if actual.shape != expected.shape:
        fail(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.dtype != expected.dtype:
        fail(f"{what}: {actual.dtype}, expected {expected.dtype} as the arguments have; does a new tensor take their dtype?")
    scale = expected.abs().max().item() if scale is None else scale
    if near(actual, expected, rtol, scale):
        return
    bad = ~((actual - expected).abs() <= rtol * scale)
    place = bad.nonzero()[0].tolist() if expected.dim() else []
    at = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place))
    mistakes = mistakes() if callable(mistakes) else mistakes or {}
    hint = next((name for name, forms in mistakes.items() for wrong in (forms if isinstance(forms, list) else [forms])
                 if wrong.shape == actual.shape and near(actual, wrong, max(rtol, 1e-7), scale)), None)
    got, wanted = actual[tuple(place)].item(), expected[tuple(place)].item()
    digits = 4 if not math.isfinite(got) or abs(got - wanted) > 1e-3 * abs(wanted) else 10
    fail(f"{what}{', ' if at else ''}{at}: {got:.{digits}g}, expected {wanted:.{digits}g}", hint)


def agree_number(what, actual, expected, mistakes=None, rtol=1e-9, scale=None):
    """The same of a Python number."""
    __tracebackhide__ = True
    if type(actual) is not float and type(actual) is not int:
        fail(f"{what}: a {type(actual).__name__}, expected a Python float")
    wrong = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in (mistakes or {}).items()}
    as_tensor = torch.tensor(float(actual), dtype=torch.float64)
    agree(what, as_tensor, torch.tensor(float(expected), dtype=torch.float64), wrong, rtol, (), scale)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def call(function, *args, **kwargs):
    """function's result; its arguments must come back as they were."""
    given = list(tensors_in([*args, *kwargs.values()]))
    before = [tensor.detach().clone() for tensor in given]
    result = function(*args, **kwargs)
    for tensor, copy in zip(given, before):
        if not torch.equal(tensor.detach(), copy):
            fail("an argument was changed in place; work on a new tensor")
    return result


def parts_of(what, result, n, names):
    __tracebackhide__ = True
    if not isinstance(result, tuple) or len(result) != n:
        fail(f"{what}: expected a tuple of {n}, {names}; got a {type(result).__name__}"
             + (f" of {len(result)}" if isinstance(result, (tuple, list)) else ""))
    return result


def gradient_of(what, loss, x, hint):
    """d loss/d x; a loss that does not depend on x is the mistake `hint`."""
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        fail(f"{what}: has no gradient", hint)
    grad, = torch.autograd.grad(loss.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


class Draw:
    """Numbers of a seed, in float64."""

    def __init__(self, *seed):
        self.random = random.Random(" ".join(map(str, seed)))
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def ids(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)

    def size(self, low, high):
        return self.random.randint(low, high)

    def lengths_mask(self, rows, width):
        """(rows, width): each row's response is a run of 1s, none as long as another if that can be."""
        lengths = self.random.sample(range(1, width + 1), min(rows, width))
        lengths += [self.size(1, width) for _ in range(rows - len(lengths))]
        return torch.tensor([[float(t < n) for t in range(width)] for n in lengths], dtype=torch.float64)

    def holes_mask(self, rows, width):
        """(rows, width): turns of the policy (1) and of the environment (0) by turns; each row ends in one of either."""
        rows = [[1.0] + [float(self.random.random() < 0.6) for _ in range(width - 1)] for _ in range(rows)]
        for row in rows:
            row[self.size(1, width - 2)] = 0.0  # the environment speaks within
            if sum(row) < 3:
                row[-1] = row[1] = 1.0
        return torch.tensor(rows, dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- Stand-ins for what an exercise uses of the others: slow, and of use to no one else ----------------------------


@contextlib.contextmanager
def stand_ins(number):
    slow = {7: dict(adamw=adamw_by_loop, adamw_step=adamw_step_by_loop),
            8: dict(token_logps=token_logps_by_loop, group_advantages=group_advantages_by_loop)}.get(number, {})
    true = {name: getattr(amft, name) for name in slow}
    vars(amft).update(slow)
    try:
        yield
    finally:
        vars(amft).update(true)


def token_logps_by_loop(logits, ids):
    return torch.stack([torch.stack([logits[b, t, ids[b, t]] - logits[b, t].logsumexp(0) for t in range(ids.shape[1])])
                        for b in range(ids.shape[0])])


def group_advantages_by_loop(rewards):
    rows = [[r - (sum(row) - r) / (len(row) - 1) for r in row] for row in rewards.tolist()]
    scale = statistics.pstdev(itertools.chain(*rows))
    if scale <= 1e-6:
        return torch.zeros_like(rewards), 1.0
    return torch.tensor(rows, dtype=rewards.dtype) / scale, scale


def adamw_by_loop(theta, grad, m, v, norm, step, lr, max_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    return tuple(map(torch.stack, step_by_loop(theta.unbind(), grad.unbind(), m.unbind(), v.unbind(), step - 1, lr, max_norm,
                                               weight_decay, b1, b2, eps, norm)))


def adamw_step_by_loop(theta, grad, state, **how):
    theta, m, v = adamw_by_loop(theta, grad, state.m, state.v, grad.norm(), state.step + 1, **how)
    return theta, amft.AdamState(m, v, state.step + 1)


# --- 1: token_logps -----------------------------------------------------------------------------------------------


def logsumexp(row):
    return (top := max(row)) + math.log(math.fsum(math.exp(x - top) for x in row))


def logp_rows(logits, ids):
    return tensor([[row[i] - logsumexp(row) for row, i in zip(rows, chosen)]
                   for rows, chosen in zip(logits.tolist(), ids.tolist())])


def drawn_logits(seed, size):
    draw = Draw("token_logps", seed)
    B, T, V = draw.size(2, 4), draw.size(3, 5), draw.size(5, 8)
    return draw, size * draw.normal(B, T, V), draw.ids(V, B, T)


@exercise(1)
def test_token_logps_values(seed):
    """A softmax over another axis, another token's value, a probability in place of its logarithm."""
    _, logits, ids = drawn_logits(seed, 2.0)
    expected = logp_rows(logits, ids)
    def mistakes():
        chosen = torch.nn.functional.one_hot(ids, logits.shape[-1]).double()
        return dict(probability=expected.exp(), raw_logit=(logits * chosen).sum(-1), negated=-expected,
                    wrong_axis=[((logits - logits.logsumexp(axis, keepdim=True)) * chosen).sum(-1) for axis in (0, 1)],
                    shifted_ids=[logp_rows(logits, ids.roll(shift, 1)) for shift in (-1, 1)],
                    likeliest=logp_rows(logits, logits.argmax(-1)))
    agree("token_logps", call(amft.token_logps, logits, ids), expected, mistakes)


@exercise(1)
def test_token_logps_of_improbable_tokens(seed):
    """Tokens whose probability is below the smallest float have a log-probability all the same."""
    _, logits, _ = drawn_logits(seed, 400.0)
    logits, ids = logits.float(), logits.argmin(-1)
    expected = logp_rows(logits, ids).float()
    actual = call(amft.token_logps, logits, ids)
    if isinstance(actual, torch.Tensor) and actual.shape == ids.shape and (
            not actual.isfinite().all() or len(actual.unique()) == 1 < len(expected.unique())):
        got, wanted = actual[0, 0].item(), expected[0, 0].item()
        fail(f"token_logps of improbable tokens, row 0, token 0: {got:.4g}, expected {wanted:.4g}", "log_of_softmax")
    agree("token_logps of improbable tokens", actual, expected, rtol=1e-5)


@exercise(1)
def test_token_logps_gradient(seed):
    """Of sum w logp: w (1[v = id] - p_v) at each logit."""
    draw, logits, ids = drawn_logits(seed, 2.0)
    weights = draw.normal(*ids.shape)
    logits.requires_grad_()
    logps = call(amft.token_logps, logits, ids)
    if not isinstance(logps, torch.Tensor) or logps.shape != ids.shape:
        fail(f"token_logps: expected a tensor of shape {tuple(ids.shape)}")
    actual = gradient_of("token_logps", logps * weights, logits, "no_gradient")
    expected = tensor([[[w * ((v == i) - math.exp(x - logsumexp(row))) for v, x in enumerate(row)]
                        for row, i, w in zip(rows, chosen, ws)]
                       for rows, chosen, ws in zip(logits.tolist(), ids.tolist(), weights.tolist())])
    agree("gradient of token_logps", actual, expected, axes=("row", "token", "logit"))


# --- 2: sft_loss and implicit_reward ------------------------------------------------------------------------------


def masked(seed, name):
    draw = Draw(name, seed)
    B, T = draw.size(3, 5), draw.size(4, 7)
    mask = draw.lengths_mask(B, T)
    return draw, -draw.normal(B, T).abs() - 0.1, mask


def pairs(values, mask):
    """[[value of each token on the mask] of each row]"""
    return [[x for x, on in zip(xs, ons) if on] for xs, ons in zip(values.tolist(), mask.tolist())]


@exercise(2)
def test_sft_loss_values(seed):
    """Another divisor than the mask's tokens, tokens off the mask, the wrong sign; and no gradient."""
    draw, logps, mask = masked(seed, "sft_loss")
    kept, every = pairs(logps, mask), logps.flatten().tolist()
    count, total = sum(map(len, kept)), math.fsum(map(math.fsum, kept))
    wrong = dict(sft_all_positions=-total / len(every), sft_row_means=-statistics.mean(map(statistics.mean, kept)),
                 sft_no_mask=-math.fsum(every) / count, sft_sign=total / count, sft_sum=-total,
                 sft_per_sequence=-total / len(kept))
    wrong = {name: tensor(value) for name, value in wrong.items()}
    wrong["sft_no_mask"] = [wrong["sft_no_mask"], tensor(-math.fsum(every) / len(every))]
    agree("sft_loss", call(amft.sft_loss, logps, mask), tensor(-total / count), wrong)
    logps.requires_grad_()
    grad = gradient_of("sft_loss", amft.sft_loss(logps, mask), logps, "sft_sum")
    agree("gradient of sft_loss", grad, -mask / count)


@exercise(2)
def test_sft_loss_of_parts_adds_up(seed):
    """Micro-batches that are each divided by their own number of tokens."""
    draw, logps, mask = masked(seed, "parts of sft_loss")
    kept, cut = pairs(logps, mask), draw.size(1, len(logps) - 1)
    count = sum(map(len, kept))
    for n_tokens in (count, mask.sum(), count + 7):
        for rows in (slice(cut), slice(cut, None)):
            total, own = -math.fsum(map(math.fsum, kept[rows])), sum(map(len, kept[rows]))
            agree(f"sft_loss of {own} tokens with n_tokens={int(n_tokens)}",
                  call(amft.sft_loss, logps[rows], mask[rows], n_tokens), tensor(total / int(n_tokens)),
                  {"sft_ignores_tokens": tensor(total / own)})


@exercise(2)
def test_implicit_reward_values(seed):
    """A mean over tokens, tokens off the mask, no reference, no beta."""
    draw, logps, mask = masked(seed, "implicit_reward")
    reference, beta = -draw.normal(*logps.shape).abs() - 0.1, draw.random.uniform(0.2, 0.7)
    ratios = pairs(logps - reference, mask)
    expected = tensor([beta * math.fsum(row) for row in ratios])
    def mistakes():
        return dict(reward_no_beta=expected / beta, reward_mean=expected / mask.sum(1), reward_sign=-expected,
                    reward_no_reference=tensor([beta * math.fsum(row) for row in pairs(logps, mask)]),
                    reward_no_mask=tensor([beta * math.fsum(row) for row in (logps - reference).tolist()]))
    agree("implicit_reward", call(amft.implicit_reward, logps, reference, mask, beta), expected, mistakes, axes=("row",))
    agree("implicit_reward at beta's default", call(amft.implicit_reward, logps, reference, mask), expected / beta,
          axes=("row",))


# --- 3: group_advantages ------------------------------------------------------------------------------------------


def differences(rows):
    return [[r - (math.fsum(row) - r) / (len(row) - 1) for r in row] for row in rows]


@exercise(3)
def test_group_advantages_values(seed):
    """Another baseline than the mean of a prompt's other samples, another scale than one for all."""
    draw = Draw("group_advantages", seed)
    P, G = draw.size(3, 5), draw.size(3, 6)
    rewards = draw.normal(P, G) + 2 * draw.normal(P, 1)
    rows = rewards.tolist()
    true = differences(rows)
    flat = list(itertools.chain(*true))
    scale = statistics.pstdev(flat)
    expected = tensor(true) / scale
    own = [[r - statistics.mean(row) for r in row] for row in rows]
    every = list(itertools.chain(*rows))
    grand = [[r - statistics.mean(every) for r in row] for row in rows]
    advantages, actual_scale = parts_of("group_advantages", call(amft.group_advantages, rewards), 2, "advantages and scale")
    agree("advantages", advantages, expected, lambda: dict(
        batch_mean=tensor(grand) / statistics.pstdev(itertools.chain(*grand)), not_scaled=[tensor(true), tensor(own)],
        group_std=[tensor([[x / deviation(row) for x in row] for row in form]) for form in (true, own)
                   for deviation in (statistics.pstdev, statistics.stdev)],
        sample_std=tensor(true) / statistics.stdev(flat), own_mean=tensor(own) / scale,
        scale_of_rewards=[tensor(form) / deviation(every) for form in (true, own)
                          for deviation in (statistics.pstdev, statistics.stdev)]), axes=("prompt", "sample"))
    agree_number("scale", actual_scale, scale, dict(
        own_mean=statistics.pstdev(itertools.chain(*own)), sample_std=statistics.stdev(flat), not_scaled=1.0,
        scale_of_rewards=statistics.pstdev(every)))


@exercise(3)
def test_group_advantages_without_a_signal(seed):
    """Each prompt's samples all alike: there is nothing to learn, whatever the prompts are to each other."""
    draw = Draw("no signal", seed)
    P, G = draw.size(3, 5), draw.size(2, 6)
    for rewards in (torch.ones(P, G).double(), torch.zeros(P, G), draw.normal(P, 1).expand(P, G).clone(),
                    torch.full((P, G), 0.1)):
        advantages, scale = parts_of("group_advantages", call(amft.group_advantages, rewards), 2, "advantages and scale")
        hint = "division_by_nothing" if isinstance(advantages, torch.Tensor) and not advantages.isfinite().all() else None
        if hint:
            fail("without a signal: advantages are not finite", hint)
        grand = rewards - rewards.mean()
        agree("advantages without a signal", advantages, torch.zeros_like(rewards), dict(batch_mean=grand / grand.std(correction=0)),
              scale=1.0, rtol=0.0, axes=("prompt", "sample"))
        agree_number("scale without a signal", scale, 1.0)


# --- 4: gae -------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k} over a row's own tokens, which are taken out of the row first."""
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        own = [t for t in range(values.shape[1]) if mask[b, t] > 0]
        r, v = ([x[b, t].item() for t in own] for x in (rewards, values))
        delta = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(own))]
        for i, t in enumerate(own):
            advantages[b, t] = math.fsum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return advantages


def gae_backwards(rewards, values, mask, gamma, lam, wrong):
    """A column at a time, with one mistake."""
    B, T = values.shape
    advantages = torch.zeros_like(values)
    for b in range(B):
        own = [t for t in range(T) if mask[b, t] > 0]
        running, following, last = 0.0, values[b, -1].item() if wrong == "bootstrapped_column" else 0.0, True
        for t in reversed(range(T)):
            value = values[b, t].item()
            if not mask[b, t] and wrong not in ("environment_counts", "environment_decays"):
                following = value if wrong == "environment_follows" else following
                continue
            if wrong == "bootstrapped" and last:
                following = value
            last = False
            delta = rewards[b, t].item() + (1.0 if wrong == "no_gamma" else gamma) * following
            delta -= 0.0 if wrong == "no_baseline" else value
            factor = dict(no_lam=gamma, lam_without_gamma=lam, one_delta=0.0).get(wrong, gamma * lam)
            if wrong == "environment_decays" and not mask[b, t]:
                running *= factor
                continue
            running = delta + factor * running
            following = value
            advantages[b, t] = running
    return advantages


GAE_MISTAKES = ("environment_counts", "environment_decays", "environment_follows", "bootstrapped", "bootstrapped_column", "no_gamma", "no_lam",
                "lam_without_gamma", "one_delta", "no_baseline")


def drawn_episodes(seed, name, whole=False):
    draw = Draw(name, seed)
    B, T = draw.size(3, 5), draw.size(5, 8)
    mask = torch.ones(B, T, dtype=torch.float64) if whole else draw.holes_mask(B, T)
    return draw, draw.normal(B, T) * mask, draw.normal(B, T), mask


def check_gae(what, rewards, values, mask, gamma, lam, how):
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    result = parts_of("gae", call(amft.gae, rewards, values, mask, **how), 2, "advantages and returns")
    def mistakes():
        found = {}
        for name in GAE_MISTAKES:
            wrong = gae_backwards(rewards, values, mask, gamma, lam, name)
            name = {"environment": "environment_counts", "bootstrapped": "bootstrapped"}.get(name.split("_")[0], name)
            found.setdefault(name, []).extend([wrong * mask, wrong])
        if result[0].shape == mask.shape and near(result[0].detach() * mask, expected, 1e-7, expected.abs().max().item()):
            found["unmasked"] = result[0].detach()
        return found
    agree(f"advantages{what}", result[0], expected, mistakes)
    returns = (expected + values) * mask
    agree(f"returns{what}", result[1], returns, lambda: dict(
        returns_are_advantages=expected, unmasked=expected + values,
        returns_are_rewards=gae_backwards(rewards, values, mask, gamma, 1.0, "no_baseline") if gamma == 1 else
        gae_by_definition(rewards, 0 * values, mask, gamma, 1.0)))


@exercise(4)
def test_gae_values(seed):
    """Credit that is lost or gained where the environment speaks, and gamma or lam in the wrong place."""
    draw, rewards, values, mask = drawn_episodes(seed, "gae")
    gamma, lam = draw.random.uniform(0.6, 0.95), draw.random.uniform(0.3, 0.9)
    check_gae("", rewards, values, mask, gamma, lam, dict(gamma=gamma, lam=lam))


@exercise(4)
def test_gae_of_whole_rows(seed):
    """Every token is the policy's own: the value after the last one is still 0."""
    draw, rewards, values, mask = drawn_episodes(seed, "gae of whole rows", whole=True)
    gamma, lam = draw.random.uniform(0.6, 0.95), draw.random.uniform(0.3, 0.9)
    check_gae(" of whole rows", rewards, values, mask, gamma, lam, dict(gamma=gamma, lam=lam))


@exercise(4)
def test_gae_at_its_defaults(seed):
    """gamma = lam = 1: an advantage is the sum of the rewards from here on, less the value."""
    _, rewards, values, mask = drawn_episodes(seed, "gae at its defaults")
    check_gae(" at the defaults", rewards, values, mask, 1.0, 1.0, {})


# --- 5: ppo_loss --------------------------------------------------------------------------------------------------


def ppo_parts(seed, name):
    """(draw, logps, old, advantages, mask, clip): every mistake shows, and no ratio is at the clip's edge."""
    for attempt in itertools.count():
        draw, logps, mask = masked(f"{seed} {attempt}", name)
        old, advantages = logps - 0.5 * draw.normal(*logps.shape), draw.normal(*logps.shape)
        clip = draw.random.uniform(0.1, 0.3)
        ratio = (logps - old).exp()
        edges = torch.stack([ratio - 1 - clip, ratio - 1 + clip]).abs().min().item()
        total, wrong = ppo_by_loop(logps, old, advantages, mask, clip)
        if edges > 1e-3 and abs(total) > 0.02 and apart(total, wrong):
            return draw, logps, old, advantages, mask, clip


def ppo_by_loop(logps, old, advantages, mask, clip):
    """(loss, {mistake: its loss}), token by token."""
    sums, rows, off, count = {}, [], 0.0, 0
    for b in range(len(logps)):
        row = []
        for t in range(logps.shape[1]):
            logp, before, A = logps[b, t].item(), old[b, t].item(), advantages[b, t].item()
            def surrogate(ratio, of=min):
                return of(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
            ratio = math.exp(logp - before)
            if not mask[b, t]:
                off += surrogate(ratio)
                continue
            row.append(surrogate(ratio))
            for name, value in (("maximum", surrogate(ratio, max)), ("not_clipped", ratio * A),
                                ("clipped_alone", min(max(ratio, 1 - clip), 1 + clip) * A),
                                ("log_ratio", surrogate(logp - before)), ("inverse_ratio", surrogate(1 / ratio))):
                sums[name] = sums.get(name, 0.0) - value
        rows.append(row)
        count += len(row)
    total = -math.fsum(map(math.fsum, rows))
    wrong = {name: value / count for name, value in sums.items()}
    return total / count, wrong | dict(
        ppo_sign=-total / count, ppo_no_mask=(total - off) / logps.numel(), ppo_all_positions=total / logps.numel(),
        ppo_row_means=-statistics.mean(map(statistics.mean, rows)))


@exercise(5)
def test_ppo_loss_values(seed):
    """The wrong one of the two terms, the ratio upside down, another divisor than the mask's tokens."""
    _, logps, old, advantages, mask, clip = ppo_parts(seed, "ppo_loss")
    expected, wrong = ppo_by_loop(logps, old, advantages, mask, clip)
    wrong = {name: tensor(value) for name, value in wrong.items()}
    wrong["ppo_no_mask"] = [wrong["ppo_no_mask"], wrong["ppo_no_mask"] * logps.numel() / mask.sum()]
    agree("ppo_loss", call(amft.ppo_loss, logps, old, advantages, mask, clip), tensor(expected), wrong)
    expected, _ = ppo_by_loop(logps, old, advantages, mask, 0.2)
    agree("ppo_loss at clip's default", call(amft.ppo_loss, logps, old, advantages, mask), tensor(expected))


@exercise(5)
def test_ppo_loss_gradient(seed):
    """Where the policy still is the one that sampled: -A mask / tokens. Elsewhere a central difference."""
    _, logps, old, advantages, mask, clip = ppo_parts(seed, "gradient of ppo_loss")
    x = logps.clone().requires_grad_()
    grad = gradient_of("ppo_loss", amft.ppo_loss(x, x.detach().clone(), advantages, mask, clip), x, "ppo_detached")
    agree("gradient of ppo_loss where the ratio is 1", grad, -advantages * mask / mask.sum(),
          {"ppo_detached": torch.zeros_like(mask), "ppo_sign": advantages * mask / mask.sum()})
    x = logps.clone().requires_grad_()
    grad = gradient_of("ppo_loss", amft.ppo_loss(x, old, advantages, mask, clip), x, "ppo_detached")
    expected, h = torch.zeros_like(logps), 1e-6
    for b, t in itertools.product(*map(range, logps.shape)):
        sides = [ppo_by_loop(logps + sign * h * (torch.arange(logps.numel()).view_as(logps) == b * logps.shape[1] + t),
                             old, advantages, mask, clip)[0] for sign in (1, -1)]
        expected[b, t] = (sides[0] - sides[1]) / (2 * h)
    agree("gradient of ppo_loss", grad, expected, {"ppo_detached": torch.zeros_like(mask)}, rtol=1e-6)


@exercise(5)
def test_ppo_loss_of_parts_adds_up(seed):
    """Micro-batches that are each divided by their own number of tokens."""
    draw, logps, old, advantages, mask, clip = ppo_parts(seed, "parts of ppo_loss")
    cut, count = draw.size(1, len(logps) - 1), int(mask.sum())
    for n_tokens in (count, mask.sum()):
        for rows in (slice(cut), slice(cut, None)):
            own = ppo_by_loop(logps[rows], old[rows], advantages[rows], mask[rows], clip)[0]
            actual = call(amft.ppo_loss, logps[rows], old[rows], advantages[rows], mask[rows], clip, n_tokens)
            agree(f"ppo_loss of {int(mask[rows].sum())} tokens with n_tokens={count}", actual,
                  tensor(own * mask[rows].sum().item() / count), {"ppo_ignores_tokens": tensor(own)}, scale=1.0)


# --- 6: adamw and adamw_step --------------------------------------------------------------------------------------


def step_by_loop(theta, grad, m, v, step, lr, max_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, norm=None, wrong=""):
    """Entry by entry, of floats, of complex numbers or of torch's scalars: (theta', m', v'), lists. norm: of the whole
    gradient, where these are some of its entries; wrong: one mistake."""
    raw, real = grad, lambda x: x.real if isinstance(x, complex) else x
    if wrong == "clipped_by_value":
        grad = [min(max(g, -max_norm), max_norm) for g in grad]
    elif wrong != "not_clipped_norm":
        norm = sum(g * g for g in grad) ** 0.5 if norm is None else norm
        share = max_norm / (norm + 1e-6)
        if wrong == "constant_clipping":
            share = real(share)
        if real(share) < 1 or wrong == "always_scaled":
            grad = [g * share for g in grad]
    count, new = step + (wrong != "step_too_early"), ([], [], [])
    for x, g, first, second, unclipped in zip(theta, grad, m, v, raw):
        if wrong == "l2_decay":
            g = g + weight_decay * x
        if wrong not in ("l2_decay", "no_decay"):
            x = x * (1 - (1 if wrong == "decay_without_lr" else lr) * weight_decay)
        first = b1 * first + (1 - b1) * g
        square = unclipped * unclipped if wrong == "moment_of_unclipped" else g * g
        second = b2 * second + (1 - b2) * (real(square) if wrong == "constant_v" else square)
        below = real(second) if wrong == "constant_v" else second
        no_correction = wrong == "no_bias_correction" or count == 0
        down, up = (1, 1) if no_correction else (1 - b1 ** count, 1 - b2 ** count)
        if real(below) == 0:
            root = eps
        elif wrong == "eps_inside":
            root = (below / up + eps) ** 0.5
        elif wrong == "eps_before_correction":
            root = (below ** 0.5 + eps) / up ** 0.5
        else:
            root = (below / up) ** 0.5 + eps
        for values, value in zip(new, (x - lr * (first / down) / root, first, second)):
            values.append(value)
    return new


STEP_MISTAKES = ("no_bias_correction", "step_too_early", "l2_decay", "no_decay", "decay_without_lr", "eps_inside",
                 "eps_before_correction", "not_clipped_norm", "always_scaled", "clipped_by_value", "moment_of_unclipped")


def check_steps(what, draw, max_norm, steps=4, **how):
    """Each step starts where torch's optimiser stands, and must end where it ends."""
    N, lr = 9, draw.random.uniform(0.01, 0.05)
    true = torch.nn.Parameter(draw.normal(N))
    optimizer = torch.optim.AdamW([true], lr=lr, weight_decay=how.get("weight_decay", 0.0),
                                  betas=(how.get("b1", 0.9), how.get("b2", 0.999)), eps=how.get("eps", 1e-8))
    theta, m, v = true.detach().clone(), torch.zeros(N).double(), torch.zeros(N).double()
    for step in range(steps):
        grad = draw.normal(N)
        grad[-1] = 0.0  # a token that never occurs
        before = [x.tolist() for x in (theta, grad, m, v)]
        true.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([true], max_norm)
        optimizer.step()
        state = optimizer.state[true]
        expected = true.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        result = call(amft.adamw_step, theta, grad, amft.AdamState(m, v, step), lr=lr, max_norm=max_norm, **how)
        result = parts_of("adamw_step", result, 2, "theta' and AdamState")
        if not isinstance(result[1], amft.AdamState):
            fail(f"adamw_step: the new state is a {type(result[1]).__name__}, expected an AdamState")
        actual = result[0], result[1].m, result[1].v
        def mistakes(part, scale):
            wrong = {name: tensor(step_by_loop(*before, step, lr, max_norm, wrong=name, **how)[part]) for name in STEP_MISTAKES}
            return {name: value for name, value in wrong.items() if not near(value, expected[part], 2e-6, scale)}
        # theta' - theta: what is compared is the step, not how little it changed theta.
        for part, name in ((1, "m"), (2, "v"), (0, "theta")):
            scale = (expected[0] - theta if part == 0 else expected[part]).abs().max().item()
            agree(f"{name}' of step {step + 1}{what}", actual[part], expected[part], lambda: mistakes(part, scale), rtol=2e-6,
                  axes=("entry",), scale=scale)
        if result[1].step != step + 1:
            fail(f"adamw_step{what}: the new state's step is {result[1].step}, expected {step + 1}")
        some = slice(2, 6)
        result = parts_of("adamw", call(amft.adamw, theta[some], grad[some], m[some], v[some], grad.norm(), step + 1, lr=lr,
                                        max_norm=max_norm, **how), 3, "theta', m', v'")
        for part, name in ((1, "m"), (2, "v"), (0, "theta")):
            scale = (expected[0] - theta if part == 0 else expected[part]).abs().max().item()
            def mistakes_of_some():
                wrong = tensor(step_by_loop(*(x[some] for x in before), step, lr, max_norm, **how)[part])
                return {} if near(wrong, expected[part][some], 2e-6, scale) else dict(norm_of_some=wrong)
            agree(f"{name}' of adamw on entries 2 to 5{what}", result[part], expected[part][some], mistakes_of_some, rtol=2e-6,
                  axes=("entry",), scale=scale)
        theta, m, v = expected


@exercise(6)
def test_adamw_step_against_torch(seed):
    """Any part of AdamW that differs from torch's: bias correction, decay, eps, the count of steps."""
    draw = Draw("adamw_step", seed)
    b1, b2 = draw.random.uniform(0.5, 0.8), draw.random.uniform(0.8, 0.95)
    check_steps(" with other b1, b2 and eps", draw, 100.0, b1=b1, b2=b2, eps=draw.random.uniform(0.02, 0.1))
    check_steps("", draw, 100.0, weight_decay=draw.random.uniform(0.05, 0.5))


@exercise(6)
def test_adamw_step_is_clipped_as_torch_does(seed):
    """Gradients above the norm on some steps and below it on others."""
    draw = Draw("clipping", seed)
    check_steps(" with clipping", draw, draw.random.uniform(0.3, 0.8))
    check_steps(" with clipping", draw, 3.0, steps=6, weight_decay=0.1)


@exercise(6)
def test_adamw_step_derivative_is_finite(seed):
    """Along a direction, by forward mode, against the complex step; one coordinate has never had a gradient."""
    draw = Draw("derivative", seed)
    N, h = 7, 1e-30
    theta, grad, direction, m, v = (draw.normal(N) for _ in range(5))
    v = v ** 2 * 0.1
    for x in (grad, direction, m, v):
        x[2] = 0.0
    max_norm = draw.random.uniform(0.3, 0.8) * grad.norm().item()
    def stepped(grad):
        return amft.adamw(theta, grad, m, v, grad.norm(), 4, lr=0.01, max_norm=max_norm)[0]
    _, actual = torch.func.jvp(stepped, (grad,), (direction,))
    moved = [g + 1j * h * d for g, d in zip(grad.tolist(), direction.tolist())]
    expected = tensor([x.imag / h if isinstance(x, complex) else 0.0 for x in step_by_loop(
        theta.tolist(), moved, m.tolist(), v.tolist(), 3, 0.01, max_norm)[0]])
    if isinstance(actual, torch.Tensor) and not actual.isfinite().all():
        fail("adamw's derivative where v = 0 is not finite", "derivative_not_finite")
    agree("derivative of adamw's theta'", actual, expected, rtol=2e-6, axes=("entry",))


# --- 7: step_sensitivity ------------------------------------------------------------------------------------------


def sensitivity_by_complex_step(theta, g_rl, g_sft, mu, state, last=None, trace=0.0, wrong="", **how):
    """f(x + ih) = f(x) + ih f'(x): the derivative without a difference, exact for h as small as 1e-30."""
    h, tangents = 1e-30, [torch.zeros_like(theta)] * 3
    if last is not None and wrong != "trace_missing":
        tangents = [(1.0 if wrong == "trace_not_applied" else trace) * x for x in last]
        if wrong == "trace_only_theta":
            tangents[1:] = [torch.zeros_like(theta)] * 2
    starts = [[complex(x, h * dx) for x, dx in zip(xs.tolist(), dxs.tolist())]
              for xs, dxs in zip((theta, state.m, state.v), tangents)]
    mu = complex(mu, -h if wrong == "sensitivity_sign" else h)
    grad = [(1 - mu) * a + mu * b for a, b in zip(g_rl.tolist(), g_sft.tolist())]
    if wrong == "unclipped_derivative":
        how = {**how, "max_norm": 1e30}
        wrong = ""
    after = step_by_loop(starts[0], grad, starts[1], starts[2], state.step, wrong=wrong, **how)
    return [tensor([x.imag / h for x in values]) for values in after]


SENSITIVITY_MISTAKES = ("sensitivity_sign", "unclipped_derivative", "constant_clipping", "constant_v", "trace_missing",
                        "trace_not_applied", "trace_only_theta")


def drawn_step(seed, name, steps=None):
    draw, N = Draw(name, seed), 8
    theta, g_rl, g_sft, m = (draw.normal(N) for _ in range(4))
    v, step = 0.1 * draw.normal(N) ** 2 + 0.01, draw.size(1, 9) if steps is None else steps
    for x in (g_rl, g_sft, m, v):
        x[3] = 0.0  # a token that never occurs
    mu = draw.random.uniform(0.2, 0.8)
    return draw, theta, g_rl, g_sft, mu, amft.AdamState(m, v, step)


def tangents_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 3 or not all(
            isinstance(x, torch.Tensor) and x.dim() == 1 for x in result):
        fail("step_sensitivity: expected a tuple of 3 tensors (N,), d (theta', m', v')/d mu")
    return result


def check_sensitivity(what, args, last=None, trace=0.0, **how):
    theta, g_rl, g_sft, mu, state = args
    expected = sensitivity_by_complex_step(*args, last, trace, **how)
    given = {} if last is None else dict(last=last, trace=trace)
    result = tangents_of(call(amft.step_sensitivity, *args, **given, **how))
    def mistakes(part):
        found = {}
        if part == 0:
            found["plain_sgd"] = -how["lr"] * (g_sft - g_rl)
        for name in SENSITIVITY_MISTAKES:
            wrong = sensitivity_by_complex_step(*args, last, trace, wrong=name, **how)[part]
            if not near(wrong, expected[part], 1e-6, expected[part].abs().max().item()):
                found[name] = wrong
        actual = result[part].detach()
        off = (actual - expected[part]).abs().max() / expected[part].abs().max()
        if off < 1e-3:  # right in its first digits
            found["finite_difference"] = actual
        return found
    for part, name in enumerate(("theta", "m", "v")):
        agree(f"d {name}'/d mu{what}", result[part], expected[part], lambda: mistakes(part), rtol=1e-11, axes=("entry",))


@exercise(7)
def test_step_sensitivity_values(seed):
    """A derivative that leaves out clipping, a moment or the weight decay."""
    draw, *args = drawn_step(seed, "step_sensitivity")
    _, g_rl, g_sft, mu, _ = args
    norm = ((1 - mu) * g_rl + mu * g_sft).norm().item()
    for what, max_norm in ((" of a clipped step", norm / 3), ("", norm * 3)):
        check_sensitivity(what, args, lr=0.02, max_norm=max_norm, weight_decay=0.1)
    check_sensitivity(" with other b1, b2 and eps", args, lr=0.02, max_norm=norm / 2, b1=0.7, b2=0.9, eps=0.05)


@exercise(7)
def test_step_sensitivity_with_a_trace(seed):
    """Moments or theta of the step before that do not move with mu at the share trace."""
    draw, *args = drawn_step(seed, "trace")
    last, trace = tuple(draw.normal(8) for _ in range(3)), draw.random.uniform(0.3, 0.9)
    last[1][3] = last[2][3] = 0.0  # as of a token that never occurs: its m and v are 0 whatever mu
    norm = ((1 - args[3]) * args[1] + args[3] * args[2]).norm().item()
    for max_norm in (norm / 3, norm * 3):
        check_sensitivity(" with a trace", args, last, trace, lr=0.02, max_norm=max_norm, weight_decay=0.1)
    check_sensitivity(" with trace 0", args, last, 0.0, lr=0.02, max_norm=norm / 3)


@exercise(7)
def test_step_sensitivity_is_no_finite_difference(seed):
    """Adam's first step is nearly the gradient's sign: where g(mu) is as small as eps its slope is steep, and only there."""
    draw, theta, g_rl, g_sft, mu, state = drawn_step(seed, "kink", steps=0)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    g_rl[1] = (draw.random.uniform(1e-9, 5e-9) - mu * g_sft[1]) / (1 - mu)
    how = dict(lr=0.02, max_norm=1e3)
    expected = sensitivity_by_complex_step(theta, g_rl, g_sft, mu, state, **how)[0][1]
    result = tangents_of(call(amft.step_sensitivity, theta, g_rl, g_sft, mu, state, **how))
    actual = result[0][1].detach()
    def mistakes():
        found = {}
        for h in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
            up, down, here = (step_by_loop([theta[1].item()], [((1 - x) * g_rl + x * g_sft)[1].item()], [0.0], [0.0], 0,
                                           **how)[0][0] for x in (mu + h, mu - h, mu))
            for slope in ((up - down) / (2 * h), (up - here) / h, (here - down) / h):
                if abs(actual.item() - slope) < 0.05 * abs(slope):
                    found["finite_difference"] = actual
        return found
    agree("d theta'/d mu where the gradient is near 0, entry 1", actual, expected, mistakes, rtol=1e-5, axes=())


# --- 8: meta_gradient ---------------------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """Logits from the mean of the tokens so far: small, causal, in float64, and called as a policy of amft.py is."""

    def __init__(self, draw, vocabulary, width=3):
        super().__init__()
        self.embedding = torch.nn.Parameter(draw.normal(vocabulary, width))
        self.head = torch.nn.Parameter(draw.normal(width, vocabulary))

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=slice(None), use_cache=None,
                output_hidden_states=False):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.unsqueeze(-1).to(self.embedding.dtype)
        seen = (self.embedding[input_ids] * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return SimpleNamespace(logits=(torch.tanh(seen) @ self.head)[:, logits_to_keep], hidden_states=None)


def response_logp(model, prompt, response, own, temperature):
    """log pi of the tokens where own is 1, in Python numbers, from a forward pass of the one conversation."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0] / temperature
    return math.fsum(row[i] - logsumexp(row) for row, i, on in zip(
        logits[len(prompt) - 1:-1].tolist(), response.tolist(), own.tolist()) if on)


def along(model, tangent, function, h=1e-4):
    """d function()/d theta . tangent by a central difference of fourth order; the model is left as it was."""
    theta = parameters_to_vector(model.parameters()).detach().clone()
    def at(shift):
        vector_to_parameters(theta + shift * h * tangent, model.parameters())
        return function()
    slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    vector_to_parameters(theta, model.parameters())
    return slope


def rollouts_of(prompts, responses, mask, success):
    ids = torch.cat([prompts, responses], 1)
    batch = amft.Batch(ids, torch.ones_like(ids), mask, [[]] * len(ids))
    return amft.Rollouts([], batch, success, torch.zeros_like(mask), 0.0, 0.0)


def direction(draw, model):
    tangent = draw.normal(sum(p.numel() for p in model.parameters()))
    return tangent / tangent.norm()


@exercise(8)
def test_meta_gradient_values(seed):
    """Prompts of different difficulty, two without a signal, conversations of different length with holes."""
    draw = Draw("meta_gradient", seed)
    P, G, T, V, S = 5, 4, 4, 6, 3
    model, tau = Policy(draw, V), draw.random.uniform(0.5, 0.8)
    solved = [1, 3, 2, 0, 4]
    draw.random.shuffle(solved)
    success = tensor([draw.random.sample([1.0] * n + [0.0] * (G - n), G) for n in solved])
    prompts, responses = draw.ids(V, P, S).repeat_interleave(G, 0), draw.ids(V, P * G, T)
    mask = draw.lengths_mask(P * G, T)
    mask[::3, 1] = 0
    tangent = direction(draw, model)

    def scores(temperature, where=mask):  # (P, G): d log pi(response) along the tangent
        return tensor([along(model, tangent, lambda: response_logp(model, prompts[i], responses[i], where[i], temperature))
                       for i in range(P * G)]).view(P, G)
    true = scores(tau)
    others = (success.sum(1, keepdim=True) - success) / (G - 1)
    slopes = ((success - others) * true).mean(1)
    size = (success * true).abs().max().item()
    config = SimpleNamespace(temperature=tau, samples=G, prompts=P, micro_tokens=4096)
    result = parts_of("meta_gradient", call(amft.meta_gradient, model, tangent, rollouts_of(prompts, responses, mask, success),
                                            config), 2, "dU/dmu and its standard error")
    slope, error = statistics.mean(slopes.tolist()), statistics.stdev(slopes.tolist()) / math.sqrt(P)
    active = slopes[(slopes != 0)]
    centred = success - others
    mistakes = dict(
        without_baseline=(success * true).mean(), batch_baseline=((success - success.mean()) * true).mean(),
        own_sample_in_baseline=slope * (G - 1) / G, standardised=slope / centred.std(correction=0).item(),
        no_temperature=((success - others) * scores(1.0)).mean(),
        whole_batch_mask=((success - others) * scores(tau, torch.ones_like(mask))).mean(),
        token_mean=((success - others) * true / mask.sum(1).view(P, G)).mean(), sum_of_samples=slope * G,
        sum_of_prompts=slope * P, silent_prompts_dropped=active.mean(), meta_sign=-slope)
    agree_number("dU/dmu", result[0], slope, mistakes, rtol=1e-6, scale=size)
    agree_number("standard error of dU/dmu", result[1], error, dict(
        error_population=statistics.pstdev(slopes.tolist()) / math.sqrt(P), error_not_of_mean=statistics.stdev(slopes.tolist()),
        error_over_samples=statistics.stdev(slopes.tolist()) / math.sqrt(P * G),
        silent_prompts_dropped=active.std().item() / math.sqrt(len(active))), rtol=1e-6, scale=size)
    # Other advantages than the group's, as a method may choose: the same sum with them.
    values, scale = draw.normal(P, G), draw.random.uniform(2.0, 4.0)
    values[draw.size(0, P - 1)] = 0.0
    given = (values * scale * true).mean(1)
    result = parts_of("meta_gradient", call(amft.meta_gradient, model, tangent, rollouts_of(prompts, responses, mask, success),
                                            config, (values, scale)), 2, "dU/dmu and its standard error")
    size = scale * (values * true).abs().max().item()
    agree_number("dU/dmu with given advantages", result[0], given.mean(), dict(
        given_ignored=slope, standardised=given.mean() / scale), rtol=1e-6, scale=size)
    agree_number("standard error with given advantages", result[1], given.std() / math.sqrt(P), rtol=1e-6, scale=size)


@exercise(8)
def test_meta_gradient_in_expectation(seed):
    """Every pair of responses of one token at its probability: the expectation is the slope of the exact U."""
    draw = Draw("expectation", seed)
    V, tau = 4, draw.random.uniform(0.6, 0.9)
    model, prompt = Policy(draw, V), draw.ids(V, 3)
    right = set(draw.random.sample(range(V), 2))
    tangent = direction(draw, model)
    def p(y):
        return math.exp(response_logp(model, prompt, torch.tensor([y]), torch.ones(1), tau))
    expected = along(model, tangent, lambda: sum(p(y) for y in right))
    config, estimate, size = SimpleNamespace(temperature=tau, samples=2, prompts=2, micro_tokens=4096), 0.0, 0.0
    for y, z in itertools.product(range(V), repeat=2):  # the second prompt's samples are all alike: slope 0
        success = tensor([[y in right, z in right], [1.0, 1.0]])
        rollouts = rollouts_of(prompt.expand(4, -1), torch.tensor([[y], [z], [0], [1]]), torch.ones(4, 1).double(), success)
        slope = parts_of("meta_gradient", amft.meta_gradient(model, tangent, rollouts, config), 2, "dU/dmu and its error")[0]
        if type(slope) is not float:
            fail(f"dU/dmu: a {type(slope).__name__}, expected a Python float")
        estimate, size = estimate + p(y) * p(z) * 2 * slope, max(size, abs(slope))
    agree_number("expectation of dU/dmu", estimate, expected, dict(
        own_sample_in_baseline=expected / 2, meta_sign=-expected, sum_of_prompts=2 * expected), rtol=1e-6, scale=max(size, 1e-3))


@exercise(8)
def test_meta_gradient_without_a_signal(seed):
    """All of a prompt's samples alike, for every prompt: exactly nothing is known."""
    draw = Draw("silent prompts", seed)
    P, G, T, V = 3, 3, 2, 5
    model = Policy(draw, V)
    success = tensor([[float(p % 2)] * G for p in range(P)])
    rollouts = rollouts_of(draw.ids(V, P * G, 3), draw.ids(V, P * G, T), torch.ones(P * G, T).double(), success)
    config = SimpleNamespace(temperature=0.9, samples=G, prompts=P, micro_tokens=4096)
    result = parts_of("meta_gradient", call(amft.meta_gradient, model, direction(draw, model), rollouts, config), 2,
                      "dU/dmu and its standard error")
    for name, value in zip(("dU/dmu", "standard error"), result):
        agree_number(f"{name} without a signal", value, 0.0, scale=1.0, rtol=0.0)


# --- 9: update_mu -------------------------------------------------------------------------------------------------


def update_by_hand(mu, entropy, target, estimates, evidence, c, memory, wrong=""):
    """Eq. 6 in Python numbers, with one mistake or none: (mu', evidence', forces)."""
    Phi = statistics.NormalDist().cdf
    entropy_force = c.eta_h * (entropy - target if wrong == "entropy_sign" else target - entropy)
    known = [pair for pair in estimates if pair[1] > 0 or wrong == "zero_error"]
    force, total, variance = 0.0, *evidence
    slopes = [slope for slope, _ in known]
    slope = (statistics.mean(slopes) if wrong == "mean_of_slopes" and slopes else sum(slopes))
    if known and c.controller == "paper":
        force = c.eta_mu * slope
        if wrong == "paper_evidence":
            total, variance = total + slope, variance + sum(e * e for _, e in known)
    elif known:
        fades = 1.0 if wrong == "no_memory" else memory ** (len(known) if wrong == "fades_twice" else 1)
        total = fades * total + slope
        variance = (fades if wrong == "memory_not_squared" else fades ** 2) * variance
        variance += sum(e if wrong == "error_not_squared" else e * e for _, e in known)
        z = total / math.sqrt(variance)
        force = c.eta_mu * dict(slope_alone=slope, sign_alone=(z > 0) - (z < 0), phi_alone=Phi(z),
                                erf_of_z=2 * Phi(z * math.sqrt(2)) - 1).get(wrong, 2 * Phi(z) - 1)
    elif wrong == "evidence_lost":
        total, variance = 0.0, 0.0
    moved = mu + force + entropy_force
    moved = moved if wrong == "not_clipped_mu" else min(max(moved, c.mu_min), c.mu_max)
    return moved, (total, variance), (force, entropy_force)


UPDATE_MISTAKES = ("entropy_sign", "no_memory", "memory_not_squared", "fades_twice", "error_not_squared", "slope_alone",
                   "sign_alone", "phi_alone", "erf_of_z", "mean_of_slopes", "not_clipped_mu", "evidence_lost", "zero_error",
                   "paper_evidence")
UPDATE_NAMES = "mu'", "evidence's total", "evidence's variance", "meta force", "entropy force"


def flat(result):
    mu, evidence, forces = parts_of("update_mu", result, 3, "mu', evidence' and (meta force, entropy force)")
    for name, pair in (("evidence'", evidence), ("the forces", forces)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            fail(f"update_mu: {name} must be a pair")
    return (mu, *evidence, *forces)


def check_update(what, mu, entropy, target, estimates, evidence, c, memory=0.98):
    args = mu, entropy, target, estimates, evidence, c
    expected = flat(update_by_hand(*args, memory))
    try:
        actual = flat(amft.update_mu(*args, **({} if memory == 0.98 else dict(memory=memory))))
    except ZeroDivisionError:
        fail(f"update_mu{what}: division by zero", "zero_error")
    wrong = {name: flat(update_by_hand(*args, memory, name)) for name in UPDATE_MISTAKES
             if name != "zero_error" or evidence[1] or any(e for _, e in estimates)}
    order = 4, 1, 2, 3, 0  # causes before their effects
    for i in order:
        mistakes = {name: values[i] for name, values in wrong.items() if abs(values[i] - expected[i]) > 1e-7}
        agree_number(f"{UPDATE_NAMES[i]}{what}", actual[i], expected[i], mistakes,
                     scale=max(1e-3, abs(expected[i])))


def controller(draw, kind="evidence", **settings):
    return SimpleNamespace(**{**dict(controller=kind, eta_mu=draw.random.uniform(0.05, 0.1), eta_h=draw.random.uniform(0.1, 0.3),
                                     mu_min=0.05, mu_max=0.95), **settings})


@exercise(9)
def test_update_mu_values(seed):
    """A sign, a variance, an expected sign or a fading of evidence that is not Eq. 6's as it is stated."""
    draw = Draw("update_mu", seed)
    normal, uniform = draw.random.gauss, draw.random.uniform
    for n in (1, 2):
        c, memory = controller(draw), uniform(0.5, 0.9)
        estimates = [(normal(0, 1), uniform(0.3, 0.8) * (2 * i + 1)) for i in range(n)]
        args = uniform(0.4, 0.6), uniform(0.8, 1.0), uniform(1.1, 1.3), estimates, (normal(0, 1), uniform(0.5, 2)), c
        check_update(f" with {n} estimate{'s' * (n > 1)}", *args, memory)
        check_update(" at memory's default", *args)
    for entropy, target in ((0.0, 9.0), (9.0, 0.0)):
        check_update(f" with entropy {entropy:.0f} and H* {target:.0f}", 0.5, entropy, target, [], (normal(0, 1), 1.0),
                     controller(draw))


@exercise(9)
def test_update_mu_over_steps(seed):
    """The evidence of one step goes into the next one."""
    draw = Draw("update_mu over steps", seed)
    c, memory, mu, evidence = controller(draw), draw.random.uniform(0.5, 0.9), 0.5, (0.0, 0.0)
    for step in range(1, 7):
        estimates = [(draw.random.gauss(0, 1), draw.random.uniform(0.3, 2)) for _ in range(draw.size(0, 2))]
        args = mu, draw.random.uniform(0.8, 1.2), 1.0, estimates, evidence, c, memory
        check_update(f" of step {step}", *args)
        mu, evidence, _ = update_by_hand(*args)


@exercise(9)
def test_update_mu_of_the_paper(seed):
    """Evidence that the paper's controller keeps, or a slope that it does not take as it is."""
    draw = Draw("update_mu of the paper", seed)
    for n in (0, 1, 2):
        estimates = [(draw.random.gauss(0, 1), draw.random.uniform(0.3, 2)) for _ in range(n)]
        check_update(f" of the paper's controller with {n} estimates", 0.5, draw.random.uniform(0.8, 1.2), 1.0, estimates,
                     (draw.random.gauss(0, 1), 1.5), controller(draw, "paper"), 0.7)


@exercise(9)
def test_update_mu_without_a_signal(seed):
    """Evidence that is lost, or a division by zero, where no estimate had a signal."""
    draw = Draw("update_mu without a signal", seed)
    evidence = draw.random.gauss(0, 1), draw.random.uniform(0.5, 2)
    for estimates in ([], [(0.0, 0.0)]):
        for before in (evidence, (0.0, 0.0)):
            target = 1.0 + draw.random.uniform(0.1, 0.3)
            check_update(" without a signal", 0.5, 1.0, target, estimates, before, controller(draw), 0.6)
    check_update(" with one silent estimate of two", 0.5, 1.0, 1.1, [(draw.random.gauss(0, 1), 0.7), (0.0, 0.0)], evidence,
                 controller(draw), 0.6)


# --- 10: Deal.grade -----------------------------------------------------------------------------------------------


def value_of(tree):
    """The exact value of a number or of (left, operator, right); None after a division by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, op, right = value_of(tree[0]), tree[1], value_of(tree[2])
    if left is None or right is None or (op == "/" and right == 0):
        return None
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[op](right)


def text_of(tree):
    return str(tree) if isinstance(tree, int) else f"({text_of(tree[0])}{tree[1]}{text_of(tree[2])})"


def random_tree(rng, numbers):
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randint(1, len(numbers) - 1)
    return random_tree(rng, numbers[:cut]), rng.choice("+-*/"), random_tree(rng, numbers[cut:])


def deal_of(numbers, target):
    ranks = tuple("A" if n == 1 else str(n) for n in numbers)
    return tasks.Deal(ranks, {"J": 10, "Q": 10, "K": 10}, tuple(numbers), "1", target)


def check_grade(deal, formula, expected, hint=None, reply=None):
    """hint: the mistake that is likely, or {wrong outcome: the mistake}."""
    reply = json.dumps(dict(cards=deal.ranks, number=deal.numbers, formula=formula)) if reply is None else reply
    actual = deal.grade(reply)
    if type(actual) is not str:
        fail(f"grade of {reply[:90]!r}: a {type(actual).__name__}, expected the name of an outcome")
    if actual != expected:
        shown = f"formula {formula!r}" if formula else f"reply {reply[:90]!r}"
        fail(f"numbers {deal.numbers}, target {deal.target}, {shown}: {actual[:40]!r}, expected {expected!r}",
             hint.get(actual) if isinstance(hint, dict) else hint)


@exercise(10)
def test_grade_right_and_wrong_formulas(seed):
    """Random formulas over random numbers: the target is the value itself, or another number."""
    rng = Draw("grade", seed).random
    # 8 / (3 - 8 / 3) = 24: floats miss it.
    check_grade(deal_of([8, 3, 8, 3], 24), "8/(3-8/3)=24", "correct",
                {"wrong_result": "rounded", "illegal_number": "numbers_in_order"})
    a = rng.randint(2, 9)
    check_grade(deal_of([a, a, 1, 2], 24), f"(2+1)/({a}-{a})=24", "wrong_result",
                {"correct": "zero_division", "illegal_number": "numbers_in_order"})
    for _ in range(40):
        numbers = [rng.randint(1, 10) for _ in range(4)]
        tree = random_tree(rng, rng.sample(numbers, 4))
        value, text = value_of(tree), text_of(tree)
        whole = value is not None and value.denominator == 1 and value > 0
        target = int(value) if whole else 24
        right, deal = "correct" if whole else "wrong_result", deal_of(numbers, target)
        hint = {"illegal_number": "numbers_in_order", "wrong_result": "fixed_target",
                "correct": "zero_division" if value is None else "rounded"}
        check_grade(deal, f"{text}={target}", right, hint)
        check_grade(deal, text, right, {**hint, "illegal_formula": "equals_required"})
        if whole:
            check_grade(deal_of(numbers, target + 1), f"{text}={target + 1}", "wrong_result")
            check_grade(deal, f" {text} =  {target} ", "correct", hint)
            check_grade(deal, f"{text}={target + 1}", "illegal_formula", "stated_target")


@exercise(10)
def test_grade_uses_the_deal(seed):
    """Numbers or a target that are the reply's, or fixed, and not the deal's own."""
    rng = Draw("the deal", seed).random
    while True:
        a, b, c, d = numbers = rng.sample(range(2, 11), 4)
        target = a + b + c * d
        if target != 24:
            break
    deal, formula = deal_of(numbers, target), f"{a}+{b}+{c}*{d}"
    hint = {"wrong_result": "fixed_target", "illegal_number": "numbers_in_order"}
    check_grade(deal, f"{formula}={target}", "correct", {**hint, "illegal_formula": "fixed_target"})
    check_grade(deal, formula, "correct", {**hint, "illegal_formula": "equals_required"})
    check_grade(deal, f"{formula}=24", "illegal_formula", "stated_target")
    check_grade(deal, f"{d}*{c}+{b}+{a}", "correct", hint)
    check_grade(deal, "", "correct", "number_field", reply=json.dumps(dict(cards=[], number="rubbish", formula=formula)))
    check_grade(deal, f"{target}", "illegal_number", {"correct": "numbers_not_checked"})
    check_grade(deal, "", "illegal_number", {"correct": "number_field"},
                reply=json.dumps(dict(cards=[], number=[target], formula=f"{target}")))
    check_grade(deal, f"{a}+{b}", "illegal_number", {"wrong_result": "outcome_order"})
    check_grade(deal, f"{a}/({b}-{b})", "illegal_number", {"wrong_result": "outcome_order"})
    twice = deal_of([a, a, b, c], 2 * a + b + c)
    check_grade(twice, f"{a}+{b}+{c}", "illegal_number", "numbers_as_a_set")
    check_grade(twice, f"{a}+{b}+{b}+{c}", "illegal_number", "numbers_as_a_set")


@exercise(10)
def test_grade_of_malformed_replies(seed):
    """Replies and formulas that are none and yet pass, or stop the grader."""
    rng = Draw("malformed", seed).random
    a, b, c, d = numbers = rng.sample(range(2, 11), 4)
    deal, formula = deal_of(numbers, a + b + c + d), f"{a}+{b}+{c}+{d}"
    for reply in ("", "null", "[1]", "{}", "[" * 999, formula, '{"formula": 24}', '{"formula": ["24"]}', '{"formula": null}',
                  json.dumps(dict(formula=formula)) + "x", f'{{"formula": "{formula}", "formula": "{formula}"}}'):
        check_grade(deal, "", "no_answer", "not_a_text", reply=reply)
    for text in ("", f"-{formula}", f"({formula}", f"{formula})", f"{formula}+", f"{a} {formula}", f"{a}**{b}", f"0{formula}",
                 f"{formula}={deal.target}={deal.target}", f"{formula}=", f"{formula}={deal.target}.0",
                 f"{formula}=+{deal.target}", f"{formula}=\n{deal.target}", f"{formula}\n"):
        check_grade(deal, text, "illegal_formula", "stated_target" if text.count("=") else None)
    spaces = tasks.MAX_FORMULA - len(formula)
    check_grade(deal, formula.replace("+", " " * spaces + "+", 1), "correct", "too_long")
    check_grade(deal, formula.replace("+", " " * (spaces + 1) + "+", 1), "illegal_formula", "too_long")
