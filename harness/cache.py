"""The key-value cache that the sampling loop fills."""

import math

from transformers import DynamicCache, StaticCache


def with_room(model, cache, columns):
    """A static cache of so many columns that begins as `cache` does; `cache` where a layer has no such form.

    Static: its tensors keep their place while a reply grows, which a captured decode step needs."""
    plain = type(cache) in (DynamicCache, StaticCache)
    if not plain or any(layer.is_sliding for layer in cache.layers):
        return cache
    static = StaticCache(config=model.config, max_cache_len=columns)
    for layer, before in zip(static.layers, cache.layers):
        known = int(before.get_seq_length())
        layer.update(before.keys[:, :, :known], before.values[:, :, :known])
    return static


def max_length(model):
    """Most tokens of a conversation."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
