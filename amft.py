"""AMFT, Adaptive Meta Fine-Tuning (arXiv 2508.06944), in one file.

A policy pi_theta learns from demonstrations (SFT) and from its own graded samples (RL) on one loss,
and a controller learns their balance mu from what mu does to success on held-out prompts:

    (1)  J_RL(theta)  = E_{y ~ pi_theta}[R_explicit(y)]     R = 1 if y is correct, else 0; by PPO
    (2)  L_SFT(theta) = -E_{(x, y*)}[log pi_theta(y* | x)]  the implicit reward of the expert's path
    (3)  L(theta; mu) = (1 - mu) L_RL(theta) + mu L_SFT(theta)
    (4)  U(theta')    = E_{x ~ val, y ~ pi_theta'}[R_explicit(y)], theta' = theta after a step on L
    (5)  dU/dmu       = <grad U(theta'), d theta'/d mu>
    (6)  mu          <- clip(mu + eta_mu dU/dmu + eta_H (H* - H(pi_theta)), mu_min, mu_max)

Differs from the paper:
    Eq. 5 goes through the steps as taken (clipping, AdamW; earlier ones fade: --trace), not SGD
    Eq. 6 moves mu off --mu by how sure dU/dmu's sign is (--controller paper: to the letter)
    U can also be of the step's own prompts, for a dot product (--utility val: Eq. 4)
    the entropy's sign is Eq. 6's; the paper's text has the other one (--eta-h below 0)
    both losses are divided by their batch's response tokens; the paper leaves it open
    General Points' defaults: no warm-up, --advantage group, --imitation rectified (W, gae, nll)

    python amft.py --task gp                    # Algorithm 1 on General Points, minutes on a CPU
    python amft.py --task gp --smoke            # the same path in under a minute
    python amft.py --task gp --method sft-rl    # or sft, rl, fixed; rivals: compare/rivals.py
    python amft.py --resume runs/gp             # go on with a run that was cut off

Read `train` first, Algorithm 1. Shapes: P prompts, G samples of each, B = P * G conversations,
S tokens of the whole, T after the prompt, V vocabulary, D width, N parameters. theta, gradients and
Adam's moments are flat, (N,).
"""

import copy
import dataclasses
import math
import random
import signal
import sys
from functools import partial
from typing import Any, Callable, NamedTuple

from harness.arguments import METHOD_FLAGS, RunConfig, flag, parse, stop_quietly
from harness.evaluation import evaluation
from harness.screen import table
from tasks import IMAGE, TASKS, Task

# --- Configuration: the flags ---
@dataclasses.dataclass
class Config(RunConfig):
    """flag(default, help, low, high). RunConfig has the run's: steps, task, model, seed, eval_n."""
    # The mixture, and the step
    method: str = flag("amft", "what chooses mu")
    mu: float = flag(0.5, "mu of fixed, and where amft starts", 0, 1)
    warmup: int = flag(10, "W: the first steps, SFT alone; of sft-rl 0: half", 0)
    lr: float = flag(1e-4, "alpha at the first step; it falls linearly to 0", 1e-12)
    # The controller
    controller: str = flag("evidence", "paper: Eq. 6 as printed", choices=("evidence", "paper"))
    eta_mu: float = flag(0.45, "most that dU/dmu moves mu; paper: its rate; 0: none", 0)
    eta_h: float = flag(0.1, "mu's move per nat of entropy below H*; paper: a step's", -1e6, 1e6)
    mu_min: float = flag(0.05, "mu stays at or above", 0, 1)
    mu_max: float = flag(0.95, "mu stays at or below", 0, 1)
    utility: str = flag("both", "whose success; train: the step's own prompts'",
                        choices=("val", "train", "both"))
    meta_every: int = flag(5, "K: steps between looks at validation prompts", 1)
    trace: float = flag(0.98, "share of d theta/d mu that is carried on; 0: Eq. 5", 0, 1)
    # Exploration
    prompts: int = flag(32, "P: prompts in a step", 2)
    samples: int = flag(8, "G: samples of a prompt", 2)
    temperature: float = flag(1.0, "of samples and of L_RL's log-probabilities", 0.01)
    max_new_tokens: int = flag(40, "longest response", 1)
    reward: str = flag("binary", "1/0 (Eq. 1), or the task's own points",
                       choices=("binary", "graded"))
    advantage: str = flag("gae", "over phi, or over a prompt's other samples",
                          choices=("gae", "group"))
    clip: float = flag(0.2, "PPO's range of the ratio", 0, 1)
    ppo_epochs: int = flag(1, "updates with each batch of samples", 1)
    # Imitation
    imitation: str = flag("nll", "Eq. 2; rectified: times each token's own p",
                          choices=("nll", "rectified"))
    demos: int = flag(20000, "training problems, a demonstration each", 1)
    sft_batch: int = flag(64, "demonstrations in a step", 1)

if __name__ == "__main__":  # a mistyped flag and --help answer before torch is imported, in seconds
    signal.signal(signal.SIGINT, stop_quietly)
    parse(None, Config, TASKS, METHOD_FLAGS, __doc__)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.utils import parameters_to_vector, vector_to_parameters  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import Cache  # noqa: E402
