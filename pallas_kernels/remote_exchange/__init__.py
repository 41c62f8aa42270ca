"""Rows between the GPUs of one host by remote references alone: no collective library and no multicast.

    routes(experts, …) -> Routes;  send(x, routes) -> rows on their devices;  collect(rows, routes) -> sums at home

Letters: T tokens of one device, D width, S devices along the mesh axis, K experts per token, R rows that a device has
room for. A token with several experts on one device goes there once.

`send` and `collect` are called inside a shard_map over the axis, and each is the other's gradient. With `beside`, a
number of multiprocessors, they run on a stream of their own, in the room that expert products with as many to spare
leave them (`grouped_matmul.SPARE`); 0 takes all there are, in the order of the program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.combine import combine
from pallas_kernels.remote_exchange import mosaic_gpu
from pallas_kernels.vary import vary_alike

__all__ = ["Routes", "arrivals", "collect", "combine_collect", "routes", "send", "send_spread", "why_not"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """What device `me` of S sends and what comes to it.

    places (T, S) i32: the row of each of its tokens on every device, R where it has none. source (R,) i32: the token,
    of the S·T of all devices, of each row that comes, ascending; past the number that came, S·T and more, no number
    twice. starts (S + 1,) i32: how many of these rows are tokens of the devices before each, and of all. overflow ()
    i32: its tokens' choices that found no room.
    """

    places: jax.Array
    source: jax.Array
    starts: jax.Array
    overflow: jax.Array


def routes(experts: jax.Array, me: jax.Array, *, mine: int, devices: int, rows: int) -> Routes:
    """The routes of device `me` () i32 from everyone's choices: experts (S·T, K) i32, token by token, device by device.

    A choice of S·mine or more is none; device s holds experts s·mine … (s+1)·mine − 1. Rows stand on their device in
    the order of these tokens; those past `rows` = R find no room. Pure arithmetic, the same on every device.
    """
    everyone = experts.shape[0]
    tokens = everyone // devices
    going = jnp.any((experts // mine)[:, :, None] == jnp.arange(devices, dtype=jnp.int32)[None, None], axis=1)
    place = arrivals(going, rows)
    there = jax.lax.dynamic_slice_in_dim(place, me, 1, axis=1)[:, 0]
    source = jnp.arange(everyone, everyone + rows, dtype=jnp.int32)
    source = source.at[there].set(jnp.arange(everyone, dtype=jnp.int32), mode="drop")
    come = jnp.sum(there.reshape(devices, tokens) < rows, axis=1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros_like(come[:1]), jnp.cumsum(come, dtype=jnp.int32)])
    own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=me * tokens, slice_size=tokens)
    places, chosen = own(place), own(experts)
    device = jnp.minimum(chosen // mine, devices - 1)
    lost = (chosen < devices * mine) & (jnp.take_along_axis(places, device, axis=1) == rows)
    return Routes(places, source, starts, jnp.sum(lost, dtype=jnp.int32))


def arrivals(going: jax.Array, rows: int) -> jax.Array:
    """going (N, S) bool -> (N, S) i32: how many tokens before it go to that device; `rows` where it doesn't."""
    before = jnp.cumsum(going, axis=0, dtype=jnp.int32) - 1
    return jnp.where(going & (before < rows), before, rows)


def send(x: jax.Array, routes: Routes, *, axis: str, beside: int = 0) -> jax.Array:
    """x (T, D) -> (R, D): the rows that all devices have for this one, `routes.source` of all tokens.

    Rows past those are undefined: they hold what the memory held. Differentiable in x. Raises NotImplementedError where
    `why_not` has a reason.
    """
    _check_tokens("send", x, routes)
    _check("send", x, routes, axis)
    return _send(axis, beside, *vary_alike(x, routes))


def send_spread(x: jax.Array, routes: Routes, slot: jax.Array, *, axis: str, back_beside: int = 0):
    """x (T, D), slot (R, K) i32 -> rows (R·K, D), stand_in (R, D): `combine.spread` of what `send` gives, as it comes.

    Row r of `send` is row slot[r, k] here, for every k where that is below R·K; other rows are undefined. The gradient
    of x is taken from that of stand_in, a `collect` beside what `back_beside` says: whoever uses the rows gives it the
    sums that `spread`'s gradient would (`gated_ffn`), and rows none. Errors as `send`'s.
    """
    _check_tokens("send_spread", x, routes)
    _check("send_spread", x, routes, axis, slot)
    return _send_spread(axis, back_beside, *vary_alike(x, slot, routes))


