"""Token ids: of texts, each tokenised once, and side by side in a batch."""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def token_ids(tokenizer: Any, text: str, special: bool, template: str | None = None) -> list:
    """A text's token ids, with special tokens or without. With a chat template, the tokenizer's: as it writes the first
    prompt (special), or what is shown later. Problems come again, and are not tokenised again."""
    return list(_token_ids(tokenizer, text, special, template))


@lru_cache(maxsize=2 ** 14)
def _token_ids(tokenizer: Any, text: str, special: bool, template: str | None) -> tuple:
    if template:
        from recipes.checkpoints import encode_chat
        return tuple(encode_chat(tokenizer, text, special))
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def pad(tokenizer: Any, rows: list, side: str, device: Any) -> tuple:
    """(ids, attention mask), each (B, width), of lists of token ids; side: where the padding goes."""
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones_like(row) for row in ids]
    ids = pad_sequence(ids, True, tokenizer.pad_token_id, side)
    return ids.to(device), pad_sequence(real, True, 0, side).to(device)
