"""Break the code on purpose, one silent bug at a time, and see the named test fail.

    python benchmarks/mutants.py

Each row: file, the text that is there, what the bug puts in its place, the test that must catch it. The bug is made in
a copy of the project. A row whose text is no longer there, or whose test still passes, is reported and fails the run.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [
    # the step
    ("amft.py", "(torch.linalg.vector_norm(grad) + 1e-6)", "(grad.abs().max() + 1e-6)", "step_equals_torch"),
    ("amft.py", "m / (1 - betas[0] ** step)", "m", "step_equals_torch"),
    ("amft.py", "theta * (1 - lr * weight_decay)", "theta * (1 - weight_decay)", "step_equals_torch"),
    ("amft.py", "root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)", "root = v.sqrt()",
     "sensitivity_is_finite"),
    # the meta-gradient
    ("amft.py", "(1 - mu) * g_rl + mu * g_sft, AdamState", "mu * g_rl + (1 - mu) * g_sft, AdamState", "finite_difference"),
    ("amft.py", "else trace * x for x in last", "else x for x in last", "with_a_trace"),
    ("amft.py", "AdamState(m, v, state.step), **how)", "AdamState(m, state.v, state.step), **how)", "with_a_trace"),
    ("amft.py", "(logps_of(model, batch, temperature, theta) * batch.mask).sum(-1)",
     "logps_of(model, batch, temperature, theta)[:, 0]", "finite_difference or per_sample"),
    ("amft.py", "* G / (G - 1)", "", "unbiased"),
    ("amft.py", "per_prompt.std().item() / math.sqrt(P)", "per_prompt.std().item() / math.sqrt(P * G)", "unbiased"),
    ("amft.py", "* mask.sum() / len(mask)).item() * rollouts.scale", ").item() * rollouts.scale", "own_meta"),
    ("amft.py", "len(mask)).item() * rollouts.scale", "len(mask)).item()", "own_meta"),
    ("amft.py", "slope = -(g_rl", "slope = (g_rl", "own_meta"),
    ("amft.py", "own_meta_gradient(g_rl, state.sensitivity[0]", "own_meta_gradient(g, state.sensitivity[0]", "own_meta or mu_follows"),
    ("amft.py", "s.meta = (*s.meta, meta)", "s.meta = (meta,)", "mu_follows"),
    ("amft.py", "config.gamma == config.lam == 1", "True", "bad_input"),
    ("amft.py", "mu = self.rows(\"step\")[-1][\"mu\"]", "mu = state.mu", "the_budget"),
    # the controller
    ("amft.py", "(target_entropy - entropy)", "(entropy - target_entropy)", "hand_computed"),
    ("amft.py", "residuals[unit] += hit - p", "residuals[len(residuals)] += hit - p", "clusters"),
    ("amft.py", "config.evidence_decay ** 2 * evidence[1]", "config.evidence_decay * evidence[1]", "hand_computed"),
    ("amft.py", "math.erf(total / math.sqrt(2 * variance))", "math.erf(total / math.sqrt(variance))", "hand_computed or calibrated"),
    ("amft.py", "max(mu + meta_force + entropy_force, config.mu_min)", "mu + meta_force + entropy_force", "hand_computed"),
    # losses and advantages
    ("amft.py", "return -(logps * mask).sum()", "return -logps.sum()", "slow_loops"),
    ("amft.py", "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages", "slow_loops"),
    ("amft.py", "(ratio * advantages, ratio.clamp(1 - clip, 1 + clip)", "(ratio * advantages, ratio.clamp(1, 1 + clip)",
     "slow_loops"),
    ("amft.py", "return -(surrogate * mask)", "return (surrogate * mask)", "slow_loops"),
    ("amft.py", "std(1, keepdim=True, correction=0)", "std(1, keepdim=True)", "by_hand"),
    ("amft.py", "delta + gamma * lam * running, running)", "delta + gamma * running, running)", "gae"),
    ("amft.py", "torch.where(own, values[:, t], next_value)", "values[:, t] * own", "gae"),
    ("amft.py", "beta * ((logps - ref_logps) * mask)", "beta * ((ref_logps - logps) * mask)", "slow_loops"),
    ("amft.py", "gradient(model, sft_loss(weighted, part.mask, tokens))", "gradient(model, sft_loss(weighted, part.mask))",
     "micro_batches or published"),
    ("amft.py", "part.mask, config.clip, tokens)", "part.mask, config.clip)", "micro_batches"),
    # the policy
    ("amft.py", "return out.logits[:, :-1] / temperature", "return out.logits[:, 1:] / temperature", "company"),
    ("amft.py", "position_ids=positions(batch.attention),", "", "absolute_positions"),
    ("amft.py", "+ [tokenizer.eos_token_id]\n", "\n", "company"),
    ("amft.py", "now = ((ended.cumsum(1) - ended == 0) &", "now = ((ended.cumsum(1) == 0) &", "rollout_samples"),
    # conversations and pictures
    ("amft.py", "attention_mask=attention[:, :-1], position_ids", "attention_mask=torch.ones_like(attention[:, :-1]), position_ids",
     "rollout_samples or sampled_from"),
    ("amft.py", "& ~done.unsqueeze(1)).float()", ").float()", "alone_and_in_company"),
    ("amft.py", "played = [copy.copy(episode) for", "played = [episode for", "alone_and_in_company or rollout_samples"),
    ("amft.py", "position_ids=positions(attention)[:, new]", "position_ids=positions(attention[:, new])", "sampled_from"),
    ("amft.py", "[float(turn.learn)] * len(said)", "[1.0] * len(said)", "demonstrations_teach"),
    ("amft.py", "last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask", "last = mask", "whole_conversations"),
    ("amft.py", "[self.pixels[i] for i in chosen if self.pixels]", "self.pixels", "alone_and_in_company"),
    ("amft.py", "logits.index_fill(-1,", "logits if True else logits.index_fill(-1,", "cannot_say"),
    ("amft.py", "attention_mask=batch.attention", "attention_mask=torch.ones_like(batch.attention)", "company"),
    ("amft.py", "top_k=0, top_p=1.0", "top_k=50, top_p=1.0", "frequencies"),
    ("amft.py", "self.columns.append(-(logp.exp() * logp)", "self.columns.append((logp.exp() * logp)", "rollout_samples"),
    # the loop
    ("amft.py", 'random.Random(f"step {config.seed} {step}")', "random.Random()", "same_seed"),
    ("amft.py", "os.truncate(self.log, saved.pop(\"log_bytes\"))", "saved.pop(\"log_bytes\")", "killed"),
    ("amft.py", "adam=AdamState(*saved[\"adam\"])", "adam=state.adam", "killed"),
    ("amft.py", "g = w_rl * g_rl + w_sft * g_sft", "g = g_rl + w_sft * g_sft", "mu_one or published"),
    ("amft.py", "left -= config.meta_prompts *", "left -= 0 *", "budget"),
    # the rules
    ("amft.py", "c(logp.detach().exp(), rows) * logp", "c(logp.exp(), rows) * logp", "published and (dft or chord)"),
    ("amft.py", "c=lambda s, p, A: p * (1 - p)", "c=lambda s, p, A: p", "published and chord"),
    ("amft.py", "(p + s.config.shape) ** 2", "(p + s.config.shape)", "published and luffy"),
    ("amft.py", "0.5 * math.exp(-s.entropy)", "0.5 * math.exp(s.entropy)", "published and srft"),
    ("amft.py", "c=lambda s, p, A: 1 / s.config.samples", "c=lambda s, p, A: 1.0", "published and dyme"),
    ("amft.py", "s.correct <= s.config.gate", "s.correct < s.config.gate", "gates"),
    ("amft.py", "success, torch.ones_like(success[:, :1])", "success, torch.zeros_like(success[:, :1])", "gates"),
    ("amft.py", "(1 - mu).repeat_interleave", "(1 + 0 * mu).repeat_interleave", "published and hpt"),
    ("amft.py", "tokens, weights = demos.mask.sum(), mu", "tokens, weights = None, mu", "published and hpt"),
    ("amft.py", "s.rng.random() < last / (last + s.config.sasr * warm)", "s.rng.random() < warm / (last + s.config.sasr * warm)",
     "sasr_by_hand"),
    ("amft.py", "best = (0.5 * gap + noise_rl)", "best = (0.5 * gap + noise_sft)", "rules_for_one_mu"),
    ("amft.py", "buffer[:0] = [problem", "buffer[len(buffer):] = [problem", "relift"),
    ("amft.py", "if not math.isfinite(row.get(name) or 0.0)", "if False", "non_finite"),
    # the task
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
]


def caught(file, old, new, test):
    """True if the test fails on the mutant, and the mutant could be made."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "results", "runs", "*.pt", "__pycache__"))
        text = (copy / file).read_text()
        if old not in text:
            return "text not found"
        (copy / file).write_text(text.replace(old, new))
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", test],
                              cwd=copy, capture_output=True).returncode
        return {0: "SURVIVED", 1: "caught", 5: "no such test"}.get(code, f"pytest exit code {code}")


def main():
    bad = 0
    for file, old, new, test in MUTANTS:
        result = caught(file, old, new, test)
        bad += result != "caught"
        print(f"{result:15} {test:28} {file}: {' '.join(old.split())[:50]} -> {' '.join(new.split())[:50]}", flush=True)
    print(f"{len(MUTANTS) - bad} of {len(MUTANTS)} silent bugs caught")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