from transformers import PreTrainedModel as Model  # noqa: E402
from transformers import PreTrainedTokenizerBase as Tokenizer  # noqa: E402

from harness.cache import max_length, with_room  # noqa: E402
from harness.capture import Decoding, begin, decoding, draw  # noqa: E402
from harness.loading import load_policy, make_task  # noqa: E402
from harness.memory import by_rows, by_slices  # noqa: E402
from harness.pictures import pixel_values, place_pictures  # noqa: E402
from harness.run import Run, one_line_errors  # noqa: E402
from harness.tokens import pad, token_ids  # noqa: E402
from harness.value import value_function  # noqa: E402

# --- The policy: conversations as token ids ---
class Batch(NamedTuple):
    """B conversations. Prompts are left-padded: every first response starts in the same column.
    After it turns of different length leave holes, which attention hides."""
    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S), 1 on real tokens
    response_mask: Tensor  # (B, T), of what follows the prompt: 1.0 on the policy's tokens and ends
    images: list  # B, each row's pictures in reading order, a list of (H, W, 3) uint8

    def rows(self, rows):
        input_ids = self.input_ids[rows]
        images = [[]] * len(input_ids)
        if any(self.images):  # which ones: that is waited for
            chosen = torch.arange(len(self.images), device=input_ids.device)[rows].tolist()
            images = [self.images[i] for i in chosen]
        return Batch(
            input_ids,
            self.attention_mask[rows],
            self.response_mask[rows],
            images)

    @property
    def responses(self):  # (B, T)
        return self.input_ids[:, -self.response_mask.shape[1]:]

def stop_token_ids(model: Model) -> list:
    """Ids of the tokens that end a response; the first is the one that demonstrations teach."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]

def encode_text(model: Model, tokenizer: Tokenizer, text: str, first: bool = True) -> list:
    """Token ids of what a task shows: a prompt (first), or an observation."""
    text = place_pictures(model, text)
    return token_ids(tokenizer, text, first, template=tokenizer.chat_template)

def encode_observations(model: Model, tokenizer: Tokenizer, episodes: list, texts: list,
                        first: bool = False) -> tuple:
    """(ids, attention mask, (B, width) each, left-padded; images) of what is shown; "": one end."""
    end = stop_token_ids(model)[:1]
    rows = [encode_text(model, tokenizer, text, first) if text else end for text in texts]
    ids, attention_mask = pad(tokenizer, rows, "left", model.device)
    images = [[episode.image] if IMAGE in text else [] for episode, text in zip(episodes, texts)]
    return ids, attention_mask, images

def encode_demos(model: Model, tokenizer: Tokenizer, episodes: list) -> Batch:
    """The Batch of the episodes' demonstrations."""
    prompts, rests, masks, images = [], [], [], []
    for episode in episodes:
        turns = episode.demonstration()
        rest, mask = [], []
        for turn in turns:
            if turn is not turns[0]:
                observation = encode_text(model, tokenizer, turn.shown, first=False)
                rest += observation
                mask += [0.0] * len(observation)
            response = token_ids(tokenizer, turn.response, False)
            response += stop_token_ids(model)[:1]  # has loss, or the policy would not learn to stop
            rest += response
            mask += [float(turn.learn)] * len(response)
        prompts.append(encode_text(model, tokenizer, turns[0].shown))
        rests.append(rest)
        masks.append(torch.tensor(mask))
        images.append([turn.image for turn in turns if turn.image is not None])
    prompt_ids, prompt_attention = pad(tokenizer, prompts, "left", model.device)
    rest_ids, rest_attention = pad(tokenizer, rests, "right", model.device)
    attention_mask = torch.cat([prompt_attention, rest_attention], 1)
    response_mask = pad_sequence(masks, True).to(model.device)
    return Batch(torch.cat([prompt_ids, rest_ids], 1), attention_mask, response_mask, images)

# --- The policy: log-probabilities ---
def model_inputs(input_ids: Tensor, attention_mask: Tensor, images: list, start: int = 0) -> dict:
    """What the model takes of the columns from `start` on; those before are in its cache."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding and holes take no position
    return dict(
        input_ids=input_ids[:, start:],
        attention_mask=attention_mask,
        position_ids=positions[:, start:],
        **pixel_values(images, input_ids.device))

def response_outputs(model: Model, batch: Batch, hidden: bool = False) -> tuple:
    """(logits (B, T, V) that predict the response tokens; if hidden, the last states (B, T, D))."""
    S, T = batch.input_ids.shape[1], batch.response_mask.shape[1]
    # Column t of the logits predicts column t + 1 of the ids.
    columns = torch.arange(S - T - 1, S - 1, device=batch.input_ids.device)
    inputs = model_inputs(batch.input_ids, batch.attention_mask, batch.images)
    output = model(**inputs, logits_to_keep=columns, use_cache=False, output_hidden_states=hidden)
    states = at_least_float32(output.hidden_states[-1][:, columns]) if hidden else None
    return output.logits, states

def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi of each id: (B, T, V), (B, T) -> (B, T), in float32 at least."""
    return at_least_float32(logits).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

