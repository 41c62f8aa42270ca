"""What the values of a checkpoint's config.json must be beside their types, whatever the family."""

import dataclasses
import math
from typing import Any

from moejax.errors import UserError

_HEADS = (  # width, heads of queries, heads of keys; DBRX's names, then everyone else's
    ("d_model", "n_heads", "kv_n_heads"),
    ("hidden_size", "num_attention_heads", "num_key_value_heads"),
)
_UNSET_ROPE = frozenset({"mscale", "mscale_all_dim"})  # 0 is how DeepSeek's files leave them out
_PER_LAYER = ("layer_types", "no_rope_layers")


def check(config: Any, zero: frozenset[str]) -> None:
    """UserError where a family's config holds a number that can't be, or values that contradict each other.

    zero: counts that may be 0.
    """
    rope = getattr(config, "rope", None)
    for name, value in _numbers(config):
        _at_least(name, value, 0 if isinstance(value, float) or name in zero else 1)
    for name, value in _numbers(rope) if rope is not None else ():
        _at_least(f"rope_parameters' {name}", value, 0)
        if value == 0 and name not in _UNSET_ROPE:
            raise UserError(f"config.json: rope_parameters' {name}={value}: it must be above 0")
    _check_heads(config)
    _check_layers(config)


def _numbers(config: Any) -> list[tuple[str, int | float]]:
    """(field, number) of a dataclass, those of float tuples too; numbers of layers in a tuple are no sizes."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        several = [each for each in value if isinstance(each, float)] if isinstance(value, tuple) else [value]
        found += [(field.name, each) for each in several if type(each) in (int, float)]
    return found


def _at_least(name: str, value: int | float, least: int) -> None:
    if not math.isfinite(value) or value < least:
        raise UserError(f"config.json: {name}={value}: it must be a number of at least {least}")


def _check_heads(config: Any) -> None:
    if hasattr(config, "qk_rope_head_dim"):  # latent attention: no width follows from another
        return _check_even("qk_rope_head_dim", config.qk_rope_head_dim)
    names = next(names for names in _HEADS if hasattr(config, names[0]))
    width, heads, kv = (getattr(config, name) for name in names)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and width % heads:
        raise UserError(f"config.json: {names[1]}={heads} does not divide {names[0]}={width}: give a divisor of it")
    if kv is not None and heads % kv:
        raise UserError(f"config.json: {names[2]}={kv} does not divide {names[1]}={heads}: give a divisor of it")
    _check_even("head_dim" if head_dim else f"{names[0]} / {names[1]}", head_dim or width // heads)


def _check_even(name: str, width: int) -> None:
    if width % 2:
        raise UserError(f"config.json: {name}={width} is odd: rotary positions turn features in pairs")


def _check_layers(config: Any) -> None:
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if values is not None and len(values) != config.num_hidden_layers:
            raise UserError(f"config.json: {name} has {len(values)} entries and num_hidden_layers="
                            f"{config.num_hidden_layers}: give one entry for each layer")  # fmt: skip
