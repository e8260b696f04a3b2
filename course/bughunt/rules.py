"""The pool of the bug hunt: rules that plant one silent bug in one function, with choices drawn per student.

A rule names a function and an expression (or statement) in it, as ast.unparse would print it, and what a bug puts in
its place. `<k>` in a replacement is drawn from draw["k"]. Where the expression is there more than once, one place is drawn.
A file of private rules has the same form: RULES = [...], and SECRET = "...", without which anybody can draw any
student's bugs (see instructor.md).
"""

import ast
import itertools
from typing import NamedTuple


class Rule(NamedTuple):
    where: str  # file:qualified name of the function
    old: str  # the expression or statement there
    new: tuple  # what may stand there instead
    says: str  # what is wrong then, and what a log shows: the instructor's
    flags: str = ""  # of the run whose log shows it
    draw: dict = {}
    probe: str = ""  # the test that tells it from the right file (see probes.py); "": the function's own


TWO = "--ppo-epochs 3 --lr 1e-3"
GAE = "--advantage gae --lr 1e-3"
WARM = "--temperature 1.5"
AMFT_RUN = "--warmup 0 --steps 10 --meta-every 2 --utility both"
VAL_RUN = "--warmup 0 --steps 10 --meta-every 2 --utility val"
TURNS = "--task gp-turns --max-new-tokens 60 --prompts 4"

