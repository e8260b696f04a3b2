"""Tests of the course kit: the student's folder, the wrong answers that must lose their points and hear why, and
submissions that attack the grader.

    python -m pytest -q course/test_course.py
    AMFT_SLOW=1 python -m pytest -q course/test_course.py     # every wrong answer with 8 seeds, every attack in a process
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import cases  # noqa: E402
import check  # noqa: E402
import grade  # noqa: E402
import make_student  # noqa: E402
import verdict  # noqa: E402

SLOW = bool(os.environ.get("AMFT_SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="takes longer: AMFT_SLOW=1 runs it")
SOURCES = {module: path.read_text() for module, path in grade.FILES.items()}
EXERCISES = {e["id"]: e for e in grade.exercises()}


@lru_cache(maxsize=32)
def functions(source):
    return grade.functions_in(ast.parse(source))


def answer(exercise, body, function=None):
    """The sources with another body, a text without indent, of an exercise's function."""
    e = EXERCISES[exercise]
    name = function or list(e["functions"])[0]
    source = SOURCES[e["module"]]
    node, lines = functions(source)[name], source.splitlines(keepends=True)
    first = grade.body_of(node)[0]
    start = node.body[0].end_lineno if first is not node.body[0] else first.lineno - 1
    lines[start:node.end_lineno] = [" " * first.col_offset + line + "\n" for line in body.strip("\n").splitlines()]
    return {**SOURCES, e["module"]: "".join(lines)}


# Bodies as a student may write them, where the solution's own has a form that saves memory.
PLAIN = {
    1: "logits = at_least_float32(logits)\nreturn logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)",
    7: """
mu = torch.as_tensor(mu, dtype=theta.dtype, device=theta.device)
def step(mu, theta, m, v):
    g = (1 - mu) * g_rl + mu * g_sft
    return adamw(theta, g, m, v, g.norm(), state.step + 1, **how)
moved = [torch.zeros_like(theta) if last is None else trace * x for x in last or range(3)]
return torch.func.jvp(step, (mu, theta, state.m, state.v), (torch.ones_like(mu), *moved))[1]
""",
    8: """
P, G = rollouts.success.shape
values, scale = group_advantages(rollouts.success) if advantages is None else advantages
slopes = torch.zeros(P, dtype=d_theta.dtype, device=d_theta.device)
for p in range(P):
    part = rollouts.batch.rows(slice(p * G, (p + 1) * G))
    logps = (logps_of(model, part, config.temperature) * part.response_mask).sum(1)
    grads = torch.autograd.grad((scale * values[p] * logps).mean(), list(model.parameters()))
    slopes[p] = torch.cat([grad.reshape(-1) for grad in grads]) @ d_theta
return slopes.mean().item(), slopes.std().item() / math.sqrt(P)
""",
}
# And other right answers.
RIGHT = [
    (1, "x = logits.to(torch.promote_types(logits.dtype, torch.float32))\nreturn torch.log_softmax(x, 2)[torch.arange(len(ids))[:, None], torch.arange(ids.shape[1]), ids]"),
    (1, "x = logits if logits.dtype == torch.float64 else logits.float()\nreturn x.gather(-1, ids[..., None])[..., 0] - x.logsumexp(-1)"),
    (1, "import torch.nn.functional as F\nreturn -F.cross_entropy(at_least_float32(logits).transpose(1, 2), ids, reduction='none')"),
    (6, """
theta, m, v = adamw(theta, grad, state.m, state.v, torch.linalg.vector_norm(grad), state.step + 1, **how)
return theta, AdamState(m, v, state.step + 1)
"""),
    (7, """
def step(mu, theta, m, v):
    new, after = adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, AdamState(m, v, state.step), **how)
    return new, after.m, after.v
mu = torch.tensor(float(mu), dtype=theta.dtype)
moved = [0 * theta] * 3 if last is None else [trace * x for x in last]
return torch.func.jvp(step, (mu, theta, state.m, state.v), (torch.ones_like(mu), *moved))[1]
"""),
    (2, "kept = mask.bool()\nn = mask.sum() if n_tokens is None else n_tokens\nreturn logps[kept].sum().neg() / n", "sft_loss"),
    (2, "return beta * torch.einsum('bt,bt->b', logps - ref_logps, mask)", "implicit_reward"),
    (3, """
P, G = rewards.shape
others = torch.stack([torch.cat([rewards[:, :i], rewards[:, i + 1:]], 1).mean(1) for i in range(G)], 1)
centred = rewards - others
scale = float(((centred - centred.mean()) ** 2).mean().sqrt())
return (torch.zeros_like(rewards), 1.0) if scale < 1e-6 else (centred / scale, scale)
"""),
    (4, """
out = torch.zeros_like(values)
for b, row in enumerate(mask.tolist()):
    own = [t for t, on in enumerate(row) if on]
    running = following = 0.0
    for t in own[::-1]:
        running = float(rewards[b, t]) + gamma * following - float(values[b, t]) + gamma * lam * running
        following, out[b, t] = float(values[b, t]), running
return out, torch.where(mask > 0, out + values, torch.zeros_like(out))
"""),
    (4, """
B, T = values.shape
order = mask.argsort(stable=True, dim=1, descending=True)
n = mask.sum(1, keepdim=True)
on = (torch.arange(T) < n).to(values)
r, v = rewards.gather(1, order) * on, values.gather(1, order) * on
delta = r + gamma * torch.cat([v[:, 1:], torch.zeros(B, 1).to(v)], 1) - v
i = torch.arange(T)
factor = torch.where(i[None] >= i[:, None], (gamma * lam) ** (i[None] - i[:, None]).clamp(min=0).to(v), 0.0)
inner = (delta * on) @ factor.T * on
found = torch.zeros_like(values).scatter(1, order, inner)
return found, (found + values) * mask
"""),
    (5, """
n = mask.sum() if n_tokens is None else n_tokens
ratio = torch.exp(logps - old_logps)
best = torch.where(advantages >= 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
return -torch.einsum("bt,bt,bt->", best, advantages, mask) / n
"""),
    (5, """
import torch.nn.functional as F
A, r = advantages, (logps - old_logps).exp()
loss = -r * A + F.relu(r - 1 - clip) * A.clamp(min=0) + F.relu(1 - clip - r) * (-A).clamp(min=0)
return (loss * mask).sum() / (n_tokens if n_tokens is not None else mask.sum())
"""),
    (6, """
share = torch.minimum(torch.ones_like(norm), max_norm / (norm + 1e-6))
g = grad.mul(share)
m = torch.lerp(m, g, 1 - b1)
v = torch.addcmul(v * b2, g, g, value=1 - b2)
seen = v > 0
root = torch.where(seen, torch.where(seen, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v)) / (1 - b2 ** step) ** 0.5
return theta - lr * weight_decay * theta - lr / (1 - b1 ** step) * m / (root + eps), m, v
""", "adamw"),
    (6, """
defaults = dict(max_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8)
h = {**defaults, **how}
norm, n = (grad ** 2).sum() ** 0.5, state.step + 1
g = grad * min(1.0, h["max_norm"] / (norm.item() + 1e-6))
m = h["b1"] * state.m + (1 - h["b1"]) * g
v = h["b2"] * state.v + (1 - h["b2"]) * g ** 2
moved = h["lr"] * (m / (1 - h["b1"] ** n)) / ((v / (1 - h["b2"] ** n)).sqrt() + h["eps"])
return theta * (1 - h["lr"] * h["weight_decay"]) - moved, state._replace(m=m, v=v, step=n)
"""),
    (7, """
import torch.autograd.forward_ad as fw
with fw.dual_level():
    d = [torch.zeros_like(theta)] * 3 if last is None else [trace * x for x in last]
    x, m, v = (fw.make_dual(a, b) for a, b in zip((theta, state.m, state.v), d))
    g = fw.make_dual((1 - mu) * g_rl + mu * g_sft, g_sft - g_rl)
    return tuple(fw.unpack_dual(y).tangent for y in adamw(x, g, m, v, g.norm(), state.step + 1, **how))
"""),
    (8, """
P, G = rollouts.success.shape
w, s = advantages or group_advantages(rollouts.success)
found = []
for p in range(P):
    part = rollouts.batch.rows(slice(p * G, p * G + G))
    total = (logps_of(model, part, config.temperature) * part.response_mask).sum(1) @ (w[p] * s) / G
    found.append(float(parameters_to_vector(torch.autograd.grad(total, tuple(model.parameters()))) @ d_theta))
mean = sum(found) / P
return mean, math.sqrt(sum((x - mean) ** 2 for x in found) / (P - 1) / P)
"""),
    (9, """
force = config.eta_h * (target_entropy - entropy)
if config.controller == "paper":
    start, meta = mu, config.eta_mu * sum(s for s, e in estimates if e)
else:
    old, many = evidence
    new = [s / e for s, e in estimates if e]
    if new:
        old, many = memory * old, memory * many
    evidence = old + sum(new), many + len(new)
    weights = [odds * math.exp(-effect * evidence[0]), math.exp(evidence[1] * effect * effect / 2), odds * math.exp(effect * evidence[0])]
    start, meta = config.mu, config.eta_mu * (weights[2] - weights[0]) / sum(weights)
return max(config.mu_min, min(config.mu_max, start + meta + force)), evidence, (meta, force)
"""),
    (10, """
from collections import Counter
fields = fields_of(response)
formula = fields["formula"] if fields and "formula" in fields else None
if type(formula) is not str:
    return "no_answer"
left, *rest = formula.split("=")
if len(formula) > MAX_FORMULA or len(rest) > 1 or rest and rest[0].strip(" ") != f"{self.target}":
    return "illegal_formula"
try:
    numbers, value = parse(left)
except ValueError:
    return "illegal_formula"
if Counter(numbers) != Counter(self.numbers):
    return "illegal_number"
return "correct" if value is not None and value == self.target else "wrong_result"
"""),
    (10, """
import re
formula = (fields_of(response) or dict()).get("formula")
if not isinstance(formula, str): return "no_answer"
match = re.compile(r"([^=]*)(?:= *" + re.escape(str(self.target)) + " *)?").fullmatch(formula)
if match is None or len(formula) > MAX_FORMULA: return "illegal_formula"
try: used, value = parse(match[1])
except ValueError: return "illegal_formula"
if sorted(used) != sorted(self.numbers): return "illegal_number"
return ("wrong_result", "correct")[value == self.target]
"""),
    (11, """
world.generator.manual_seed(seed)
point, moments, rows = world.start, fresh(world.start), []
now = dict(mu=config.mu, evidence=(0.0, 0.0), target=None, d=None)
def look(t, g_rl, seen, scale):
    if now["d"] is None or config.eta_mu == 0:
        return []
    found = [amft.own_meta_gradient(g_rl, now["d"][0], seen.batch, scale)]
    if not (t - config.warmup) % config.meta_every:
        found += [amft.meta_gradient(world.model, now["d"][0], world.rollouts(point, 8, 4), config)]
    return found
t = 0
while t < steps:
    t += 1
    g_rl, g_sft, seen, scale = world.gradients(point, config)
    if t <= config.warmup:
        mu, found = 1.0, []
    else:
        if now["target"] is None:
            now["target"] = seen.entropy
        found = look(t, g_rl, seen, scale)
        now["mu"], now["evidence"], _ = amft.update_mu(now["mu"], seen.entropy, now["target"], found, now["evidence"], config)
        mu = now["mu"]
        now["d"] = amft.step_sensitivity(point, g_rl, g_sft, mu, moments, now["d"], config.trace, lr=lr)
    rows += [Row(t, point, g_rl, g_sft, mu, seen.entropy, scale, found, now["evidence"])]
    point, moments = amft.adamw_step(point, torch.lerp(g_rl, g_sft, mu), moments, lr=lr)
return rows, point
"""),
]


