"""What the exercises' functions are asked, and what is right: the grader's own, not handed out.

Each function below gives the cases of one test, drawn from a seed. What is expected comes from a reference that shares
nothing with amft.py: a loop over Python numbers, torch's optimiser, a complex step, a difference quotient, an
enumeration. Beside it stand the values that typical mistakes would give, so that a failure can say which one it was.
No function of a student is called here: see verdict.py.
"""

import functools
import itertools
import json
import math
import random
import statistics
from fractions import Fraction
from types import SimpleNamespace

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from verdict import Case, Check, Made, Wrong, is_tensor, near, policy_class

MAX_FORMULA = 60  # tasks.py's
TESTS = {}  # name: (exercise, function, what makes its cases)


def cases_of(exercise, function):
    """Enter a function that makes cases, under its own name."""
    def enter(maker):
        TESTS[maker.__name__] = (exercise, function, maker)
        return maker
    return enter


@functools.lru_cache(maxsize=256)
def cases(name, seed):
    """The cases of a test; the same for the same seed."""
    torch.set_default_dtype(torch.float32)
    return TESTS[name][2](seed)


def apart(expected, mistakes, margin=1e-3):
    """Does every mistake show with these numbers? If not, a test draws others."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item()
    return scale > 0 and all(not near(torch.as_tensor(wrong, dtype=torch.float64), expected, margin, scale)
                             for wrong in mistakes.values())


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


@cases_of(1, "token_logps")
def token_logps_values(seed):
    """A softmax over another axis, another token's value, a probability in place of its logarithm."""
    _, logits, ids = drawn_logits(seed, 2.0)
    expected = logp_rows(logits, ids)
    chosen = torch.nn.functional.one_hot(ids, logits.shape[-1]).double()
    mistakes = dict(
        probability=expected.exp(), raw_logit=(logits * chosen).sum(-1), negated=-expected,
        wrong_axis=[((logits - logits.logsumexp(axis, keepdim=True)) * chosen).sum(-1) for axis in (0, 1)],
        shifted_ids=[logp_rows(logits, ids.roll(shift, 1)) for shift in (-1, 1)],
        likeliest=logp_rows(logits, logits.argmax(-1)))
    return [Case("token_logps", (logits, ids), {}, (Check("token_logps", expected, (), mistakes),))]


@cases_of(1, "token_logps")
def token_logps_of_improbable_tokens(seed):
    """Tokens whose probability is below the smallest float have a log-probability all the same."""
    _, logits, _ = drawn_logits(seed, 400.0)
    logits, ids = logits.float(), logits.argmin(-1)
    expected = logp_rows(logits, ids).float()
    check = Check("token_logps of improbable tokens", expected, rtol=1e-5, lost="log_of_softmax")
    return [Case("token_logps", (logits, ids), {}, (check,))]


@cases_of(1, "token_logps")
def token_logps_of_a_bfloat16_policy(seed):
    """Logits of eight bits: what comes back is float32, and was computed in it."""
    _, logits, ids = drawn_logits(f"bfloat16 {seed}", 4.0)
    logits = logits.bfloat16()
    expected = logp_rows(logits, ids).float()
    late = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1).float()
    check = Check("token_logps of bfloat16 logits", expected, (), dict(promoted_late=late), rtol=1e-5)
    return [Case("token_logps", (logits, ids), {}, (check,))]


@cases_of(1, "token_logps")
def token_logps_gradient(seed):
    """Of sum w logp: w (1[v = id] - p_v) at each logit."""
    draw, logits, ids = drawn_logits(seed, 2.0)
    weights = draw.normal(*ids.shape)
    expected = tensor([[[w * ((v == i) - math.exp(x - logsumexp(row))) for v, x in enumerate(row)]
                        for row, i, w in zip(rows, chosen, ws)]
                       for rows, chosen, ws in zip(logits.tolist(), ids.tolist(), weights.tolist())])
    check = Check("gradient of token_logps", expected, axes=("row", "token", "logit"), nothing="no_gradient")
    return [Case("token_logps", (logits, ids), {}, (check,), slope=("gradient", 0, weights))]


# --- 2: sft_loss and implicit_reward ------------------------------------------------------------------------------


def masked(seed, name):
    draw = Draw(name, seed)
    B, T = draw.size(3, 5), draw.size(4, 7)
    mask = draw.lengths_mask(B, T)
    return draw, -draw.normal(B, T).abs() - 0.1, mask


def pairs(values, mask):
    """[[value of each token on the mask] of each row]"""
    return [[x for x, on in zip(xs, ons) if on] for xs, ons in zip(values.tolist(), mask.tolist())]


@cases_of(2, "sft_loss")
def sft_loss_values(seed):
    """Another divisor than the mask's tokens, tokens off the mask, the wrong sign; and no gradient."""
    draw, logps, mask = masked(seed, "sft_loss")
    kept, every = pairs(logps, mask), logps.flatten().tolist()
    count, total = sum(map(len, kept)), math.fsum(map(math.fsum, kept))
    wrong = dict(
        sft_all_positions=-total / len(every), sft_row_means=-statistics.mean(map(statistics.mean, kept)),
        sft_no_mask=[-math.fsum(every) / count, -math.fsum(every) / len(every)], sft_sign=total / count, sft_sum=-total,
        sft_per_sequence=-total / len(kept))
    value = Check("sft_loss", tensor(-total / count), (), wrong)
    slope = Check("gradient of sft_loss", -mask / count, nothing="sft_no_gradient")
    return [Case("sft_loss", (logps, mask), {}, (value,)),
            Case("sft_loss", (logps, mask), {}, (slope,), slope=("gradient", 0, None))]


@cases_of(2, "sft_loss")
def sft_loss_of_parts_adds_up(seed):
    """Micro-batches that are each divided by their own number of tokens."""
    draw, logps, mask = masked(seed, "parts of sft_loss")
    kept, cut, found = pairs(logps, mask), draw.size(1, len(logps) - 1), []
    count = sum(map(len, kept))
    for n_tokens in (count, mask.sum(), count + 7):
        for rows in (slice(cut), slice(cut, None)):
            total, own = -math.fsum(map(math.fsum, kept[rows])), sum(map(len, kept[rows]))
            check = Check(f"sft_loss of {own} tokens with n_tokens={int(n_tokens)}", tensor(total / int(n_tokens)), (),
                          dict(sft_ignores_tokens=total / own))
            found.append(Case("sft_loss", (logps[rows], mask[rows], n_tokens), {}, (check,)))
    return found


@cases_of(2, "implicit_reward")
def implicit_reward_values(seed):
    """A mean over tokens, tokens off the mask, no reference, no beta."""
    draw, logps, mask = masked(seed, "implicit_reward")
    reference, beta = -draw.normal(*logps.shape).abs() - 0.1, draw.random.uniform(0.2, 0.7)
    expected = tensor([beta * math.fsum(row) for row in pairs(logps - reference, mask)])
    mistakes = dict(
        reward_no_beta=expected / beta, reward_mean=expected / mask.sum(1), reward_sign=-expected,
        reward_no_reference=tensor([beta * math.fsum(row) for row in pairs(logps, mask)]),
        reward_no_mask=tensor([beta * math.fsum(row) for row in (logps - reference).tolist()]))
    value = Check("implicit_reward", expected, (), mistakes, axes=("row",))
    default = Check("implicit_reward at beta's default", expected / beta, axes=("row",))
    return [Case("implicit_reward", (logps, reference, mask, beta), {}, (value,)),
            Case("implicit_reward", (logps, reference, mask), {}, (default,))]


# --- 3: group_advantages ------------------------------------------------------------------------------------------


def differences(rows):
    return [[r - (math.fsum(row) - r) / (len(row) - 1) for r in row] for row in rows]


PAIR = (2, "advantages and scale")