def logps_of(model: Model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | x, y_<t) of a batch's responses, (B, T)."""
    logits, _ = response_outputs(model, batch)
    if temperature != 1:
        logits = at_least_float32(logits) / temperature
    return by_rows(token_logps, logits, batch.responses)  # in parts, if they are large

def flatten(model: Model) -> Tensor:
    """theta (N,), in float32 at least."""
    return at_least_float32(parameters_to_vector(model.parameters()).detach())

def set_theta(model: Model, theta: Tensor) -> None:
    """Make theta (N,) the model's weights: views of it; of a bfloat16 model rounded copies."""
    vector_to_parameters(theta.to(model.dtype), model.parameters())

# --- The policy: sampling ---
class Reply(NamedTuple):
    """A response of each of B conversations, of up to n tokens."""
    ids: Tensor  # (B, n)
    mask: Tensor  # (B, n), 1.0 on its tokens, the end included; 0 after it, and where all was over
    entropy: Tensor  # (B, n), at temperature 1, in nats
    truncated: Tensor  # (B,), True where no end came

def prefill(model: Model, input_ids: Tensor, attention_mask: Tensor, images: list,
            cache: Cache = None) -> Cache:
    """The key-value cache of all columns but the last one, from which the reply goes on."""
    known = int(cache.get_seq_length()) if cache else 0
    inputs = model_inputs(input_ids[:, :-1], attention_mask[:, :-1], images, known)
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

def decode_step(model: Model, cache: Cache, state: Decoding, attention_mask: Tensor) -> None:
    """A token of each conversation: cache and state go on by a column, in their place, and nothing
    waits for the device, which can replay it. attention_mask: state's, as far as it has come."""
    output = model(
        input_ids=state.input_ids.index_select(1, state.column - 1),
        attention_mask=attention_mask,
        position_ids=state.attention_mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True)
    logits = output.logits[:, -1].float()  # (B, V)
    logps = logits.log_softmax(-1)
    token = draw(logits, state.temperature)
    token = token.masked_fill(~state.speaking, model.generation_config.pad_token_id)
    state.append(token, entropy=-(logps.exp() * logps).sum(-1))

def generate_reply(model: Model, input_ids: Tensor, attention_mask: Tensor, cache: Cache,
                   done: Tensor, max_new_tokens: int, temperature: float) -> Reply:
    """A response of each conversation (B, S) that is not done (B,); temperature 0 is greedy."""
    S = input_ids.shape[1]
    state = begin(
        input_ids, attention_mask, ~done, stop_token_ids(model), temperature, room=max_new_tokens)
    step = partial(decode_step, model)
    loop = decoding(step, model, cache, state)  # on a GPU the step is captured
    for column in range(S, S + max_new_tokens):
        loop.advance(column)
        if column % loop.look_every == 0 and not loop.state.speaking.any():
            break
    said = loop.state.attention_mask[:, S:].any(0).sum()  # a replay may go on where all is over
    reply = slice(S, S + int(said))
    return Reply(
        ids=loop.state.input_ids[:, reply].clone(),
        mask=loop.state.attention_mask[:, reply].float(),
        entropy=loop.state.entropy[:, reply].clone(),
        truncated=loop.state.speaking.clone())

# --- Rollouts: conversations of the policy with the task ---
class Rollouts(NamedTuple):
    """G conversations with each of P episodes, those of a prompt together."""
    episodes: list  # B, played to their ends
    batch: Batch
    success: Tensor  # (P, G), 1.0 where the episode was solved: R_explicit of Eq. 1
    rewards: Tensor  # (B, T), the task's points, at each response's last token
    entropy: float  # at temperature 1, mean over sampled tokens, nats
    truncated: float  # share of responses without an end

@torch.no_grad()
def rollout(model: Model, tokenizer: Tokenizer, episodes: list, samples: int = 1,
            max_new_tokens: int = 40, temperature: float = 1.0) -> Rollouts:
    """G = `samples` conversations with each of P episodes; temperature 0 is greedy."""
    prompts = [episode.prompt for episode in episodes]
    input_ids, attention_mask, images = encode_observations(
        model, tokenizer, episodes, prompts, first=True)
    cache = prefill(model, input_ids, attention_mask, images)  # each prompt once, not G times
    cache.batch_repeat_interleave(samples)
    input_ids = input_ids.repeat_interleave(samples, 0)
    attention_mask = attention_mask.repeat_interleave(samples, 0)
    images = [pictures for pictures in images for _ in range(samples)]
    played = [copy.copy(episode) for episode in episodes for _ in range(samples)]
    done = input_ids.new_zeros(len(played), dtype=torch.bool)
    masks, rewards, entropies, truncated = [], [], [], []
    while True:
        cache = with_room(model, cache, input_ids.shape[1] + max_new_tokens)
        reply = generate_reply(
            model, input_ids, attention_mask, cache, done, max_new_tokens, temperature)
        truncated.append(reply.truncated[~done])
        entropies.append((reply.entropy * reply.mask).sum())
        observations, points, done = answer_replies(model, tokenizer, played, reply, done)
        input_ids = torch.cat([input_ids, reply.ids], 1)
        attention_mask = torch.cat([attention_mask, reply.mask.long()], 1)
        masks.append(reply.mask)
        rewards.append(points)
        if done.all():
            break
        shown, real, pictures = encode_observations(model, tokenizer, played, observations)
        if input_ids.shape[1] + shown.shape[1] + max_new_tokens > max_length(model):
            break  # out of room: what is not solved by now stays unsolved
        input_ids = torch.cat([input_ids, shown], 1)
        attention_mask = torch.cat([attention_mask, real], 1)
        images = [row + more for row, more in zip(images, pictures)]
        nothing = torch.zeros_like(shown, dtype=torch.float)  # what is shown is not the policy's
        masks.append(nothing)
        rewards.append(nothing)
        cache = with_room(model, cache, input_ids.shape[1])
        cache = prefill(model, input_ids, attention_mask, pictures, cache)
    batch = Batch(input_ids, attention_mask, torch.cat(masks, 1), images)
    success = torch.tensor([float(episode.success) for episode in played], device=model.device)
    entropy = sum(entropies).item() / batch.response_mask.sum().item()
    truncated = torch.cat(truncated).float().mean().item()
    return Rollouts(
        played, batch, success.view(-1, samples), torch.cat(rewards, 1), entropy, truncated)