def edited(exercise, old, new):
    """The sources with one text of an exercise's plain answer, or of its solution, replaced."""
    e = EXERCISES[exercise]
    for whole in ([answer(exercise, PLAIN[exercise])] if exercise in PLAIN else []) + [SOURCES]:
        source = whole[e["module"]]
        for name in e["functions"]:
            node = functions(source)[name]
            lines = source.splitlines(keepends=True)
            text = "".join(lines[node.lineno - 1:node.end_lineno])
            if old in text:
                lines[node.lineno - 1:node.end_lineno] = [text.replace(old, new, 1)]
                return {**SOURCES, e["module"]: "".join(lines)}
    raise AssertionError(f"exercise {exercise} does not hold {old!r}")


# Exercise, a text of the solution, what a wrong answer has there, the hint that it must hear.
WRONG = [
    (1, "logits.log_softmax(-1)", "logits.softmax(-1).log()", "log_of_softmax"),
    (1, "logits.log_softmax(-1)", "logits.softmax(-1).clamp(min=1e-12).log()", "log_of_softmax"),
    (1, "logits.log_softmax(-1)", "logits.softmax(-1)", "probability"),
    (1, "logits.log_softmax(-1)", "logits", "raw_logit"),
    (1, "logits.log_softmax(-1)", "logits.log_softmax(1)", "wrong_axis"),
    (1, "ids.unsqueeze(-1)", "ids.roll(-1, 1).unsqueeze(-1)", "shifted_ids"),
    (1, "ids.unsqueeze(-1)", "logits.argmax(-1).unsqueeze(-1)", "likeliest"),
    (1, "return logits", "return -logits", "negated"),
    (1, "logits.log_softmax(-1)", "logits.detach().log_softmax(-1)", "no_gradient"),
    (1, "logits = at_least_float32(logits)", "", None),
    (1, "logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)",
     "logits.bfloat16().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1).to(logits.dtype)", None),
    (2, "-(logps * mask)", "-(logps.detach() * mask)", "sft_no_gradient"),
    (3, "scale < 1e-6", "scale < 1e-8", "noise_scaled"),
    (3, "scale < 1e-6", "scale < 1e-5", "silent_too_soon"),
    (3, "centred / scale, scale", "centred / (scale + 1e-8), scale", "added_to_scale"),
    (4, "torch.where(on_token, delta + gamma * lam * advantage, advantage)",
     "torch.where(on_token, delta + gamma * lam * advantage, 0)", "advantage_zeroed"),
    (4, "torch.where(on_token, values[:, t], next_value)", "torch.where(on_token, values[:, t], 0)", "next_value_zeroed"),
    (4, "return advantages, (advantages + values) * mask",
     "on = advantages[mask > 0]\n    return (advantages - on.mean()) / (on.std() + 1e-8) * mask, (advantages + values) * mask",
     "advantages_normalised"),
    (5, "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(0.8, 1.2)", "clip_fixed"),
    (5, "(logps - old_logps).exp()", "((logps - old_logps) * mask).sum(-1, keepdim=True).exp()", "sequence_ratio"),
    (5, "torch.minimum(ratio * advantages, clipped * advantages)",
     "torch.where(advantages < 0, torch.maximum(torch.minimum(ratio * advantages, clipped * advantages), 3 * advantages),"
     " torch.minimum(ratio * advantages, clipped * advantages))", "dual_clip"),
    (6, "theta = theta * (1 - lr * weight_decay) - lr * (m_hat / (root_hat + eps))",
     "theta = (theta - lr * (m_hat / (root_hat + eps))) * (1 - lr * weight_decay)", "decay_after_step"),
    (6, "v.clamp(min=1e-37)", "v.clamp(min=1e-9)", None),
    (8, "if advantages is None else advantages", "if advantages is None or not group_advantages(rollouts.success)[0].any() else advantages", None),
    (9, "log_ratio = effect * total", "log_ratio = torch.tensor(effect * total).float().item()", "single_precision"),
    (10, "right.strip(\" \") != str(self.target)", "right.strip() != str(self.target)", "only_spaces"),
    (10, "(equals and right.strip(\" \") != str(self.target))",
     "(equals and (not right.strip(\" \").isdigit() or int(right) != self.target))", "target_spelt"),
    (10, "(equals and right.strip(\" \") != str(self.target))",
     "(equals and (right != right.strip('\\n\\t') or right.replace(\" \", \"\") != str(self.target)))", None),
    (10, "len(formula) > MAX_FORMULA", "len(formula.strip()) > MAX_FORMULA", "too_long"),
    (2, "-(logps * mask).sum() / (mask.sum() if n_tokens is None else n_tokens)", "-(logps * mask).mean()", "sft_all_positions"),
    (2, "-(logps * mask).sum() / (mask.sum() if n_tokens is None else n_tokens)", "-((logps * mask).sum(1) / mask.sum(1)).mean()",
     "sft_row_means"),
    (2, "-(logps * mask)", "(logps * mask)", "sft_sign"),
    (2, "(logps * mask).sum()", "logps.sum()", "sft_no_mask"),
    (2, "(mask.sum() if n_tokens is None else n_tokens)", "mask.sum()", "sft_ignores_tokens"),
    (2, "(mask.sum() if n_tokens is None else n_tokens)", "len(mask)", "sft_per_sequence"),
    (2, "beta * (", "(", "reward_no_beta"),
    (2, "mask).sum(-1)", "mask).sum(-1) / mask.sum(-1)", "reward_mean"),
    (2, "logps - ref_logps", "ref_logps - logps", "reward_sign"),
    (2, "(logps - ref_logps)", "logps", "reward_no_reference"),
    (3, " * G / (G - 1)", "", "own_mean"),
    (3, "rewards.mean(1, keepdim=True)) * G / (G - 1)", "rewards.mean())", "batch_mean"),
    (3, "centred / scale, scale", "centred / centred.std(1, keepdim=True), scale", "group_std"),
    (3, "correction=0", "correction=1", "sample_std"),
    (3, "scale < 1e-6", "False", "division_by_nothing"),
    (3, "centred / scale, scale", "centred, scale", "not_scaled"),
    (3, "torch.zeros_like(centred), 1.0", "torch.zeros_like(centred), scale", None),
    (3, "centred.std(", "rewards.std(", "scale_of_rewards"),
    (4, "torch.where(on_token, values[:, t], next_value)", "values[:, t]", "environment_counts"),
    (4, "torch.where(on_token, delta + gamma * lam * advantage, advantage)",
     "torch.where(on_token, delta, 0) + gamma * lam * advantage", "environment_counts"),
    (4, "next_value = torch.zeros_like(values[:, 0])", "next_value = values[:, -1]", "bootstrapped"),
    (4, "+ gamma * next_value", "+ next_value", "no_gamma"),
    (4, "gamma * lam * advantage", "gamma * advantage", "no_lam"),
    (4, "gamma * lam * advantage", "lam * advantage", "lam_without_gamma"),
    (4, "delta + gamma * lam * advantage", "delta", "one_delta"),
    (4, " - values[:, t]", "", "no_baseline"),
    (4, "advantage * on_token", "advantage", "unmasked"),
    (4, "(advantages + values) * mask", "advantages", "returns_are_advantages"),
    (5, "torch.minimum", "torch.maximum", "maximum"),
    (5, "torch.minimum(ratio * advantages, clipped * advantages)", "clipped * advantages", "clipped_alone"),
    (5, "ratio.clamp(1 - clip, 1 + clip)", "ratio", "not_clipped"),
    (5, ".exp()", "", "log_ratio"),
    (5, "logps - old_logps", "old_logps - logps", "inverse_ratio"),
    (5, "-(surrogate", "(surrogate", "ppo_sign"),
    (5, "(surrogate * mask).sum()", "surrogate.sum()", "ppo_no_mask"),
    (5, "(mask.sum() if n_tokens is None else n_tokens)", "mask.sum()", "ppo_ignores_tokens"),
    (5, "-(surrogate * mask).sum() / (mask.sum() if n_tokens is None else n_tokens)",
     "-((surrogate * mask).sum(1) / mask.sum(1)).mean()", "ppo_row_means"),
    (5, "(logps - old_logps).exp()", "(logps - old_logps).detach().exp()", "ppo_detached"),
    (6, "(m_hat / (root_hat + eps))", "(m / (root + eps))", "no_bias_correction"),
    (6, "theta * (1 - lr * weight_decay)", "theta", "no_decay"),
    (6, "1 - lr * weight_decay", "1 - weight_decay", "decay_without_lr"),
    (6, ".clamp(max=1.0)", ".clamp(max=1.0) + weight_decay * theta; weight_decay = 0", "l2_decay"),
    (6, "(root_hat + eps)", "((root + eps) / math.sqrt(1 - b2 ** step))", "eps_before_correction"),
    (6, "root_hat + eps", "(v / (1 - b2 ** step) + eps).sqrt()", "eps_inside"),
    (6, ".clamp(max=1.0)", "", "always_scaled"),
    (6, "grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)", "grad", "not_clipped_norm"),
    (6, "grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)", "grad.clamp(-max_norm, max_norm)", "clipped_by_value"),
    (6, "(norm + 1e-6)", "(grad.norm() + 1e-6)", "norm_of_some"),
    (6, "v.clamp(min=1e-37).sqrt()", "v.sqrt()", "derivative_not_finite"),
    (6, "AdamState(m, v, state.step + 1)", "AdamState(m, v, state.step)", "step_not_counted"),
    (7, "(1 - mu) * g_rl + mu * g_sft", "mu * g_rl + (1 - mu) * g_sft", None),
    (7, "state.step + 1, **how)", "state.step + 1, **{**how, 'max_norm': 1e30})", "unclipped_derivative"),
    (7, "g.norm(), state.step", "g.norm().detach(), state.step", None),
    (7, "trace * d_v, d_norm", "trace * d_v, 0 * d_norm", "constant_clipping"),
    (7, "trace * d_m, trace * d_v", "0 * d_m, 0 * d_v", "trace_only_theta"),
    (7, "trace * x for x in last", "x for x in last", "trace_not_applied"),
    (7, "if last is None else", "if True else", "trace_missing"),
    (7, "(torch.ones_like(mu), *moved)", "(torch.ones_like(mu), moved[0], 0 * theta, 0 * theta)", "trace_only_theta"),
    (7, "(torch.ones_like(mu), *moved)", "(-torch.ones_like(mu), *moved)", "sensitivity_sign"),
    (8, "(scale * values[p] * logps)", "(values[p] * logps)", "standardised"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success, 1.0)", "without_baseline"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success - rollouts.success.mean(), 1.0)", "batch_baseline"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success - rollouts.success.mean(1, keepdim=True), 1.0)",
     "own_sample_in_baseline"),
    (8, "logps_of(model, part, config.temperature)", "logps_of(model, part)", "no_temperature"),
    (8, "part, config.temperature) * part.response_mask)", "part, config.temperature))", "whole_batch_mask"),
    (8, ".sum() / G", ".sum()", "sum_of_samples"),
    (8, " * batch.response_mask[rows]", "", "whole_batch_mask"),
    (8, "weighted, config, config.temperature)", "weighted, config)", "no_temperature"),
    (8, "group_advantages(rollouts.success) if advantages is None else advantages", "group_advantages(rollouts.success)",
     "given_ignored"),
    (8, "slopes.mean().item()", "slopes.sum().item()", "sum_of_prompts"),
    (8, "slopes.mean().item()", "slopes[slopes != 0].sum().item() / max(1, (slopes != 0).sum().item())", "silent_prompts_dropped"),
    (8, "slopes.std()", "slopes.std(correction=0)", "error_population"),
    (8, "math.sqrt(P)", "math.sqrt(P * G)", "error_over_samples"),
    (8, " / math.sqrt(P)", "", "error_not_of_mean"),
    (9, "(target_entropy - entropy)", "(entropy - target_entropy)", "entropy_sign"),
    (9, "fade * evidence[0]", "evidence[0]", None),
    (9, "fade * evidence[1]", "evidence[1]", "count_not_faded"),
    (9, "memory if zs else 1.0", "memory ** len(zs)", "fades_twice"),
    (9, "memory if zs else 1.0", "memory", "fades_in_silence"),
    (9, "slope / error for", "slope for", "slope_alone"),
    (9, "2 * math.sinh(log_ratio) / (zero + 2 * math.cosh(log_ratio))", "(1 if total > 0 else -1)", "sign_alone"),
    (9, "2 * math.sinh(log_ratio) / (zero + 2 * math.cosh(log_ratio))", "2 * math.sinh(log_ratio) / zero", "not_normalised"),
    (9, "math.exp(n * effect ** 2 / 2) / odds", "1 / odds", "no_count"),
    (9, "math.exp(n * effect ** 2 / 2) / odds", "math.exp(n * effect ** 2 / 2)", "no_odds"),
    (9, "mu = config.mu\n", "pass\n", "adds_up"),
    (9, "if error > 0", "", "zero_error"),
    (9, "min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)", "mu + meta_force + entropy_force",
     "not_clipped_mu"),
    (11, "(t - config.warmup) % config.meta_every == 0", "True", "looked_every_step"),
    (11, "target = seen.entropy if target is None else target", "target = seen.entropy", "target_moves"),
    (11, "sensitivity, config.trace, lr=lr", "None, config.trace, lr=lr", "no_trace"),
    (11, "taken = mu if t > config.warmup else 1.0", "taken = mu", "no_warm_up"),
    (11, "range(1, steps + 1)", "range(steps)", None),
    (11, "(1 - taken) * g_rl + taken * g_sft, state", "taken * g_rl + (1 - taken) * g_sft, state", None),
    (11, "world.generator.manual_seed(seed)", "pass", None),
    (11, "return log, theta", "return log, world.start", None),
    (11, "theta, g_rl, g_sft, mu, state, sensitivity", "theta, g_sft, g_rl, mu, state, sensitivity", None),
    (10, "sorted(used) != sorted(self.numbers)", "set(used) != set(self.numbers)", "numbers_as_a_set"),
    (10, "sorted(used) != sorted(self.numbers)", "tuple(used) != tuple(self.numbers)", "numbers_in_order"),
    (10, "sorted(used) != sorted(self.numbers)", "False", "numbers_not_checked"),
    (10, "sorted(self.numbers)", "sorted(fields_of(response).get('number'))", "number_field"),
    (10, "value == self.target", "value == 24", "fixed_target"),
    (10, "right.strip(\" \") != str(self.target)", "False", "stated_target"),
    (10, "(equals and right", "(right", "equals_required"),
    (10, "len(formula) > MAX_FORMULA or ", "", "too_long"),
    (10, "value == self.target", "value is None or value == self.target", "zero_division"),
    (10, "if not isinstance(formula, str)", "if formula is None", None),
]
# Exercise, a whole body, the hint.
BODIES = [
    (7, """
h = 1e-5
def step(mu):
    after, new = adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
    return after, new.m, new.v
return tuple((a - b) / (2 * h) for a, b in zip(step(mu + h), step(mu - h)))
""", "finite_difference"),
    (7, """
h = 1e-5
starts = [(0.0 * theta if last is None else trace * x) for x in last or (theta,) * 3]
def step(s):
    at = [x + s * d for x, d in zip((theta, state.m, state.v), starts)]
    after, new = adamw_step(at[0], (1 - mu - s) * g_rl + (mu + s) * g_sft, AdamState(at[1], at[2], state.step), **how)
    return after, new.m, new.v
ends = {s: step(s * h) for s in (-2, -1, 1, 2)}
return tuple((8 * (b - a) - (d - c)) / (12 * h) for c, a, b, d in zip(*(ends[s] for s in (-2, -1, 1, 2))))
""", "finite_difference"),
    (7, "return -how['lr'] * (g_sft - g_rl), torch.zeros_like(theta), torch.zeros_like(theta)", None),
    (4, "return (rewards - values) * mask, rewards * mask", None),
    (8, "return 0.0, 0.0", None),
    (5, "return logps.sum() * 0", None),
    (9, "return mu, evidence, (0.0, 0.0)", None),
    (10, "return 'correct' if str(self.target) in response else 'wrong_result'", None),
    (11, "return [], world.start", None),
    (11, "row = Row(1, world.start, world.start, world.start, 1.0, 1.0, 1.0, [], (0.0, 0.0))\nreturn [row._replace(t=t + 1) for t in range(steps)], world.start", None),
]


