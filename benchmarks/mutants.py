"""Break the code on purpose, one silent bug at a time, and see the named tests fail.

    python benchmarks/mutants.py                           # all, 20 minutes on a core
    python benchmarks/mutants.py --only '*temperature*'    # rows whose printed line matches
    python benchmarks/mutants.py --check                   # no tests: is each bug's text still there?

Each row of MUTANTS: file, the text that is there once, what the bug puts in its place, the tests that must catch it
(pytest -k), and the test files that hold them where they are not the ones that TESTS names for the file.
The bugs are made one after the other in one copy of the project. A row whose text is no longer there, or whose tests
still pass, is reported and fails the run; so do tests that fail without any bug, which count for nothing.
"""

import argparse
import fnmatch
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # for the tests of a row
MODELS = "recipes/test_models.py"
PROBLEMS = "recipes/test_problems.py"
LARGE = "recipes/test_large.py"
HARNESS = "harness/test_harness.py"
PICTURES = "harness/test_pictures.py"
CAPTURE = "harness/test_capture.py"
TESTS = {
    "amft.py": "test_amft.py",
    "tasks.py": "test_amft.py",
    "base/make.py": "test_amft.py",
    "harness/arguments.py": f"{HARNESS} test_amft.py",
    "harness/cache.py": f"{HARNESS} test_amft.py",
    "harness/capture.py": "test_amft.py",
    "harness/loading.py": f"{HARNESS} test_amft.py",
    "harness/run.py": f"{HARNESS} test_amft.py",
    "harness/tokens.py": "test_amft.py",
    "harness/pictures.py": PICTURES,
    "recipes/checkpoints.py": MODELS,
    "recipes/large.py": f"{LARGE} {MODELS}",
    "recipes/problems.py": PROBLEMS,
    "recipes/parallel.py": "recipes/test_parallel.py",
    "compare/rivals.py": "compare/test_rivals.py",
}