@cases_of(3, "group_advantages")
def group_advantages_values(seed):
    """Another baseline than the mean of a prompt's other samples, another scale than one for all."""
    draw = Draw("group_advantages", seed)
    P, G = draw.size(3, 5), draw.size(3, 6)
    rewards = draw.normal(P, G) + 2 * draw.normal(P, 1)
    rows = rewards.tolist()
    true = differences(rows)
    flat = list(itertools.chain(*true))
    scale = statistics.pstdev(flat)
    own = [[r - statistics.mean(row) for r in row] for row in rows]
    every = list(itertools.chain(*rows))
    grand = [[r - statistics.mean(every) for r in row] for row in rows]
    added = [scale + more for more in (1e-4, 1e-5, 1e-6, 1e-8)]
    mistakes = dict(
        batch_mean=tensor(grand) / statistics.pstdev(itertools.chain(*grand)), not_scaled=[tensor(true), tensor(own)],
        group_std=[tensor([[x / deviation(row) for x in row] for row in form]) for form in (true, own)
                   for deviation in (statistics.pstdev, statistics.stdev)],
        sample_std=tensor(true) / statistics.stdev(flat), own_mean=tensor(own) / scale,
        scale_of_rewards=[tensor(form) / deviation(every) for form in (true, own)
                          for deviation in (statistics.pstdev, statistics.stdev)],
        added_to_scale=[tensor(true) / more for more in added])
    advantages = Check("advantages", tensor(true) / scale, (0,), mistakes, axes=("prompt", "sample"))
    divisor = Check("scale", scale, (1,), dict(
        own_mean=statistics.pstdev(itertools.chain(*own)), sample_std=statistics.stdev(flat), not_scaled=1.0,
        scale_of_rewards=statistics.pstdev(every), added_to_scale=added))
    return [Case("group_advantages", (rewards,), {}, (advantages, divisor), PAIR)]


@cases_of(3, "group_advantages")
def group_advantages_without_a_signal(seed):
    """Each prompt's samples all alike, or as good as alike: there is nothing to learn, whatever the prompts are to each
    other. A spread of a few millionths is a signal."""
    draw, found = Draw("no signal", seed), []
    P, G = draw.size(3, 5), draw.size(2, 6)
    noise = draw.normal(P, G)
    noise = noise / tensor(differences(noise.tolist())).std(correction=0)
    for rewards in (torch.ones(P, G).double(), torch.zeros(P, G), draw.normal(P, 1).expand(P, G).clone(),
                    torch.full((P, G), 0.1), 0.5 + draw.random.uniform(1e-7, 5e-7) * noise):
        grand, own = rewards - rewards.mean(), tensor(differences(rewards.double().tolist()))
        values = Check("advantages without a signal", torch.zeros_like(rewards), (0,),
                       dict(batch_mean=grand / grand.std(correction=0).clamp(min=1e-30),
                            noise_scaled=own / own.std(correction=0).clamp(min=1e-30)), rtol=0.0, scale=1.0,
                       axes=("prompt", "sample"), lost="division_by_nothing")
        scale = Check("scale without a signal", 1.0, (1,))
        found.append(Case("group_advantages", (rewards,), {}, (values, scale), PAIR))
    small = draw.random.uniform(2e-6, 9e-6) * noise
    true = tensor(differences(small.tolist()))
    values = Check("advantages of a small signal", true / true.std(correction=0), (0,),
                   dict(silent_too_soon=torch.zeros_like(true)), rtol=1e-6, axes=("prompt", "sample"))
    found.append(Case("group_advantages", (small,), {}, (values,), PAIR))
    return found


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
    environment = ("environment_counts", "environment_decays")
    for b in range(B):
        running, last = 0.0, True
        following = values[b, -1].item() if wrong == "bootstrapped_column" else 0.0
        for t in reversed(range(T)):
            value = values[b, t].item()
            if not mask[b, t] and wrong not in environment:
                following = value if wrong == "environment_follows" else following
                following = 0.0 if wrong == "following_zeroed" else following
                running = 0.0 if wrong == "running_zeroed" else running
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


GAE_MISTAKES = dict(
    environment_counts="environment_counts", environment_decays="environment_counts", environment_follows="environment_counts",
    running_zeroed="advantage_zeroed", following_zeroed="next_value_zeroed", bootstrapped="bootstrapped",
    bootstrapped_column="bootstrapped", no_gamma="no_gamma", no_lam="no_lam", lam_without_gamma="lam_without_gamma",
    one_delta="one_delta", no_baseline="no_baseline")


def drawn_episodes(seed, name, whole=False):
    draw = Draw(name, seed)
    B, T = draw.size(3, 5), draw.size(5, 8)
    mask = torch.ones(B, T, dtype=torch.float64) if whole else draw.holes_mask(B, T)
    return draw, draw.normal(B, T) * mask, draw.normal(B, T), mask


def gae_case(what, rewards, values, mask, gamma, lam, how):
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    scale, wrong = expected.abs().max().item(), {}
    for name, hint in GAE_MISTAKES.items():
        value = gae_backwards(rewards, values, mask, gamma, lam, name)
        if not near(value * mask, expected, 1e-7, scale):
            wrong.setdefault(hint, []).extend([value * mask, value])
    on = expected[mask > 0]
    wrong["advantages_normalised"] = [(expected - on.mean()) / (on.std(correction=n) + more) * mask
                                      for n in (0, 1) for more in (0.0, 1e-8)]
    advantages = Check(f"advantages{what}", expected, (0,), wrong, masked=("unmasked", mask))
    rewards_alone = (gae_backwards(rewards, values, mask, gamma, 1.0, "no_baseline") if gamma == 1 else
                     gae_by_definition(rewards, 0 * values, mask, gamma, 1.0))
    returns = Check(f"returns{what}", (expected + values) * mask, (1,), dict(
        returns_are_advantages=expected, unmasked=expected + values, returns_are_rewards=rewards_alone))
    return Case("gae", (rewards, values, mask), how, (advantages, returns), (2, "advantages and returns"))


@cases_of(4, "gae")
def gae_values(seed):
    """Credit that is lost or gained where the environment speaks, and gamma or lam in the wrong place."""
    draw, rewards, values, mask = drawn_episodes(seed, "gae")
    gamma, lam = draw.random.uniform(0.6, 0.95), draw.random.uniform(0.3, 0.9)
    return [gae_case("", rewards, values, mask, gamma, lam, dict(gamma=gamma, lam=lam))]


@cases_of(4, "gae")
def gae_of_whole_rows(seed):
    """Every token is the policy's own: the value after the last one is still 0."""
    draw, rewards, values, mask = drawn_episodes(seed, "gae of whole rows", whole=True)
    gamma, lam = draw.random.uniform(0.6, 0.95), draw.random.uniform(0.3, 0.9)
    return [gae_case(" of whole rows", rewards, values, mask, gamma, lam, dict(gamma=gamma, lam=lam))]


@cases_of(4, "gae")
def gae_at_its_defaults(seed):
    """gamma = lam = 1: an advantage is the sum of the rewards from here on, less the value."""
    _, rewards, values, mask = drawn_episodes(seed, "gae at its defaults")
    return [gae_case(" at the defaults", rewards, values, mask, 1.0, 1.0, {})]


# --- 5: ppo_loss --------------------------------------------------------------------------------------------------


