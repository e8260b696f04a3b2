"""A checkpoint that is not from here: its chat template, its ends, and whether it can be a policy at all.

Called where --model, --data, --bf16 or --gradient-checkpointing is given (harness/loading.py) and where a tokenizer has a
chat template (amft.encode_text); imports nothing of amft, whose module is handed over as `core`."""

import math
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

SAID = "<what the policy said>"  # stands for a response while a chat template is rendered


def encode_chat(tokenizer: Any, text: str, first: bool = True) -> list[int]:
    """Token ids of a prompt (first) or of an observation, as the chat template has them."""
    before = [] if first else [dict(role="user", content="-"), dict(role="assistant", content=SAID)]
    text = tokenizer.apply_chat_template(before + [dict(role="user", content=text)], tokenize=False,
                                         add_generation_prompt=True)
    if not first:  # an observation follows the end of turn, which the policy itself has said
        text, end = text.split(SAID)[-1], end_of_turn(tokenizer)
        text = text.partition(end)[2] if end in text else text
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: Any) -> str:
    """The token with which a response ends: in a chat template the first special one after it, else EOS."""
    if tokenizer.chat_template:
        messages = [dict(role="user", content="-"), dict(role="assistant", content=SAID)]
        rest = tokenizer.apply_chat_template(messages, tokenize=False).split(SAID)[-1]
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t) in rest]
        if special:
            return min(special, key=rest.index)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no token that ends a text")
    return tokenizer.eos_token


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end a response: the one that is taught first, then the checkpoint's others."""
    known = [tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)), tokenizer.eos_token_id]
    for ids in (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id):
        known += ids if isinstance(ids, list) else [ids]
    return [i for i in dict.fromkeys(known) if i is not None]


def check_checkpoint(core: Any, model: Any, tokenizer: Any, info: dict, task: Any, config: Any, learns: bool) -> None:
    """Make a policy of the checkpoint: raise ValueError, one line, where it or the texts cannot be had.

    It reads, speaks and learns once, on a demonstration: what it cannot do fails here and now, not in step 10."""
    if info["missing_keys"] or info["mismatched_keys"] or not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("weights are missing, or not finite")
    tokenizer.pad_token = tokenizer.pad_token or end_of_turn(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=ends_of(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
                                               bos_token_id=tokenizer.bos_token_id)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    check_texts(core, model, tokenizer, task, config.max_new_tokens)
    example = [task.examples()[0]]
    demo = core.encode_demos(model, tokenizer, example)
    check_reading(core, model, tokenizer, demo)
    core.rollout(model, tokenizer, example, samples=2, max_new_tokens=2, temperature=0)
    if learns:
        loss = (core.logps_of(model, demo) * demo.response_mask).sum()
        for grad in torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True):
            if not grad.isfinite().all():
                raise ValueError("its gradient is not finite")


def checkpoint_gradients(model: Any) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("it has no layers that --gradient-checkpointing knows")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        vars(layer).update({name: 0.0 for name, p in vars(layer).items() if "dropout" in name and isinstance(p, float)})

    def where_it_learns(*_):
        # A layer does this in training mode only, and then without a cache. What is in it stays in evaluation mode:
        # dropout would make another policy of it.
        for layer in layers:
            layer.training = torch.is_grad_enabled()
    model.register_forward_pre_hook(where_it_learns)


def check_texts(core: Any, model: Any, tokenizer: Any, task: Any, max_new_tokens: int) -> None:
    """Raise ValueError where a text cannot be encoded, or does not fit: of a file's problems, where any does not."""
    rows, room = model.get_input_embeddings().num_embeddings, getattr(
        model.config.get_text_config(), "max_position_embeddings", math.inf)
    long, longest, examples = [], 0, task.examples()
    for i, episode in enumerate(examples):
        turns = episode.demonstration()
        responses = tokenizer([turn.response for turn in turns], add_special_tokens=False)["input_ids"]
        prompt = core.encode_text(model, tokenizer, episode.prompt)
        for text in (text for turn in turns for text in (turn.shown, turn.response) if i == 0):
            back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
            if back.split() != text.split():
                raise ValueError(f"its tokenizer cannot encode the task: a text comes back as {back[-60:]!r}")
        if tokenizer.unk_token_id in {*prompt, *sum(responses, [])} - {tokenizer.eos_token_id, None}:
            raise ValueError(f"its tokenizer cannot encode all of {episode.source or 'a text'}")
        if max(max(ids, default=0) for ids in (prompt, *responses)) >= rows:
            raise ValueError(f"its tokenizer has tokens that the model lacks, which has {rows}")
        if len(prompt) + max_new_tokens > room:
            raise ValueError(f"{episode.source or 'a prompt'} has {len(prompt)} tokens, with --max-new-tokens "
                             f"{max_new_tokens} more than the model's {room}")
        if (length := max(map(len, responses)) + 1) > max_new_tokens and not episode.exam:
            long, longest = long + [episode.source], max(longest, length)
    if long:
        first = f", first {long[0]}" * bool(long[0])
        raise ValueError(f"--max-new-tokens is {max_new_tokens}, {len(long)} of {len(examples)} demonstrations are longer"
                         f"{first}; the longest has {longest} tokens")


@torch.no_grad()
def check_reading(core: Any, model: Any, tokenizer: Any, demo: Any) -> None:
    """Raise ValueError where a demonstration's log-probabilities after padding and from a cache, as in sampling, are not
    those of a plain forward pass: some architectures do not honour padding, positions, or a cache that was read before."""
    known, two = demo.input_ids.shape[1] - demo.response_mask.shape[1], torch.zeros_like(demo.input_ids[:, :2])
    first, later = demo.images[0][:1], demo.images[0][1:]  # the prompt has the first one
    inputs = core.model_inputs(demo.input_ids, demo.attention_mask, demo.images)
    plain = model(**{name: inputs[name] for name in ("input_ids", "pixel_values") if name in inputs}).logits
    ids = torch.cat([two + tokenizer.pad_token_id, demo.input_ids], 1)
    attention = torch.cat([two, demo.attention_mask], 1)
    cache = core.prefill(model, ids[:, :known + 2], attention[:, :known + 2], [first])
    cache.batch_repeat_interleave(2)
    cache = core.with_room(model, cache, ids.shape[1])
    inputs = core.model_inputs(ids.repeat(2, 1), attention.repeat(2, 1), [later, later], known + 1)
    cached = model(**inputs, past_key_values=cache).logits
    gap = (core.token_logps(plain[:, known - 1:-1], demo.responses) - core.token_logps(cached[:1, :-1], demo.responses))
    gap = (gap * demo.response_mask).abs().sum() / demo.response_mask.sum()
    limit = 0.5 if plain.dtype == torch.bfloat16 else 0.1  # rounding is far below it, another policy far above
    if not gap < limit:
        raise ValueError(f"padding and a cache change its log-probabilities, by {gap:.2f} a token")