MUTANTS = [
    # the step
    ("amft.py", "norm=grad.norm(), step", "norm=grad.abs().max(), step", "step_equals_torch"),
    ("amft.py", "m / (1 - b1 ** step)", "m", "step_equals_torch"),
    ("amft.py", "theta * (1 - lr * weight_decay)", "theta * (1 - weight_decay)", "step_equals_torch"),
    ("amft.py", "root = v.clamp(min=1e-37).sqrt()", "root = v.sqrt()", "sensitivity_is_finite"),
    # the sensitivity
    ("amft.py", "grad = (1 - mu) * g_rl + mu * g_sft\n        primals",
     "grad = mu * g_rl + (1 - mu) * g_sft\n        primals", "finite_difference"),
    ("amft.py", "tangents = trace * d_theta", "tangents = d_theta", "with_a_trace"),
    ("amft.py", "trace * d_m, trace * d_v, d_norm", "trace * d_m, 0 * d_v, d_norm", "with_a_trace"),
    ("amft.py", "trace * d_v, d_norm", "trace * d_v, 0 * d_norm", "finite_difference"),
    ("amft.py", "step.g_rl = step.g_sft = None  # memory", "pass", "floats_a_parameter", LARGE),
    ("amft.py", "    del grad  # memory\n    step = partial", "    step = partial", "floats_a_parameter", LARGE),
    ("amft.py", "        del slopes  # memory\n", "", "floats_a_parameter", LARGE),
    ("amft.py", "            del grad  # memory\n", "", "floats_a_parameter", LARGE),
    ("recipes/large.py", "del part, parts  # memory", "# memory", "floats_a_parameter"),
    ("recipes/large.py", "vector[start:start + size].clone() for", "vector[start:start + size] for",
     "floats_a_parameter"),
    ("recipes/large.py", "size: int = 2 ** 22", "size: int = 2 ** 40", "floats_a_parameter"),
    ("recipes/large.py", "whole[start:start + size] = part", "whole[:len(part)] = part", "slices_give"),
    ("amft.py", "step.g_sft, step.mu, adam, self.sensitivity", "step.g_sft, step.mu, adam, None", "hang_together"),
    ("amft.py", "step.g_sft, step.mu, adam", "step.g_sft, self.config.mu, adam", "hang_together"),
    ("amft.py", "self.sensitivity, trace, lr=step.lr)", "self.sensitivity, trace, lr=self.config.lr)", "hang_together"),
    ("amft.py", "self.sensitivity, trace, lr=step.lr)",
     "self.sensitivity, trace, lr=step.lr - self.config.lr / self.config.steps)", "hang_together"),
    ("amft.py", "(1 - (t - 1) / config.steps)", "(1 - t / config.steps)", "hang_together"),
    ("amft.py", "trace = self.config.trace if first else 1.0", "trace = self.config.trace", "fades_once"),
    ("amft.py", "            method.before_update(step,",
     "            theta = theta - step.lr * step.g_rl\n            method.before_update(step,", "hang_together"),
    # the meta-gradient
    ("amft.py", "(logps * batch.response_mask[rows]).sum(1)", "logps[:, 0]", "slow_loop or unbiased"),
    ("amft.py", "weighted, config, config.temperature)", "weighted, config)",
     "exactly_unbiased or slow_loop"),
    ("amft.py", "(scale * values[p][rows]", "(values[p][rows]", "meta_gradient_against_a_slow_loop"),
    ("amft.py", "(scale * values[p][rows]", "(scale * values[p][:len(rows)]",
     "meta_gradient_against_a_slow_loop or micro_batches"),
    ("amft.py", "values, scale = group_advantages(rollouts.success) if advantages is None else advantages",
     "values, scale = rollouts.success, 1.0", "meta_gradient_against_a_slow_loop"),
    ("amft.py", "slopes.std().item() / math.sqrt(P)", "slopes.std().item() / math.sqrt(P * G)", "slow_loop or covers"),
    ("amft.py", "g_rl @ d_theta * n_tokens / len(batch.input_ids)", "g_rl @ d_theta", "own_meta"),
    ("amft.py", "len(batch.input_ids)).item() * scale", "len(batch.input_ids)).item()", "own_meta"),
    ("amft.py", "slope = -(g_rl", "slope = (g_rl", "own_meta"),
    ("amft.py", "step.g_rl, d_theta, step.roll", "step.g_sft, d_theta, step.roll", "mu_follows"),
    ("amft.py", "by algebra\n                estimates.append((slope, error))",
     "by algebra\n                estimates = [(slope, error)]", "mu_follows"),
    ("amft.py", "informative > 2", "informative > 0", "mu_follows or few_informative"),
    ("amft.py", ' or config.controller == "paper":  # of one', ":  # of one", "paper_controller or few_informative"),
    ("amft.py", "self.task.sample(self.split, step.rng)", 'self.task.sample("train", step.rng)',
     "target_entropy_is_measured"),
    ("amft.py", "episodes, config.samples, config.max_new_tokens,\n                          config.temperature)",
     "episodes, config.samples, config.max_new_tokens)", "target_entropy_is_measured"),
    # the controller
    ("amft.py", "(target_entropy - entropy)", "(entropy - target_entropy)", "hand_computed"),
    ("amft.py", "fade * evidence[1] + len(zs)", "evidence[1] + len(zs)", "hand_computed"),
    ("amft.py", "memory if zs else 1.0", "memory", "hand_computed"),
    ("amft.py", "n * effect ** 2 / 2) / odds", "n * effect ** 2 / 2) * odds", "bayes or hand_computed"),
    ("amft.py", "math.exp(n * effect ** 2 / 2)", "math.exp(effect ** 2 / 2)", "bayes or hand_computed"),
    ("amft.py", "mu = config.mu\n        zs", "zs", "hand_computed or rests"),
    ("amft.py", "max(mu + meta_force + entropy_force, config.mu_min)", "mu + meta_force + entropy_force", "hand_computed"),
    ("amft.py", "config.eta_mu * sum(slope for slope, _ in estimates)",
     "sum(math.copysign(config.eta_mu, slope) for slope, _ in estimates)", "paper_controller or hand_computed"),
    ("amft.py", "if self.target_entropy is None:", "if True:", "target_entropy_is_measured"),
    ("amft.py", "return 1.0  # the warm-up", "return self.mu  # the warm-up", "budget or hang_together"),
    ("amft.py", "if update == 0:\n", "if True:\n", "fades_once"),
    # losses and advantages
    ("amft.py", "at_least_float32(logits).log_softmax(-1).gather", "at_least_float32(logits).softmax(-1).log().gather",
     "large_logits"),
    ("amft.py", "return -(logps * mask).sum()", "return -logps.sum()", "slow_loops"),
    ("amft.py", "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages", "slow_loops"),
    ("amft.py", "clipped = ratio.clamp(1 - clip, 1 + clip)", "clipped = ratio.clamp(1, 1 + clip)", "slow_loops"),
    ("amft.py", "return -(surrogate * mask)", "return (surrogate * mask)", "slow_loops"),
    ("amft.py", "centred.std(correction=0)", "centred.std()", "by_hand"),
    ("amft.py", "return centred / scale, scale", "return centred / (centred.std(1, keepdim=True) + 1e-6), scale",
     "advantages_by_hand or own_meta"),
    ("amft.py", "delta + gamma * lam * advantage, advantage)", "delta + gamma * advantage, advantage)", "gae"),
    ("amft.py", "lam: float = 1.0)", "lam: float = 0.95)", "gae or own_meta or graded_rewards"),
    ("amft.py", "next_value = torch.where(on_token, values[:, t], next_value)", "next_value = values[:, t] * on_token",
     "gae"),
    ("amft.py", "if totals.max() - totals.min() < 1e-6:", "if False:", "equal_rewards"),
    ("amft.py", "beta * ((logps - ref_logps) * mask)", "beta * ((ref_logps - logps) * mask)", "slow_loops"),
    ("amft.py", "is_last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask", "is_last = mask",
     "whole_conversations or graded_rewards"),
    ("amft.py", 'if config.reward == "binary":', "if True:", "graded_rewards"),
    ("amft.py", "token_weights(logp.detach(), rows)", "token_weights(logp, rows)", "loss_of_a_demonstration"),
    ("amft.py", "weights * logp, batch.response_mask[rows], n_tokens)", "weights * logp, batch.response_mask[rows])",
     "loss_of_a_demonstration or micro_batches"),
    ("amft.py", "config.clip, n_tokens)", "config.clip)", "micro_batches or old_samples"),
    ("amft.py", "advantages.values, loss, config, config.temperature)", "advantages.values, loss, config)",
     "old_samples or own_meta_gradient_is_the_slope"),
    ("amft.py", "old = logp.detach() if old_logps is None else old_logps[rows]", "old = logp.detach()", "old_samples"),
    ("amft.py", "old_logps = logps if old_logps is None else old_logps", "old_logps = logps", "fades_once"),
    ("amft.py", "output.hidden_states[-1]", "output.hidden_states[0]", "phi_reads"),
    # the policy
    ("amft.py", "columns = torch.arange(S - T - 1, S - 1,", "columns = torch.arange(S - T, S,", "company"),
    ("amft.py", "    if temperature != 1:\n", "    if False:\n", "temperature_of_log"),
    ("amft.py", "positions = (attention_mask.cumsum(1) - 1).clamp(min=0)",
     "positions = torch.arange(attention_mask.shape[1], device=input_ids.device).expand_as(attention_mask)",
     "absolute_positions"),
    ("amft.py", "attention_mask=attention_mask,\n        position_ids=positions",
     "attention_mask=torch.ones_like(attention_mask),\n        position_ids=positions", "company"),
    ("amft.py", "position_ids=positions[:, start:]", "position_ids=positions[:, :input_ids.shape[1] - start]",
     "sampled_from"),
    ("amft.py", "response += stop_token_ids(model)[:1]", "pass", "company"),
    ("amft.py", "max(1, max_tokens // batch.input_ids.shape[1])", "max(1, max_tokens)", "micro_batches"),
    ("amft.py", "rows = (used != 0).any(1)", "rows = (used[:, 0] != 0)", "begin_with_a_slip or micro_batches"),
    # sampling
    ("harness/capture.py", "self.speaking.to(self.attention_mask.dtype)",
     "(self.speaking & ~torch.isin(token, self.stops)).to(self.attention_mask.dtype)", "rollout_samples"),
    ("amft.py", "draw(logits, state.temperature)",
     "draw(logits.masked_fill(logits < logits.topk(50).values[:, -1:], -1e9), state.temperature)", "frequencies"),
    ("harness/capture.py", "(logits / temperature.clamp(min=1e-6)).softmax(-1)", "logits.softmax(-1)", "frequencies"),
    ("harness/capture.py", "(logits / temperature.clamp(min=1e-6))", "(logits * temperature)", "frequencies"),
    ("harness/capture.py", "torch.where(temperature > 0, drawn, logits.argmax(-1))", "drawn",
     "temperature_0_takes", CAPTURE),
    ("amft.py", "entropy=-(logps.exp() * logps)", "entropy=(logps.exp() * logps)", "rollout_samples"),
    ("amft.py", "logps = logits.log_softmax(-1)", "logps = (logits / state.temperature.clamp(min=0.1)).log_softmax(-1)",
     "sampled_from"),
    ("amft.py", "(reply.entropy * reply.mask).sum()", "reply.entropy.sum()", "entropy_is_that"),
    ("harness/capture.py", "self.speaking.logical_and_(~torch.isin(token, self.stops))", "pass",
     "rollout_samples or alone_and_in_company"),
    ("amft.py", "position_ids=state.attention_mask.sum(1, keepdim=True) - 1",
     "position_ids=state.attention_mask.sum(1, keepdim=True)", "sampled_from or rollout_samples"),
    ("amft.py", "truncated.append(reply.truncated[~done])", "truncated.append(reply.truncated)", "log_counts"),
    ("amft.py", "torch.cat(truncated).float().mean().item()", "torch.cat(truncated).sum().item() / len(played)",
     "log_counts or truncation"),
    # chat templates and kinds of models; a comparison's budget
    ("recipes/checkpoints.py", 'before.count("<think>") <= before.count("</think>")', "True", "no_thoughts"),
    ("recipes/checkpoints.py", "template = FIXED_DATE + template", "pass", "todays_date"),
    ("recipes/checkpoints.py", "part.output_router_logits = False", "pass", "router"),
    ("recipes/real.py", "n_steps * args.meta_every // (args.meta_every + 1)", "n_steps", "one_budget", "recipes/test_real.py"),
    # a captured step
    ("harness/capture.py", "self.state.attention_mask[:, columns:] = 0", "pass", "any_length", CAPTURE),
    ("harness/capture.py", "cumulative_length.fill_(known)", "cumulative_length.fill_(0)", "greedily", CAPTURE),
    ("harness/capture.py", "    made.bring_home(model)", "    pass", "weights_that", CAPTURE),
    ("harness/capture.py", "weight.data.clone() for weight", "weight.data for weight", "weights_that", CAPTURE),
    ("harness/capture.py", "(own[:, :columns] if own.dim() == 2 else own).copy_(given)",
     "own[:, :columns].copy_(given) if own.dim() == 2 else given.numel() > 1 and own.copy_(given)",
     "draws_what", CAPTURE),
    ("harness/capture.py", "if made is None or not made.fit(model)", "if made is None", "weights_that", CAPTURE),
    ("harness/cache.py", "max_cache_len=columns)", "max_cache_len=columns - 1)", "is_sampled_is_the_policy", MODELS),
    ("harness/cache.py", "max_cache_len=columns)", "max_cache_len=columns - 2)", "of_generate or sampled_from"),
    ("harness/cache.py", "before.keys[:, :, :known], before.values", "before.keys[:, :, :known], before.keys",
     "of_generate or sampled_from"),
    # conversations and pictures
    ("harness/capture.py", "self.state.attention_mask[:, :column])",
     "torch.ones_like(self.state.attention_mask[:, :column]))", "rollout_samples or sampled_from"),
    ("amft.py", "attention_mask = torch.cat([attention_mask, reply.mask.long()], 1)",
     "attention_mask = torch.cat([attention_mask, torch.ones_like(reply.ids)], 1)", "is_attended_to"),
    ("amft.py", "attention_mask = torch.cat([attention_mask, real], 1)",
     "attention_mask = torch.cat([attention_mask, torch.ones_like(real)], 1)",
     "is_attended_to or what_is_shown_is_not_read"),
    ("amft.py", "input_ids, attention_mask, ~done, stop_token_ids(model), temp",
     "input_ids, attention_mask, torch.ones_like(done), stop_token_ids(model), temp",
     "what_was_graded or is_attended_to"),
    ("amft.py", "played = [copy.copy(episode) for", "played = [episode for", "alone_and_in_company or rollout_samples"),
    ("amft.py", "points[row, lengths[row] - 1]", "points[row, 0]", "points_stand or graded_rewards"),
    ("amft.py", "input_ids.shape[1] + shown.shape[1] + max_new_tokens > max_length(model)",
     "input_ids.shape[1] + shown.shape[1] > max_length(model)", "might_not_fit"),
    ("amft.py", "[float(turn.learn)] * len(response)", "[1.0] * len(response)", "demonstrations_teach"),
    ("amft.py", "[self.images[i] for i in chosen]", "self.images", "keep_their_pictures or alone_and_in_company"),
    ("amft.py", "[turn.image for turn in turns if", "[turn.image for turn in turns[::-1] if", "reading_order",
     PICTURES),
    ("harness/pictures.py", "pixels.float() / 127.5 - 1", "pixels.float() / 255", "pixels_are"),
    ("harness/loading.py", "logits.index_fill(-1, banned, -1e9)", "logits", "cannot_say", PICTURES),
    # the loop
    ("amft.py", 'random.Random(f"step {config.seed} {t}")', "random.Random()", "same_seed"),
    ("amft.py", 'random.Random(f"step {config.seed} {t}")', 'random.Random(f"step {t}")', "of_each_seed"),
    ("amft.py", "torch.manual_seed(rng.getrandbits(62))", "torch.manual_seed(config.seed)", "of_each_seed"),
    ("amft.py", 'random.Random(f"demos {config.seed}")', 'random.Random("demos")', "of_each_seed"),
    ("amft.py", "grad = (1 - step.mu) * step.g_rl + step.mu * step.g_sft", "grad = step.g_rl + step.mu * step.g_sft",
     "mu_one or gradient_of_its_loss"),
    ("amft.py", "step.problems, config.samples,\n                                    config.max_new_tokens, "
     "config.temperature)", "step.problems, config.samples, config.max_new_tokens)", "target_entropy_is_measured"),
    ("amft.py", "step.n_sampled += len(val.episodes)", "step.n_sampled += 0", "budget or same_seed"),
    ("amft.py", "config.max_new_tokens, temperature).episodes", "config.max_new_tokens, config.temperature).episodes",
     "evaluation_reports"),
    ("harness/evaluation.py", "best = max(grid, key=lambda t: found[t]", "best = min(grid, key=lambda t: found[t]",
     "best_temperature", HARNESS),
    ("harness/evaluation.py", 'key=lambda split: split != "val"', 'key=lambda split: split == "val"',
     "best_temperature", HARNESS),
    ("harness/evaluation.py", "samples if t else 1", "samples", "best_temperature", HARNESS),
    ("amft.py", "and t % config.val_every == 0", "and (t - 1) % config.val_every == 0", "val_every_looks"),
    ("harness/run.py", "        if bad:\n", "        if False:\n", "non_finite"),
    # a run that goes on
    ("amft.py", "sensitivity=self.sensitivity)", "sensitivity=None)", "interrupted_run"),
    ("amft.py", "evidence=self.evidence,", "evidence=(0.0, 0.0),", "interrupted_run"),
    ("amft.py", "target_entropy=self.target_entropy,", "target_entropy=None,", "interrupted_run"),
    ("amft.py", "mu=self.mu,", "mu=self.config.mu,", "interrupted_run"),
    ("harness/run.py", 'os.truncate(self.log, own["log"])', "None", "interrupted_run"),
    ("harness/run.py", 'type(adam)(*saved["adam"])', "adam", "interrupted_run"),
    ("amft.py", "modules = [method, phi, phi", "modules = [method, None, phi", "interrupted_run"),
    ("amft.py", "phi.optimizer if phi else None]", "None]", "interrupted_run"),
    ("harness/run.py", '(self.folder / "state.tmp").write_bytes(',
     '(self.folder / "state.tmp").write_bytes(b"") or self.state.write_bytes(',
     "older_than_its_last or state_is_written"),
    ("harness/run.py", 'if self.rows("step"):', "if False:", "state_that_is_gone"),
    ("harness/run.py", "return self.stopping or since", "return since", "signal_waits"),
    ("amft.py", "run.evaluate(look, task.splits)\n        run.save(theta, adam, modules)\n    for",
     "run.evaluate(look, task.splits)\n    for", "second_signal or ctrl_c_while", HARNESS),
    ("harness/run.py", "            bad.append(\"theta\")\n", "            pass\n", "too_high or non_finite or theta"),
    ("harness/run.py", ", strict=True)", ")", "states_of_something_else"),
    ("harness/run.py", "            ending.run.lock.close()\n", "            pass\n", "run_that_ended_is_free"),
    ("harness/arguments.py", 'if unfinished(path / "metrics.jsonl") else ""', "if path else \"\"", "not_empty"),
    ("harness/arguments.py", "if getattr(config, name) not in known:", "if False:", "logs_with_bad_settings"),
    ("harness/arguments.py", "check(config, methods.get(config.method, MethodFlags()).unused)", "check(config, [])",
     "interrupted_run or took_goes_on"),
    ("harness/run.py", "if not locked(self.lock):", "if False:", "second_process or two_that_start"),
    ("harness/run.py", 'self.screen.finish(self.rows("step", "eval"))\n'
     '        self.write("final", rollouts=self.rollouts, seconds=round(self.seconds, 1))',
     'self.write("final", rollouts=self.rollouts, seconds=round(self.seconds, 1))\n'
     '        self.screen.finish(self.rows("step", "eval"))', "ctrl_c_while"),
    ("amft.py", "(self.config.warmup or self.config.steps // 2)", "self.config.warmup", "switches_at"),
    # bad input
    ("harness/arguments.py", " and math.isfinite(value)", "", "bad_flags"),
    ("harness/arguments.py", "**of_task, **(of_smoke if \"smoke\" in given else {}), **of_method",
     "**(of_smoke if \"smoke\" in given else {}), **of_task, **of_method", "smoke_wins"),
    ("harness/arguments.py", 'if given.get("reward") == "graded":', "if False:", "flags_that_fit or bad_flags"),
    ("harness/arguments.py", 'dict(utility="val", trace=0.0)', 'dict(utility="val")',
     "flags_that_fit or bad_flags or published"),
    ("harness/arguments.py", 'min(settings["warmup"], settings["steps"] // 2)', 'settings["warmup"]',
     "flags_that_fit or bad_flags"),
    ("harness/arguments.py", "if taken:", "if False:",
     "not_empty or unfinished_run or current_folder"),
    ("harness/run.py", "allow_nan=False", "allow_nan=True", "not_json"),
    ("harness/run.py", ' or own["log"] > self.log.stat().st_size', "", "states_of_something_else"),
    ("recipes/checkpoints.py", 'info["missing_keys"] or info["mismatched_keys"] or', 'info["mismatched_keys"] or',
     "cannot_read or bad_weights", HARNESS),
    ("recipes/checkpoints.py", "or not finite:", "or False:", "bad_weights", HARNESS),
    # a reader's checkpoint
    ("recipes/checkpoints.py", "model.generation_config = GenerationConfig(", "GenerationConfig(", "own_way_to_sample"),
    ("recipes/checkpoints.py", "return min(special, key=rest.index)", "pass", "template_ends_it"),
    ("recipes/checkpoints.py", "return min(special, key=rest.index)", "return max(special, key=rest.index)",
     "template_ends_it"),
    ("recipes/checkpoints.py", "return [i for i in dict.fromkeys(known) if i is not None]", "return known[:1]",
     "any_of_the"),
    ("recipes/checkpoints.py", "        if end in shown:\n", "        if False:\n", "templates_own_text"),
    ("recipes/checkpoints.py", "    return ids_of(tokenizer, shown)\n",
     '    return tokenizer(shown, add_special_tokens=first)["input_ids"]\n', "begins_once", "test_amft.py"),
    ("recipes/checkpoints.py", '    if shown.endswith(" "):\n', "    if False:\n", "written_twice"),
    ("recipes/checkpoints.py", "        if not here:\n", "        if False:\n", "otherwise_is_refused"),
    ("recipes/checkpoints.py", "if not gap < limit:", "if gap is None:", "cannot_be"),
    ("recipes/checkpoints.py", "if not grad.isfinite().all():", "if grad is None:", "cannot_be"),
    ("recipes/checkpoints.py", "if max(used, default=0) >= rows:", "if False:", "cannot_be"),
    ("amft.py", "return x.to(torch.promote_types(x.dtype, torch.float32))", "return x", "bf16 or one_copy", MODELS),
    ("recipes/large.py", "ctx.function(x, i), x, g)[0])", "ctx.function(x, i), x, g)[0] * 1.01)",
     "one_copy or rows_of_logits"),
    ("recipes/large.py", "(x, i) for x, i in InParts.few(logits, ids)]", "(x, i) for x, i in [(logits, ids)] * 2]",
     "one_copy or rows_of_logits"),
    ("recipes/checkpoints.py", "layer.training = torch.is_grad_enabled()", "layer.train(torch.is_grad_enabled())",
     "checkpointing_changes"),
    ("recipes/checkpoints.py", "layer.training = torch.is_grad_enabled()", "layer.training = True",
     "checkpointing_changes"),
    ("recipes/checkpoints.py", "layer.gradient_checkpointing = True", "layer.gradient_checkpointing = False",
     "checkpointing_changes"),
    ("amft.py", "return at_least_float32(parameters_to_vector(model.parameters()).detach())",
     "return parameters_to_vector(model.parameters()).detach()", "bf16", MODELS),
    ("amft.py", "vector_to_parameters(theta.to(model.dtype),", "vector_to_parameters(theta,", "bf16", MODELS),
    ("amft.py", "logits = at_least_float32(logits) / temperature", "logits = logits / temperature", "bf16", MODELS),
    # a reader's problems
    ("recipes/problems.py", '.decode("utf-8-sig").split("\\n")', '.decode("utf-8-sig").splitlines()', "newlines_alone"),
    ("recipes/problems.py", '"utf-8-sig"', '"utf-8"', "newlines_alone"),
    ("recipes/checkpoints.py", "for episode in examples:", "for episode in examples[:1]:", "every_length", PROBLEMS),
    ("recipes/checkpoints.py", "max_new_tokens and not episode.exam:", "max_new_tokens:", "need_not_fit", PROBLEMS),
    ("recipes/checkpoints.py", "if len(prompt) + max_new_tokens > room:", "if len(prompt) > room:", "every_length",
     PROBLEMS),
    ("recipes/checkpoints.py", "if tokenizer.unk_token_id in used", "if None in used", "unknown", PROBLEMS),
    ("recipes/problems.py", "prompt).casefold()).split())", "prompt)).split())", "near_duplicates"),
    ("recipes/problems.py", 'unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())',
     "prompt.casefold()", "near_duplicates"),
    ("recipes/problems.py", "if problem.unit not in tested:", "if True:", "only_evaluated"),
    ("recipes/problems.py", "[replace(problem, exam=True) for", "[problem for", "only_evaluated"),
    ("recipes/problems.py", 'prompt = f"{prompt.rstrip()} {REQUEST}"', "pass", "form_of_the_answer"),
    ("tasks.py", 'return tail.rpartition("####")[2].strip() if "####" in tail else None', "return None", "four_hashes",
     PROBLEMS),
    ("tasks.py", "text.rstrip()[-100:].rpartition", "text.rpartition", "four_hashes", PROBLEMS),
    ("recipes/problems.py", "drawn += rng.sample(own, len(own))", "drawn += rng.choices(own, k=len(own))",
     "without_replacement"),
    ("recipes/problems.py", "sample(own, min(n, len(own)))", "choices(own, k=min(n, len(own)))", "only_evaluated"),
    # the rivals
    ("compare/rivals.py", "return p * (1 - p)", "return p", "tokens_weight"),
    ("compare/rivals.py", "p * gamma / (p + gamma) ** 2", "p * gamma / (p + gamma)", "tokens_weight"),
    ("compare/rivals.py", 'warmup=0, imitation="rectified")', "warmup=0)", "published and dft"),
    ("compare/rivals.py", "* p * gamma / (p + gamma) ** 2", "* p / (p + gamma)", "published and luffy"),
    ("compare/rivals.py", "1 / (self.config.samples + 1)", "1 / self.config.samples", "published and luffy"),
    ("compare/rivals.py", "0.5 * math.exp(-step.rollouts.entropy)", "0.5 * math.exp(step.rollouts.entropy)",
     "published and srft"),
    ("compare/rivals.py", "torch.where(rollouts.success > 0, right, -1.0)",
     "torch.where(rollouts.success > 0, right, 0.0)", "published and srft"),
    ("compare/rivals.py", "super().token_weights(step, logps, rows) / self.config.samples",
     "super().token_weights(step, logps, rows)", "published and dyme"),
    ("compare/rivals.py", "<= self.config.gate", "< self.config.gate", "gates"),
    ("compare/rivals.py", "(success.sum(1) == 0).float()", "(success.sum(1) <= 1).float()", "gates"),
    ("compare/rivals.py", "demo = torch.ones_like(success[:, :1])", "demo = torch.zeros_like(success[:, :1])", "gates"),
    ("compare/rivals.py", "share = (1 - self.mus) / (1", "share = 1 / (1", "weights_of_single or published and hpt"),
    ("compare/rivals.py", "share = self.mus / self.mus.mean().clamp(min=1e-9)", "share = self.mus",
     "weights_of_single or published and hpt"),
    ("compare/rivals.py", "share[rows].unsqueeze(1) * super()", "share[:len(rows)].unsqueeze(1) * super()",
     "published and superrl"),
    ("compare/rivals.py", "draw >= self.last /", "draw < self.last /", "sasr_by_hand"),
    ("compare/rivals.py", "        if self.warms_up(step.t):\n", "        if True:\n", "sasr_by_hand"),
    ("compare/rivals.py", "zip(self.chosen, solved) if not one]", "zip(self.chosen, solved) if one]",
     "relift_keeps"),
    ("compare/rivals.py", "self.waiting = self.waiting[self.config.sft_batch:]", "self.waiting = ()", "relift_keeps"),
    ("compare/rivals.py", "(1 + math.cos(", "(1 - math.cos(", "cosine_by_hand"),
    ("compare/rivals.py", "(step.t - 1) / max(self.config.steps - 1, 1)", "step.t / self.config.steps",
     "cosine_by_hand"),
    ("compare/rivals.py", "best = (0.5 * gap + noise_rl)", "best = (0.5 * gap + noise_sft)", "gac_by_hand"),
    ("compare/rivals.py", "len(nll) // 10", "0 * len(nll)", "three_proxies"),
    ("compare/rivals.py", "kept * a + (1 - kept) * b", "b", "three_proxies"),
    ("compare/rivals.py", "(step.t - config.warmup) % config.meta_every == 0", "True", "three_proxies"),
    ("compare/rivals.py", "        if first:\n            self.spent += step.n_sampled",
     "        if first:\n            self.spent += 0", "shared_out"),
    ("compare/rivals.py", " - config.prompts * looks(config, t)", "", "shared_out"),
    # several processes
    ("recipes/parallel.py", "torch.manual_seed(seed + RANK)", "torch.manual_seed(seed)", "streams"),
    ("recipes/parallel.py", "return total(grad), total(logps)", "return grad, total(logps)", "two_ranks"),
    ("recipes/parallel.py", "return total(grad), total(logps)", "return total(grad), logps", "two_ranks"),
    ("recipes/parallel.py", "order = torch.tensor(place).argsort()", "order = torch.arange(len(place))", "two_ranks"),
    ("recipes/parallel.py", "pad(x, (left, right), value=value)", "pad(x, (0, left + right), value=value)",
     "two_ranks or joined_conv"),
    ("recipes/parallel.py", "for part in parts], tokens)", "for part in parts], turns)", "joined_conv"),
    ("recipes/parallel.py", "P * (P - 1) * error ** 2 + P * mean ** 2", "P * (P - 1) * error ** 2", "two_ranks"),
    ("recipes/parallel.py", "return None, total(states)", "return None, states", "two_ranks"),
    ("recipes/parallel.py", "            dist.broadcast(leaf, 0)", "            pass", "broken_run_goes_on"),
    ("recipes/parallel.py", "if len(set(bits)) > 1 or len(set(mu)) > 1:", "if len(set(mu)) > 1:", "one_line"),
    ("recipes/parallel.py", "if len(set(bits)) > 1 or len(set(mu)) > 1:", "if len(set(bits)) > 1:", "one_line"),
    ("recipes/parallel.py", 'if store.add("said", 1) == 1 and line:', "if line:", "one_line"),
    # the tasks
    ("tasks.py", "if sorted(used) != sorted(self.numbers):", "if set(used) != set(self.numbers):",
     "hostile or bracketing"),
    ("tasks.py", 'return outcome if outcome == "no_answer" or self.recognised(response) else "wrong_cards"',
     "return outcome", "picture_alone or named_outcome", f"{PICTURES} test_amft.py"),
    ("tasks.py", "self.point += 1\n            self.tries = 0\n", "self.point += 1\n", "own_attempts"),
    ("tasks.py", "self.tries >= self.attempts", "self.tries > self.attempts", "chance_predicts or feedback"),
    ("tasks.py", "e.success and all(hits), e.unit", "e.success and hits[0], e.unit", "measures_of"),
    ("tasks.py", "if claims == stop.intersection or", "if claims != stop.intersection or", "never_wrong"),
    ("tasks.py", "TURNS[(way - heading) % 8]", 'TURNS.get(way - heading, "left")', "walks_through"),
    ("tasks.py", "(side - way) % 8", "(way - side) % 8", "walks_through or actions_are"),
    ("tasks.py", 'return -value if match[1] == "-" else value', "return value", "equal_numbers"),
    ("tasks.py", 'text.rfind("\\\\boxed{")', 'text.find("\\\\boxed{")', "equal_numbers"),
    ("tasks.py", "if role_of(problem.unit) == role:", "if True:", "roles_differ"),
    ("tasks.py", '"H": (205, 30, 45)', '"H": (25, 25, 25)', "template_reader", PICTURES),
    ("tasks.py", "bearing - 2 * view + 4) % 8 - 4", "bearing - 2 * view + 4) % 8 - 3", "sign_reader", PICTURES),
    ("tasks.py", "if len(dict(pairs)) < len(pairs):", "if False:", "hostile"),
    ("tasks.py", "if len(response) > MAX_RESPONSE:", "if False:", "hostile"),
    ("tasks.py", '(op == "/" and pb == MUL)', "False", "brute_force"),
    ("tasks.py", '"/": a / target', '"/": target * a', "brute_force"),
    ("tasks.py", "if ROLES[tuple(sorted(numbers))] == chosen.role and", "if", "disjoint"),
    ("base/make.py", "if value == tasks.TARGET and", "if False and", "pretraining"),
    ("tasks.py", "residuals[unit] += hit - p", "residuals[len(residuals)] += hit - p", "clusters"),
    ("tasks.py", "object_pairs_hook=unique_keys, parse_constant=no_constant", "object_pairs_hook=unique_keys",
     "hostile"),
    ("tasks.py", 'role = split if split in ("train", "val") else', 'role = split if split in ("train",) else',
     "new_splits_are_new"),
]