def answer_replies(model: Model, tokenizer: Tokenizer, played: list, reply: Reply,
                   done: Tensor) -> tuple:
    """The task's turn: (observations (B,), points (B, n) at replies' last tokens, done (B,))."""
    observations = [""] * len(played)  # what is over is shown one end, which nobody reads
    ids = reply.ids.tolist()  # at once: each row would wait for the device
    lengths = reply.mask.sum(1).long().tolist()
    stops = set(stop_token_ids(model))
    points = torch.zeros(reply.mask.shape)
    done = done.to("cpu", copy=True)
    for row in (~done).nonzero().squeeze(1).tolist():
        text = tokenizer.decode([i for i in ids[row][:lengths[row]] if i not in stops])
        observation, point, over = played[row].step(text)
        points[row, lengths[row] - 1] = point
        done[row] = over
        observations[row] = "" if over else observation
    return observations, points.to(model.device), done.to(model.device)

# --- The two losses ---
# Differs: each is divided by one number, the response tokens of its whole batch; otherwise mu would
# mean nothing, and a micro-batch or a skipped row would change the gradient.
def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2,
             n_tokens: Any = None) -> Tensor:
    """Eq. 1 by PPO-clip, token by token. All (B, T); n_tokens: the divisor, if not mask's sum."""
    ratio = (logps - old_logps).exp()  # 1 on the first update, but not its gradient
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -(surrogate * mask).sum() / (mask.sum() if n_tokens is None else n_tokens)

def sft_loss(logps: Tensor, mask: Tensor, n_tokens: Any = None) -> Tensor:
    """Eq. 2: negative log-likelihood. logps, mask (B, T); n_tokens as in ppo_loss."""
    return -(logps * mask).sum() / (mask.sum() if n_tokens is None else n_tokens)

