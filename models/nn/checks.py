"""Checks that the specs of all families share: one line with found, needed, what to change."""

from typing import Any


def check_positive(spec: Any, *names: str) -> None:
    """Raise ValueError where one of the named sizes is below 1."""
    for name in names:
        if getattr(spec, name) < 1:
            raise ValueError(f"{name}={getattr(spec, name)} is not positive; set it to 1 or more")


def check_probabilities(spec: Any, *names: str) -> None:
    """Raise ValueError where one of the named dropout rates is no probability below 1."""
    for name in names:
        if not 0.0 <= getattr(spec, name) < 1.0:
            raise ValueError(
                f"{name}={getattr(spec, name)} is no probability below 1; "
                "set it to 0 or more and less than 1"
            )


def check_heads(spec: Any) -> None:
    """Raise ValueError where key/value heads, query heads, width and head size do not fit."""
    heads = spec.num_attention_heads
    kv_heads = heads if spec.num_key_value_heads is None else spec.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
            f"set it to one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
        )
    if spec.head_dim is None and spec.hidden_size % heads:
        raise ValueError(
            f"num_attention_heads={heads} does not divide hidden_size={spec.hidden_size}; "
            "change one of them or set head_dim"
        )
    if spec.head_dim is not None and spec.head_dim < 1:
        raise ValueError(f"head_dim={spec.head_dim} is not positive; set it to 2 or more")
    size = spec.head_dim or spec.hidden_size // heads
    if size % 2:
        raise ValueError(f"head_dim={size} is odd; rotary positions need an even one")
