"""Large policies: the same numbers in parts. Below LARGE a function is called as it is."""

LARGE = 2 ** 24  # numbers


def by_slices(function, *vectors):
    """What function makes of vectors (N,), entry by entry, three vectors (N,)."""
    if vectors[0].numel() <= LARGE:
        return function(*vectors)
    from recipes.large import in_slices
    return in_slices(function, *vectors)


def by_rows(function, logits, ids):
    """function(logits (B, T, V), ids (B, T)) -> (B, T)."""
    if logits.numel() <= LARGE:
        return function(logits, ids)
    from recipes.large import InParts
    return InParts.apply(function, logits, ids)