@lru_cache
def dumped(module, name):
    return ast.dump(functions(SOURCES[module])[name])


def others_unchanged(sources, exercise):
    """Do the other exercises' functions still hold the solution's bodies?"""
    for module, source in SOURCES.items():
        for e in EXERCISES.values():
            if e["module"] == module and e["id"] != exercise and sources[module] != source:
                for name in e["functions"]:
                    assert ast.dump(functions(sources[module])[name]) == dumped(module, name)


CASES = [(n, edited(n, old, new), hint, new) for n, old, new, hint in WRONG] + [
    (n, answer(n, body), hint, body) for n, body, hint in BODIES]


def answers():
    """The sources with the solution's bodies, as far as they may be handed in, and plain ones."""
    return merged(*((n, PLAIN[n]) for n in PLAIN))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_wrong_answers_lose_their_points_and_hear_why(case):
    """Each is judged as grade.py does, but in this process. What is wrong in one exercise leaves the others as they are."""
    exercise, sources, hint, text = case
    e = EXERCISES[exercise]
    if SLOW:
        others_unchanged(sources, exercise)
    for seed in range(8 if SLOW else 1):
        passed, message = grade.judge(e, sources, [seed])
        assert not passed, f"seed {seed}: {text} passes"
        first = message.splitlines()[0]
        said = [name for name, question in e["hints"].items() if question in first]
        assert said == [hint] if hint else len(said) <= 1, f"seed {seed}: {text}: {message}"


