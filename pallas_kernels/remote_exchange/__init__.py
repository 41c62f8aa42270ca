"""Rows between the GPUs of one host by remote references alone: no collective library and no multicast.

    routes(experts, …) -> Routes;  send(x, routes) -> rows on their devices;  collect(rows, routes) -> sums at home

Letters: T tokens of one device, D width, S devices along the mesh axis, K experts per token, R tokens that can come:
all S·T, or those of a part of the devices. A token with several experts on one device goes there once.

`send` and `collect` are called inside a shard_map over the axis, and each is the other's gradient. With `beside`, an
even number of multiprocessors, they run on a stream of their own, in the room that expert products with as many to
spare leave them (`grouped_matmul.SPARE`); with 0 in the order of the program, on all there are, but for rows that stay
on their device, which leave `SPARE`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.remote_exchange import mosaic_gpu
from pallas_kernels.vary import vary_alike

__all__ = [
    "Routes", "arrivals", "check_tokens", "collect", "routes", "run_collect", "run_send", "send", "split", "why_not",
    "within",
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """What device `me` of S sends and what comes to it, of N neighbours: all S, or as many as a part of `split` has.

    From device me + first + j, around all S, come rows starts[j] … stops[j] − 1 of R, (N,) i32 each. source (R,) i32:
    the token, of the S·T of all devices, of each row; of a row that doesn't come S·T and more, no number twice.
    places (T, N) i32: the row of each token of `me` on device me − first − j; R or more where it has none.
    """

    places: jax.Array
    source: jax.Array
    starts: jax.Array
    stops: jax.Array
    first: int = dataclasses.field(default=0, metadata={"static": True})


def routes(experts: jax.Array, me: jax.Array, *, mine: int, devices: int, parts=()) -> Routes:
    """The routes of device `me` () i32 from everyone's choices: experts (S·T, K) i32, token by token, device by device.

    A choice of S·mine or more is none; device s holds experts s·mine … (s+1)·mine − 1. On a device its own tokens stand
    first, then those of the next device, and so on. parts: how many devices, in this order, each part has, whose rows
    begin where all tokens of those before would end. Pure arithmetic, the same on every device.
    """
    everyone, S = experts.shape[0], devices
    tokens = everyone // S
    going = jnp.any((experts // mine)[:, :, None] == jnp.arange(S, dtype=jnp.int32)[None, None], axis=1)
    nearest = _nearest_first(going.reshape(S, tokens, S))
    shares = list(_shares(parts or (S,), tokens))
    found = []
    for before, count, first, room in shares:
        row = arrivals(nearest[before : before + count].reshape(room, S))
        found.append(jnp.where(row < room, first + row, everyone).reshape(count, tokens, S))
    place = jnp.concatenate(found)

    there = jax.lax.dynamic_index_in_dim(place, me, axis=2, keepdims=False)
    neighbour = jnp.arange(S, dtype=jnp.int32)
    number = (me + neighbour)[:, None] % S * tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
    source = jnp.arange(everyone, 2 * everyone, dtype=jnp.int32)
    source = source.at[there.reshape(-1)].set(number.reshape(-1), mode="drop")
    come = jnp.sum(there < everyone, axis=1, dtype=jnp.int32)
    ends = [first + jnp.cumsum(come[before : before + count], dtype=jnp.int32) for before, count, first, _ in shares]
    stops = jnp.concatenate(ends)

    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    places = place[neighbour[None], token, (me - neighbour)[None] % S]
    return Routes(places, source, stops - come, stops)


def within(experts: jax.Array, *, mine: int, devices: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """`routes`' experts where a device has room for `rows` choices: those past it become none, S·mine. And how many of
    each device's choices these are, (S,) i32.

    They come in the order of `routes`, a token's from the first to the last.
    """
    S = devices
    here = (experts // mine)[..., None] == jnp.arange(S, dtype=jnp.int32)[None, None]
    nearest = _nearest_first(here.reshape(S, -1, S))
    late = jnp.cumsum(nearest.reshape(-1, S), axis=0, dtype=jnp.int32) > rows
    lost = _nearest_first(nearest & late.reshape(nearest.shape), back=True).any(axis=2)
    return jnp.where(lost.reshape(experts.shape), S * mine, experts), jnp.sum(lost, axis=1, dtype=jnp.int32)


def _nearest_first(a: jax.Array, back: bool = False) -> jax.Array:
    """a (S, n, S), of device i for device s -> of device s + i for device s; or the other way round."""
    return jnp.stack([jnp.roll(a[:, :, s], s if back else -s, axis=0) for s in range(a.shape[2])], axis=2)


def split(routes: Routes, parts: tuple[int, ...]) -> list[Routes]:
    """The routes of each part, made with the same `parts`, with rows numbered from 0."""
    found = []
    for before, count, first, room in _shares(parts, routes.source.shape[0] // sum(parts)):
        of = slice(before, before + count)
        places, starts, stops = (a[..., of] - first for a in (routes.places, routes.starts, routes.stops))
        found.append(Routes(places, routes.source[first : first + room], starts, stops, before))
    return found


def _shares(parts, tokens):
    """Of each part: the devices before it and of it, the rows before it and of it."""
    before = 0
    for count in parts:
        yield before, count, tokens * before, tokens * count
        before += count


def arrivals(going: jax.Array) -> jax.Array:
    """going (N, S) bool -> (N, S) i32: how many before it go to that device; N where it doesn't."""
    return jnp.where(going, jnp.cumsum(going, axis=0, dtype=jnp.int32) - 1, going.shape[0])