RULES = [
    # the policy and its samples
    Rule("amft.py:logps_of", "at_least_float32(logits) / temperature",
         ("at_least_float32(logits) * temperature", "at_least_float32(logits) / temperature ** <k>",
          "at_least_float32(logits) / max(temperature, <h>)"),
         "log-probabilities are not those of the policy that sampled: rl_loss and meta_own shift at --temperature 1.5",
         WARM, dict(k=("2", "0.5", "3"), h=("2.0", "3.0"))),
    Rule("amft.py:response_outputs", "output.hidden_states[-1][:, columns]",
         ("output.hidden_states[-1][:, columns + 1]", "output.hidden_states[<k>][:, columns]"),
         "phi sees the token that it is to foresee, or another layer: advantages lose what the token did", GAE,
         dict(k=("1", "2", "-2"))),
    Rule("amft.py:answer_replies", "[i for i in ids[row][:lengths[row]] if i not in stops]",
         ("ids[row][:lengths[row] - 1]", "ids[row][:lengths[row] - 2]"),
         "a response that was cut off, or every one, loses its last token before it is graded: success falls",
         "", {}, "rollout"),
    Rule("amft.py:rollout", "success.view(-1, samples)",
         ("success.view(samples, -1).T", "success.roll(<k>).view(-1, samples)"),
         "success belongs to another sample: mean success is right, zero_adv falls or RL learns nothing", "",
         dict(k=("1", "-1", "2"))),
    Rule("amft.py:rollout", "sum(entropies).item() / batch.response_mask.sum().item()",
         ("sum(entropies).item() / len(played)", "sum(entropies).item() / batch.response_mask.numel()",
          "sum(entropies).item() / batch.response_mask.sum().item() / math.log(<k>)"),
         "entropy is not nats a token: far from the right file's", "", dict(k=("2", "10"))),
    Rule("amft.py:rollout", "torch.cat(truncated).float().mean().item()",
         ("torch.cat(truncated).sum().item() / len(episodes)", "1 - torch.cat(truncated).float().mean().item()",
          "torch.cat(truncated).float().max().item()"),
         "truncated is not a share of the responses", "--max-new-tokens 30"),
    Rule("amft.py:rollout", "reply.truncated[~done]",
         ("(reply.mask[:, -1] > 0)[~done]", "~reply.truncated[~done]", "(reply.mask.sum(1) > <k>)[~done]"),
         "truncated counts complete responses", "--max-new-tokens 30", dict(k=("20", "25"))),
    Rule("amft.py:answer_replies", "lengths[row] - 1", ("lengths[row] - <k>", "lengths[row] // 2", "lengths[row] // 3"),
         "the task's points lie at a token that did not earn them: with GAE the later tokens go unpaid",
         "--reward graded " + GAE, dict(k=("2", "3")), "rollout"),
    Rule("amft.py:decode_step", "-(logps.exp() * logps).sum(-1)",
         ("-(logps.exp() * logps).sum(-1) / math.log(<k>)", "-logps.mean(-1)", "-logps.max(-1).values",
          "-(logps.exp() * logps).mean(-1)"),
         "entropy in another unit, or none at all", "", dict(k=("2", "10")), "rollout"),
    Rule("amft.py:decode_step", "draw(logits, state.temperature)",
         ("draw(logits, state.temperature ** 2)", "draw(<k> * logits, state.temperature)",
          "draw(logits.masked_fill(logits < logits.topk(<n>).values[:, -1:], -1e9), state.temperature)"),
         "samples are not the policy's: success looks better, rl_loss and the meta-gradient are biased", WARM,
         dict(k=("1.5", "2", "3"), n=("2", "3", "4")), "rollout"),
    # losses and advantages
    Rule("amft.py:ppo_loss", "(logps - old_logps).exp()",
         ("(old_logps - logps).exp()", "(logps - logps.detach()).exp()", "((logps - old_logps) / <k>).exp()",
          "(1 + logps - old_logps)"),
         "the ratio is wrong from the second update of a step on (reversed: from the first, RL unlearns)", TWO,
         dict(k=("2", "3"))),
    Rule("amft.py:ppo_loss", "ratio.clamp(1 - clip, 1 + clip)",
         ("ratio.clamp(1 - clip, 1 + <k> * clip)", "ratio.clamp(max=1 + clip)", "ratio.clamp(min=1 - clip)",
          "ratio.clamp(1 - clip / <k>, 1 + clip)"),
         "one side of the clip holds too late or too early: grad_norm_rl of later updates", TWO + " --clip 0.01",
         dict(k=("2", "3", "4"))),
    Rule("amft.py:sft_loss", "mask.sum()", ("len(mask)", "mask.numel()", "mask.sum(1).max()"),
         "the logged sft_loss is not per token"),
    Rule("amft.py:group_advantages", "(rewards - rewards.mean(1, keepdim=True)) * G / (G - 1)",
         ("rewards - rewards.mean(1, keepdim=True)", "(rewards - rewards.mean(1, keepdim=True)) * (G - 1) / G",
          "(rewards - rewards.mean(1, keepdim=True)) * G / (G + <k>)"),
         "the baseline holds the sample itself; the loss does not notice, but scale is too small: meta_own and "
         "meta_grad by a factor", VAL_RUN, dict(k=("1", "2"))),
    Rule("amft.py:group_advantages", "rewards.mean(1, keepdim=True)",
         ("rewards.mean()", "rewards.mean(0, keepdim=True)", "rewards.median(1, keepdim=True).values",
          "rewards[:, <k>:].mean(1, keepdim=True)"),
         "another baseline: prompts without a signal push all the same, or samples pay for others' prompts", "",
         dict(k=("1", "2"))),
    Rule("amft.py:group_advantages", "scale < 1e-06", ("scale < <k>",),
         "a batch with few successes gets advantage 0: grad_norm_rl is 0 at some steps", "",
         dict(k=("0.3", "0.35", "0.4"))),
    Rule("amft.py:group_advantages", "centred / scale, scale",
         ("centred / scale, 1.0", "centred / scale, 1 / scale", "centred / scale, scale ** 2",
          "centred * scale, scale"),
         "scale is not what the advantages were divided by: meta-gradients off by a factor (or grad_norm_rl small)",
         VAL_RUN),
    Rule("amft.py:gae", "next_value = torch.zeros_like(values[:, 0])",
         ("next_value = values[:, -1]", "next_value = torch.full_like(values[:, 0], <k>)"),
         "a value after the end: no conversation has one; rl_loss and grad_norm_rl shift", GAE, dict(k=("1.0", "0.5"))),
    Rule("amft.py:gae", "rewards[:, t] + gamma * next_value - values[:, t]",
         ("rewards[:, t] + gamma * next_value", "rewards[:, t] + gamma * next_value + values[:, t]",
          "gamma * (rewards[:, t] - values[:, t] + next_value) - rewards[:, t]"),
         "delta without its baseline, with the wrong sign, or without its reward", GAE),
    Rule("amft.py:gae", "delta + gamma * lam * advantage",
         ("delta + gamma * lam * next_value", "delta + gamma * lam * delta", "delta + gamma * lam * advantage / <k>"),
         "rewards hardly travel back to earlier tokens", GAE, dict(k=("2", "4"))),
    Rule("amft.py:gae", "torch.where(on_token, delta + gamma * lam * advantage, advantage)",
         ("torch.where(on_token, delta + gamma * lam * advantage, <k> * advantage)",),
         "what the task says cuts the credit of the responses before it", TURNS + " " + GAE,
         dict(k=("0.0", "0.5", "0.9"))),
    Rule("amft.py:gae", "(advantages + values) * mask",
         ("advantages * mask", "(advantages - values) * mask", "(advantages + <k> * values) * mask"),
         "phi learns a wrong target", GAE, dict(k=("0.5", "2"))),
    Rule("amft.py:advantages_of", "(mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask",
         ("(mask.cumsum(1) == 1) * mask", "(mask.cumsum(1) == (mask.sum(1, keepdim=True) / 2).ceil()) * mask"),
         "the reward comes before the end: what follows it goes unpaid", GAE),
    Rule("amft.py:advantages_of", "phi.learn(values, returns, mask)",
         ("phi.learn(values, advantages, mask)", "phi.learn(values, rewards, mask)",
          "phi.learn(values, -returns, mask)"),
         "phi learns advantages, single rewards or the negative of its returns", GAE),
    Rule("amft.py:advantages_of", "advantages - on_tokens.mean()",
         ("advantages - advantages.mean()", "advantages - on_tokens.median()", "advantages - on_tokens.mean() / <k>"),
         "advantages are not centred over the policy's own tokens: rl_loss is not 0 on the first update", GAE,
         dict(k=("2", "3"))),
    # gradients
    Rule("amft.py:loss_gradient", "total += slope.reshape(-1)",
         ("total.copy_(slope.reshape(-1))",
          "total.copy_((total + slope.reshape(-1)) / <k>)"),
         "gradients of micro-batches are not added: grad_norm depends on --micro-tokens",
         "--micro-tokens 600 --lr 1e-3", dict(k=("2",))),
    Rule("amft.py:rl_gradient", "batch.response_mask.sum()",
         ("batch.response_mask.numel()", "(advantages.values != 0).sum()", "len(batch.input_ids)",
          "batch.attention_mask.sum()"),
         "L_RL is divided by something else than the response tokens: grad_norm_rl by a factor"),
    Rule("amft.py:sft_gradient", "batch.response_mask.sum()",
         ("batch.attention_mask.sum()", "batch.response_mask.numel()", "len(batch.input_ids)"),
         "L_SFT's gradient has another divisor than its logged value: grad_norm_sft by a factor", "", {},
         "sft_gradient"),
    # the step and its derivative
    Rule("amft.py:adamw", "(max_norm / (norm + 1e-06)).clamp(max=1.0)",
         ("(max_norm / (norm + 1e-06))", "(max_norm / (norm + 1e-06)).clamp(min=1.0)",
          "(max_norm / (norm + 1e-06)).clamp(max=<k>)"),
         "small gradients are blown up to the norm, or large ones not clipped", "--lr 1e-3", dict(k=("2.0", "10.0"))),
    Rule("amft.py:adamw", "b2 * v + (1 - b2) * grad * grad",
         ("b1 * v + (1 - b1) * grad * grad", "b2 * v + (1 - b2) * m * m", "b2 * v + (1 - b1) * grad * grad",
          "b2 * v + (1 - b2) * grad.abs()"),
         "the second moment is another average: steps of another size", "--lr 1e-3"),
    Rule("amft.py:adamw", "math.sqrt(1 - b2 ** step)", ("(1 - b2 ** step)", "math.sqrt(1 - b1 ** step)", "1.0"),
         "v's bias correction is wrong: the first steps are too small or too large", "--lr 1e-3"),
    Rule("amft.py:adamw_step", "grad.norm()", ("grad.norm() ** 2", "grad.norm() / <k>", "grad.abs().sum()"),
         "another norm than the gradient's is held below max_norm: steps are too large or too small", "--lr 1e-3",
         dict(k=("4", "10"))),
    Rule("amft.py:adamw_step", "AdamState(m, v, state.step + 1)",
         ("AdamState(m, v, state.step)", "AdamState(m, v, state.step + 1 + <k>)", "AdamState(grad, v, state.step + 1)"),
         "the step does not count, counts too fast, or momentum is forgotten", "--lr 1e-3", dict(k=("1", "3"))),
    Rule("amft.py:step_sensitivity", "g_sft - g_rl", ("g_rl - g_sft", "<k> * (g_sft - g_rl)", "g_sft", "g_sft + g_rl"),
         "d theta'/d mu of another move of the gradient: meta-gradients turned round, or by a factor", VAL_RUN,
         dict(k=("0.5", "2.0"))),
    Rule("amft.py:step_sensitivity", "(trace * d_theta, g_sft - g_rl, trace * d_m, trace * d_v, d_norm)",
         ("(trace * d_theta, g_sft - g_rl, trace * d_v, trace * d_m, d_norm)",
          "(trace * d_theta, g_sft - g_rl, 0 * d_m, trace * d_v, d_norm)",
          "(trace * d_theta, g_sft - g_rl, trace * d_m, d_v, d_norm)"),
         "momentum's share in d theta/d mu is lost or mixed up: meta-gradients change from the second mixed step on",
         VAL_RUN + " --trace 0.7"),
    Rule("amft.py:step_sensitivity", "trace * d_theta",
         ("trace ** <k> * d_theta", "(1 - trace) * d_theta", "d_theta / (1 + trace)"),
         "the trace fades too fast", VAL_RUN + " --trace 0.7", dict(k=("2", "3", "4"))),
    Rule("amft.py:step_sensitivity", "(1 - mu) * g_rl + mu * g_sft",
         ("(1 - mu) * g_rl + g_sft", "g_rl + mu * g_sft", "g_rl + mu * (g_sft + g_rl)"),
         "the derivative is of another mixture than the step's", VAL_RUN),
    # the meta-gradient and the controller
    Rule("amft.py:meta_gradient", "(scale * values[p][rows] * of_responses).sum() / G",
         ("(scale * values[p][rows] * of_responses).sum()",
          "(scale * values[p][rows] * of_responses / batch.response_mask[rows].sum(1)).sum() / G",
          "(scale * values[p][rows] * of_responses).sum() / P",
          "(scale * values[p][rows].clamp(min=0) * of_responses).sum() / G"),
         "meta_grad and meta_se by a factor, or only of the right samples", VAL_RUN),
    Rule("amft.py:meta_gradient", "slice(p * G, (p + 1) * G)", ("slice(p, P * G, P)", "slice(p, p + G)", "slice(0, G)"),
         "advantages meet the responses of other prompts: meta_grad is noise around 0", VAL_RUN),
    Rule("amft.py:meta_gradient", "slopes.mean().item()",
         ("slopes[slopes != 0].mean().item() if slopes.any() else 0.0", "slopes.median().item()",
          "slopes.sum().item()"),
         "prompts without a signal do not count, or the mean is none", VAL_RUN),
    Rule("amft.py:meta_gradient", "math.sqrt(P)", ("P", "math.sqrt(<k> * P)", "math.sqrt(P) / P"),
         "meta_se is too small or too large: mu moves too surely or too little", VAL_RUN, dict(k=("9", "25"))),
    Rule("amft.py:own_meta_gradient", "g_rl @ d_theta * n_tokens / len(batch.input_ids)",
         ("g_rl @ d_theta * n_tokens", "g_rl @ d_theta * n_tokens / batch.response_mask.numel()",
          "g_rl @ d_theta * batch.response_mask.shape[1]"),
         "meta_own is not per conversation", AMFT_RUN + " --utility train"),
    Rule("amft.py:own_meta_gradient", "abs(slope)", ("slope ** 2", "abs(slope) / <k>", "1.0"),
         "the error of meta_own: mu follows a single batch, or none", AMFT_RUN + " --utility train",
         dict(k=("4", "10"))),
    Rule("amft.py:update_mu", "fade * evidence[0]",
         ("evidence[0]", "fade ** <k> * evidence[0]", "(1 - fade) * evidence[0]"),
         "old evidence fades in its count only, or too fast", AMFT_RUN, dict(k=("10", "30"))),
    Rule("amft.py:update_mu", "2 * math.sinh(log_ratio) / (zero + 2 * math.cosh(log_ratio))",
         ("2 * math.sinh(abs(log_ratio)) / (zero + 2 * math.cosh(log_ratio))", "math.copysign(1.0, log_ratio)",
          "2 * math.sinh(-log_ratio) / (zero + 2 * math.cosh(log_ratio))",
          "2 * math.sinh(log_ratio) / (zero + <k> * math.cosh(log_ratio))"),
         "mu moves one way only, all the way each time, or too little", AMFT_RUN, dict(k=("8", "20"))),
    Rule("amft.py:update_mu", "min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)",
         ("min(max(mu + meta_force, config.mu_min), config.mu_max) + entropy_force",
          "max(mu + meta_force + entropy_force, config.mu_min)",
          "min(max(mu + meta_force, config.mu_min), config.mu_max)"),
         "mu leaves its bounds, or the entropy does not move it", AMFT_RUN + " --eta-h 5 --mu-min 0.45 --mu-max 0.55"),
    Rule("amft.py:Controller.choose_mu", "self.mu", ("self.config.mu", "(self.mu + self.config.mu) / 2"),
         "mu begins anew at each step: it never goes far", AMFT_RUN, {}, "run"),
    Rule("amft.py:Controller.estimates", "self.sensitivity[0]", ("self.sensitivity[1]", "self.sensitivity[<k>]"),
         "d m'/d mu or d v'/d mu in the place of d theta'/d mu", AMFT_RUN, dict(k=("2", "-2")), "run"),
    Rule("amft.py:Controller.estimates", "(step.t - config.warmup) % config.meta_every == 0",
         ("(step.t - config.warmup) % config.meta_every <= 1", "(step.t - config.warmup) % config.meta_every != 0",
          "(step.t - config.warmup) // config.meta_every == <k>"),
         "the look at validation prompts comes too often, or not every K steps: rows with meta_grad, rollouts",
         AMFT_RUN + " --meta-every 3", dict(k=("1", "2")), "run"),
    Rule("amft.py:Controller.before_update", "self.config.trace if first else 1.0",
         ("self.config.trace ** <k> if first else 1.0", "(1 - self.config.trace) if first else 1.0", "1.0"),
         "d theta/d mu of past steps fades too fast, or never: the meta-gradient changes from the third mixed step on",
         VAL_RUN + " --trace 0.7", dict(k=("2", "4")), "run"),
    Rule("amft.py:Method.token_weights", "logps.exp()",
         ("(1 - logps.exp())", "logps.exp() ** <k>", "logps.exp().mean()", "logps"),
         "a demonstration's token is weighted by something else than its probability: grad_norm_sft",
         "--imitation rectified", dict(k=("2", "3")), "run"),
    Rule("amft.py:Method.choose_prompts", "range(self.config.demos)",
         ("range(self.config.prompts)", "range(<k> * self.config.prompts)"),
         "the same few problems are tried at every step", "", dict(k=("2", "3")), "run"),
    # the loop
    Rule("amft.py:train", "(1 - step.mu) * step.g_rl + step.mu * step.g_sft",
         ("(1 - config.mu) * step.g_rl + config.mu * step.g_sft",
          "(1 - step.mu) * step.g_rl + step.mu * step.g_sft / (step.g_sft.norm() + 1e-12)",
          "(1 - step.mu) * step.g_rl + step.mu ** <k> * step.g_sft"),
         "the step is on another mixture than the log's mu: grad_norm does not fit its parts", AMFT_RUN,
         dict(k=("2", "3")), "run"),
    Rule("amft.py:train", "config.lr * (1 - (t - 1) / config.steps)",
         ("config.lr", "config.lr * (1 - (t - 1) / config.steps) ** <k>", "config.lr * (t / config.steps)"),
         "the learning rate does not fall linearly to 0", "--lr 1e-3", dict(k=("2", "3")), "run"),
    Rule("amft.py:train", "method.choose_demos(step)",
         ("method.choose_prompts(step)", "range(config.sft_batch)", "method.choose_demos(step)[:<k>]"),
         "fewer demonstrations than --sft-batch, or the same ones at each step", "", dict(k=("2", "4")), "run"),
    # the task and the tokens
    Rule("tasks.py:Deal.grade", "sorted(used) != sorted(self.numbers)",
         ("len(used) != len(self.numbers)", "sum(used) != sum(self.numbers)", "not set(used) <= set(self.numbers)",
          "max(used) != max(self.numbers)"),
         "illegal formulas pass: success is high, illegal_number rare"),
    Rule("tasks.py:Deal.grade", "right.strip(' ') != str(self.target)",
         ("right.strip(' ') not in str(self.target)", "not right.strip(' ').startswith(str(self.target))",
          "len(right.strip(' ')) != len(str(self.target))"),
         "a wrong right-hand side passes: fewer illegal_formula"),
    Rule("tasks.py:Deal.grade", "value == self.target",
         ("value is not None and abs(value - self.target) <= <k>", "value is not None and value % self.target == 0",
          "value is not None and abs(value) >= self.target"),
         "near is good enough: success of the untrained policy is too high", "", dict(k=("1", "2"))),
    Rule("tasks.py:Deal.grade", "formula.partition('=')",
         ("formula.rpartition('=')", "formula.replace(' ', '').partition('=')"),
         "a formula without =24 is refused, or spaces glue digits together"),
    Rule("tasks.py:parse.chain", "apply(op, value, right)", ("apply(op, right, value)",),
         "a - b and a / b are turned round: right answers count as wrong, success falls"),
    Rule("tasks.py:values_of", "{'A': 1, **rule}", ("{'A': <k>, **rule}",),
         "an ace is not 1: deals and grades are of other numbers", "", dict(k=("11", "10", "2"))),
    Rule("amft.py:encode_demos", "[float(turn.learn)] * len(response)",
         ("[float(turn.learn)] * (len(response) - 1) + [0.0]", "[0.0] + [float(turn.learn)] * (len(response) - 1)",
          "[float(turn.learn)] * (len(response) - <k>) + [0.0] * <k>"),
         "the end of a response, or its first token, carries no loss: truncated rises", "--lr 1e-3",
         dict(k=("2", "3"))),
    Rule("amft.py:encode_demos", "[0.0] * len(observation)",
         ("[1.0] * len(observation)", "[0.5] * len(observation)"),
         "the policy learns to speak the task's part", TURNS),
    Rule("tasks.py:GeneralPoints.dealt", "rng.choice(solve(tuple(sorted(numbers))))",
         ("solve(tuple(sorted(numbers)))[<k>]", "min(solve(tuple(sorted(numbers))), key=len)",
          "max(solve(tuple(sorted(numbers))))"),
         "every deal has one demonstration for ever: no variety, sft_loss is lower", "", dict(k=("0", "-1"))),
    Rule("tasks.py:interval", "min(n, p * (1 - p) / variance)",
         ("max(n, p * (1 - p) / variance)", "p * (1 - p) / variance * <k>", "len(residuals) * <k>"),
         "the interval is too narrow or too wide", "", dict(k=("2", "4"))),
]


def function(tree, name):
    """The node of a qualified name."""
    node = tree
    for part in name.split("."):
        node = next(child for child in ast.walk(node) if child is not node and getattr(child, "name", None) == part
                    and isinstance(child, (ast.FunctionDef, ast.ClassDef)))
    return node


def same(text):
    """The text as ast.unparse prints it, whatever it is."""
    tree = ast.parse(text).body[0]
    return ast.unparse(tree.value if isinstance(tree, ast.Expr) else tree)


def places(rule, tree):
    """The nodes that a rule may replace."""
    old, kind = same(rule.old), ast.parse(rule.old).body[0]
    kind = type(kind.value if isinstance(kind, ast.Expr) else kind)
    return [node for node in ast.walk(function(tree, rule.where.split(":")[1]))
            if type(node) is kind and not isinstance(getattr(node, "ctx", None), ast.Store)
            and ast.unparse(node) == old]


def variants(rule):
    """Every text that may stand there instead."""
    for text in rule.new:
        names = [name for name in rule.draw if f"<{name}>" in text]
        for values in itertools.product(*(rule.draw[name] for name in names)):
            said = text
            for name, value in zip(names, values):
                said = said.replace(f"<{name}>", value)
            yield said
