"""A checkpoint that is not from here: its chat template, its ends, and whether it can be a policy.

Called where --model, --data, --bf16 or --gradient-checkpointing is given (harness/loading.py), and
where a tokenizer has a chat template (amft.encode_text). Nothing of amft is imported: its module is
handed over as `core`.
"""

import datetime
import json
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.cache import max_length

SAID = "<what the policy said>"  # stands for a response while a chat template is rendered
# A template that tells the date is told this one: the same seed gives the same log tomorrow.
DATE = datetime.datetime(2024, 7, 26)
SPELLED = {"%-d": "26", "%-m": "7"}
SPELLED.update({code: DATE.strftime(code) for code in "%A %a %B %b %d %m %Y %y %H %M %S".split()})
FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{code}', '{text}')" for code, text in SPELLED.items())
    + " }}{%- endmacro -%}")
# How templates are asked to write a response without a thought: (fields of its message, words).
SILENT = (
    ({}, {}),
    (dict(reasoning_content=""), {}),
    ({}, dict(enable_thinking=False)),
    ({}, dict(thinking=False)))

# --- Chat templates ---
def template_words(tokenizer: Any, text: str) -> None:
    """--chat-template-kwargs: what the tokenizer's chat template is told, a JSON object."""
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, dict):
        raise ValueError(f"--chat-template-kwargs {text}: is not a JSON object")
    tokenizer.template_words = text

def rendered(tokenizer: Any, *texts: str) -> str:
    """A conversation as the chat template writes it; its texts are the user's and the policy's."""
    own = getattr(tokenizer, "template_words", "{}")
    return written(tokenizer, texts, *without_thought(tokenizer, tokenizer.chat_template, own))

def written(tokenizer: Any, texts: tuple, fields: dict, words: dict) -> str:
    """The same, with these fields in the policy's messages, and these words told to the template."""
    messages = []
    for i, text in enumerate(texts):
        by_policy = dict(role="assistant", content=text, **fields)
        messages.append(by_policy if i % 2 else dict(role="user", content=text))
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DATE + template
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **words)

@lru_cache(maxsize=64)
def without_thought(tokenizer: Any, template: str, own: str) -> tuple:
    """(fields, words) by which the template closes the <think> that it opens before a response."""
    # A demonstration in an open thought would teach the policy to end there.
    for fields, words in SILENT:
        words = {**words, **json.loads(own)}
        before = written(tokenizer, ("-", SAID), fields, words).rpartition(SAID)[0]
        if before.count("<think>") <= before.count("</think>"):
            return fields, words
    raise ValueError("its chat template opens a <think> before a response and does not close it; "
                     "--chat-template-kwargs may tell it to")

def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def encode_chat(tokenizer: Any, text: str, first: bool = True) -> list[int]:
    """Token ids of a prompt (first) or of an observation, up to where the policy speaks."""
    # Not add_generation_prompt: some templates write more than that before a response.
    if first:
        shown = rendered(tokenizer, text, SAID).rpartition(SAID)[0]
    else:  # an observation follows the end of turn, which the policy itself has said
        shown = rendered(tokenizer, "-", SAID, text, SAID).partition(SAID)[2].rpartition(SAID)[0]
        end = end_of_turn(tokenizer)
        if end in shown:
            shown = shown.partition(end)[2]
    if shown.endswith(" "):
        # A tokenizer may put a space before any text: then the response's first token has this one.
        without = ids_of(tokenizer, shown.rstrip(" "))
        if without + ids_of(tokenizer, SAID) == ids_of(tokenizer, shown + SAID):
            return without
    return ids_of(tokenizer, shown)

def end_of_turn(tokenizer: Any) -> str:
    """The token that ends a response: a chat template's first special one after it, else EOS."""
    if tokenizer.chat_template:
        rest = rendered(tokenizer, "-", SAID).rpartition(SAID)[2]
        tokens = tokenizer.added_tokens_decoder.values()
        special = [str(token) for token in tokens if token.special and str(token) in rest]
        if special:
            return min(special, key=rest.index)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no token that ends a text")
    return tokenizer.eos_token