def test_the_solution_passes():
    """The repository's own bodies, and the plain ones."""
    plain = answers()
    for e in EXERCISES.values():
        passed, message = grade.judge(e, plain, [0])
        assert passed, message
        if e["id"] in PLAIN:
            passed, message = grade.judge(e, SOURCES, [0])
            assert passed, message


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case[0])
def test_other_right_answers_pass(case):
    """A test or a refusal that takes points from a right answer in another form."""
    exercise, body, *function = case
    function = function[0] if function else list(EXERCISES[exercise]["functions"])[-1]
    passed, message = grade.judge(EXERCISES[exercise], answer(exercise, body, function), range(8 if SLOW else 1))
    assert passed, message


def test_there_are_twenty_right_answers():
    assert len(RIGHT) >= 20 and {case[0] for case in RIGHT} == set(EXERCISES)


# --- What is in the folder that students get ----------------------------------------------------------------------


def test_the_table_of_exercises_is_whole():
    """A test or a hint that is listed nowhere, listed and not there, or points that are not 60."""
    assert list(EXERCISES) == list(range(1, 12)) and sum(e["points"] for e in EXERCISES.values()) == 74
    listed = [(e["id"], name) for e in EXERCISES.values() for name in e["tests"]]
    assert sorted(listed) == sorted((exercise, name) for name, (exercise, *_) in cases.TESTS.items())
    text = (HERE / "cases.py").read_text()
    for e in EXERCISES.values():
        assert set(e["hidden"]) < set(e["tests"]) and e["points"] == sum(e["functions"].values())
        for name in e["functions"]:
            assert name in functions(SOURCES[e["module"]])
            assert any(cases.TESTS[test][1] == name and test not in e["hidden"] for test in e["tests"])
        for hint in e["hints"]:
            assert f'"{hint}"' in text or f"{hint}=" in text, f"{hint}: no test says it"
    assert len({hint for _, _, hint, _ in CASES}) > 80


def test_the_handout_states_the_facts_of_the_table():
    """A handout whose points, minutes, lines or limits are not the grader's."""
    text = (HERE / "handout.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \| .*? \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    assert [(int(n), re.findall(r"`([\w.]+)`", names), *map(int, numbers)) for n, names, *numbers in rows] == [
        (e["id"], list(e["functions"]), e["points"], e["minutes"], e["lines"]) for e in EXERCISES.values()]
    for name in [*set(check.modules()) - {"amft"}, *check.STORED, f"{grade.SECONDS} seconds", f"{grade.MIB} MiB", f"seed {grade.VISIBLE}"]:
        assert name in text, name


NEEDED = {"harness/arguments.py", "harness/cache.py", "harness/loading.py", "harness/memory.py", "harness/pictures.py",
          "harness/run.py", "harness/screen.py", "harness/value.py", "recipes/checkpoints.py", "recipes/large.py",
          "recipes/problems.py"}


def test_what_amft_imports_goes_with_it():
    """A file that a run imports, perhaps on demand, and that student, hunt and autograder would lack; or too many."""
    assert NEEDED <= set(grade.beside())
    assert not [name for name in grade.beside() if "test_" in name or not name.startswith(("harness/", "recipes/"))]


def python(folder, *words):
    """What a student starts in the folder: nothing of the repository is on its path."""
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})


def test_a_folder_that_is_solved_runs(tmp_path):
    """A kit whose amft.py does not find what it imports: also a recipe, which other tokens than the usual 40 ask for."""
    make_student.make(tmp_path / "student", upto=12)
    flags = "--out run --steps 1 --prompts 2 --samples 2 --sft-batch 2 --demos 4 --eval-n 1 --max-new-tokens 41"
    done = python(tmp_path / "student", "amft.py", "--device", "cpu", *flags.split())
    assert done.returncode == 0, done.stderr
    recipes = ", ".join(path.stem for path in (tmp_path / "student" / "recipes").glob("*.py"))
    done = python(tmp_path / "student", "-c", f"from recipes import {recipes}")
    assert "problems" in recipes and done.returncode == 0, done.stderr
    assert '"final"' in (tmp_path / "student" / "run" / "metrics.jsonl").read_text()


