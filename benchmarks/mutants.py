"""Break the code on purpose, one silent bug at a time, and see the named tests fail.

    python benchmarks/mutants.py                           # all, 20 minutes on a core
    python benchmarks/mutants.py --only '*temperature*'    # rows whose printed line matches

Each row: file, the text that is there once, what the bug puts in its place, the tests that must catch it (pytest -k),
of the file that TESTS says, or of MODELS.
The bugs are made one after the other in one copy of the project. A row whose text is no longer there, or whose tests
still pass, is reported and fails the run; so do tests that fail without any bug, which count for nothing.
"""

import argparse
import fnmatch
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # for the tests of a row
TESTS = {"amft.py": "test_amft.py", "tasks.py": "test_amft.py", "base/make.py": "test_amft.py",
         "compare/rivals.py": "compare/test_rivals.py", "recipes/parallel.py": "recipes/test_parallel.py"}
MODELS = "recipes/test_models.py: "
FORGET = 'vars(method).update(state["method"], config=method.config)'
MUTANTS = [
    # the step
    ("amft.py", "norm=grad.norm(), step", "norm=grad.abs().max(), step", "step_equals_torch"),
    ("amft.py", "m / (1 - b1 ** step)", "m", "step_equals_torch"),
    ("amft.py", "theta * (1 - lr * weight_decay)", "theta * (1 - weight_decay)", "step_equals_torch"),
    ("amft.py", "root = v.clamp(min=1e-37).sqrt()", "root = v.sqrt()",
     "sensitivity_is_finite"),
    # the sensitivity
    ("amft.py", "theta, (1 - mu) * g_rl + mu * g_sft, m", "theta, mu * g_rl + (1 - mu) * g_sft, m", "finite_difference"),
    ("amft.py", "tangents = trace * d_theta", "tangents = d_theta", "with_a_trace"),
    ("amft.py", "trace * d_m, trace * d_v, d_norm", "trace * d_m, 0 * d_v, d_norm", "with_a_trace"),
    ("amft.py", "trace * d_v, d_norm", "trace * d_v, 0 * d_norm", "finite_difference"),
    ("amft.py", "del s.g_rl, s.g_sft  # memory", "pass", "floats_a_parameter"),
    ("tasks.py", "x[i:i + size].clone() for", "x[i:i + size] for", "floats_a_parameter"),
    ("tasks.py", "size=2 ** 22", "size=2 ** 40", "floats_a_parameter"),
    ("tasks.py", "x[i:i + size] = part", "x[:len(part)] = part", "slices_give"),
    ("amft.py", "s.g_sft, s.mu, s.adam, self.tangents, lam", "s.g_sft, s.mu, s.adam, None, lam", "hang_together"),
    ("amft.py", "s.g_sft, s.mu, s.adam, self", "s.g_sft, self.config.mu, s.adam, self", "hang_together"),
    ("amft.py", "self.tangents, lam, lr=s.lr)", "self.tangents, lam, lr=self.config.lr)", "hang_together"),
    ("amft.py", "self.tangents, lam, lr=s.lr)", "self.tangents, lam, lr=s.lr - self.config.lr / self.config.steps)",
     "hang_together"),
    ("amft.py", "(1 - (t - 1) / config.steps)", "(1 - t / config.steps)", "hang_together"),
    ("amft.py", "lam = 1.0 if s.update else self.config.trace", "lam = self.config.trace", "fades_once"),
    ("amft.py", "            method.moved(s)\n", "            s.theta = s.theta - s.lr * s.g_rl\n            method.moved(s)\n", "hang_together"),
    # the meta-gradient
    ("amft.py", "(logps * part.mask[rows]).sum(1)", "logps[:, 0]", "slow_loop or unbiased"),
    ("amft.py", "part, used, surrogate, config, config.temperature)", "part, used, surrogate, config)",
     "exactly_unbiased or slow_loop"),
    ("amft.py", "(scale * advantages[p][rows]", "(advantages[p][rows]",
     "meta_gradient_against_a_slow_loop"),
    ("amft.py", "advantages, scale = given or group_advantages(rollouts.success)", "advantages, scale = rollouts.success, 1.0",
     "meta_gradient_against_a_slow_loop"),
    ("amft.py", "slopes.std().item() / math.sqrt(P)", "slopes.std().item() / math.sqrt(P * G)", "slow_loop or covers"),
    ("amft.py", "g_rl @ tangent * batch.mask.sum() / len(batch.ids)", "g_rl @ tangent", "own_meta"),
    ("amft.py", "len(batch.ids)).item() * scale", "len(batch.ids)).item()", "own_meta"),
    ("amft.py", "slope = -(g_rl", "slope = (g_rl", "own_meta"),
    ("amft.py", "own_meta_gradient(s.g_rl, self", "own_meta_gradient(s.g_sft, self", "mu_follows"),
    ("amft.py", "shown.append(meta_gradient(s.model, self.tangents[0], seen, c, self.given(s, seen)))",
     "shown = [meta_gradient(s.model, self.tangents[0], seen, c, self.given(s, seen))]", "mu_follows"),
    ("amft.py", 's.task.sample(self.on, s.rng)', 's.task.sample("train", s.rng)', "target_entropy_is_measured"),
    ("amft.py", "episodes, c.samples, c.max_new_tokens, c.temperature)", "episodes, c.samples, c.max_new_tokens)",
     "target_entropy_is_measured"),
    # the controller
    ("amft.py", "(target_entropy - entropy)", "(entropy - target_entropy)", "hand_computed"),
    ("amft.py", "memory ** 2 * evidence[1]", "memory * evidence[1]", "hand_computed"),
    ("amft.py", "math.erf(total / math.sqrt(2 * variance))", "math.erf(total / math.sqrt(variance))",
     "hand_computed or calibrated"),
    ("amft.py", "max(mu + meta_force + entropy_force, config.mu_min)", "mu + meta_force + entropy_force", "hand_computed"),
    ("amft.py", "config.eta_mu * sum(slope for slope, _ in estimates)", "math.copysign(config.eta_mu, estimates[0][0])",
     "paper_controller or hand_computed"),
    ("amft.py", "if self.target_entropy is None:", "if True:", "target_entropy_is_measured"),
    ("amft.py", "return 1.0  # the warm-up", "return self.now", "budget or hang_together"),
    ("amft.py", "s.mu = method.mu(s) if s.update == 0 else s.mu", "s.mu = method.mu(s)", "fades_once"),
    # losses and advantages
    ("amft.py", "wide(logits).log_softmax(-1).gather", "wide(logits).softmax(-1).log().gather", "large_logits"),
    ("amft.py", "return -(logps * mask).sum()", "return -logps.sum()", "slow_loops"),
    ("amft.py", "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages", "slow_loops"),
    ("amft.py", "(ratio * advantages, ratio.clamp(1 - clip, 1 + clip)", "(ratio * advantages, ratio.clamp(1, 1 + clip)",
     "slow_loops"),
    ("amft.py", "return -(surrogate * mask)", "return (surrogate * mask)", "slow_loops"),
    ("amft.py", "centred.std(correction=0)", "centred.std()", "by_hand"),
    ("amft.py", "return (centred / scale, scale)", "return (centred / (centred.std(1, keepdim=True) + 1e-6), scale)",
     "advantages_by_hand or own_meta"),
    ("amft.py", "delta + gamma * lam * running, running)", "delta + gamma * running, running)", "gae"),
    ("amft.py", "gamma=1.0, lam=1.0)", "gamma=1.0, lam=0.95)", "gae or own_meta or graded_rewards"),
    ("amft.py", "following = torch.where(own, values[:, t], following)", "following = values[:, t] * own", "gae"),
    ("amft.py", "beta * ((logps - ref_logps) * mask)", "beta * ((ref_logps - logps) * mask)", "slow_loops"),
    ("amft.py", "last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask", "last = mask",
     "whole_conversations or graded_rewards"),
    ("amft.py", 'rollouts.graded if config.reward == "graded" else rollouts.success', "rollouts.success", "graded_rewards"),
    ("amft.py", "c = logps.detach().exp() if", "c = logps.exp() if", "loss_of_a_demonstration"),
    ("amft.py", "return loss(logp, mask[rows], tokens, rows)", "return loss(logp, mask[rows], None, rows)",
     "loss_of_a_demonstration or micro_batches"),
    ("amft.py", "batch.mask[rows], config.clip, tokens)", "batch.mask[rows], config.clip)", "micro_batches or old_samples"),
    ("amft.py", "advantages.values, loss, config, config.temperature)", "advantages.values, loss, config)",
     "old_samples or own_meta_gradient_is_the_slope"),
    ("amft.py", "old = logp.detach() if old_logps is None else old_logps[rows]", "old = logp.detach()", "old_samples"),
    ("amft.py", "old = logps if old is None else old", "old = logps", "fades_once"),
    # the policy
    ("tasks.py", "columns = torch.arange(S - T - 1, S - 1,", "columns = torch.arange(S - T, S,", "company"),
    ("tasks.py", "out.logits if temperature == 1 else wide(out.logits) / temperature", "out.logits", "temperature_of_log"),
    ("tasks.py", "positions = (attention.cumsum(1) - 1).clamp(min=0)",
     "positions = torch.arange(attention.shape[1], device=attention.device).expand_as(attention)", "absolute_positions"),
    ("tasks.py", "attention_mask=attention, position_ids", "attention_mask=torch.ones_like(attention), position_ids", "company"),
    ("tasks.py", "position_ids=positions[:, start:]", "position_ids=positions[:, :ids.shape[1] - start]", "sampled_from"),
    ("tasks.py", "[\"input_ids\"] + end\n", "[\"input_ids\"]\n", "company"),
    ("tasks.py", "own = ((ended.cumsum(1) - ended == 0) &", "own = ((ended.cumsum(1) == 0) &", "rollout_samples"),
    ("tasks.py", "top_k=0, top_p=1.0", "top_k=50, top_p=1.0", "frequencies"),
    ("tasks.py", "do_sample=True, temperature=temperature", "do_sample=True, temperature=1.0", "frequencies"),
    ("tasks.py", "self.columns.append(-(logp.exp() * logp)", "self.columns.append((logp.exp() * logp)", "rollout_samples"),
    ("tasks.py", "(torch.stack(watcher.columns, 1) * own).sum()", "torch.stack(watcher.columns, 1).sum()", "entropy_is_that"),
    # conversations and pictures
    ("tasks.py", "model.generate(ids, attention_mask=attention,", "model.generate(ids, attention_mask=torch.ones_like(attention),",
     "rollout_samples or sampled_from"),
    ("tasks.py", "& ~done.unsqueeze(1)).float()", ").float()", "alone_and_in_company"),
    ("amft.py", "played = [copy.copy(episode) for", "played = [episode for", "alone_and_in_company or rollout_samples"),
    ("tasks.py", "[float(turn.learn)] * len(said)", "[1.0] * len(said)", "demonstrations_teach"),
    ("tasks.py", "[self.pixels[i] for i in chosen]", "self.pixels", "alone_and_in_company"),
    ("tasks.py", "out.index_fill(-1, token, -1e9)", "out", "cannot_say"),
    # the loop
    ("amft.py", 'random.Random(f"step {config.seed} {t}")', "random.Random()", "same_seed"),
    ("amft.py", "s.g = (1 - s.mu) * s.g_rl + s.mu * s.g_sft", "s.g = s.g_rl + s.mu * s.g_sft", "mu_one or gradient_of_its_loss"),
    ("amft.py", "how = config.samples, config.max_new_tokens, config.temperature", "how = config.samples, config.max_new_tokens",
     "target_entropy_is_measured"),
    ("amft.py", "s.sampled += len(seen.episodes)", "s.sampled += 0", "budget or same_seed"),
    ("amft.py", "(1, 0, greedy)", "(1, config.temperature, greedy)", "evaluation_reports"),
    ("amft.py", "(samples, config.temperature, sampled)", "(samples, 0, sampled)", "evaluation_reports"),
    ("amft.py", "if bad := [name for name, value in row.items() if not math.isfinite(value)]:", "if bad := []:", "non_finite"),
    # a run that goes on
    ("amft.py", FORGET, FORGET.replace('state["method"]', '{**state["method"], "tangents": None}'), "interrupted_run"),
    ("amft.py", FORGET, FORGET.replace('state["method"]', '{**state["method"], "evidence": (0.0, 0.0)}'), "interrupted_run"),
    ("amft.py", FORGET, FORGET.replace('state["method"]', '{**state["method"], "target_entropy": None}'), "interrupted_run"),
    ("amft.py", FORGET, FORGET.replace('state["method"]', '{**state["method"], "now": method.now}'), "interrupted_run"),
    ("amft.py", 'os.truncate(self.log, state["log"])', "None", "interrupted_run"),
    ("amft.py", 'AdamState(*state["adam"])', "AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)", "interrupted_run"),
    ("amft.py", 'phi.load_state_dict(state["phi"][0])', "None", "interrupted_run"),
    ("amft.py", 'phi.optimizer.load_state_dict(state["phi"][1])', "None", "interrupted_run"),
    ("amft.py", '(self.folder / "state.tmp").write_bytes(', "(self.folder / 'state.tmp').write_bytes(b'') or self.state.write_bytes(",
     "older_than_its_last"),
    ("amft.py", "(self.config.warmup or self.config.steps // 2)", "self.config.warmup", "switches_at"),
    # bad input
    ("amft.py", " and math.isfinite(f.type(text))", "", "bad_flags"),
    ("amft.py", "allow_nan=False", "allow_nan=True", "not_json"),
    ("amft.py", ' or state["log"] > self.log.stat().st_size', "", "states_and_logs"),
    ("tasks.py", 'info["missing_keys"] or info["mismatched_keys"] or', 'info["mismatched_keys"] or', "checkpoints_that_are"),
    ("tasks.py", "not all(p.isfinite().all() for p in model.parameters())", "False", "checkpoints_that_are"),
    # a reader's checkpoint
    ("tasks.py", "model.generation_config = GenerationConfig(", "GenerationConfig(", MODELS + "own_way_to_sample"),
    ("tasks.py", "return min(special, key=rest.index)", "pass", MODELS + "template_ends_it"),
    ("tasks.py", "return min(special, key=rest.index)", "return max(special, key=rest.index)", MODELS + "template_ends_it"),
    ("tasks.py", "return [i for i in dict.fromkeys(known) if i is not None]", "return known[:1]", MODELS + "any_of_the"),
    ("tasks.py", "text = text.partition(end)[2] if end in text else text", "pass", MODELS + "template_ends_it"),
    ("tasks.py", "if not (gap := (gap[0] - gap[1]).abs().sum() / batch.mask.sum()) < limit:", "if gap is None:", MODELS + "cannot_be"),
    ("tasks.py", "if not grad.isfinite().all():", "if grad is None:", MODELS + "cannot_be"),
    ("tasks.py", "for ids in (prompt, *responses)) >= rows:", "for ids in (prompt, *responses)) < 0:", MODELS + "cannot_be"),
    ("tasks.py", "x.to(torch.promote_types(x.dtype, torch.float32))", "x", MODELS + "one_copy"),
    ("tasks.py", "ctx.function(x, i), x, g)[0])", "ctx.function(x, i), x, g)[0] * 1.01)", MODELS + "one_copy"),
    ("tasks.py", "(x, i) for x, i in InParts.few(logits, ids)]", "(x, i) for x, i in [(logits, ids)] * 2]", MODELS + "one_copy"),
    ("tasks.py", "layer.training = torch.is_grad_enabled()", "layer.train(torch.is_grad_enabled())", MODELS + "checkpointing_changes"),
    ("tasks.py", "layer.training = torch.is_grad_enabled()", "layer.training = True", MODELS + "checkpointing_changes"),
    ("tasks.py", "layer.gradient_checkpointing = True", "layer.gradient_checkpointing = False", MODELS + "checkpointing_changes"),
    ("tasks.py", "return wide(parameters_to_vector(model.parameters()).detach())", "return parameters_to_vector(model.parameters()).detach()",
     MODELS + "bf16"),
    ("tasks.py", "weight.data = part.view_as(weight).to(weight.dtype)", "weight.data = part.view_as(weight)", MODELS + "bf16"),
    ("tasks.py", "else wide(out.logits) / temperature", "else out.logits / temperature", MODELS + "bf16"),
    ("amft.py", "max(1, config.micro_tokens // batch.ids.shape[1])", "max(1, config.micro_tokens)", "micro_batches"),
    # a reader's problems
    ("tasks.py", ".read().split(\"\\n\")", ".read().splitlines()", MODELS + "newlines_alone"),
    ("tasks.py", "encoding=\"utf-8-sig\"", "encoding=\"utf-8\"", MODELS + "newlines_alone"),
    ("tasks.py", "for i, episode in enumerate(examples):", "for i, episode in enumerate(examples[:1]):", MODELS + "every_length"),
    ("tasks.py", "max_new_tokens and not episode.exam:", "max_new_tokens:", MODELS + "solution_is_not"),
    ("tasks.py", "if len(prompt) + max_new_tokens > room:", "if len(prompt) > room:", MODELS + "every_length"),
    ("tasks.py", "if tokenizer.unk_token_id in {*prompt", "if None in {*prompt", MODELS + "unknown"),
    ("tasks.py", "prompt).casefold()).split())", "prompt)).split())", MODELS + "near_duplicates"),
    ("tasks.py", "unicodedata.normalize(\"NFKC\", unicodedata.normalize(\"NFKC\", prompt).casefold())", "prompt.casefold()",
     MODELS + "near_duplicates"),
    ("tasks.py", "if problem.unit not in tested:", "if True:", MODELS + "only_evaluated"),
    ("tasks.py", "[replace(problem, exam=True) for", "[problem for", MODELS + "only_evaluated"),
    ("tasks.py", "prompt = f\"{prompt.rstrip()} {REQUEST}\"", "pass", MODELS + "form_of_the_answer"),
    ("tasks.py", "if box is None and \"####\" in tail and", "if False and", MODELS + "four_hashes"),
    ("tasks.py", "text.rstrip()[-100:].rpartition", "text.rpartition", MODELS + "four_hashes"),
    ("tasks.py", "drawn += rng.sample(own, len(own))", "drawn += rng.choices(own, k=len(own))", MODELS + "without_replacement"),
    ("tasks.py", "sample(own, min(n, len(own))) if own", "choices(own, k=min(n, len(own))) if own", MODELS + "only_evaluated"),
    # the rivals
    ("compare/rivals.py", "amft.sft_loss(p * (1 - p) * logps", "amft.sft_loss(p * logps", "coefficients_of_probable"),
    ("compare/rivals.py", "p = logps.detach().exp()", "p = logps.exp()", "coefficients_of_probable"),
    ("compare/rivals.py", 'imitation="rectified"', 'imitation="nll"', "published and dft"),
    ("compare/rivals.py", "* p / (p + self.config.shape)", "* p / (p.detach() + self.config.shape)", "published and luffy"),
    ("compare/rivals.py", "1 / (self.config.samples + 1)", "1 / self.config.samples", "published and luffy"),
    ("compare/rivals.py", "0.5 * math.exp(-s.rollouts.entropy)", "0.5 * math.exp(s.rollouts.entropy)", "published and srft"),
    ("compare/rivals.py", "0.1 * math.exp(s.rollouts.entropy), -1.0)", "0.1 * math.exp(s.rollouts.entropy), 0.0)",
     "published and srft"),
    ("compare/rivals.py", "logps, mask, tokens, rows) / self.config.samples", "logps, mask, tokens, rows)", "published and dyme"),
    ("compare/rivals.py", "<= self.config.gate", "< self.config.gate", "gates"),
    ("compare/rivals.py", "(s.rollouts.success.sum(1) == 0)", "(s.rollouts.success.sum(1) <= 1)", "gates"),
    ("compare/rivals.py", "success, torch.ones_like(success[:, :1])", "success, torch.zeros_like(success[:, :1])", "gates"),
    ("compare/rivals.py", "share = (1 - s.weights) / (1", "share = 1 / (1", "weights_of_single or published and hpt"),
    ("compare/rivals.py", "share = s.weights / s.weights.mean().clamp(min=1e-9)", "share = s.weights",
     "weights_of_single or published and hpt"),
    ("compare/rivals.py", "mask * share[rows].unsqueeze(1)", "mask * share[:len(rows)].unsqueeze(1)", "published and superrl"),
    ("compare/rivals.py", "draw >= self.last /", "draw < self.last /", "sasr_by_hand"),
    ("compare/rivals.py", "self.last if s.t <= max(self.config.warmup, 1) else self.warm", "self.last", "sasr_by_hand"),
    ("compare/rivals.py", "if not one), *self.buffer)", "if one), *self.buffer)", "relift_buffers"),
    ("compare/rivals.py", "self.buffer = self.buffer[self.config.sft_batch:]", "self.buffer = ()", "relift_buffers"),
    ("compare/rivals.py", "(1 + math.cos(", "(1 - math.cos(", "cosine_by_hand"),
    ("compare/rivals.py", "(s.t - 1) / max(self.config.steps - 1, 1)", "s.t / self.config.steps", "cosine_by_hand"),
    ("compare/rivals.py", "best = (0.5 * gap + noise_rl)", "best = (0.5 * gap + noise_sft)", "gac_by_hand"),
    ("compare/rivals.py", "len(s.nll) // 10", "0 * len(s.nll)", "three_proxies"),
    ("compare/rivals.py", "c.memory * a + (1 - c.memory) * b", "b", "three_proxies"),
    ("compare/rivals.py", "(s.t - c.warmup) % c.meta_every == 0", "True", "three_proxies"),
    ("compare/rivals.py", "self.spent += 0 if s.update else s.sampled", "self.spent += 0", "shared_out"),
    ("compare/rivals.py", " - c.prompts * looks(c, s.t)", "", "shared_out"),
    # several processes
    ("recipes/parallel.py", "torch.manual_seed(seed + RANK)", "torch.manual_seed(seed)", "streams"),
    ("recipes/parallel.py", "return total(grad), total(logps)", "return grad, total(logps)", "two_ranks"),
    ("recipes/parallel.py", "return total(grad), total(logps)", "return total(grad), logps", "two_ranks"),
    ("recipes/parallel.py", "order = torch.tensor(place).argsort()", "order = torch.arange(len(place))", "two_ranks"),
    ("recipes/parallel.py", "left = S - right", "left = 0 * S - 0 * right", "two_ranks"),
    ("recipes/parallel.py", "for part in parts], tokens)", "for part in parts], turns)", "joined_conv"),
    ("recipes/parallel.py", "P * (P - 1) * error ** 2 + P * mean ** 2", "P * (P - 1) * error ** 2", "two_ranks"),
    ("recipes/parallel.py", "return None, total(states)", "return None, states", "two_ranks"),
    ("recipes/parallel.py", "        result = super().restore(*args)\n", "        result = super().restore(*args[:1], None, args[2])\n",
     "ranks_of_a_run"),
    ("recipes/parallel.py", "set(everyones((bits, s.mu)))", "set(everyones(s.mu))", "one_line"),
    ("recipes/parallel.py", 'if store.add("said", 1) == 1 and line:', "if line:", "one_line"),
    # the tasks
    ("tasks.py", "if sorted(used) != sorted(self.numbers):", "if set(used) != set(self.numbers):", "hostile or bracketing"),
    ("tasks.py", "return outcome if outcome == \"no_answer\" or self.recognised(response) else \"wrong_cards\"", "return outcome",
     "pictures_hold"),
    ("tasks.py", "self.point, self.tries = self.point + 1, 0", "self.point = self.point + 1", "own_attempts"),
    ("tasks.py", "self.tries >= self.attempts", "self.tries > self.attempts", "random_agent or feedback"),
    ("tasks.py", "if claims == stop.intersection or", "if claims != stop.intersection or", "never_wrong"),
    ("tasks.py", "TURNS[(way - heading) % 8]", "TURNS.get(way - heading, \"left\")", "walks_through"),
    ("tasks.py", "(side - way) % 8", "(way - side) % 8", "walks_through"),
    ("tasks.py", "return -value if match[1] == \"-\" else value", "return value", "equal_numbers"),
    ("tasks.py", "text.rfind(\"\\\\boxed{\")", "text.find(\"\\\\boxed{\")", "equal_numbers"),
    ("tasks.py", "if role_of(problem.unit) == role:", "if True:", "roles_differ"),
    ("tasks.py", "\"H\": (205, 30, 45)", "\"H\": (25, 25, 25)", "template_reader"),
    ("tasks.py", "bearing - 2 * view + 4) % 8 - 4", "bearing - 2 * view + 4) % 8 - 3", "sign_reader"),
    ("tasks.py", "if len(dict(pairs)) < len(pairs):", "if False:", "hostile"),
    ("tasks.py", "if len(response) > MAX_RESPONSE:", "if False:", "hostile"),
    ("tasks.py", '(op == "/" and pb == MUL)', "False", "brute_force"),
    ("tasks.py", '"/": a / target', '"/": target * a', "brute_force"),
    ("tasks.py", 'if ROLES[tuple(sorted(numbers))] == chosen.role and', "if", "disjoint"),
    ("base/make.py", "if value == tasks.TARGET and", "if False and", "pretraining"),
    ("tasks.py", "residuals[unit] += hit - p", "residuals[len(residuals)] += hit - p", "clusters"),
    ("tasks.py", "object_pairs_hook=unique_keys, parse_constant=no_constant", "object_pairs_hook=unique_keys", "hostile"),
    ("tasks.py", 'role = split if split in ("train", "val") else', 'role = split if split in ("train",) else',
     "new_splits_are_new"),
]