class Bug(NamedTuple):
    """A row of MUTANTS."""
    file: str
    old: str
    new: str
    tests: str  # pytest -k
    where: str = ""  # their files, if not TESTS[file]

    @property
    def line(self):
        """What is printed of it, and what --only matches."""
        return " ".join(f"{self.file}: {self.old} -> {self.new}  [{self.tests}]".split())

    def files(self, copy):
        """The test files that are there."""
        names = (self.where or TESTS[self.file]).split()
        return " ".join(name for name in names if (copy / name).exists())

    def made(self, text):
        """The file with the bug; ValueError or SyntaxError says why there is none."""
        if text.count(self.old) != 1:
            raise ValueError(f"text there {text.count(self.old)} times")
        broken = text.replace(self.old, self.new)
        compile(broken, self.file, "exec")
        return broken


def mistake(bug, folder):
    """Why the bug cannot be made of the file as it is; None if it can."""
    try:
        bug.made((folder / bug.file).read_text())
    except (ValueError, SyntaxError, OSError) as error:
        return str(error)


def imported_once():
    """Import what the tests need and bugs are not in: each test process is a fork that has it."""
    for name in ("torch", "pytest", "numpy", "matplotlib.figure", "safetensors.torch", "torch._dynamo",
                 "transformers.generation.utils", "transformers.models.auto", "transformers.models.gpt2.modeling_gpt2",
                 "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava"):
        importlib.import_module(name)
    gc.freeze()  # nothing of it is looked through again at the end of each test process