def test_a_students_folder(tmp_path):
    """It holds what it should, its tests fail on each stub for being one, and all pass on the solution."""
    out = tmp_path / "student"
    make_student.make(out)
    assert make_student.check(out, solution=SLOW) == []
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"amft.py", "tasks.py", "requirements.txt", "test_exercises.py", "conftest.py", "exercises.toml",
            "check.py", "verdict.py", "visible.json", "base/model.safetensors", "handout.md", "written.md", "toy.py", "meta-gradient.png", *NEEDED} <= files
    for name in ("handout.md", "written.md"):  # every file that they name is there
        for linked in re.findall(r"\]\(([^)]+)\)", (out / name).read_text()):
            assert linked in files, linked
    assert not [name for name in files if re.search("mutants|recorded|metrics|grade|cases|answers.md|instructor|test_amft|test_course|[.]git", name)]
    hidden = [name for e in EXERCISES.values() for name in e["hidden"]]
    assert hidden and not any(name in (out / file).read_text() for name in hidden for file in ("visible.json", "exercises.toml"))
    for module, source in SOURCES.items():
        made = (out / f"{module}.py").read_text()
        for e in EXERCISES.values():
            for name in e["functions"] if e["module"] == module else ():
                mine, theirs = functions(made)[name], functions(source)[name]
                assert ast.get_docstring(mine) == ast.get_docstring(theirs) and ast.dump(mine.args) == ast.dump(theirs.args)
                assert grade.is_stub(mine)
                assert made.splitlines()[mine.lineno - 1] == source.splitlines()[theirs.lineno - 1]  # its comment on shapes
                body = "\n".join(source.splitlines()[theirs.lineno:theirs.end_lineno])
                for comment in re.findall(r"(?<=# )\w+ .*$", body, re.M):
                    assert comment not in made
        assert grade.remarks({module: made}, list(EXERCISES.values())) == []


def test_comments_of_a_body_go_and_those_of_a_signature_stay():
    """A comment that hands out the answer; a signature that is cut with the body."""
    source = """class A:
    def f(self,
          x: int = 3) -> int:  # (B, T)
        # the answer is 4
        return x + 1  # 4

        # and 5

    def g(self):
        \"\"\"Says.

        More.\"\"\"
        # secret
        def helper():
            # secret
            return 3
        return helper()


def h():  # stays
    return 1
"""
    made = make_student.emptied(source, {"A.f": EXERCISES[1], "A.g": EXERCISES[2]})
    assert "answer" not in made and "secret" not in made and "x + 1" not in made and "and 5" not in made
    assert all(kept in made for kept in ("def f(self,\n          x: int = 3) -> int:  # (B, T)\n        # Exercise 1, 4 points",
                                         'Says.\n\n        More."""\n        # Exercise 2', "def h():  # stays\n    return 1\n"))
    assert all(grade.is_stub(node) == (name != "h") for name, node in functions(made).items())


def test_a_folder_with_the_first_exercises_solved(tmp_path):
    """--upto that empties too much or too little, and a folder that is written over."""
    make_student.make(tmp_path / "student", upto=4)
    for e in EXERCISES.values():
        for name in e["functions"]:
            node = functions((tmp_path / "student" / f"{e['module']}.py").read_text())[name]
            assert grade.is_stub(node) == (e["id"] >= 4)
    with pytest.raises(ValueError, match="not empty"):
        make_student.make(tmp_path / "student")


def test_a_years_variant(tmp_path, monkeypatch):
    """--year whose numbers are those of other years, or that the grader does not share; --exercises that solves the wrong ones."""
    make_student.make(tmp_path / "a", only=(4, 11), year="2027")
    make_student.make(tmp_path / "b", only=(4, 11))
    assert (tmp_path / "a" / "visible.json").read_text() != (tmp_path / "b" / "visible.json").read_text()
    for e in EXERCISES.values():
        for name in e["functions"]:
            node = functions((tmp_path / "a" / f"{e['module']}.py").read_text())[name]
            assert grade.is_stub(node) == (e["id"] in (4, 11))
    assert grade.visible_seed() == grade.VISIBLE
    monkeypatch.setenv("AMFT_COURSE_YEAR", "2027")
    assert grade.visible_seed() == grade.visible_seed("2027") in grade.VERIFIED
    assert all(grade.visible_seed() not in grade.hidden_seeds(f"student {i}") for i in range(99))


@slow
def test_a_folder_whose_tests_are_wrong_is_noticed(tmp_path):
    """A --check that passes whatever the folder's tests do."""
    out = tmp_path / "student"
    make_student.make(out, upto=10)
    text = (out / "visible.json").read_text()
    frozen = json.loads(text)
    frozen["tests"]["grade_uses_the_deal"] = []
    (out / "visible.json").write_text(json.dumps(frozen))
    assert "grade_uses_the_deal: passes without exercise 10" in make_student.check(out, upto=10, solution=False)
    frozen["tests"]["gae_values"][0] = frozen["tests"]["gae_of_whole_rows"][0]
    assert make_student.outcomes(out).keys() > {"gae_values"}


# --- Submissions --------------------------------------------------------------------------------------------------


def submitted(folder, sources):
    folder.mkdir(parents=True, exist_ok=True)
    for module, source in sources.items():
        (folder / f"{module}.py").write_text(source)
    return folder


def merged(*changes):
    """One pair of sources of several bodies, (exercise, body)."""
    sources = dict(SOURCES)
    for exercise, body in changes:
        e = EXERCISES[exercise]
        for name in e["functions"]:
            source = sources[e["module"]]
            node, lines = functions(source)[name], source.splitlines(keepends=True)
            first = grade.body_of(node)[0]
            start = node.body[0].end_lineno if first is not node.body[0] else first.lineno - 1
            lines[start:node.end_lineno] = [" " * first.col_offset + line + "\n" for line in body.strip("\n").splitlines()]
            sources[e["module"]] = "".join(lines)
    return sources


def scores(results):
    return [row["score"] for row in results["tests"]]