def pytest_of(copy, *argv):
    """(exit code or None after SECONDS, what it printed) of pytest in a fork, which has all imports but the project's."""
    output = copy.parent / "output"
    if (child := os.fork()) == 0:
        os.setsid()
        os.chdir(copy)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        import pytest
        code = 3
        try:
            code = int(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(copy), *argv]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + SECONDS * (1 if "-x" in argv else 10)
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, output.read_text()
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(done[1]), output.read_text()


def failing(output):
    """Names of the tests in pytest's summary."""
    return [line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="GLOB", default="*", help="rows whose line (file: text -> bug, tests) matches")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a bug")
    arguments = parser.parse_args()
    rows = [(file, old, new, test, " ".join(f"{file}: {old} -> {new}  [{test}]".split())) for file, old, new, test in MUTANTS]
    rows = [(*row, MODELS[:-2] if row[3].startswith(MODELS) else TESTS[row[0]]) for row in rows]
    rows = [(*row[:3], row[3].removeprefix(MODELS), *row[4:]) for row in rows]
    rows = [row for row in rows if fnmatch.fnmatchcase(row[4], arguments.only)]
    sys.dont_write_bytecode = True  # two bugs of one size in one second would share their bytecode
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for name in ("torch", "pytest", "numpy", "transformers.models.auto", "transformers.models.llama.modeling_llama",
                 "transformers.models.gpt2.modeling_gpt2", "transformers.models.llava.modeling_llava",
                 "transformers.generation.utils", "torch._dynamo", "safetensors.torch"):
        importlib.import_module(name)
    counts, unsound = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "results", "runs", "*.pt", "__pycache__"))
        for tests in dict.fromkeys(row[5] for row in rows if not arguments.no_baseline):
            used = " or ".join(dict.fromkeys(f"({row[3]})" for row in rows if row[5] == tests))
            _, output = pytest_of(copy, tests, "-k", used, "-rfE")
            unsound[tests] = failing(output)
            print(f"{tests}: without a bug {output.strip().splitlines()[-1]}", *unsound[tests], sep="\n  ", flush=True)
        for file, old, new, test, line, tests in rows:
            text = (copy / file).read_text()
            if text.count(old) != 1:
                result = f"text there {text.count(old)} times"
            else:
                (copy / file).write_text(text.replace(old, new))
                skip = [x for name in unsound.get(tests, ()) for x in ("--deselect", name)]
                code, output = pytest_of(copy, tests, "-x", "-rfE", "-k", test, *skip)
                (copy / file).write_text(text)
                result = {0: "SURVIVED", 1: "caught", 5: "no such test", None: "timed out"}.get(code, f"exit code {code}")
            counts[result] = counts.get(result, 0) + 1
            by = failing(output)[:1] if result == "caught" else []
            print(f"{result:15} {line}", *by, sep="  by ", flush=True)
    caught = counts.get("caught", 0)
    print(f"{caught} of {len(rows)} silent bugs caught; {counts}")
    sys.exit(caught < len(rows) or any(unsound.values()))


if __name__ == "__main__":
    main()