def pytest_of(copy, files, *argv):
    """(exit code or None after SECONDS, what it printed) of pytest in a fork."""
    output = copy.parent / "output"
    if (child := os.fork()) == 0:
        run_here(copy, output, [*files.split(), *argv])
    end = time.monotonic() + SECONDS * (1 if "-x" in argv else 10)
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, output.read_text()
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(done[1]), output.read_text()


def run_here(copy, output, argv):
    """The end of this process: pytest in the folder `copy`."""
    os.setsid()
    os.chdir(copy)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import pytest
    code = 3
    try:
        code = int(pytest.main(["-q", "-p", "no:cacheprovider", "--assert=plain", "--rootdir", str(copy), *argv]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def failing(output):
    """Names of the tests in pytest's summary."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.partition(" ")[2].partition(" - ")[0] for line in lines]


def baseline(bugs, copy):
    """{test files: the tests of these that fail without a bug}."""
    unsound = {}
    for files in dict.fromkeys(bug.files(copy) for bug in bugs):
        used = " or ".join(dict.fromkeys(f"({bug.tests})" for bug in bugs if bug.files(copy) == files))
        _, output = pytest_of(copy, files, "-k", used, "-rfE")
        unsound[files] = failing(output)
        print(f"{files}: without a bug {output.strip().splitlines()[-1]}", *unsound[files], sep="\n  ", flush=True)
    return unsound


def tried(bug, copy, unsound):
    """(what became of the bug, in words; the test that failed first)."""
    files = bug.files(copy)
    if wrong := mistake(bug, copy):
        return wrong, ""
    if not files:
        return "no such file", ""
    text = (copy / bug.file).read_text()
    (copy / bug.file).write_text(bug.made(text))
    skip = [word for name in unsound.get(files, ()) for word in ("--deselect", name)]
    code, output = pytest_of(copy, files, "-x", "-rfE", "-k", bug.tests, *skip)
    (copy / bug.file).write_text(text)
    result = {0: "SURVIVED", 1: "caught", 5: "no such test", None: "timed out"}.get(code, f"exit code {code}")
    return result, "".join(failing(output)[:1])


def check(bugs):
    """Is each bug's text there once, and what it makes of it still Python?"""
    wrong = [(bug, text) for bug in bugs if (text := mistake(bug, ROOT))]
    for bug, text in wrong:
        print(f"{text:20} {bug.line}")
    print(f"{len(bugs) - len(wrong)} of {len(bugs)} bugs can be made")
    return bool(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="GLOB", default="*", help="rows whose printed line matches")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a bug")
    parser.add_argument("--check", action="store_true", help="run no tests; see that each row's text is there once")
    arguments = parser.parse_args()
    bugs = [bug for bug in (Bug(*row) for row in MUTANTS) if fnmatch.fnmatchcase(bug.line, arguments.only)]
    if arguments.check:
        sys.exit(check(bugs))
    sys.dont_write_bytecode = True  # two bugs of one size in one second would share their bytecode
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    imported_once()
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "results", "runs", "*.pt", "__pycache__"))
        unsound = {} if arguments.no_baseline else baseline(bugs, copy)
        for bug in bugs:
            result, test = tried(bug, copy, unsound)
            counts[result] = counts.get(result, 0) + 1
            print(f"{result:15} {bug.line}", *[test] * (result == "caught"), sep="  by ", flush=True)
    caught = counts.get("caught", 0)
    print(f"{caught} of {len(bugs)} silent bugs caught; {counts}")
    sys.exit(caught < len(bugs) or any(unsound.values()))


if __name__ == "__main__":
    main()
