"""Rows to tokens and back: K rows a token, weighted and summed, and a token's value to its K rows. No atomics.

Letters: T tokens, D width, K rows per token at most, R rows. slot (T, K) i32: the row of each choice, R where it has
none, never negative (nobody checks); no row stands in it twice, so every row is written by one program and the result
is the same in every run.

On a Hopper GPU both are kernels (`mosaic_gpu`), elsewhere plain XLA (`xla`).
"""

import functools
import importlib
import logging
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.vary import vary_alike

__all__ = ["combine", "pick", "spread"]

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


def combine(rows: jax.Array, slot: jax.Array, weight: jax.Array | None, *, implementation=None) -> jax.Array:
    """rows (R, D), slot (T, K) i32, weight (R,) f32 or None for ones -> (T, D): Σ_k weight[slot] · rows[slot].

    Summed in float32 over k in order, in rows' dtype at the end; tokens without a row come out zero. Rows in no slot
    are never read. Differentiable in rows and weight: weight's gradient is 0 where no slot points, rows' gradient there
    is undefined, as `spread`'s rows. implementation: "mosaic_gpu", "xla", or None, which picks by platform and width.

    Raises ValueError for shapes or dtypes that don't fit, NotImplementedError where the named implementation can't run.
    """
    rows, slot, weight = jnp.asarray(rows), jnp.asarray(slot), None if weight is None else jnp.asarray(weight)
    _check("combine", rows, slot)
    if weight is not None and (weight.shape != rows.shape[:1] or weight.dtype != jnp.float32):
        raise ValueError(f"combine: weight must be float32 ({rows.shape[0]},); got {weight.dtype}{list(weight.shape)}")
    name = _named(implementation, rows)
    if 0 in (*rows.shape, *slot.shape):
        return vary_alike(jnp.zeros((slot.shape[0], rows.shape[1]), rows.dtype), rows, slot, weight)[0]
    return _combine(name, *vary_alike(rows, slot, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(name, rows, slot, weight):
    return _module(name).combine(rows, slot, weight)


def _combine_forward(name, rows, slot, weight):
    kept = jnp.zeros((rows.shape[0], 0), rows.dtype) if weight is None else rows
    return _module(name).combine(rows, slot, weight), (*vary_alike(kept, slot), weight)


def _combine_backward(name, residuals, grad):
    rows, slot, weight = residuals
    if weight is None:
        return _module(name).spread(grad, slot, rows.shape[0]), None, None
    drows, dweight = _module(name).combine_gradients(rows, slot, weight, grad)
    return drows, None, dweight


_combine.defvjp(_combine_forward, _combine_backward)


def spread(x: jax.Array, slot: jax.Array, num_rows: int, *, implementation=None) -> jax.Array:
    """x (T, D), slot (T, K) i32 -> (R, D), R = num_rows, static: row slot[t, k] is x[t], read once for its K rows.

    Rows in no slot are undefined: "mosaic_gpu" leaves them as the memory was. Differentiable in x (a `combine` without
    weights). Arguments and errors as `combine`'s.
    """
    x, slot = jnp.asarray(x), jnp.asarray(slot)
    _check("spread", x, slot)
    if x.shape[0] != slot.shape[0]:
        raise ValueError(f"spread: x has {x.shape[0]} tokens and slot {slot.shape[0]}; give both the same")
    shape = jax.ShapeDtypeStruct((num_rows, x.shape[1]), x.dtype)
    name = _named(implementation, shape)
    if 0 in (*x.shape, *slot.shape, num_rows):
        return vary_alike(jnp.zeros(shape.shape, x.dtype), x, slot)[0]
    return _spread(name, num_rows, *vary_alike(x, slot))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(name, num_rows, x, slot):
    return _module(name).spread(x, slot, num_rows)


_spread.defvjp(
    lambda name, num_rows, x, slot: (_module(name).spread(x, slot, num_rows), slot),
    lambda name, num_rows, slot, grad: (_module(name).combine(grad, slot, None), None),
)


def pick(rows) -> str:
    """What `implementation=None` takes for these rows (or their shape and dtype) on this platform."""
    name = "mosaic_gpu" if _module("mosaic_gpu").why_not(rows) is None else "xla"
    _log_once(f"combine: {name} on {jax.default_backend()}")
    return name


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger("pallas_kernels").info(line)


def _named(name, rows) -> str:
    if name is None:
        return pick(rows)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"combine: unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    reason = _module(name).why_not(rows)
    if reason is not None:
        raise NotImplementedError(
            f"combine: {name} can't take {rows.dtype}{list(rows.shape)}: {reason}; implementation='xla' would"
        )
    return name


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _check(what, rows, slot) -> None:
    right = rows.ndim == slot.ndim == 2 and slot.dtype == jnp.int32 and jnp.issubdtype(rows.dtype, jnp.floating)
    if not right:
        raise ValueError(
            f"{what}: needs rows or tokens (N, D) of a floating dtype and slot (T, K) int32; got "
            f"{rows.dtype}{list(rows.shape)} and {slot.dtype}{list(slot.shape)}"
        )
