"""Tests of the course kit: the student's folder, the wrong answers that must lose their points and hear why, and
submissions that attack the grader.

    python -m pytest -q course/test_course.py
    AMFT_SLOW=1 python -m pytest -q course/test_course.py     # every wrong answer with 20 seeds, every attack in a process
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import grade  # noqa: E402
import make_student  # noqa: E402

SLOW = bool(os.environ.get("AMFT_SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="takes longer: AMFT_SLOW=1 runs it")
SOURCES = {module: (HERE.parent / f"{module}.py").read_text() for module in ("amft", "tasks")}
EXERCISES = {e["id"]: e for e in grade.exercises()}


def answer(exercise, body, function=None):
    """The sources with another body, a text without indent, of an exercise's function."""
    e = EXERCISES[exercise]
    name = function or e["functions"][0]
    source = SOURCES[e["module"]]
    node, lines = grade.functions_in(ast.parse(source))[name], source.splitlines(keepends=True)
    first = grade.body_of(node)[0]
    start = node.body[0].end_lineno if first is not node.body[0] else first.lineno - 1
    lines[start:node.end_lineno] = [" " * first.col_offset + line + "\n" for line in body.strip("\n").splitlines()]
    return {**SOURCES, e["module"]: "".join(lines)}


def edited(exercise, old, new):
    """The sources with one text of an exercise's solution replaced."""
    e = EXERCISES[exercise]
    source = SOURCES[e["module"]]
    for name in e["functions"]:
        node = grade.functions_in(ast.parse(source))[name]
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
    (2, "-(logps * mask).sum() / (mask.sum() if tokens is None else tokens)", "-(logps * mask).mean()", "sft_all_positions"),
    (2, "-(logps * mask).sum() / (mask.sum() if tokens is None else tokens)", "-((logps * mask).sum(1) / mask.sum(1)).mean()",
     "sft_row_means"),
    (2, "-(logps * mask)", "(logps * mask)", "sft_sign"),
    (2, "(logps * mask).sum()", "logps.sum()", "sft_no_mask"),
    (2, "(mask.sum() if tokens is None else tokens)", "mask.sum()", "sft_ignores_tokens"),
    (2, "(mask.sum() if tokens is None else tokens)", "len(mask)", "sft_per_sequence"),
    (2, "beta * (", "(", "reward_no_beta"),
    (2, "mask).sum(-1)", "mask).sum(-1) / mask.sum(-1)", "reward_mean"),
    (2, "logps - ref_logps", "ref_logps - logps", "reward_sign"),
    (2, "(logps - ref_logps)", "logps", "reward_no_reference"),
    (3, " * G / (G - 1)", "", "own_mean"),
    (3, "rewards.mean(1, keepdim=True)) * G / (G - 1)", "rewards.mean())", "batch_mean"),
    (3, "(centred / scale, scale)", "(centred / centred.std(1, keepdim=True), scale)", "group_std"),
    (3, "correction=0", "correction=1", "sample_std"),
    (3, "(centred / scale, scale) if scale > 1e-6 else (torch.zeros_like(centred), 1.0)", "(centred / scale, scale)",
     "division_by_nothing"),
    (3, "raise ValueError", "return rewards, 1.0 #", "one_sample"),
    (3, "centred.std(", "rewards.std(", "scale_of_rewards"),
    (4, "torch.where(own, values[:, t], following)", "values[:, t]", "environment_counts"),
    (4, "torch.where(own, delta + gamma * lam * running, running)", "torch.where(own, delta, 0) + gamma * lam * running",
     "environment_counts"),
    (4, "running = following = torch.zeros_like(values[:, 0])", "running, following = 0 * values[:, 0], values[:, -1]", "bootstrapped"),
    (4, "+ gamma * following", "+ following", "no_gamma"),
    (4, "gamma * lam * running", "gamma * running", "no_lam"),
    (4, "gamma * lam * running", "lam * running", "lam_without_gamma"),
    (4, "delta + gamma * lam * running", "delta", "one_delta"),
    (4, " - values[:, t]", "", "no_baseline"),
    (4, "running * own", "running", "unmasked"),
    (4, "(advantages + values) * mask", "advantages", "returns_are_advantages"),
    (5, "torch.minimum", "torch.maximum", "maximum"),
    (5, "torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
     "ratio.clamp(1 - clip, 1 + clip) * advantages", "clipped_alone"),
    (5, "ratio.clamp(1 - clip, 1 + clip)", "ratio", "not_clipped"),
    (5, ".exp()", "", "log_ratio"),
    (5, "logps - old_logps", "old_logps - logps", "inverse_ratio"),
    (5, "-(surrogate", "(surrogate", "ppo_sign"),
    (5, "(surrogate * mask).sum()", "surrogate.sum()", "ppo_no_mask"),
    (5, "(mask.sum() if tokens is None else tokens)", "mask.sum()", "ppo_ignores_tokens"),
    (5, "-(surrogate * mask).sum() / (mask.sum() if tokens is None else tokens)",
     "-((surrogate * mask).sum(1) / mask.sum(1)).mean()", "ppo_row_means"),
    (5, "(logps - old_logps).exp()", "(logps - old_logps).detach().exp()", "ppo_detached"),
    (6, "m / (1 - betas[0] ** step)) / (root / math.sqrt(1 - betas[1] ** step)", "m) / (root", "no_bias_correction"),
    (6, "lr * update, ", "lr * (update + weight_decay * theta) + lr * weight_decay * theta, ", "no_decay"),
    (6, "1 - lr * weight_decay", "1 - weight_decay", "decay_without_lr"),
    (6, "step = state.step + 1", "grad, weight_decay, step = grad + weight_decay * theta, 0, state.step + 1", "l2_decay"),
    (6, "(root / math.sqrt(1 - betas[1] ** step) + eps)", "((root + eps) / math.sqrt(1 - betas[1] ** step))", "eps_before_correction"),
    (6, "root / math.sqrt(1 - betas[1] ** step) + eps", "(v / (1 - betas[1] ** step) + eps).sqrt()", "eps_inside"),
    (6, ".clamp(max=1.0)", "", "always_scaled"),
    (6, "grad * (max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)", "grad", "not_clipped_norm"),
    (6, "grad * (max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)", "grad.clamp(-max_norm, max_norm)",
     "clipped_by_value"),
    (6, "torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)", "v.sqrt()", "derivative_not_finite"),
    (7, "(1 - mu) * g_rl + mu * g_sft", "mu * g_rl + (1 - mu) * g_sft", None),
    (7, "AdamState(m, v, state.step), **how)", "AdamState(m, v, state.step), **{**how, 'max_norm': 1e30})", "unclipped_derivative"),
    (7, "trace * x for x in last", "x for x in last", "trace_not_applied"),
    (7, "if last is None else", "if True else", "trace_missing"),
    (7, "(torch.ones_like(mu), *moved)", "(torch.ones_like(mu), moved[0], 0 * theta, 0 * theta)", "trace_only_theta"),
    (7, "(torch.ones_like(mu), *moved)", "(-torch.ones_like(mu), *moved)", "sensitivity_sign"),
    (8, "(scale * advantages[p] * logps)", "(advantages[p] * logps)", "standardised"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success, 1.0)", "without_baseline"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success - rollouts.success.mean(), 1.0)", "batch_baseline"),
    (8, "group_advantages(rollouts.success)", "(rollouts.success - rollouts.success.mean(1, keepdim=True), 1.0)",
     "own_sample_in_baseline"),
    (8, "logps_of(model, part, config.temperature)", "logps_of(model, part)", "no_temperature"),
    (8, "part, config.temperature) * part.mask)", "part, config.temperature))", "whole_batch_mask"),
    (8, "slopes.mean().item()", "slopes.sum().item()", "sum_of_prompts"),
    (8, "slopes.mean().item()", "slopes[slopes != 0].sum().item() / max(1, (slopes != 0).sum().item())", "silent_prompts_dropped"),
    (8, "slopes.std()", "slopes.std(correction=0)", "error_population"),
    (8, "math.sqrt(P)", "math.sqrt(P * G)", "error_over_samples"),
    (8, " / math.sqrt(P)", "", "error_not_of_mean"),
    (9, "(target_entropy - entropy)", "(entropy - target_entropy)", "entropy_sign"),
    (9, "memory * evidence[0]", "evidence[0]", None),
    (9, "memory ** 2 * evidence[1]", "memory * evidence[1]", "memory_not_squared"),
    (9, "sum(error ** 2 for", "sum(error for", "error_not_squared"),
    (9, "math.erf(total / math.sqrt(2 * variance))", "math.erf(total / math.sqrt(variance))", "erf_of_z"),
    (9, "math.erf(total / math.sqrt(2 * variance))", "(1 if total > 0 else -1)", "sign_alone"),
    (9, "math.erf(total / math.sqrt(2 * variance))", "sum(slope for slope, _ in estimates)", "slope_alone"),
    (9, "if error > 0", "", "zero_error"),
    (9, "min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)", "mu + meta_force + entropy_force", "not_clipped_mu"),
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
]