def test_doing_nothing_scores_nothing(tmp_path, monkeypatch):
    """Points for stubs; results.json that is not whole after each exercise."""
    make_student.make(tmp_path / "student")
    states, true = [], grade.write
    monkeypatch.setattr(grade, "write", lambda path, results: (states.append(json.dumps(results)), true(path, results)))
    results = grade.grade([tmp_path / "student"], tmp_path / "results.json", say=lambda *_, **__: None)
    assert len(states) == 12 and [state.count("cut off before") for state in states] == list(range(11, -1, -1))
    assert results["score"] == 0 and scores(results) == [0] * 11
    assert all("not done: " in row["output"] for row in results["tests"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["output"] == ""  # nothing was changed around the exercises


LIMITS = """
held = []
while True:
    held.append(torch.ones(2 ** 25))
"""
ESCAPE = """
for kind in ().__class__.__base__.__subclasses__():
    if kind.__name__ == "_wrap_close":
        system = kind.__init__.__globals__
"""


def test_hostile_submissions_lose_one_exercise_and_the_rest_is_graded(tmp_path, monkeypatch):
    """By the command's own path: refused bodies start no process, the others are stopped."""
    sources = merged(
        (1, "import sys\nsys.modules[__name__] = None"), (2, "while True:\n    pass"), (3, LIMITS),
        (4, "while True:\n    print('x' * 100)"), (5, "raise SystemExit(0)"), (6, "import os\nos._exit(0)"),
        (7, "import os\nwhile True:\n    os.fork()"), (8, "return open('amft.py').read()"),
        (9, "raise NotImplementedError"))
    true = grade.in_process
    monkeypatch.setattr(grade, "in_process", lambda e, name, source, tests, seconds, prefix: true(
        e, name, source, tests, 4 if e["id"] == 2 else seconds, prefix=prefix))
    some = list(range(1, 11)) if SLOW else [1, 3, 6, 7, 8, 9, 10]  # two of them start a process
    results = grade.grade([submitted(tmp_path / "in", sources)], tmp_path / "results.json", only=some, say=lambda *_, **__: None)
    said = [row["output"] for row in results["tests"]]
    assert scores(results) == [0] * (len(said) - 1) + [4], said
    assert all(len(text.splitlines()) <= 4 for text in said)
    parts = ("import of sys is not allowed", "longer than 4 s", "more memory than", "printing without end", "SystemExit",
             "import of os is not allowed", "import of os is not allowed", "open is not allowed", "not done", "tests passed")
    for number, text in zip(some, said):
        assert parts[number - 1] in text, text


REFUSED = [
    "sys.modules[__name__] = None", "sys.exit()", "os._exit(0)", "os.fork()", "exit()", "quit()", "import amft", "from amft import gae",
    "import test_exercises", "import importlib", "from torch import os", "import torch.multiprocessing", "import numpy",
    "return torch.os", "return torch.multiprocessing.Process()", "t = torch\nt.os", "return [torch][0]", "torch.load('x')", "torch.save(1, 'x')",
    "return torch.utils.data", "return torch.hub.load('x')", "import functools\nreturn functools.sys", "import torch as t\nreturn t.ops.x",
    "from torch import nn\nreturn nn.modules.module", "from torch.nn import functional as F\nreturn F.importlib", "return math.__loader__",
    "open('amft.py')", "eval('1')", "exec('1')", "compile('1', '', 'exec')", "__import__('os')", "globals()", "vars()", "getattr(torch, 'o' + 's')",
    "setattr(torch, 'allclose', None)", "torch.allclose = lambda *a, **k: True", "torch.Tensor.abs = None", "del torch.abs",
    "for torch.abs in [1]: pass", "with a as torch.abs: pass", "return (lambda: 0).__globals__", "return ().__class__",
    "'{0.__class__}'.format(1)", "(i for i in ()).gi_frame", "try: 1 / 0\nexcept Exception as e: return e.__traceback__.tb_frame",
    "class Fake:\n    def __eq__(self, other): return True", "def __eq__(a, b): return True", "type('F', (), {})", "global gae\ngae = None",
    "match 1:\n    case int(__class__=x): return x", "inspect.currentframe()", "breakpoint()", "input()", "import gc", "import ctypes",
    "async def f(): pass", "return torch.get_device_module('cpu')", "torch.set_default_dtype(torch.float16)", "return math", "x = [].__len__",
    "return torch.backends.cpu.get_cpu_capability()", "torch.zeros(1).numpy().tofile('x')", "return torch.func", "return torch.zeros(1).share_memory_()",
]


def refuse(body, function="step_sensitivity"):
    """What check.py says of a body, if it says something."""
    node = ast.parse("def f():\n" + "".join(f"    {line}\n" for line in body.splitlines())).body[0]
    exercise = next(e for e in EXERCISES.values() if function in e["functions"])
    check.refusal(node, f"{exercise['module']}.py", exercise["module"], function)


@pytest.mark.parametrize("body", REFUSED)
def test_bodies_that_are_refused(body):
    """A way to files, processes, other modules or the tests that refusal() does not see."""
    with pytest.raises(grade.Refused, match="not allowed in a graded body|is not there"):
        refuse(body)


FINE = [
    "import math\nreturn math.erf(1)", "from fractions import Fraction\nreturn Fraction(1)", "import itertools\nreturn list(itertools.product((1, 2)))",
    "import torch.nn.functional as F\nreturn F.log_softmax(theta, -1)", "from torch.func import jvp\nreturn jvp", "return state._replace(step=1)",
    "from torch import nn\nreturn nn.functional.softmax(theta)", "return torch.nn.functional.cross_entropy(theta, g_rl)", "p = theta\np.grad = None",
    "with torch.no_grad():\n    x = torch.zeros(3)", "return torch.autograd.grad(theta, g_rl)", "return torch.autograd.functional.jvp(adamw, theta)",
    "def helper(x):\n    nonlocal y\n    return x\ny = 1", "return [x for x in range(3) if x]", "print('hello')", "import json\nreturn json.loads('1')",
    "import re\nreturn re.fullmatch('a', 'b')", "for _ in range(3): pass", "return theta.copy()", "return torch.linalg.vector_norm(theta)",
    "theta.select(0, 1)", "copy = theta.clone()\nreturn copy", "id = 3\nreturn [id for _ in 'ab']", "return (lambda input: input)(1)", "return theta.trace()",
    # What the handout lists and was refused once.
    "return torch.nn.utils.parameters_to_vector(theta)", "import re\nreturn re.compile('a', re.IGNORECASE).fullmatch('b')",
    "return torch.distributions.Categorical(logits=theta).entropy()", "import statistics\nreturn statistics.NormalDist().cdf(1.0)",
    "return type(theta) is str", "from torch.distributions import Categorical\nreturn Categorical(logits=theta).log_prob(g_rl)",
    "from functools import partial, reduce\nreturn partial(adamw, lr=1.0)", "from collections import Counter\nreturn Counter([1]).most_common()",
    "try:\n    return mu\nexcept ZeroDivisionError as error:\n    raise ValueError(f'{error}')", "assert mu > 0, 'mu'", "return -theta[..., None].mT",
    "while (n := len(how)) > 3: break\nreturn n", "return state.m * how['lr'], state.v, state.step", "return how.get('b1', 0.9)",
    "return torch.finfo(theta.dtype).eps", "return AdamState(theta, theta, 1)", "return theta.new_tensor(mu).double().item()",
    "from torch.nn.utils.rnn import pad_sequence\nreturn pad_sequence([theta])", "return ' '.join(map(str, [1])).strip()", "x: float = 1.0\nreturn x",
    "import torch.autograd.forward_ad as fw\nwith fw.dual_level():\n    return fw.unpack_dual(fw.make_dual(theta, theta)).tangent",
    "return torch.func.jacfwd(lambda m: m * theta)(mu)", "return torch.stack([theta, g_rl]).amax(0).clamp_min(0)", "return max(theta.tolist(), key=abs)",
]


@pytest.mark.parametrize("body", FINE)
def test_bodies_that_are_not_refused(body):
    """A refusal of what an honest answer may say."""
    refuse(body)


# Bodies that were not refused, as if a way around the refusal had been found: what the process itself withstands.
FORGE = """
for fd in range(3, 40):
    try:
        system["write"](fd, b'{"answer": true, "changed": false}\\n' * 99)
    except OSError:
        pass
system["_exit"](0)
"""
UNCHECKED = [
    (ESCAPE + "system['fork']()", "os.fork"), (ESCAPE + "system['_exit'](0)", "before there was an answer"),
    (ESCAPE + "system['system']('true')", "os.system"), (ESCAPE + "system['kill'](1, 0)", "os.kill"),
    (ESCAPE + "system['open']('amft.py', 0)", "opening amft.py"), (ESCAPE + FORGE, "a bool, expected a tensor"),
    ("import os", "import of os"), ("return open('amft.py')", "NameError"), ("return torch.ones(2 ** 30)", "more memory than"),
    ("return torch.load('x')", "opening x"), ("torch.save(1, 'x')", "iostream error"),
    ("try:\n    torch.load('x')\nexcept BaseException: pass\nreturn logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)",
     "opening x"),
    ("def f(): return f()\nreturn f()", "RecursionError"),
]


def in_process(exercise, body, **how):
    function = list(EXERCISES[exercise]["functions"])[0]
    tests = grade.asked(EXERCISES[exercise], function, [0])
    return grade.in_process(EXERCISES[exercise], function, answer(exercise, body)[EXERCISES[exercise]["module"]], tests, **how)


@pytest.mark.parametrize("body, said", [pytest.param(*row, marks=slow) for row in UNCHECKED])
def test_what_the_process_withstands(body, said):
    """A body that, unrefused, gets a verdict, a file or a process of its own."""
    passed, message, measured = in_process(1, body, checked=False)
    assert not passed and said in message, message
    assert measured["mib"] < 800


# Attacks on what compares, each with a return that is no answer. Refused or not, they earn nothing.
PATCHES = {
    "update_wrapper": """
from functools import update_wrapper
from types import SimpleNamespace
update_wrapper(torch.Tensor, SimpleNamespace(abs=lambda self: self.detach() * 0), assigned=("abs",), updated=())
""",
    "wraps": "import functools\nfunctools.wraps(gae, updated=('_' + '_globals_' + '_',))(gae)\n",
    "le": "torch.Tensor.le = torch.Tensor.__le__ = lambda *a: torch.ones(1).bool()\n",
    "equal": "torch.equal = torch.allclose = lambda *a, **k: True\n",
    "near": "import verdict\nverdict.near = lambda *a: True\nverdict.judged = lambda *a: None\n",
    "functional": "from torch import functional as TF\nTF.torch.Tensor.abs = lambda self: self * 0\n",
    "fx": "from torch import fx\n", "numbers": "from fractions import numbers\nnumbers.ABCMeta('A', (), {})\n",
}


@pytest.mark.parametrize("name", PATCHES)
def test_no_patch_of_what_compares_earns_points(name):
    """functools.update_wrapper on torch.Tensor made every comparison true, as long as student code ran where it was made."""
    body = PATCHES[name] + "return torch.zeros(1)"
    passed, message = grade.judge(EXERCISES[4], answer(4, body), [0])
    assert not passed and message.startswith("refused: amft.py, line ") and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "update_wrapper" else slow) for name in PATCHES])
def test_nor_does_it_where_it_is_not_refused(name):
    """As if the list had a hole: the body runs, with every import that it wants, and is judged elsewhere."""
    body = PATCHES[name] + "return torch.zeros(1)"
    passed, message, _ = in_process(4, body, checked=False)
    assert not passed, message


def test_torch_may_import_in_a_bodys_name():
    """as_tensor, first called in a body, imports torch.storage by the body's own import, and was refused."""
    passed, message, _ = in_process(7, PLAIN[7])
    assert passed, message