def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end a response: the one that is taught, then the checkpoint's own."""
    known = [tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)), tokenizer.eos_token_id]
    for config in (model.generation_config, model.config.get_text_config()):
        ids = config.eos_token_id
        known += ids if isinstance(ids, list) else [ids]
    return [i for i in dict.fromkeys(known) if i is not None]

# --- Can it be a policy? ---
def check_checkpoint(core: Any, model: Any, tokenizer: Any, info: dict, task: Any, config: Any,
                     learns: bool) -> None:
    """Make a policy of the checkpoint; ValueError, one line, where it or the texts cannot be had.

    It reads, speaks and learns once, on a demonstration: what it cannot do fails here and now, not
    in step 10."""
    for part in (model.config, model.config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False  # of a mixture of experts; nothing here reads them
    finite = all(parameter.isfinite().all() for parameter in model.parameters())
    if info["missing_keys"] or info["mismatched_keys"] or not finite:
        raise ValueError("weights are missing, or not finite")
    tokenizer.pad_token = tokenizer.pad_token or end_of_turn(tokenizer)
    # Nothing of the checkpoint's own way to sample enters.
    model.generation_config = GenerationConfig(
        eos_token_id=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    check_texts(core, model, tokenizer, task, config.max_new_tokens)
    episode = task.examples()[0]
    if tokenizer.chat_template:
        check_template(core, model, tokenizer, episode)
    demo = core.encode_demos(model, tokenizer, [episode])
    try:
        check_reading(core, model, tokenizer, demo)
        core.rollout(model, tokenizer, [episode], samples=2, max_new_tokens=2, temperature=0)
    except Exception as error:
        if not kind_of(model):
            raise
        raise ValueError(f"{kind_of(model)}, which is not supported ({error})")
    if learns:
        loss = (core.logps_of(model, demo) * demo.response_mask).sum()
        weights = list(model.parameters())
        for grad in torch.autograd.grad(loss, weights, materialize_grads=True):
            if not grad.isfinite().all():
                raise ValueError("its gradient is not finite")

def kind_of(model: Any) -> str:
    """What its layers do that sampling with padding and a cache may not allow; "": nothing known."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", ()))
    if layers & {"linear_attention", "mamba", "recurrent"}:
        return "its layers have linear attention or another running state"
    of_attention = getattr(config, "attn_config", None)
    alibi = [getattr(config, "alibi", False), getattr(of_attention, "alibi", False)]
    if config.model_type == "bloom" or any(alibi):
        return "its positions are distances (ALiBi)"
    return ""

def checkpoint_gradients(model: Any) -> None:
    """Layers keep their inputs alone where the model learns, and compute the rest again."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("it has no layers that --gradient-checkpointing knows")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for name, value in list(vars(layer).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)

    def where_it_learns(*_):
        # A layer does this in training mode only, and then without a cache. What is in it stays in
        # evaluation mode: dropout would make another policy of it.
        for layer in layers:
            layer.training = torch.is_grad_enabled()
    model.register_forward_pre_hook(where_it_learns)

def check_texts(core: Any, model: Any, tokenizer: Any, task: Any, max_new_tokens: int) -> None:
    """ValueError where a text cannot be encoded or does not fit; of a file's problems any one."""
    rows = model.get_input_embeddings().num_embeddings
    room = max_length(model)
    examples = task.examples()
    check_alphabet(tokenizer, examples[0])
    long, longest = [], 0
    for episode in examples:
        texts = [turn.response for turn in episode.demonstration()]
        responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompt = core.encode_text(model, tokenizer, episode.prompt)
        used = {*prompt, *sum(responses, [])}
        if tokenizer.unk_token_id in used - {tokenizer.eos_token_id, None}:
            raise ValueError(f"its tokenizer cannot encode all of {episode.source or 'a text'}")
        if max(used, default=0) >= rows:
            raise ValueError(f"its tokenizer has tokens that the model lacks, which has {rows}")
        if len(prompt) + max_new_tokens > room:
            raise ValueError(
                f"--max-new-tokens {max_new_tokens}: too many beside the {len(prompt)} tokens of "
                f"{episode.source or 'a prompt'}; the model has room for {room}")
        length = max(map(len, responses)) + 1
        if length > max_new_tokens and not episode.exam:
            long.append(episode.source)
            longest = max(longest, length)
    if long:
        first = f", first {long[0]}" if long[0] else ""
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, {len(long)} of {len(examples)} demonstrations "
            f"are longer{first}; the longest has {longest} tokens")
    widest = max(examples, key=characters)
    length = core.encode_demos(model, tokenizer, [widest]).input_ids.shape[1]
    if length > room and not widest.exam:
        raise ValueError(f"a demonstration of {widest.source or 'the task'} has {length} tokens with all that it answers; "
                         f"the model has room for {room}")

def characters(episode: Any) -> int:
    """Of an episode's demonstration, with what is shown."""
    return sum(len(turn.shown) + len(turn.response) for turn in episode.demonstration())

def check_alphabet(tokenizer: Any, episode: Any) -> None:
    """ValueError where a text does not come back from its tokens."""
    for turn in episode.demonstration():
        for text in (turn.shown, turn.response):
            back = tokenizer.decode(ids_of(tokenizer, text))
            if back.split() != text.split():
                raise ValueError(
                    f"its tokenizer cannot encode the task: a text comes back as {back[-60:]!r}")

def check_template(core: Any, model: Any, tokenizer: Any, episode: Any) -> None:
    """ValueError where a demonstration is not what the chat template writes, turn by turn."""
    end = end_of_turn(tokenizer)
    texts = []
    for turn in episode.demonstration()[:2]:
        ids = core.encode_text(model, tokenizer, turn.shown, first=not texts)
        ours = tokenizer.decode(ids + ids_of(tokenizer, turn.response)).rstrip()
        texts += [core.place_pictures(model, turn.shown), turn.response]
        whole = tokenizer.decode(ids_of(tokenizer, rendered(tokenizer, *texts)))
        _, here, rest = whole.partition(ours)
        if not here:
            n = max(n for n in range(len(ours)) if ours[:n] in whole)  # so far they agree
            theirs = whole[whole.index(ours[:n]):]
            near = slice(max(0, n - 20), n + 20)
            raise ValueError(
                f"its chat template writes {theirs[near]!r} where {ours[near]!r} is trained")
        more = rest.partition(end)[0].strip()
        if end in rest and more:
            raise ValueError(f"its chat template writes {more[:40]!r} between a response and {end}")

@torch.no_grad()
def check_reading(core: Any, model: Any, tokenizer: Any, demo: Any) -> None:
    """ValueError where a demonstration's log-probabilities after padding and from a cache, as in
    sampling, are not those of a plain forward pass: some architectures do not honour padding,
    positions, or a cache that was read before."""
    inputs = core.model_inputs(demo.input_ids, demo.attention_mask, demo.images)
    read = {name: inputs[name] for name in ("input_ids", "pixel_values") if name in inputs}
    known = demo.input_ids.shape[1] - demo.response_mask.shape[1]  # columns of the prompt
    plain = model(**read).logits[:, known - 1:-1]
    padding = torch.full_like(demo.input_ids[:, :2], tokenizer.pad_token_id)
    ids = torch.cat([padding, demo.input_ids], 1)
    attention_mask = torch.cat([torch.zeros_like(padding), demo.attention_mask], 1)
    known += padding.shape[1]
    first, later = demo.images[0][:1], demo.images[0][1:]  # the prompt has the first one
    cache = core.prefill(model, ids[:, :known], attention_mask[:, :known], [first])
    cache.batch_repeat_interleave(2)
    cache = core.with_room(model, cache, ids.shape[1])
    inputs = core.model_inputs(
        ids.repeat(2, 1), attention_mask.repeat(2, 1), [later, later], known - 1)
    cached = model(**inputs, past_key_values=cache).logits[:1, :-1]
    gap = core.token_logps(plain, demo.responses) - core.token_logps(cached, demo.responses)
    gap = (gap * demo.response_mask).abs().sum() / demo.response_mask.sum()
    limit = 0.5 if plain.dtype == torch.bfloat16 else 0.1  # rounding is below it, others far above
    if not gap < limit:
        raise ValueError(f"padding and a cache change its log-probabilities, by {gap:.2f} a token")