def combine_collect(rows: jax.Array, routes: Routes, slot: jax.Array, *, axis: str) -> jax.Array:
    """rows (R·K, D), slot (R, K) i32 -> (T, D): `collect` of `combine.combine`(rows, slot, None).

    Differentiable in rows, by `send_spread`'s rows: undefined where no slot points. Errors as `send`'s.
    """
    if rows.shape[0] != slot.size:
        raise ValueError(f"combine_collect: {rows.shape[0]} rows and {slot.size} places in slot; give both the same")
    _check("combine_collect", rows, routes, axis, slot)
    return _combine_collect(axis, *vary_alike(rows, slot, routes))


def collect(y: jax.Array, routes: Routes, *, axis: str, beside: int = 0) -> jax.Array:
    """y (R, D) -> (T, D): Σ_s y of device s [places[:, s]], in float32 over s in order, in y's dtype at the end.

    Tokens that went nowhere come out zero. Differentiable in y; the gradient of rows past those that came is undefined,
    as `send`'s. Errors as `send`'s.
    """
    if y.shape[:1] != routes.source.shape:
        raise ValueError(f"collect: y has {y.shape[0]} rows and source {routes.source.shape[0]}; give both the same")
    _check("collect", y, routes, axis)
    return _collect(axis, beside, *vary_alike(y, routes))


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    return mosaic_gpu.why_not(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send_spread(axis, back_beside, x, slot, routes):
    rows = mosaic_gpu.send(x, routes.source, routes.starts, slot, axis=axis)
    return rows, vary_alike(jnp.zeros((slot.shape[0], x.shape[1]), x.dtype), x)[0]


_send_spread.defvjp(
    lambda axis, back_beside, x, slot, routes: (_send_spread(axis, back_beside, x, slot, routes), routes),
    lambda axis, back_beside, routes, grads: (
        _run(mosaic_gpu.collect, axis, back_beside, grads[1], routes.places), None, None
    ),
)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_collect(axis, rows, slot, routes):
    with jax.named_scope("combine"):
        sums = combine(rows, slot, None)
    return mosaic_gpu.collect(sums, routes.places, axis=axis)


_combine_collect.defvjp(
    lambda axis, rows, slot, routes: (_combine_collect(axis, rows, slot, routes), (slot, routes)),
    lambda axis, kept, grad: (mosaic_gpu.send(grad, kept[1].source, kept[1].starts, kept[0], axis=axis), None, None),
)


def _run(function, axis, beside, *args):
    run = functools.partial(function, axis=axis, beside=beside)
    return mosaic_gpu.on_its_stream(run)(*args) if beside else run(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(axis, beside, x, routes):
    return _run(mosaic_gpu.send, axis, beside, x, routes.source, routes.starts)


_send.defvjp(
    lambda axis, beside, x, routes: (_send(axis, beside, x, routes), routes),
    lambda axis, beside, routes, grad: (_run(mosaic_gpu.collect, axis, beside, grad, routes.places), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect(axis, beside, y, routes):
    return _run(mosaic_gpu.collect, axis, beside, y, routes.places)


_collect.defvjp(
    lambda axis, beside, y, routes: (_collect(axis, beside, y, routes), routes),
    lambda axis, beside, routes, grad: (_run(mosaic_gpu.send, axis, beside, grad, routes.source, routes.starts), None),
)


def _check_tokens(what, x, routes) -> None:
    if x.shape[:1] != routes.places.shape[:1]:
        raise ValueError(f"{what}: x has {x.shape[0]} tokens and places {routes.places.shape[0]}; give both the same")


def _check(what, rows, routes, axis, slot=None) -> None:
    if rows.ndim != 2 or routes.places.shape[1] != jax.lax.axis_size(axis):
        raise ValueError(
            f"{what}: needs (N, D) and places (T, {jax.lax.axis_size(axis)}) along axis '{axis}'; got "
            f"{list(rows.shape)} and {list(routes.places.shape)}"
        )
    if slot is not None and slot.shape[:1] != routes.source.shape:
        come = routes.source.shape[0]
        raise ValueError(f"{what}: slot has {slot.shape[0]} rows and source {come}; give both the same")
    reason = why_not(rows)
    if reason is not None:
        raise NotImplementedError(f"{what}: can't move {rows.dtype}{list(rows.shape)} by remote references: {reason}")