def send(x: jax.Array, routes: Routes, *, axis: str, beside: int = 0) -> jax.Array:
    """x (T, D) -> (R, D): the rows that these devices have for this one, `routes.source` of all tokens.

    Rows that don't come are undefined: they hold what the memory held. Differentiable in x. Raises NotImplementedError
    where `why_not` has a reason.
    """
    check_tokens("send", x, routes, axis)
    return _send(axis, beside, *vary_alike(x, routes))


def collect(y: jax.Array, routes: Routes, *, axis: str, beside: int = 0) -> jax.Array:
    """y (R, D) -> (T, D): the sum of rows places[:, j] of its devices, in float32 over j in order, in y's dtype at the
    end.

    Tokens that went nowhere come out zero. Differentiable in y; the gradient of rows that don't come is undefined, as
    `send`'s. Errors as `send`'s.
    """
    if y.shape[:1] != routes.source.shape:
        raise ValueError(f"collect: y has {y.shape[0]} rows and source {routes.source.shape[0]}; give both the same")
    _check("collect", y, routes, axis)
    return _collect(axis, beside, *vary_alike(y, routes))


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    return mosaic_gpu.why_not(rows)


def run_send(axis, beside, x, routes, slot=None, rows=None):
    """`mosaic_gpu.send` by these routes, on a stream of its own if it has multiprocessors of its own. A device's own
    tokens alone are no exchange: nobody waits for anybody."""
    source = routes.source
    if _own(routes):
        source, axis = source - jax.lax.axis_index(axis) * x.shape[0], None
    run = functools.partial(mosaic_gpu.send, axis=axis, first=routes.first, beside=beside, rows=rows)
    args = x, source, routes.starts, routes.stops, *(() if slot is None else (slot,))
    return mosaic_gpu.on_its_stream(run)(*args) if beside else run(*args)


def run_collect(axis, beside, parts, more=None, dtype=None):
    """`mosaic_gpu.collect` of parts of (y, routes), likewise."""
    axis = None if all(_own(routes) for _, routes in parts) else axis

    def run(arrays, more):
        whole = [(y, places, routes.first) for (y, places), (_, routes) in zip(arrays, parts, strict=True)]
        return mosaic_gpu.collect(whole, more, axis=axis, beside=beside, dtype=dtype)

    args = [(y, routes.places) for y, routes in parts], more
    return mosaic_gpu.on_its_stream(run)(*args) if beside else run(*args)


def _own(routes) -> bool:
    return routes.first == 0 and routes.starts.shape == (1,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(axis, beside, x, routes):
    return run_send(axis, beside, x, routes)


_send.defvjp(
    lambda axis, beside, x, routes: (run_send(axis, beside, x, routes), routes),
    lambda axis, beside, routes, grad: (run_collect(axis, beside, [(grad, routes)]), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect(axis, beside, y, routes):
    return run_collect(axis, beside, [(y, routes)])


_collect.defvjp(
    lambda axis, beside, y, routes: (run_collect(axis, beside, [(y, routes)]), routes),
    lambda axis, beside, routes, grad: (run_send(axis, beside, grad, routes), None),
)


def check_tokens(what, x, routes, axis) -> None:
    """ValueError or NotImplementedError unless tokens x (T, D) can go by these routes."""
    if x.shape[:1] != routes.places.shape[:1]:
        raise ValueError(f"{what}: x has {x.shape[0]} tokens and places {routes.places.shape[0]}; give both the same")
    _check(what, x, routes, axis)


def _check(what, rows, routes, axis) -> None:
    S, places, starts = jax.lax.axis_size(axis), routes.places.shape, routes.starts.shape
    if rows.ndim != 2 or places[1:] != starts or starts[0] > S:
        raise ValueError(
            f"{what}: needs (N, D) and places of at most {S} devices along axis '{axis}'; got {list(rows.shape)}, "
            f"{list(places)} and starts {list(starts)}"
        )
    reason = why_not(rows)
    if reason is not None:
        raise NotImplementedError(f"{what}: can't move {rows.dtype}{list(rows.shape)} by remote references: {reason}")