def others_unchanged(sources, exercise):
    """Do the other exercises' functions still hold the solution's bodies?"""
    for module, source in SOURCES.items():
        mine, theirs = (grade.functions_in(ast.parse(text)) for text in (sources[module], source))
        for e in EXERCISES.values():
            if e["module"] == module and e["id"] != exercise:
                for name in e["functions"]:
                    assert ast.dump(mine[name]) == ast.dump(theirs[name])


CASES = [(n, edited(n, old, new), hint, new) for n, old, new, hint in WRONG] + [
    (n, answer(n, body), hint, body) for n, body, hint in BODIES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_wrong_answers_lose_their_points_and_hear_why(case):
    """Each is judged as grade.py does, but in this process. What is wrong in one exercise leaves the others as they are."""
    exercise, sources, hint, text = case
    e = EXERCISES[exercise]
    others_unchanged(sources, exercise)
    for seed in range(20 if SLOW else 1):
        passed, message = grade.judge(e, sources, [seed])
        assert not passed, f"seed {seed}: {text} passes"
        assert not hint or e["hints"][hint] in message, f"seed {seed}: {text}: {message}"


def test_the_solution_and_nothing_else_passes_everywhere():
    for e in EXERCISES.values():
        passed, message = grade.judge(e, SOURCES, [0])
        assert passed, message