# Ten attacks that are not refused, or not for what they want. None knows an answer.
ATTACKS = [
    (4, "torch.Tensor.grad = torch.Tensor.data\nreturn rewards, values"),  # an attribute that may be stored, of a class
    (4, "values.data = torch.zeros_like(values)\nreturn rewards, rewards"),  # the arguments, so that 0 is expected
    (1, "held = []\nheld.append(held)\nreturn held"),  # an answer that holds itself
    (1, "return {i: 'x' * 10000 for i in range(10 ** 4)}"),  # one that floods the pipe
    (1, "raise ValueError('4 of 4 tests passed with 4 seeds ' * 10 ** 6)"),  # a message in the place of a verdict
    (10, "import re\nre.fullmatch('(a+)+b', 'a' * 60)\nreturn 'correct'"),  # time that no signal interrupts
    (9, "nan = float('nan')\nreturn nan, (nan, nan), (nan, nan)"),  # what is not unequal
    (3, "return rewards.to_sparse().coalesce(), 1.0"),  # a layout that cannot be compared
    (5, "return torch.empty(0, dtype=torch.float64, device='meta').sum().requires_grad_()"),  # a value that is nowhere
    (11, "g = world.utility_gradient(world.start)\nlog = [Row(t + 1, world.start - t * 0.0 * g, -g, g, 1.0, 1.0, 0.5, [], (0.0, 0.0)) "
         "for t in range(steps)]\nreturn log, world.start + 5 * g"),  # a log that is written, not run
]


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case[0] in (9, 10) else slow) for case in ATTACKS], ids=lambda case: str(case[0]))
def test_attacks_that_run_earn_nothing(case):
    """By the grader's own path: 0 points, one line."""
    exercise, body = case
    e = EXERCISES[exercise]
    name = list(e["functions"])[0]
    points, message, _ = grade.graded(e, name, answer(exercise, body), [0], 8 if exercise == 10 else 60, ())
    assert points == 0 and message and len(message) < 1500 and len(message.split("\n")[0]) < 900, message


def test_what_is_no_plain_data_is_no_answer():
    """A reply whose tensors lie about their bytes, or that is no reply, and passes or stops the grader."""
    for data in ({"tensor": ["float64", [3], "AAAA"]}, {"tensor": ["float64", [-1], ""]}, {"tensor": ["object", [1], ""]},
                 {"tensor": ["float64", [10 ** 9], ""]}, {"tensor": 3}, {"made": [1]}, {"set": []}, {"tuple": 1}, [], {"a": 1, "b": 2}):
        with pytest.raises(ValueError):
            verdict.unpacked(data)
    tests = grade.asked(EXERCISES[4], "gae", [0])
    for line in (b"{}", b"[]", b"1e999", b'{"answer": ' + b"[" * 9999 + b"]" * 9999 + b"}", b'{"answer": NaN}', b'{"answer": {"tuple": [null, 3]}}',
                 b'{"answer": {"tuple": [{"tensor": ["float64", [1], "x"]}, 1]}}', b"9" * 9999, b'{"error": 3}', b"\xff"):
        passed, message = grade.told(tests, grade.replies_of((line + b"\n") * 9), "it ended")
        assert not passed and message
    import torch
    for value in (torch.randn(2, 3), torch.zeros(0, 4), torch.ones(3).bfloat16(), torch.tensor(3), (1, 2.5, "x", None, [True]), {"a": 1}):
        again = verdict.unpacked(json.loads(json.dumps(verdict.packed(value))))
        assert torch.equal(again, value) and again.dtype == value.dtype if isinstance(value, torch.Tensor) else again == value


def test_the_process_with_student_code_has_no_answers():
    """A reference's body, or the cases, in the process where a student's body runs: what stands there can be found."""
    code = (f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]; import grade; "
            "module = grade.emptied('amft', ['adamw', 'adamw_step']); grade.check.modules(); grade.check.attributes(); "
            "assert 'cases' not in sys.modules and 'test_exercises' not in sys.modules; "
            "assert len(module.adamw.__code__.co_names) == 1 and len(module.gae.__code__.co_names) > 3")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_what_a_submission_may_look_like(tmp_path):
    """Folders in folders, one file alone, links, garbage; a function that Python cannot read leaves the others."""
    submitted(tmp_path / "deep" / "a" / "b", SOURCES)
    assert grade.read_submission([tmp_path / "deep"]) == (SOURCES, [])
    assert grade.read_submission([tmp_path / "deep" / "a" / "b" / "tasks.py"])[0] == {"tasks": SOURCES["tasks"]}
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "amft.py").symlink_to(HERE.parent / "amft.py")
    (tmp_path / "link" / "tasks.py").write_bytes(b"\xff\xfe\x00")
    sources, notes = grade.read_submission([tmp_path / "link"])
    assert sources == {} and "a link" in notes[0] and "UTF-8" in notes[1]
    os.mkfifo(tmp_path / "deep" / "tasks.py")
    assert grade.read_submission([tmp_path / "deep"])[0] == SOURCES
    broken = SOURCES["amft"].replace("    ratio = (logps - old_logps).exp()", "    ratio = (logps - old_logps.exp()")
    with pytest.raises(grade.Refused, match="line .*: Python cannot read"):
        grade.find(broken, "amft.py", "ppo_loss")
    assert ast.dump(grade.find(broken, "amft.py", "gae")) == ast.dump(functions(SOURCES["amft"])["gae"])
    for text in ("(" * 100000, "\0", "def gae(:", "-" * 100000 + "1"):
        with pytest.raises(grade.Refused):
            grade.find(text, "amft.py", "gae")
    broken = SOURCES["tasks"].replace("used, value = parse(expression)", "used, value = = parse(expression)")
    with pytest.raises(grade.Refused, match="Python cannot read"):
        grade.find(broken, "tasks.py", "Deal.grade")
    broken = SOURCES["tasks"] + "\n)\n"
    assert ast.dump(grade.find(broken, "tasks.py", "Deal.grade")) == ast.dump(functions(SOURCES["tasks"])["Deal.grade"])
    changed = SOURCES["amft"].replace('    "sft-rl": SFTThenRL,\n', "")
    assert "was not used" in grade.remarks({"amft": changed}, list(EXERCISES.values()))[0]
    assert grade.remarks(answer(4, "return None"), list(EXERCISES.values())) == []


def test_two_files_of_one_name(tmp_path):
    """One of two amft.py that is graded in silence: the bug hunt's folder holds one, too."""
    submitted(tmp_path / "top", SOURCES)
    submitted(tmp_path / "top" / "hunt", {"amft": "x = 1"})
    sources, notes = grade.read_submission([tmp_path / "top"])
    assert sources == SOURCES and notes == ["amft.py: the one at the top was read, not hunt/amft.py"]
    submitted(tmp_path / "deep" / "mine", SOURCES)
    submitted(tmp_path / "deep" / "hunt", {"amft": "x = 1"})
    sources, notes = grade.read_submission([tmp_path / "deep"])
    assert sources == {name: SOURCES[name] for name in ("tasks", "toy")} and "there are 2, and none was read: hunt/amft.py, mine/amft.py" in notes[0]
    results = grade.grade([tmp_path / "deep"], tmp_path / "r.json", only=[4], say=lambda *_, **__: None)
    assert results["score"] == 0 and "no amft.py was read" in results["tests"][0]["output"] and notes[0] in results["output"]


LONG = {"minus": "return " + "-" * 3000 + "1", "sum": "return " + "+".join(["1"] * 20000), "brackets": "return " + "(" * 5000 + ")" * 5000,
        "lines": "x = 1\n" * 9000, "lists": "return " + "[" * 90 + "]" * 90, "ifs": "\n".join(" " * i + "if mu:" for i in range(99)),
        "calls": "return torch" + ".abs()" * 3000, "strings": "return " + "'a' " * 9000}


@pytest.mark.parametrize("name", LONG)
def test_what_python_can_hardly_read_costs_one_exercise(name):
    """A body whose tree exhausts the parser, the walk or the compiler, and takes the other exercises with it."""
    sources = answer(3, LONG[name])
    try:
        node = grade.find(sources["amft"], "amft.py", "group_advantages")
        check.refusal(node, "amft.py", "amft", "group_advantages")
    except grade.Refused as error:
        assert re.match(r"(refused: )?amft.py, (from )?line \d+: ", str(error)), error
    assert ast.dump(grade.find(sources["amft"], "amft.py", "gae")) == ast.dump(functions(SOURCES["amft"])["gae"])
    assert grade.remarks(sources, list(EXERCISES.values())) in ([], [
        "amft.py: Python cannot read the whole file; each function was read alone"])