def ppo_parts(seed, name):
    """(draw, logps, old, advantages, mask, clip): every mistake shows, and no ratio is at the clip's edge."""
    for attempt in itertools.count():
        draw, logps, mask = masked(f"{seed} {attempt}", name)
        old, advantages = logps - 0.5 * draw.normal(*logps.shape), draw.normal(*logps.shape)
        # A bad token that has become much likelier: PPO's loss has no bound there, a dual clip's has.
        old[0, 0], advantages[0, 0] = logps[0, 0] - draw.random.uniform(1.4, 1.8), -draw.random.uniform(0.5, 1.5)
        clip = draw.random.choice((-1, 1)) * draw.random.uniform(0.03, 0.1) + 0.2
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
        whole = math.exp(math.fsum(((logps - old) * mask)[b].tolist()))
        for t in range(logps.shape[1]):
            logp, before, A = logps[b, t].item(), old[b, t].item(), advantages[b, t].item()
            def surrogate(ratio, of=min, clip=clip):
                return of(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
            ratio = math.exp(logp - before)
            if not mask[b, t]:
                off += surrogate(ratio)
                continue
            row.append(surrogate(ratio))
            dual = max(surrogate(ratio), 3 * A) if A < 0 else surrogate(ratio)
            for name, value in (("maximum", surrogate(ratio, max)), ("not_clipped", ratio * A),
                                ("clipped_alone", min(max(ratio, 1 - clip), 1 + clip) * A),
                                ("log_ratio", surrogate(logp - before)), ("inverse_ratio", surrogate(1 / ratio)),
                                ("clip_fixed", surrogate(ratio, clip=0.2)), ("sequence_ratio", surrogate(whole)),
                                ("dual_clip", dual)):
                sums[name] = sums.get(name, 0.0) - value
        rows.append(row)
        count += len(row)
    total = -math.fsum(map(math.fsum, rows))
    wrong = {name: value / count for name, value in sums.items()}
    return total / count, wrong | dict(
        ppo_sign=-total / count, ppo_no_mask=(total - off) / logps.numel(), ppo_all_positions=total / logps.numel(),
        ppo_row_means=-statistics.mean(map(statistics.mean, rows)))


@cases_of(5, "ppo_loss")
def ppo_loss_values(seed):
    """The wrong one of the two terms, the ratio upside down, another divisor than the mask's tokens."""
    _, logps, old, advantages, mask, clip = ppo_parts(seed, "ppo_loss")
    expected, wrong = ppo_by_loop(logps, old, advantages, mask, clip)
    wrong["ppo_no_mask"] = [wrong["ppo_no_mask"], wrong["ppo_no_mask"] * logps.numel() / mask.sum().item()]
    at_default, _ = ppo_by_loop(logps, old, advantages, mask, 0.2)
    return [Case("ppo_loss", (logps, old, advantages, mask, clip), {}, (Check("ppo_loss", tensor(expected), (), wrong),)),
            Case("ppo_loss", (logps, old, advantages, mask), {}, (Check("ppo_loss at clip's default", tensor(at_default)),))]


@cases_of(5, "ppo_loss")
def ppo_loss_gradient(seed):
    """Where the policy still is the one that sampled: -A mask / tokens. Elsewhere a central difference."""
    _, logps, old, advantages, mask, clip = ppo_parts(seed, "gradient of ppo_loss")
    expected, h = torch.zeros_like(logps), 1e-6
    for b, t in itertools.product(*map(range, logps.shape)):
        sides = [ppo_by_loop(logps + sign * h * (torch.arange(logps.numel()).view_as(logps) == b * logps.shape[1] + t),
                             old, advantages, mask, clip)[0] for sign in (1, -1)]
        expected[b, t] = (sides[0] - sides[1]) / (2 * h)
    first = -advantages * mask / mask.sum()
    at_one = Check("gradient of ppo_loss where the ratio is 1", first, (), dict(
        ppo_detached=torch.zeros_like(mask), ppo_sign=-first), nothing="ppo_detached")
    away = Check("gradient of ppo_loss", expected, (), dict(ppo_detached=torch.zeros_like(mask)), rtol=1e-6,
                 nothing="ppo_detached")
    slope = ("gradient", 0, None)
    return [Case("ppo_loss", (logps, logps.clone(), advantages, mask, clip), {}, (at_one,), slope=slope),
            Case("ppo_loss", (logps, old, advantages, mask, clip), {}, (away,), slope=slope)]


@cases_of(5, "ppo_loss")
def ppo_loss_of_parts_adds_up(seed):
    """Micro-batches that are each divided by their own number of tokens."""
    draw, logps, old, advantages, mask, clip = ppo_parts(seed, "parts of ppo_loss")
    cut, count, found = draw.size(1, len(logps) - 1), int(mask.sum()), []
    for n_tokens in (count, mask.sum()):
        for rows in (slice(cut), slice(cut, None)):
            own = ppo_by_loop(logps[rows], old[rows], advantages[rows], mask[rows], clip)[0]
            args = logps[rows], old[rows], advantages[rows], mask[rows], clip, n_tokens
            check = Check(f"ppo_loss of {int(mask[rows].sum())} tokens with n_tokens={count}",
                          tensor(own * mask[rows].sum().item() / count), (), dict(ppo_ignores_tokens=own), scale=1.0)
            found.append(Case("ppo_loss", args, {}, (check,)))
    return found


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
        if wrong not in ("l2_decay", "no_decay", "decay_after_step"):
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
        moved = x - lr * (first / down) / root
        moved = moved * (1 - lr * weight_decay) if wrong == "decay_after_step" else moved
        for values, value in zip(new, (moved, first, second)):
            values.append(value)
    return new


STEP_MISTAKES = ("no_bias_correction", "step_too_early", "no_decay", "l2_decay", "decay_without_lr", "decay_after_step",
                 "eps_inside", "eps_before_correction", "not_clipped_norm", "always_scaled", "clipped_by_value",
                 "moment_of_unclipped")


def step_cases(what, draw, max_norm, function, steps=4, size=1.0, **how):
    """Each step starts where torch's optimiser stands, and must end where it ends. adamw is given entries 2 to 5 alone."""
    N, lr = 9, draw.random.uniform(0.01, 0.05)
    true = torch.nn.Parameter(draw.normal(N))
    optimizer = torch.optim.AdamW([true], lr=lr, weight_decay=how.get("weight_decay", 0.0),
                                  betas=(how.get("b1", 0.9), how.get("b2", 0.999)), eps=how.get("eps", 1e-8))
    theta, m, v = true.detach().clone(), torch.zeros(N).double(), torch.zeros(N).double()
    found, some = [], slice(2, 6) if function == "adamw" else slice(None)
    for step in range(steps):
        grad = draw.normal(N) * size
        grad[-1] = 0.0  # a token that never occurs
        true.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([true], max_norm)
        optimizer.step()
        state = optimizer.state[true]
        after = true.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        lists = [x[some].tolist() for x in (theta, grad, m, v)]
        norm = grad.norm()
        wrong = {name: step_by_loop(*lists, step, lr, max_norm, norm=norm.item(), wrong=name, **how) for name in STEP_MISTAKES}
        if function == "adamw":
            wrong["norm_of_some"] = step_by_loop(*lists, step, lr, max_norm, **how)
        checks = []
        for part, name in ((1, "m"), (2, "v"), (0, "theta")):
            expected = after[part][some]
            # theta' - theta: what is compared is the step, not how little it changed theta.
            scale = (expected - theta[some] if part == 0 else expected).abs().max().item()
            mistakes = {hint: tensor(values[part]) for hint, values in wrong.items()}
            mistakes = {hint: value for hint, value in mistakes.items() if not near(value, expected, 2e-6, scale)}
            path = (part,) if function == "adamw" or part == 0 else (1, part - 1)
            of = "of adamw on entries 2 to 5" if function == "adamw" else f"of step {step + 1}"
            checks.append(Check(f"{name}' {of}{what}", expected, path, mistakes, 2e-6, scale, ("entry",)))
        how_much = dict(lr=lr, max_norm=max_norm, **how)
        if function == "adamw":
            args = theta[some], grad[some], m[some], v[some], norm, step + 1
            found.append(Case("adamw", args, how_much, tuple(checks), (3, "theta', m', v'")))
        else:
            kind = Check("adamw_step: the new state", Made("AdamState", ()), (1,))
            count = Check(f"the new state's step{what}", float(step + 1), (1, 2), dict(step_not_counted=float(step)))
            found.append(Case("adamw_step", (theta, grad, Made("AdamState", (m, v, step))), how_much,
                              (kind, *checks, count), (2, "theta' and AdamState")))
        theta, m, v = after
    return found


def against_torch(name, seed, function):
    draw = Draw(name, seed)
    b1, b2 = draw.random.uniform(0.5, 0.8), draw.random.uniform(0.8, 0.95)
    eps, decay = draw.random.uniform(0.02, 0.1), draw.random.uniform(0.05, 0.5)
    # Gradients of many sizes, down to where v is 1e-16 of the largest: entries that a floor under v would stop.
    sizes = tensor([10.0 ** -(i % 8) for i in range(9)])
    return [*step_cases(" with other b1, b2 and eps", draw, 100.0, function, b1=b1, b2=b2, eps=eps),
            *step_cases("", draw, 100.0, function, weight_decay=decay),
            *step_cases(" with small gradients", draw, 100.0, function, size=sizes)]


def clipped_as_torch_does(name, seed, function):
    draw = Draw(name, seed)
    return [*step_cases(" with clipping", draw, draw.random.uniform(0.3, 0.8), function),
            *step_cases(" with clipping", draw, 3.0, function, steps=6, weight_decay=0.1)]


@cases_of(6, "adamw")
def adamw_against_torch(seed):
    """Some of the entries, the step counted from 1: bias correction, decay, eps, small gradients."""
    return against_torch("adamw", seed, "adamw")


@cases_of(6, "adamw")
def adamw_is_clipped_by_the_given_norm(seed):
    """The norm of the whole gradient, not of the entries that are given; above max_norm and below it."""
    return clipped_as_torch_does("adamw clipping", seed, "adamw")


@cases_of(6, "adamw_step")
def adamw_step_against_torch(seed):
    """Any part of AdamW that differs from torch's: bias correction, decay, eps, the count of steps."""
    return against_torch("adamw_step", seed, "adamw_step")


@cases_of(6, "adamw_step")
def adamw_step_is_clipped_as_torch_does(seed):
    """Gradients above the norm on some steps and below it on others."""
    return clipped_as_torch_does("clipping", seed, "adamw_step")


@cases_of(6, "adamw")
def adamw_derivative_is_finite(seed):
    """Along a direction, by forward mode, against the complex step; one coordinate has never had a gradient."""
    draw = Draw("derivative", seed)
    N, h = 7, 1e-30
    theta, grad, direction, m, v = (draw.normal(N) for _ in range(5))
    v = v ** 2 * 0.1
    for x in (grad, direction, m, v):
        x[2] = 0.0
    norm = grad.norm()
    max_norm = draw.random.uniform(0.3, 0.8) * norm.item()
    moved = [g + 1j * h * d for g, d in zip(grad.tolist(), direction.tolist())]
    expected = tensor([x.imag / h if isinstance(x, complex) else 0.0 for x in step_by_loop(
        theta.tolist(), moved, m.tolist(), v.tolist(), 3, 0.01, max_norm)[0]])
    check = Check("derivative of adamw's theta' where some v = 0", expected, (0,), rtol=2e-6, axes=("entry",),
                  lost="derivative_not_finite")
    tangents = None, direction, None, None, grad @ direction / norm, None
    return [Case("adamw", (theta, grad, m, v, norm, 4), dict(lr=0.01, max_norm=max_norm), (check,), (3, "theta', m', v'"),
                 slope=("tangent", tangents))]


# --- 7: step_sensitivity ------------------------------------------------------------------------------------------


def sensitivity_by_complex_step(theta, g_rl, g_sft, mu, state, last=None, trace=0.0, wrong="", **how):
    """f(x + ih) = f(x) + ih f'(x): the derivative without a difference, exact for h as small as 1e-30."""
    h, tangents = 1e-30, [torch.zeros_like(theta)] * 3
    if last is not None and wrong != "trace_missing":
        tangents = [(1.0 if wrong == "trace_not_applied" else trace) * x for x in last]
        if wrong == "trace_only_theta":
            tangents[1:] = [torch.zeros_like(theta)] * 2
    starts = [[complex(x, h * dx) for x, dx in zip(xs.tolist(), dxs.tolist())]
              for xs, dxs in zip((theta, *state.fields[:2]), tangents)]
    mu = complex(mu, -h if wrong == "sensitivity_sign" else h)
    grad = [(1 - mu) * a + mu * b for a, b in zip(g_rl.tolist(), g_sft.tolist())]
    if wrong == "unclipped_derivative":
        how = {**how, "max_norm": 1e30}
        wrong = ""
    after = step_by_loop(starts[0], grad, starts[1], starts[2], state.fields[2], wrong=wrong, **how)
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
    return draw, theta, g_rl, g_sft, mu, Made("AdamState", (m, v, step))


def sensitivity_case(what, args, last=None, trace=0.0, **how):
    theta, g_rl, g_sft, mu, state = args
    expected = sensitivity_by_complex_step(*args, last, trace, **how)
    wrong, checks = {}, []
    for name in SENSITIVITY_MISTAKES:
        wrong[name] = sensitivity_by_complex_step(*args, last, trace, wrong=name, **how)
    for part, name in enumerate(("theta", "m", "v")):
        scale = expected[part].abs().max().item()
        mistakes = {hint: values[part] for hint, values in wrong.items() if not near(values[part], expected[part], 1e-6, scale)}
        if part == 0:
            mistakes = dict(plain_sgd=-how["lr"] * (g_sft - g_rl)) | mistakes
        checks.append(Check(f"d {name}'/d mu{what}", expected[part], (part,), mistakes, 1e-11, axes=("entry",),
                            nearly=("finite_difference", 1e-3)))
    given = {} if last is None else dict(last=last, trace=trace)
    return Case("step_sensitivity", args, {**given, **how}, tuple(checks), TANGENTS)


TANGENTS = (3, "d (theta', m', v')/d mu")


@cases_of(7, "step_sensitivity")
def step_sensitivity_values(seed):
    """A derivative that leaves out clipping, a moment or the weight decay."""
    draw, *args = drawn_step(seed, "step_sensitivity")
    _, g_rl, g_sft, mu, _ = args
    norm = ((1 - mu) * g_rl + mu * g_sft).norm().item()
    return [sensitivity_case(" of a clipped step", args, lr=0.02, max_norm=norm / 3, weight_decay=0.1),
            sensitivity_case("", args, lr=0.02, max_norm=norm * 3, weight_decay=0.1),
            sensitivity_case(" with other b1, b2 and eps", args, lr=0.02, max_norm=norm / 2, b1=0.7, b2=0.9, eps=0.05)]


@cases_of(7, "step_sensitivity")
def step_sensitivity_with_a_trace(seed):
    """Moments or theta of the step before that do not move with mu at the share trace."""
    draw, *args = drawn_step(seed, "trace")
    last, trace = tuple(draw.normal(8) for _ in range(3)), draw.random.uniform(0.3, 0.9)
    last[1][3] = last[2][3] = 0.0  # as of a token that never occurs: its m and v are 0 whatever mu
    norm = ((1 - args[3]) * args[1] + args[3] * args[2]).norm().item()
    return [*(sensitivity_case(" with a trace", args, last, trace, lr=0.02, max_norm=max_norm, weight_decay=0.1)
              for max_norm in (norm / 3, norm * 3)),
            sensitivity_case(" with trace 0", args, last, 0.0, lr=0.02, max_norm=norm / 3)]


@cases_of(7, "step_sensitivity")
def step_sensitivity_is_no_finite_difference(seed):
    """Adam's first step is nearly the gradient's sign: where g(mu) is as small as eps its slope is steep, and only there."""
    draw, theta, g_rl, g_sft, mu, state = drawn_step(seed, "kink", steps=0)
    state = Made("AdamState", (torch.zeros_like(theta), torch.zeros_like(theta), 0))
    g_rl[1] = (draw.random.uniform(1e-9, 5e-9) - mu * g_sft[1]) / (1 - mu)
    how, slopes = dict(lr=0.02, max_norm=1e3), []
    # One entry alone, by its own scale: `where` keeps the others out.
    expected = sensitivity_by_complex_step(theta, g_rl, g_sft, mu, state, **how)[0]
    for h in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        up, down, here = (tensor(step_by_loop(theta.tolist(), ((1 - x) * g_rl + x * g_sft).tolist(), [0.0] * 8, [0.0] * 8, 0,
                                              **how)[0]) for x in (mu + h, mu - h, mu))
        slopes += [(up - down) / (2 * h), (up - here) / h, (here - down) / h]
    check = Check("d theta'/d mu where the gradient is near 0", expected, (0,), dict(finite_difference=slopes), 1e-5,
                  axes=("entry",), share=0.05)
    return [Case("step_sensitivity", (theta, g_rl, g_sft, mu, state), how, (check,), TANGENTS)]


# --- 8: meta_gradient ---------------------------------------------------------------------------------------------


def drawn_policy(draw, vocabulary, width=3):
    """(the policy that this side computes with, the same as an argument)"""
    parts = draw.normal(vocabulary, width), draw.normal(width, vocabulary)
    return policy_class()(*parts), Made("Policy", parts)


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
    batch = Made("Batch", (ids, torch.ones_like(ids), mask, [[]] * len(ids)))
    return Made("Rollouts", ([], batch, success, torch.zeros_like(mask), 0.0, 0.0))


def settings(temperature, P, G):
    return Made("SimpleNamespace", (dict(temperature=temperature, samples=G, prompts=P, micro_tokens=4096),))


def direction(draw, model):
    tangent = draw.normal(sum(p.numel() for p in model.parameters()))
    return tangent / tangent.norm()


META = (2, "dU/dmu and its standard error")


def meta_checks(what, slopes, mistakes=None, errors=None, size=1.0):
    """Of the mean of prompts' slopes, and of its standard error."""
    slope, error = statistics.mean(slopes), statistics.stdev(slopes) / math.sqrt(len(slopes))
    return (Check(f"dU/dmu{what}", slope, (0,), mistakes or {}, 1e-6, size),
            Check(f"standard error of dU/dmu{what}", error, (1,), errors or {}, 1e-6, size))


@cases_of(8, "meta_gradient")
def meta_gradient_values(seed):
    """Prompts of different difficulty, two without a signal, conversations of different length with holes."""
    draw = Draw("meta_gradient", seed)
    P, G, T, V, S = 5, 4, 4, 6, 3
    (model, policy), tau = drawn_policy(draw, V), draw.random.uniform(0.5, 0.8)
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
    centred = success - (success.sum(1, keepdim=True) - success) / (G - 1)
    slopes = (centred * true).mean(1)
    slope, active = slopes.mean().item(), slopes[slopes != 0]
    mistakes = dict(
        without_baseline=(success * true).mean(), batch_baseline=((success - success.mean()) * true).mean(),
        own_sample_in_baseline=slope * (G - 1) / G, standardised=slope / centred.std(correction=0).item(),
        no_temperature=(centred * scores(1.0)).mean(), whole_batch_mask=(centred * scores(tau, torch.ones_like(mask))).mean(),
        token_mean=(centred * true / mask.sum(1).view(P, G)).mean(), sum_of_samples=slope * G,
        sum_of_prompts=slope * P, silent_prompts_dropped=active.mean(), meta_sign=-slope)
    spread = slopes.std().item()
    errors = dict(
        error_population=slopes.std(correction=0).item() / math.sqrt(P), error_not_of_mean=spread,
        error_over_samples=spread / math.sqrt(P * G), silent_prompts_dropped=active.std().item() / math.sqrt(len(active)))
    plain = {name: float(value) for name, value in mistakes.items()}
    args = policy, tangent, rollouts_of(prompts, responses, mask, success), settings(tau, P, G)
    found = [Case("meta_gradient", args, {}, meta_checks("", slopes.tolist(), plain, errors, (success * true).abs().max().item()),
                  META)]
    # Other advantages than the group's, as a method may choose: the same sum with them.
    values, scale = draw.normal(P, G), draw.random.uniform(2.0, 4.0)
    values[draw.size(0, P - 1)] = 0.0
    given = (values * scale * true).mean(1)
    wrong = dict(given_ignored=slope, standardised=given.mean().item() / scale,
                 given_where_silent=(values * scale * true).mean(1)[slopes != 0].sum().item() / P)
    checks = meta_checks(" with given advantages", given.tolist(), wrong, {}, scale * (values * true).abs().max().item())
    return [*found, Case("meta_gradient", (*args, (values, scale)), {}, checks, META)]


@cases_of(8, "meta_gradient")
def meta_gradient_in_expectation(seed):
    """Every pair of responses of one token at its probability: the expectation is the slope of the exact U."""
    draw = Draw("expectation", seed)
    V, tau = 4, draw.random.uniform(0.6, 0.9)
    (model, policy), prompt = drawn_policy(draw, V), draw.ids(V, 3)
    right = set(draw.random.sample(range(V), 2))
    tangent = direction(draw, model)
    def p(y):
        return math.exp(response_logp(model, prompt, torch.tensor([y]), torch.ones(1), tau))
    expected, found, size = along(model, tangent, lambda: sum(p(y) for y in right)), [], 0.0
    score = [along(model, tangent, lambda: math.log(p(y))) for y in range(V)]
    for y, z in itertools.product(range(V), repeat=2):  # the second prompt's samples are all alike: slope 0
        success = tensor([[y in right, z in right], [1.0, 1.0]])
        rollouts = rollouts_of(prompt.expand(4, -1), torch.tensor([[y], [z], [0], [1]]), torch.ones(4, 1).double(), success)
        size = max(size, abs(score[y]) + abs(score[z]))
        found.append(Case("meta_gradient", (policy, tangent, rollouts, settings(tau, 2, 2)), {}, (), META,
                          weight=2 * p(y) * p(z)))
    found[-1] = found[-1]._replace(total=Check("expectation of dU/dmu", expected, rtol=1e-6, scale=max(size, 1e-3)))
    return found


@cases_of(8, "meta_gradient")
def meta_gradient_without_a_signal(seed):
    """All of a prompt's samples alike, for every prompt: exactly nothing is known, but by advantages that are given."""
    draw = Draw("silent prompts", seed)
    P, G, T, V = 3, 3, 2, 5
    model, policy = drawn_policy(draw, V)
    success = tensor([[float(p % 2)] * G for p in range(P)])
    prompts, responses, mask = draw.ids(V, P * G, 3), draw.ids(V, P * G, T), torch.ones(P * G, T).double()
    tangent = direction(draw, model)
    args = policy, tangent, rollouts_of(prompts, responses, mask, success), settings(0.9, P, G)
    checks = [Check(f"{name} without a signal", 0.0, (i,), rtol=0.0, scale=1.0)
              for i, name in enumerate(("dU/dmu", "standard error"))]
    values, scale = draw.normal(P, G), draw.random.uniform(2.0, 4.0)
    true = tensor([along(model, tangent, lambda: response_logp(model, prompts[i], responses[i], mask[i], 0.9))
                   for i in range(P * G)]).view(P, G)
    given = meta_checks(" with given advantages where all rewards are alike", (values * scale * true).mean(1).tolist(),
                        dict(given_ignored=0.0), {}, scale * (values * true).abs().max().item())
    return [Case("meta_gradient", args, {}, tuple(checks), META),
            Case("meta_gradient", args, dict(advantages=(values, scale)), given, META)]


# --- 9: update_mu -------------------------------------------------------------------------------------------------


def update_by_hand(mu, entropy, target, estimates, evidence, c, memory, wrong=""):
    """Eq. 6 in Python numbers, with one mistake or none: (mu', evidence', forces)."""
    entropy_force = c.eta_h * (entropy - target if wrong == "entropy_sign" else target - entropy)
    known = [pair for pair in estimates if pair[1] > 0 or wrong == "zero_error"]
    (total, n), start = evidence, c.mu
    if c.controller == "paper":
        force, start = c.eta_mu * sum(slope for slope, _ in known), mu
        if wrong == "paper_evidence":
            total, n = total + sum(slope / error for slope, error in known), n + len(known)
    else:
        fades = memory ** (len(known) if wrong == "fades_twice" else 1)
        if wrong == "no_memory" or not known and wrong != "fades_in_silence":
            fades = 1.0
        new = [slope if wrong == "slope_alone" else slope / error for slope, error in known]
        total = fades * total + sum(new)
        n = n * (1.0 if wrong == "count_not_faded" else fades) + len(new)
        if wrong == "evidence_lost" and not known:
            total, n = 0.0, 0.0
        force = c.eta_mu * belief_by_hand(total, n, wrong)
        start = mu if wrong == "adds_up" else start
    moved = start + force + entropy_force
    moved = moved if wrong == "not_clipped_mu" else min(max(moved, c.mu_min), c.mu_max)
    return moved, (total, n), (force, entropy_force)


def belief_by_hand(total, n, wrong):
    """P[above 0] - P[below 0], by Bayes' theorem, of the sum of n ratios z; their squares are in all three alike."""
    if wrong == "sign_alone":
        return (total > 0) - (total < 0)
    effect, odds = 0.4, 1.0 if wrong == "no_odds" else 0.2
    above, below = (odds * math.exp(mean * total - (0 if wrong == "no_count" else n * mean ** 2 / 2))
                    for mean in (effect, -effect))
    return above - below if wrong == "not_normalised" else (above - below) / (above + 1 + below)


UPDATE_MISTAKES = ("entropy_sign", "count_not_faded", "no_memory", "fades_twice", "fades_in_silence", "slope_alone",
                   "sign_alone", "no_odds", "no_count", "not_normalised", "adds_up", "not_clipped_mu", "evidence_lost",
                   "zero_error", "paper_evidence")
UPDATE_NAMES = "mu'", "evidence's total", "evidence's count", "meta force", "entropy force"
UPDATE_PATHS = (0,), (1, 0), (1, 1), (2, 0), (2, 1)


def flat(result):
    mu, evidence, forces = result
    return mu, *evidence, *forces


def update_case(what, mu, entropy, target, estimates, evidence, c, memory=0.98):
    args = mu, entropy, target, estimates, evidence, c
    expected, checks = flat(update_by_hand(*args, memory)), []
    wrong = {name: flat(update_by_hand(*args, memory, name)) for name in UPDATE_MISTAKES
             if name != "zero_error" or all(e for _, e in estimates)}
    for i in (4, 1, 2, 3, 0):  # causes before their effects
        mistakes = {name: values[i] for name, values in wrong.items() if abs(values[i] - expected[i]) > 1e-7}
        checks.append(Check(f"{UPDATE_NAMES[i]}{what}", float(expected[i]), UPDATE_PATHS[i], mistakes,
                            scale=max(1e-3, abs(expected[i])), nearly=("single_precision", 1e-6)))
    asked = mu, entropy, target, estimates, evidence, Made("SimpleNamespace", (vars(c),))
    return Case("update_mu", asked, {} if memory == 0.98 else dict(memory=memory), tuple(checks),
                (3, "mu', evidence' and (meta force, entropy force)"), errors=dict(ZeroDivisionError="zero_error"))


def controller(draw, kind="evidence", **settings):
    return SimpleNamespace(**{**dict(controller=kind, mu=draw.random.uniform(0.42, 0.48), mu_min=0.05, mu_max=0.95,
                                     eta_mu=draw.random.uniform(0.3, 0.4), eta_h=draw.random.uniform(0.1, 0.3)), **settings})


@cases_of(9, "update_mu")
def update_mu_values(seed):
    """A sign, a ratio, a belief or a fading of evidence that is not Eq. 6's as it is stated."""
    draw, found = Draw("update_mu", seed), []
    normal, uniform = draw.random.gauss, draw.random.uniform
    for n in (1, 2):
        c, memory = controller(draw), uniform(0.5, 0.9)
        estimates = [(normal(0, 1), uniform(0.3, 0.8) * (2 * i + 1)) for i in range(n)]
        args = uniform(0.5, 0.6), uniform(0.8, 1.0), uniform(1.1, 1.3), estimates, (normal(0, 1), uniform(0.5, 2)), c
        found += [update_case(f" with {n} estimate{'s' * (n > 1)}", *args, memory), update_case(" at memory's default", *args)]
    for entropy, target in ((0.0, 9.0), (9.0, 0.0)):
        found.append(update_case(f" with entropy {entropy:.0f} and H* {target:.0f}", 0.5, entropy, target, [],
                                 (normal(0, 1), 1.0), controller(draw)))
    return found


@cases_of(9, "update_mu")
def update_mu_over_steps(seed):
    """The evidence of one step goes into the next one."""
    draw, found = Draw("update_mu over steps", seed), []
    c, memory, mu, evidence = controller(draw), draw.random.uniform(0.5, 0.9), 0.5, (0.0, 0.0)
    for step in range(1, 7):
        estimates = [(draw.random.gauss(0, 1), draw.random.uniform(0.3, 2)) for _ in range(draw.size(0, 2))]
        args = mu, draw.random.uniform(0.8, 1.2), 1.0, estimates, evidence, c, memory
        found.append(update_case(f" of step {step}", *args))
        mu, evidence, _ = update_by_hand(*args)
    return found


@cases_of(9, "update_mu")
def update_mu_of_the_paper(seed):
    """Evidence that the paper's controller keeps, or a slope that it does not take as it is."""
    draw, found = Draw("update_mu of the paper", seed), []
    for n in (0, 1, 2):
        estimates = [(draw.random.gauss(0, 1), draw.random.uniform(0.3, 2)) for _ in range(n)]
        found.append(update_case(f" of the paper's controller with {n} estimates", 0.5, draw.random.uniform(0.8, 1.2), 1.0,
                                 estimates, (draw.random.gauss(0, 1), 1.5), controller(draw, "paper"), 0.7))
    return found


@cases_of(9, "update_mu")
def update_mu_without_a_signal(seed):
    """Evidence that is lost, or a division by zero, where no estimate had a signal."""
    draw, found = Draw("update_mu without a signal", seed), []
    evidence = draw.random.gauss(0, 1), draw.random.uniform(0.5, 2)
    for estimates in ([], [(0.0, 0.0)]):
        for before in (evidence, (0.0, 0.0)):
            target = 1.0 + draw.random.uniform(0.1, 0.3)
            found.append(update_case(" without a signal", 0.5, 1.0, target, estimates, before, controller(draw), 0.6))
    found.append(update_case(" with one silent estimate of two", 0.5, 1.0, 1.1,
                             [(draw.random.gauss(0, 1), 0.7), (0.0, 0.0)], evidence, controller(draw), 0.6))
    return found


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
    return Made("Deal", (ranks, {"J": 10, "Q": 10, "K": 10}, tuple(numbers), "1", target))


def grade_case(deal, formula, expected, hint=None, reply=None):
    """hint: the mistake that is likely, or {wrong outcome: the mistake}."""
    ranks, _, numbers, _, target = deal.fields
    shown = f"formula {formula!r}" if reply is None or formula else f"reply {reply[:90]!r}"
    reply = json.dumps(dict(cards=ranks, number=numbers, formula=formula)) if reply is None else reply
    mistakes = hint if isinstance(hint, dict) else {"*": hint} if hint else {}
    check = Check(f"numbers {numbers}, target {target}, {shown}", expected, (), mistakes)
    return Case("Deal.grade", (deal, reply), {}, (check,))


@cases_of(10, "Deal.grade")
def grade_right_and_wrong_formulas(seed):
    """Random formulas over random numbers: the target is the value itself, or another number."""
    rng = Draw("grade", seed).random
    a = rng.randint(2, 9)
    found = [  # 8 / (3 - 8 / 3) = 24: floats miss it.
        grade_case(deal_of([8, 3, 8, 3], 24), "8/(3-8/3)=24", "correct",
                   {"wrong_result": "rounded", "illegal_number": "numbers_in_order"}),
        grade_case(deal_of([a, a, 1, 2], 24), f"(2+1)/({a}-{a})=24", "wrong_result",
                   {"correct": "zero_division", "illegal_number": "numbers_in_order"})]
    for _ in range(40):
        numbers = [rng.randint(1, 10) for _ in range(4)]
        tree = random_tree(rng, rng.sample(numbers, 4))
        value, text = value_of(tree), text_of(tree)
        whole = value is not None and value.denominator == 1 and value > 0
        target = int(value) if whole else 24
        right, deal = "correct" if whole else "wrong_result", deal_of(numbers, target)
        hint = {"illegal_number": "numbers_in_order", "wrong_result": "fixed_target",
                "correct": "zero_division" if value is None else "rounded"}
        found += [grade_case(deal, f"{text}={target}", right, hint),
                  grade_case(deal, text, right, {**hint, "illegal_formula": "equals_required"})]
        if whole:
            found += [grade_case(deal_of(numbers, target + 1), f"{text}={target + 1}", "wrong_result"),
                      grade_case(deal, f" {text} =  {target} ", "correct", hint),
                      grade_case(deal, f"{text}={target + 1}", "illegal_formula", "stated_target")]
    return found


@cases_of(10, "Deal.grade")
def grade_uses_the_deal(seed):
    """Numbers or a target that are the reply's, or fixed, and not the deal's own."""
    rng, target = Draw("the deal", seed).random, 24
    while target == 24 or target < 10:
        a, b, c, d = numbers = rng.sample(range(2, 11), 4)
        target = a + b + c * d
    deal, formula = deal_of(numbers, target), f"{a}+{b}+{c}*{d}"
    hint = {"wrong_result": "fixed_target", "illegal_number": "numbers_in_order"}
    found = [
        grade_case(deal, f"{formula}={target}", "correct", {**hint, "illegal_formula": "fixed_target"}),
        grade_case(deal, formula, "correct", {**hint, "illegal_formula": "equals_required"}),
        grade_case(deal, f"{formula}=24", "illegal_formula", "stated_target"),
        grade_case(deal, f"{d}*{c}+{b}+{a}", "correct", hint),
        grade_case(deal, "", "correct", "number_field", reply=json.dumps(dict(cards=[], number="rubbish", formula=formula))),
        grade_case(deal, f"{target}", "illegal_number", {"correct": "numbers_not_checked"}),
        grade_case(deal, "", "illegal_number", {"correct": "number_field"},
                   reply=json.dumps(dict(cards=[], number=[target], formula=f"{target}"))),
        grade_case(deal, f"{a}+{b}", "illegal_number", {"wrong_result": "outcome_order"}),
        grade_case(deal, f"{a}/({b}-{b})", "illegal_number", {"wrong_result": "outcome_order"})]
    # The target is a text to be met to the letter: another spelling of the number states another target.
    for spelt in (f"0{target}", " ".join(str(target)), f"{target}.0", f"+{target}", f"1{target}", f"{target}/1"):
        found.append(grade_case(deal, f"{formula}={spelt}", "illegal_formula", "target_spelt"))
    twice = deal_of([a, a, b, c], 2 * a + b + c)
    return [*found, grade_case(twice, f"{a}+{b}+{c}", "illegal_number", "numbers_as_a_set"),
            grade_case(twice, f"{a}+{b}+{b}+{c}", "illegal_number", "numbers_as_a_set")]


@cases_of(10, "Deal.grade")
def grade_of_malformed_replies(seed):
    """Replies and formulas that are none and yet pass, or stop the grader."""
    rng, found = Draw("malformed", seed).random, []
    a, b, c, d = numbers = rng.sample(range(2, 11), 4)
    deal, formula = deal_of(numbers, a + b + c + d), f"{a}+{b}+{c}+{d}"
    target = a + b + c + d
    for reply in ("", "null", "[1]", "{}", "[" * 999, formula, '{"formula": 24}', '{"formula": ["24"]}', '{"formula": null}',
                  json.dumps(dict(formula=formula)) + "x", f'{{"formula": "{formula}", "formula": "{formula}"}}'):
        found.append(grade_case(deal, "", "no_answer", "not_a_text", reply=reply))
    for text in ("", f"-{formula}", f"({formula}", f"{formula})", f"{formula}+", f"{a} {formula}", f"{a}**{b}", f"0{formula}",
                 f"{formula}={target}={target}", f"{formula}=", f"{formula}={target}.0", f"{formula}=+{target}", f"{formula}\n"):
        found.append(grade_case(deal, text, "illegal_formula", "stated_target" if text.count("=") else None))
    for space in ("\n", "\t", "\u00a0"):
        found.append(grade_case(deal, f"{formula}={space}{target}", "illegal_formula", "only_spaces"))
    spaces = " " * (MAX_FORMULA - len(formula))
    for long in (formula.replace("+", spaces + "+", 1), spaces + formula, formula + spaces):
        found += [grade_case(deal, long, "correct", "too_long"),
                  grade_case(deal, long.replace("+", " +", 1), "illegal_formula", "too_long")]
    return found


# --- 11: learn ----------------------------------------------------------------------------------------------------


def toy_of():
    """The world: toy.py as it is published, in this process, where no student code runs."""
    import toy
    return toy


def loop(seed, changed, steps, lr=0.02, wrong=""):
    """The first steps of Algorithm 1 with one mistake or none: (t, mu, entropy, scale, theta, evidence) of each."""
    toy = toy_of()
    world, config, amft = toy.World(""), toy.settings(**changed), toy.amft
    world.generator.manual_seed(seed)
    theta, state, mu, evidence, target, last, found = world.start, toy.fresh(world.start), config.mu, (0.0, 0.0), None, None, []
    warmup, every = 0 if wrong == "no_warm_up" else config.warmup, 1 if wrong == "looked_every_step" else config.meta_every
    for t in range(1, steps + 1):
        g_rl, g_sft, seen, scale = world.gradients(theta, config)
        now = t - 1 if wrong == "counted_from_zero" else t
        taken, before = 1.0, mu
        if now > warmup:
            target = seen.entropy if target is None or wrong == "target_moves" else target
            estimates = []
            if last:
                estimates.append(amft.own_meta_gradient(g_rl, last[0], seen.batch, scale))
                if (now - warmup) % every == 0:
                    estimates.append(amft.meta_gradient(world.model, last[0], world.rollouts(theta, 8, 4), config))
            mu, evidence, _ = amft.update_mu(mu, seen.entropy, target, estimates, evidence, config)
            taken = before if wrong == "late_mu" else mu
            last = amft.step_sensitivity(theta, g_rl, g_sft, taken, state, None if wrong == "no_trace" else last, config.trace, lr=lr)
        found.append((t, taken, seen.entropy, scale, theta, evidence))
        theta, state = amft.adamw_step(theta, (1 - taken) * g_rl + taken * g_sft, state, lr=lr)
    return found


LOOP_MISTAKES = "no_warm_up", "counted_from_zero", "looked_every_step", "target_moves", "no_trace", "late_mu"
ROWS = (2, "the log and theta")


@cases_of(11, "learn")
def learn_first_steps(seed):
    """A warm-up of two steps, six more: when mu is set, when estimates come, what the step is taken with."""
    steps, checks = 8, []
    changed = dict(mu=0.4, eta_mu=0.05, eta_h=0.3, trace=0.9, warmup=2, meta_every=2)
    true, wrong = loop(seed, changed, steps), {name: loop(seed, changed, steps, wrong=name) for name in LOOP_MISTAKES}
    names, paths = ("t", "mu", "entropy", "scale", "theta"), (0, 4, 5, 6, 1)
    for t in range(steps):
        for part in (0, 4, 2, 3, 1):
            expected = true[t][part]
            mistakes = {name: rows[t][part] for name, rows in wrong.items()} if part == 1 else {}
            mistakes = {name: value for name, value in mistakes.items() if abs(value - expected) > 1e-6}
            value = float(expected) if part != 4 else expected
            checks.append(Check(f"{names[part]} of step {t + 1}", value, (0, t, paths[part]), mistakes, 1e-6, axes=("entry",)))
        for i, name in enumerate(("total", "variance")):
            checks.append(Check(f"evidence's {name} after step {t + 1}", float(true[t][5][i]), (0, t, 8, i), {}, 1e-6,
                                max(abs(true[t][5][i]), 1e-6)))
    return [Case("learn", (Made("World", ("",)), seed, Made("settings", (changed,)), steps), {}, tuple(checks), ROWS)]


def numbers_of(row, t, N):
    """A row's fields, if they are what a Row holds."""
    fields = row.fields if type(row) is Made and row.name == "Row" else ()
    if len(fields) != 9:
        raise Wrong(f"row {t}: is no Row")
    vectors, plain = fields[1:4], fields[4:7]
    if not all(is_tensor(x) and x.shape == (N,) and x.dtype == torch.float64 and x.isfinite().all() for x in vectors):
        raise Wrong(f"row {t}: theta, g_rl and g_sft are not vectors (N,) of finite numbers")
    pairs = [tuple(pair) for pair in fields[7] if type(pair) in (tuple, list) and len(pair) == 2] if type(fields[7]) is list else None
    if type(fields[8]) not in (tuple, list) or len(fields[8]) != 2 or pairs is None or len(pairs) != len(fields[7]):
        raise Wrong(f"row {t}: estimates are a list of pairs, the evidence is a pair")
    for x in [*plain, *itertools.chain(*pairs), *fields[8]]:
        if type(x) is not float or not math.isfinite(x):
            raise Wrong(f"row {t}: mu, entropy, scale, estimates and evidence are finite Python floats")
    return (fields[0], *vectors, *plain, pairs, tuple(fields[8]))


def relations_of(student, changed, steps, rise, lr=0.02):
    """What must hold between the rows of a log, whatever was sampled; the relations of the handout, in its order."""
    def check(answer):
        toy = toy_of()
        world, config = toy.World(student), toy.settings(**changed)
        N, (log, end) = len(world.start), answer
        if type(log) is not list or len(log) != steps or not is_tensor(end) or end.shape != (N,) or end.dtype != torch.float64:
            raise Wrong(f"learn: expected a list of {steps} rows and theta (N,)")
        rows = [numbers_of(row, t, N) for t, row in enumerate(log, 1)]
        if [row[0] for row in rows] != list(range(1, steps + 1)):
            raise Wrong("the rows' t are not 1, 2, 3, ...")
        if not torch.equal(rows[0][1], world.start):
            raise Wrong("row 1: theta is not where the world starts")
        steps_follow(rows, end, lr)
        mu_follows(rows, config, lr)
        samples_agree(rows, world)
        before, reached = world.utility(world.start).item(), world.utility(end).item()
        if reached < before + rise:
            raise Wrong(f"U rises from {before:.2f} to {reached:.2f}, expected {rise} or more")
    return check


def steps_follow(rows, end, lr):
    """Relation 2: each theta is AdamW's step from the one before, on Eq. 3's gradient."""
    theta = torch.nn.Parameter(rows[0][1].clone())
    optimizer = torch.optim.AdamW([theta], lr=lr, weight_decay=0.0)
    for row, after in zip(rows, [*(row[1] for row in rows[1:]), end]):
        theta.data.copy_(row[1])
        theta.grad = (1 - row[4]) * row[2] + row[4] * row[3]
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.step()
        if not near(after, theta.detach(), 1e-6, lr):
            raise Wrong(f"theta after step {row[0]} is not the step of Eq. 3 with this row's mu and gradients")


def mu_follows(rows, config, lr):
    """Relations 3 and 4: mu of the row before and this row's estimates give mu; the estimates are of the sensitivity."""
    mu, evidence, target, last = config.mu, (0.0, 0.0), None, None
    m = v = torch.zeros_like(rows[0][1])
    for t, theta, g_rl, g_sft, taken, entropy, scale, estimates, after in rows:
        state = Made("AdamState", (m, v, t - 1))
        if t <= config.warmup:
            if taken != 1.0 or estimates:
                raise Wrong(f"row {t}: in the warm-up mu is 1, and there is no estimate")
        else:
            target = entropy if target is None else target
            asked = last is not None and config.eta_mu != 0
            looks = asked and (t - config.warmup) % config.meta_every == 0
            if len(estimates) != asked + looks:
                raise Wrong(f"row {t}: {len(estimates)} estimates, expected {asked + looks}")
            if asked:
                own = -2 * (g_rl @ last[0]).item() * scale  # two tokens a response
                if abs(estimates[0][0] - own) > 1e-6 * max(abs(own), 1e-9) or abs(estimates[0][1] - abs(own)) > 1e-6 * max(abs(own), 1e-9):
                    raise Wrong(f"row {t}: the estimate on the step's own prompts is {estimates[0][0]:.4g}, expected {own:.4g}")
            mu, evidence, _ = update_by_hand(mu, entropy, target, estimates, evidence, config, 0.98)
            if abs(mu - taken) > 1e-9 or any(abs(a - b) > 1e-9 * max(1.0, abs(b)) for a, b in zip(after, evidence)):
                raise Wrong(f"row {t}: mu {taken:.6f}, evidence {after}; Eq. 6 gives {mu:.6f}, {evidence} from the row before")
            last = tuple(sensitivity_by_complex_step(theta, g_rl, g_sft, taken, state, last, config.trace, lr=lr))
        grad = (1 - taken) * g_rl + taken * g_sft
        _, m, v = (tensor(x) for x in step_by_loop(theta.tolist(), grad.tolist(), m.tolist(), v.tolist(), t - 1, lr))


def samples_agree(rows, world):
    """Relation 5: in the mean over a run the gradients are those of what is sampled; entropies are the policies' own."""
    told, known = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t, theta, g_rl, g_sft, _, entropy, scale, *_ in rows:
        if abs(entropy - exact_entropy(world, theta)) > 1e-6:
            raise Wrong(f"row {t}: the entropy is not that of this row's theta")
        rise, fall = world.utility_gradient(theta), imitation_gradient(world, theta)
        told += torch.stack([-2 * scale * g_rl @ rise, g_sft @ fall])
        known += torch.stack([rise @ rise, fall @ fall])
    for name, share, room in zip(("g_rl", "g_sft"), (told / known).tolist(), (0.6, 0.4)):
        if not 1 - room < share < 1 + room:
            raise Wrong(f"{name}: over the run {share:.2f} of the gradient that the samples have in expectation, expected about 1")


def exact_entropy(world, theta):
    """Nats a token, by enumeration over all prompts: log pi of both tokens."""
    return -(world.probabilities(theta) * world.token_logps(theta).sum(-1)).sum(1).mean().item() / 2


def imitation_gradient(world, theta):
    """The gradient of Eq. 2 over the expert's distribution."""
    toy = toy_of()
    share = torch.zeros_like(world.right)
    share.scatter_(1, world.expert, torch.tensor([[toy.EXPERT, 1 - toy.EXPERT]]).expand(len(world.right), 2))
    return torch.func.grad(lambda theta: -(share * world.token_logps(theta).sum(-1)).sum() / len(share) / toy.T)(theta)


def learn_case(seed, changed, steps, rise):
    student = f"cases {seed}"
    return [Case("learn", (Made("World", (student,)), seed, Made("settings", (changed,)), steps), {}, (), ROWS,
                 relations=relations_of(student, changed, steps, rise))]


@cases_of(11, "learn")
def learn_amft(seed):
    """A run from mu = 0.5 that must learn."""
    return learn_case(seed, dict(mu=0.5, eta_mu=0.05, eta_h=0.0, trace=0.9, warmup=0, meta_every=1), 60, 0.2)


@cases_of(11, "learn")
def learn_after_a_warm_up(seed):
    """The entropy's force, a look every third step, and no trace."""
    return learn_case(seed, dict(mu=0.3, eta_mu=0.03, eta_h=0.2, trace=0.0, warmup=6, meta_every=3), 30, -1.0)


@cases_of(11, "learn")
def learn_with_mu_fixed(seed):
    """Without eta_mu and eta_h mu stays, and no estimate is asked for."""
    return learn_case(seed, dict(mu=0.6, eta_mu=0.0, eta_h=0.0, trace=0.9, warmup=3, meta_every=2), 20, -1.0)