def implicit_reward(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """beta log(pi(y|x) / pi_ref(y|x)): the reward that SFT implies (section 3.2). (B, T) -> (B,)"""
    return beta * ((logps - ref_logps) * mask).sum(-1)

# --- Advantages ---
class Advantages(NamedTuple):
    values: Tensor  # (B, T)
    scale: float  # what they were divided by

def group_advantages(rewards: Tensor) -> tuple:
    """((r - mean of the prompt's other samples) / scale, scale): (P, G) -> (P, G), float; G > 1."""
    G = rewards.shape[1]
    centred = (rewards - rewards.mean(1, keepdim=True)) * G / (G - 1)
    # One scale for all: a prompt's own would weigh prompts anew.
    scale = centred.std(correction=0).item()
    if scale < 1e-6:  # no prompt has samples that differ
        return torch.zeros_like(centred), 1.0
    return centred / scale, scale

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 1.0) -> tuple:
    """Generalised advantage estimation, (B, T) each -> (advantages, returns), 0 off the mask."""
    # Below lam = 1 phi's error biases the RL gradient, and the step's own meta-gradient with it.
    advantages = torch.zeros_like(values)
    # The value after the last token is 0: a conversation is an episode, also when it was cut off.
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        on_token = mask[:, t] > 0  # what the task says is stepped over
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(on_token, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(on_token, values[:, t], next_value)
        advantages[:, t] = advantage * on_token
    return advantages, (advantages + values) * mask

def advantages_of(model: Model, phi: Any, rollouts: Rollouts, config: Config) -> Advantages:
    """The Advantages of a step's rollouts; phi, if there is one, then learns their returns."""
    mask = rollouts.batch.response_mask
    rewards = rollouts.rewards  # (B, T), the task's points
    if config.reward == "binary":  # R_explicit, at the conversation's last token
        is_last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask
        rewards = rollouts.success.reshape(-1, 1) * is_last
    totals = rewards.sum(1).view_as(rollouts.success)  # (P, G)
    if phi is None:
        values, scale = group_advantages(totals)
        return Advantages(values.reshape(-1, 1) * mask, scale)
    states = []
    with torch.no_grad():
        for rows in micro_batches(rollouts.batch, mask, config.micro_tokens):
            part = rollouts.batch.rows(rows)
            states.append(response_outputs(model, part, hidden=True)[1])
    values = phi(torch.cat(states)) * mask  # (B, T)
    advantages, returns = gae(rewards, values.detach(), mask)
    phi.learn(values, returns, mask)  # beside theta, on fixed features: theta moves by Eq. 3 alone
    if totals.max() - totals.min() < 1e-6:  # no signal, but phi's error divided by its own spread
        return Advantages(torch.zeros_like(advantages), 1.0)
    on_tokens = advantages[mask > 0]
    scale = on_tokens.std(correction=0).item() + 1e-8
    return Advantages((advantages - on_tokens.mean()) / scale * mask, scale)

def micro_batches(batch: Batch, used: Tensor, max_tokens: int) -> tuple:
    """Rows of `used` (B, .) that are not all 0, max_tokens at a time; the others add nothing."""
    rows = (used != 0).any(1).nonzero().squeeze(1)
    at_once = max(1, max_tokens // batch.input_ids.shape[1])
    return rows.split(at_once) if len(rows) else ()

def loss_gradient(model: Model, batch: Batch, used: Tensor, loss: Callable, config: Config,
                  temperature: float = 1.0) -> tuple:
    """(gradient (N,), logps (B, T), value) of loss(logps (b, T), rows (b,)), summed over rows."""
    grad = torch.zeros_like(flatten(model))
    logps = torch.zeros_like(batch.response_mask)
    value = grad.new_zeros(())
    weights = list(model.parameters())
    sizes = [weight.numel() for weight in weights]
    for rows in micro_batches(batch, used, config.micro_tokens):
        logp = logps_of(model, batch.rows(rows), temperature)
        part = loss(logp, rows)
        slopes = torch.autograd.grad(part, weights, materialize_grads=True)
        for total, slope in zip(grad.split(sizes), slopes):
            total += slope.reshape(-1)
        del slopes  # memory
        logps[rows] = logp.detach()
        value += part.detach()
    return grad, logps, value.item()

def rl_gradient(model: Model, batch: Batch, advantages: Advantages, config: Config,
                old_logps: Any = None) -> tuple:
    """loss_gradient of L_RL. old_logps: None on the first update, by the policy that sampled."""
    n_tokens = batch.response_mask.sum()
    def loss(logp, rows):
        old = logp.detach() if old_logps is None else old_logps[rows]
        return ppo_loss(logp, old, advantages.values[rows], batch.response_mask[rows],
                        config.clip, n_tokens)
    return loss_gradient(model, batch, advantages.values, loss, config, config.temperature)

def sft_gradient(model: Model, batch: Batch, config: Config, token_weights: Callable) -> tuple:
    """loss_gradient of L_SFT, a token's -log p times token_weights(logps (b, T), rows (b,)) (b, T);
    its value is mean -log p, without them."""
    n_tokens = batch.response_mask.sum()
    def loss(logp, rows):
        weights = token_weights(logp.detach(), rows)  # constants
        return sft_loss(weights * logp, batch.response_mask[rows], n_tokens)
    grad, logps, _ = loss_gradient(model, batch, batch.response_mask, loss, config)
    return grad, logps, sft_loss(logps, batch.response_mask).item()

# --- The step, and its derivative in mu ---
class AdamState(NamedTuple):
    m: Tensor  # (N,), running mean of the gradient
    v: Tensor  # (N,), and of its square
    step: int  # updates so far

def adamw(theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, norm: Tensor, step: int, lr: float,
          max_norm: float = 1.0, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-8) -> tuple:
    """(theta', m', v') of some entries; norm: |grad| of all, which is clipped to max_norm."""
    grad = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad * grad
    m_hat = m / (1 - b1 ** step)
    root = v.clamp(min=1e-37).sqrt()  # v = 0 where no gradient ever came: d sqrt(v) would be 0/0
    root_hat = root / math.sqrt(1 - b2 ** step)
    theta = theta * (1 - lr * weight_decay) - lr * (m_hat / (root_hat + eps))
    return theta, m, v

def adamw_step(theta: Tensor, grad: Tensor, state: AdamState, **how: float) -> tuple:
    """clip_grad_norm_, then AdamW: (theta', state'). All tensors (N,)."""
    step = partial(adamw, norm=grad.norm(), step=state.step + 1, **how)
    theta, m, v = by_slices(step, theta, grad, state.m, state.v)
    return theta, AdamState(m, v, state.step + 1)

def step_sensitivity(theta: Tensor, g_rl: Tensor, g_sft: Tensor, mu: float, state: AdamState,
                     last: Any = None, trace: float = 0.0, **how: float) -> tuple:
    """d (theta', m', v')/d mu, each (N,), of the step that is taken, through clipping and AdamW."""
    # `last`, the step before's, enters at the share trace: mu was larger at past steps, by trace^i
    # at the i-th last, and momentum has still to pay (Xu et al. 2018; as there, no Hessian).
    if last is None:
        last = (torch.zeros_like(theta),) * 3
    grad = (1 - mu) * g_rl + mu * g_sft  # Eq. 3
    norm = grad.norm()
    d_norm = (grad @ g_sft - grad @ g_rl) / (norm + 1e-30)  # d |g|/d mu
    del grad  # memory
    step = partial(adamw, step=state.step + 1, **how)
    def derivative(theta, m, v, g_rl, g_sft, d_theta, d_m, d_v):
        grad = (1 - mu) * g_rl + mu * g_sft
        primals = theta, grad, m, v, norm
        tangents = trace * d_theta, g_sft - g_rl, trace * d_m, trace * d_v, d_norm  # d primals/d mu
        return torch.func.jvp(step, primals, tangents)[1]
    return by_slices(derivative, theta, state.m, state.v, g_rl, g_sft, *last)

# --- The meta-gradient (Eqs. 4-5) and the controller's rule (Eq. 6) ---
def meta_gradient(model: Model, d_theta: Tensor, rollouts: Rollouts, config: Config,
                  advantages: Any = None) -> tuple:
    """Eq. 5: (<grad U(theta'), d theta'/d mu>, its standard error), from fresh samples of theta'.
    d_theta: d theta'/d mu (N,); advantages: other (values (P, G), scale) than the group's."""
    P, G = rollouts.success.shape
    # grad U is the score-function gradient, its baseline a prompt's other samples.
    values, scale = group_advantages(rollouts.success) if advantages is None else advantages
    slopes = d_theta.new_zeros(P)
    # One gradient a prompt: prompts are the error's units. Where no sample differs the slope is 0.
    for p in values.any(1).nonzero().squeeze(1).tolist():
        batch = rollouts.batch.rows(slice(p * G, (p + 1) * G))
        def weighted(logps, rows):
            of_responses = (logps * batch.response_mask[rows]).sum(1)  # log pi(y|x), (b,)
            return (scale * values[p][rows] * of_responses).sum() / G
        slopes[p] = d_theta @ loss_gradient(
            model, batch, values[p].unsqueeze(1), weighted, config, config.temperature)[0]
    return slopes.mean().item(), slopes.std().item() / math.sqrt(P)

def own_meta_gradient(g_rl: Tensor, d_theta: Tensor, batch: Batch, scale: float) -> tuple:
    """dU/dmu on a step's own prompts, -<grad L_RL, d theta/d mu> in rewards; its size as error."""
    # Differs: theta' sampled these, after its step. One number's size as error: E[x^2] >= Var[x].
    n_tokens = batch.response_mask.sum()  # L_RL is per token, U per conversation
    slope = -(g_rl @ d_theta * n_tokens / len(batch.input_ids)).item() * scale
    return slope, abs(slope)

def update_mu(mu: float, entropy: float, target_entropy: float, estimates: list, evidence: tuple,
              config: Config, memory: float = 0.98, effect: float = 0.4,
              odds: float = 0.2) -> tuple:
    """Eq. 6 -> (mu', evidence', (meta force, entropy force)). estimates: new (dU/dmu, its standard
    error); evidence: fading (sum of their ratios z, their number)."""
    # Differs from the paper's text, which has the other sign: Eq. 6 lifts mu where H is below H*.
    entropy_force = config.eta_h * (target_entropy - entropy)
    if config.controller == "paper":
        meta_force = config.eta_mu * sum(slope for slope, _ in estimates)
    else:
        # Differs: dU/dmu is tiny and mostly noise, whose sum would carry mu to an end. Here mu is
        # --mu + eta_mu (P[dU/dmu > 0] - P[dU/dmu < 0]): without evidence it comes to rest there.
        mu = config.mu
        zs = [slope / error for slope, error in estimates if error > 0]  # 0: no sample differed
        fade = memory if zs else 1.0
        total = fade * evidence[0] + sum(zs)
        n = fade * evidence[1] + len(zs)
        evidence = (total, n)
        # z ~ N(effect, 1), N(0, 1) or N(-effect, 1); the outer ones have prior odds to the middle.
        log_ratio = effect * total
        zero = math.exp(n * effect ** 2 / 2) / odds
        belief = 2 * math.sinh(log_ratio) / (zero + 2 * math.cosh(log_ratio))
        meta_force = config.eta_mu * belief
    mu = min(max(mu + meta_force + entropy_force, config.mu_min), config.mu_max)
    return mu, evidence, (meta_force, entropy_force)

# --- Methods: what chooses mu ---
@dataclasses.dataclass
class Step:
    """One step of Algorithm 1, as far as it has come: what a method may read."""
    t: int
    lr: float
    rng: random.Random
    problems: list = ()  # the prompts that are sampled
    rollouts: Rollouts = None  # None: the step does not explore
    advantages: Advantages = None
    demos: Batch = None  # None: the step does not imitate
    g_rl: Tensor = None  # (N,), gradient of L_RL, Eq. 1
    g_sft: Tensor = None  # (N,), gradient of L_SFT, Eq. 2
    mu: float = 1.0
    n_sampled: int = 0  # responses, the controller's included
    metrics: dict = dataclasses.field(default_factory=dict)  # its row of the log

class Method:
    """What Algorithm 1 asks of a method. As it stands --method fixed: W steps SFT, then one mu."""

    def __init__(self, config, task=None, policy=(None, None)):
        self.config, self.task, self.policy = config, task, policy  # policy: (model, tokenizer)

    def explores(self, t):
        """Does step t sample responses?"""
        return t > self.config.warmup

    def imitates(self, t):
        """Does step t use demonstrations?"""
        return True

    def choose_prompts(self, step):
        """Which training problems are sampled: indices."""
        return step.rng.sample(range(self.config.demos), self.config.prompts)

    def choose_demos(self, step):
        """Which training problems are imitated: indices."""
        return step.rng.sample(range(self.config.demos), self.config.sft_batch)

    def advantages(self, step, phi):
        """The Advantages of step.rollouts; phi: the value function, or None."""
        return advantages_of(self.policy[0], phi, step.rollouts, self.config)

    def token_weights(self, step, logps, rows):
        """(b, T): what -log p of the tokens in `rows` (b,) of step.demos is multiplied by."""
        if self.config.imitation == "rectified":
            return logps.exp()  # SFT is RL with a reward of 1/pi, which p removes (2508.05629)
        return torch.ones_like(logps)

    def choose_mu(self, step):
        """mu of this step: asked once, when both gradients are known."""
        return self.config.mu if step.rollouts else 1.0

    def before_update(self, step, theta, adam, first):
        """Told before each of the step's updates of theta (N,)."""

    def state_dict(self):
        """What a run that goes on needs, besides theta."""
        return {}

    def load_state_dict(self, state):
        vars(self).update(state)

class SFT(Method):
    def explores(self, t):
        return False

class RL(Method):
    def imitates(self, t):
        return False

class SFTThenRL(Method):
    def explores(self, t):
        return t > (self.config.warmup or self.config.steps // 2)

    def imitates(self, t):
        return not self.explores(t)

class Controller(Method):
    """AMFT, Eqs. 4-6: learns mu from what mu does to success on validation prompts."""
    split = "val"  # of U's prompts

    def __init__(self, config, task=None, policy=(None, None)):
        super().__init__(config, task, policy)
        self.mu = config.mu
        self.target_entropy = None  # H*, of the first samples after the warm-up
        self.evidence = (0.0, 0.0)  # of dU/dmu's sign, see update_mu
        self.sensitivity = None  # d (theta, m, v)/d mu, (N,) each; None before the first mixed step

    def state_dict(self):
        return dict(mu=self.mu, target_entropy=self.target_entropy, evidence=self.evidence,
                    sensitivity=self.sensitivity)

    def choose_mu(self, step):
        if step.rollouts is None:
            return 1.0  # the warm-up is SFT alone
        entropy = step.rollouts.entropy
        if self.target_entropy is None:
            self.target_entropy = entropy
        estimates = self.estimates(step) if self.sensitivity else []
        self.mu, self.evidence, forces = update_mu(
            self.mu, entropy, self.target_entropy, estimates, self.evidence, self.config)
        step.metrics.update(
            meta_force=forces[0],
            entropy_force=forces[1],
            target_entropy=self.target_entropy)
        return self.mu

    def estimates(self, step):
        """[(dU/dmu, its standard error)] that this step gives."""
        config = self.config
        estimates = []
        d_theta = self.sensitivity[0]
        if config.utility in ("train", "both"):  # the step's own prompts: a dot product
            slope, error = own_meta_gradient(
                step.g_rl, d_theta, step.rollouts.batch, step.advantages.scale)
            step.metrics["meta_own"] = slope
            estimates.append((slope, error))
        if config.utility in ("val", "both") and (step.t - config.warmup) % config.meta_every == 0:
            episodes = [self.task.sample(self.split, step.rng) for _ in range(config.prompts)]
            val = rollout(*self.policy, episodes, config.samples, config.max_new_tokens,
                          config.temperature)
            step.n_sampled += len(val.episodes)
            slope, error = meta_gradient(self.policy[0], d_theta, val, config,
                                         self.val_advantages(step, val))
            step.metrics.update(meta_grad=slope, meta_se=error)
            informative = (val.success.std(1) > 0).sum()
            if informative > 2 or config.controller == "paper":  # of one or two |z| is 1 by algebra
                estimates.append((slope, error))
        return estimates

    def val_advantages(self, step, val):
        """(values (P, G), scale) of U's samples (Eq. 4); None: the group's."""

    def before_update(self, step, theta, adam, first):
        if step.rollouts is None or self.config.eta_mu == 0:
            return
        trace = self.config.trace if first else 1.0  # all updates of a step belong to its one mu
        self.sensitivity = step_sensitivity(
            theta, step.g_rl, step.g_sft, step.mu, adam, self.sensitivity, trace, lr=step.lr)

METHODS = {
    "amft": Controller,
    "fixed": Method,
    "sft": SFT,
    "rl": RL,
    "sft-rl": SFTThenRL,
}

# --- Algorithm 1 ---
def train(config: Config, method: Method, task: Task, model: Model, tokenizer: Tokenizer,
          run: Run) -> None:
    """Algorithm 1, from where `run` stands to its end: the model then holds theta_T."""
    # Initialise theta, phi, and (in the method) mu; or go on from where the run was saved.
    torch.manual_seed(config.seed)
    phi = value_function(model) if config.advantage == "gae" else None
    modules = [method, phi, phi.optimizer if phi else None]
    theta = flatten(model)
    adam = AdamState(0 * theta, 0 * theta, step=0)
    theta, adam = run.restore(theta, adam, modules)
    set_theta(model, theta)
    problems = task.training(config.demos, random.Random(f"demos {config.seed}"))
    look = partial(evaluate, model, tokenizer, task, config)
    if run.saved is None:
        run.evaluate(look, task.splits)
        run.save(theta, adam, modules)
    for t in run.steps(config.steps):  # Ctrl-C waits for a step's end
        rng = random.Random(f"step {config.seed} {t}")  # a resumed run repeats the unbroken one
        torch.manual_seed(rng.getrandbits(62))
        step = Step(t, lr=config.lr * (1 - (t - 1) / config.steps), rng=rng)
        # Exploration: P prompts, G responses to each, their explicit reward, their advantages.
        if method.explores(t):
            step.problems = [problems[i] for i in method.choose_prompts(step)]
            step.rollouts = rollout(model, tokenizer, step.problems, config.samples,
                                    config.max_new_tokens, config.temperature)
            step.n_sampled = len(step.rollouts.episodes)
            step.advantages = method.advantages(step, phi)
        # Imitation: a batch of demonstrations.
        if method.imitates(t):
            chosen = [problems[i] for i in method.choose_demos(step)]
            step.demos = encode_demos(model, tokenizer, chosen)
        old_logps = None  # (B, T), of the policy that sampled
        for update in range(config.ppo_epochs if step.rollouts else 1):
            # The gradients of the two losses. (Eqs. 1-2)
            step.g_rl = step.g_sft = torch.zeros_like(theta)
            if step.rollouts:
                step.g_rl, logps, step.metrics["rl_loss"] = rl_gradient(
                    model, step.rollouts.batch, step.advantages, config, old_logps)
                old_logps = logps if old_logps is None else old_logps
            if step.demos:
                step.g_sft, _, step.metrics["sft_loss"] = sft_gradient(
                    model, step.demos, config, partial(method.token_weights, step))
            # Controller: mu, from the meta-gradient and the entropy. (Eqs. 4-6)
            if update == 0:
                step.mu = method.choose_mu(step)
            method.before_update(step, theta, adam, first=update == 0)
            # A step on the unified loss. (Eq. 3)
            grad = (1 - step.mu) * step.g_rl + step.mu * step.g_sft
            step.metrics.update(
                grad_norm=grad.norm(),
                grad_norm_rl=step.g_rl.norm(),
                grad_norm_sft=step.g_sft.norm())
            step.g_rl = step.g_sft = None  # memory
            theta, adam = adamw_step(theta, grad, adam, lr=step.lr)
            del grad  # memory
            set_theta(model, theta)
        run.log_step(step, theta)
        if config.val_every and t % config.val_every == 0 and t < config.steps:
            run.evaluate(look, ["val"], whole=False)
        if run.due() or t == config.steps:
            run.save(theta, adam, modules)

# --- Evaluation ---
@torch.no_grad()
def evaluate(model: Model, tokenizer: Tokenizer, task: Task, config: Config, split: str,
             temperature: float, samples: int, at_once: int = 512) -> dict:
    """A row of the log (Task.measures): same episodes, same noise. at_once: conversations."""
    torch.manual_seed(0)
    episodes = task.episodes(split, config.eval_n)
    width = max(1, at_once // samples)
    played = []
    for start in range(0, len(episodes), width):
        played += rollout(model, tokenizer, episodes[start:start + width], samples,
                          config.max_new_tokens, temperature).episodes
    return dict(split=split, n=len(episodes), samples=samples, **task.measures(played, samples))

# --- A run, from its arguments ---
def main(argv: Any = None, methods: dict = METHODS, config_class: type = Config,
         method_flags: dict = METHOD_FLAGS, tasks: dict = TASKS,
         run_class: type = Run) -> None:
    """A run, or an evaluation, from the command line's words."""
    arguments = parse(argv, config_class, tasks, method_flags, __doc__)
    config = arguments.config
    with one_line_errors() as stop:
        task = make_task(config, tasks)
        learns = arguments.folder is not None
        model, tokenizer = load_policy(config, task, sys.modules[__name__], learns)
        look = partial(evaluate, model, tokenizer, task, config)
        if not learns:
            rows = evaluation(look, task.splits, config.temperature, config.eval_samples)
            return print(table({config.model: rows}))
        method = methods[config.method](config, task, (model, tokenizer))
        run = stop.run = run_class(arguments, model)
        train(config, method, task, model, tokenizer, run)
        run.evaluate(look, task.splits)
        run.finish(model, tokenizer)

if __name__ == "__main__":
    main()