def test_the_line_of_a_syntax_error_is_the_files():
    """A line that is counted from the function's first."""
    lines = SOURCES["amft"].splitlines()
    at = next(i for i, line in enumerate(lines) if "ratio = (logps - old_logps).exp()" in line)
    lines[at] = "    ratio = = 3"
    lines[2] = "    this is no Python either"
    with pytest.raises(grade.Refused, match=f"amft.py, line {at + 1}: Python cannot read"):
        grade.find("\n".join(lines), "amft.py", "ppo_loss")
    source = SOURCES["tasks"].replace("used, value = parse(expression)", "used, value = = parse(expression)")
    at = next(i for i, line in enumerate(source.splitlines(), 1) if "= = parse" in line)
    with pytest.raises(grade.Refused, match=f"tasks.py, line {at}: Python cannot read"):
        grade.find(source, "tasks.py", "Deal.grade")


def test_one_function_of_two_has_its_own_points(tmp_path):
    """All of an exercise lost by one of its two functions."""
    sources = answer(2, "return logps.sum()")
    results = grade.grade([submitted(tmp_path / "in", sources)], tmp_path / "r.json", only=[2], say=lambda *_, **__: None)
    (row,) = results["tests"]
    assert row["score"] == 2 and "sft_loss (0 of 2): sft_loss_values" in row["output"] and "implicit_reward (2 of 2)" in row["output"]


def test_check_says_what_the_grader_would(tmp_path):
    """A body that is refused although the student's own check let it through, or the other way about; a line that is not
    the file's."""
    make_student.make(tmp_path / "student", upto=12)
    sources = merged((4, "x = 1\nreturn open('x')"), (3, "return r"), (10, "import os"))
    submitted(tmp_path / "student", sources)
    done = python(tmp_path / "student", "check.py")
    said = {line.partition(":")[0].split(", ")[1]: line.partition(": ")[2] for line in done.stdout.splitlines()}
    assert done.returncode == 1 and len(said) == len([name for e in EXERCISES.values() for name in e["functions"]]), done.stderr
    for e in EXERCISES.values():
        for name in e["functions"]:
            assert (check.verdict_on(sources[e["module"]], e, name) or "may be handed in") == said[name]
    line = next(i for i, text in enumerate(sources["amft"].splitlines(), 1) if "return open('x')" in text)
    assert said["gae"] == f"refused: amft.py, line {line}: open is not allowed in a graded body"
    assert "the name r is not there" in said["group_advantages"] and "import of os" in said["Deal.grade"]


REFERENCES = "logp_rows differences gae_by_definition step_by_loop update_by_hand sensitivity_by_complex_step value_of".split()


def test_what_is_handed_out_computes_no_answer(tmp_path):
    """The slow references of the tests, which were worth 29 points pasted into the bodies."""
    make_student.make(tmp_path / "student")
    for path in (tmp_path / "student").glob("*.*"):
        if path.suffix in (".py", ".json") and path.name not in ("amft.py", "tasks.py"):
            text = path.read_text()
            assert not [name for name in REFERENCES if f"def {name}" in text], path.name
    code = "import verdict; print(sorted(name for name in vars(verdict) if callable(getattr(verdict, name)) and name[0] != '_'))"
    assert "_by_" not in python(tmp_path / "student", "-c", code).stdout


def test_a_grader_that_runs_out_of_time_says_so(tmp_path):
    """Exercises that are failed in silence when the time of all is over."""
    results = grade.grade([submitted(tmp_path / "in", answers())], tmp_path / "results.json", total=1, say=lambda *_, **__: None)
    assert results["score"] == 0 and all("not graded" in row["output"] for row in results["tests"])


def test_helpers_outside_are_said_to_be_out_of_reach():
    """A name that is not there, and no word of why; also an argument that was given another name."""
    passed, message = grade.judge(EXERCISES[4], answer(4, "return r, my_helper(rewards)"), [0])
    assert not passed and "the name r is not there: the signature is the reference's, (rewards, values, mask" in message
    assert "helpers and imports go inside the body" in message and "amft.py, line" in message


RUN = dict(mu=0.5, eta_mu=0.05, eta_h=0.1, trace=0.9, warmup=2, meta_every=2)


def forged(change):
    """What the grader says of a log of the solution that was changed by hand."""
    import torch
    import toy
    world = toy.World("cases 3")
    log, theta = toy.learn(world, 3, toy.settings(**RUN), 14)
    answer = verdict.unpacked(json.loads(json.dumps(verdict.packed(change(log, theta, torch)))))
    try:
        cases.relations_of("cases 3", RUN, 14, -1.0)(answer)
    except verdict.Wrong as error:
        return str(error)
    finally:
        torch.set_default_dtype(torch.float32)


FORGED = {  # a log's change, and the relation that it breaks
    "as it was": (lambda log, theta, torch: (log, theta), None),
    "end": (lambda log, theta, torch: (log, theta + 1e-3), "theta after step 14"),
    "mu": (lambda log, theta, torch: ([row._replace(mu=row.mu + 1e-4) if row.t == 6 else row for row in log], theta), "theta after step 6"),
    "one mu": (lambda log, theta, torch: ([row._replace(mu=0.5) for row in log], theta), "theta after step 1"),
    "gradient": (lambda log, theta, torch: ([row._replace(g_rl=-row.g_rl) for row in log], theta), "theta after step 3"),
    "entropy": (lambda log, theta, torch: ([row._replace(entropy=row.entropy + 0.1) for row in log], theta), "the entropy is not"),
    "scale": (lambda log, theta, torch: ([row._replace(scale=2 * row.scale) for row in log], theta), "row 4: the estimate on the step's own"),
    "estimates": (lambda log, theta, torch: ([row._replace(estimates=[]) for row in log], theta), "estimates, expected"),
    "evidence": (lambda log, theta, torch: ([row._replace(evidence=(1.0, 1.0)) for row in log], theta), "Eq. 6 gives"),
    "start": (lambda log, theta, torch: ([row._replace(theta=row.theta + 1) for row in log], theta + 1), "row 1: theta is not where"),
    "nan": (lambda log, theta, torch: ([row._replace(theta=row.theta / 0) for row in log], theta), "finite"),
    "short": (lambda log, theta, torch: (log[:-1], theta), "a list of 14 rows"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_log_that_is_made_up_breaks_a_relation(name):
    """A log that no run of Algorithm 1 has written, and passes."""
    change, said = FORGED[name]
    found = forged(change)
    assert found is None if said is None else said in (found or ""), found


def test_arguments_are_not_to_be_changed():
    """A body that works in place on what it was given, and passes."""
    body = "mask.zero_()\nreturn torch.zeros_like(values), torch.zeros_like(values)"
    passed, message = grade.judge(EXERCISES[4], answer(4, body), [0])
    assert not passed and "changed in place" in message


def test_hidden_seeds_are_a_students_own_and_verified(monkeypatch):
    """Hidden seeds that are everybody's, unverified, or to be worked out without the secret."""
    seeds = {tuple(grade.hidden_seeds(f"student {i}")) for i in range(50)}
    assert len(seeds) > 45 and all(len(set(three)) == 3 and set(three) <= set(grade.VERIFIED) for three in seeds)
    assert grade.VISIBLE not in grade.VERIFIED and grade.hidden_seeds("a") == grade.hidden_seeds("a")
    before = grade.hidden_seeds("a")
    monkeypatch.setenv("AMFT_COURSE_SECRET", "another")
    assert grade.hidden_seeds("a") != before


def test_gradescopes_zip_holds_what_the_grader_needs(tmp_path):
    """A zip that leaves out what amft.py imports, or the scripts that Gradescope runs."""
    make_student.make_autograder(tmp_path / "source")
    files = {str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*.*")}
    assert {"setup.sh", "requirements.txt", "course/exercises.toml", "amft.py", "tasks.py", *NEEDED} <= files
    assert os.access(tmp_path / "source" / "run_autograder", os.X_OK)
    assert not [name for name in files if re.match("test_|(harness|recipes)/(.*/)?test_", name)]


@slow
def test_the_solution_scores_everything_by_gradescopes_own_script(tmp_path):
    """From the student's folder, filled in, through run_autograder, to results.json."""
    make_student.make(tmp_path / "submission")
    submitted(tmp_path / "submission", answers())
    (tmp_path / "results").mkdir()
    make_student.make_autograder(tmp_path / "source")
    (tmp_path / "source" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "source" / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "source" / "venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "submission_metadata.json").write_text('{"users": [{"id": 7, "sid": "jdoe", "name": "J. Doe"}]}')
    subprocess.run(["bash", HERE / "gradescope" / "run_autograder"], check=True, env={**os.environ, "AUTOGRADER": str(tmp_path)})
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["score"] == 74 and all(row["status"] == "passed" for row in results["tests"])
