"""Exchange of rows by `lax.ragged_all_to_all`, for TPU: each row goes once, into its place among its expert's rows.

A device sorts its rows by expert, as for itself alone, and sends each expert's part of them. All devices know all
counts ahead (`Places`), so that what comes is sorted by expert as it lands; results go back the same way.

Letters: T tokens of one device, D model width, E experts, K experts per token, S devices on the expert axis, R rows
that come to one device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from moejax import sharding
from moejax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the parts of a device's rows go, and where those that come to it stand; all i32.

    Parts that leave, one of each expert (E,): `home`, their first rows here; `sent`, how many rows; `there`, their
    first rows on the expert's device. Parts that come (E,), of each device in turn one for each of my E/S experts:
    `here`, `came`, and their first rows at home, `back`. group_sizes (E/S,): rows of my experts. overflow (): rows of
    this device that are not sent, for want of room.
    """

    home: jax.Array
    sent: jax.Array
    there: jax.Array
    here: jax.Array
    came: jax.Array
    back: jax.Array
    group_sizes: jax.Array
    overflow: jax.Array


def places(counts: jax.Array, me: jax.Array | int, rows: int) -> Places:
    """The places of device `me`, from counts (S, E) i32, the rows of each device for each expert, with R = rows.

    A device's rows stand by expert, an expert's by the device that they come from; what lies past R isn't sent, the
    last rows of a part first.
    """
    S, E = counts.shape
    mine = E // S
    home = jnp.cumsum(counts, axis=1) - counts
    parts = counts.reshape(S, S, mine).transpose(1, 2, 0).reshape(S, mine * S)  # by device, its expert, their source
    start = jnp.cumsum(parts, axis=1) - parts
    kept = jnp.clip(rows - start, 0, parts)

    def by_source(a):  # (S, mine · S) -> (S, E), as counts
        return a.reshape(S, mine, S).transpose(2, 0, 1).reshape(S, E)

    there, sent = by_source(jnp.minimum(start, rows)), by_source(kept)

    def my_experts(a):
        return lax.dynamic_slice_in_dim(a, me * mine, mine, axis=1)

    came = my_experts(sent)
    return Places(
        home=home[me],
        sent=sent[me],
        there=there[me],
        here=my_experts(there).reshape(E),
        came=came.reshape(E),
        back=my_experts(home).reshape(E),
        group_sizes=jnp.sum(came, axis=0, dtype=jnp.int32),
        overflow=jnp.sum(counts[me] - sent[me], dtype=jnp.int32),
    )


def check_platform() -> None:
    """UserError where XLA has no ragged_all_to_all."""
    if sharding.platform() == "cpu":
        raise UserError(
            "config.model.moe.exchange='ragged' is XLA's ragged_all_to_all, which cpu doesn't have: "
            "give 'gather' or 'all_to_all', or leave it out"
        )


def send(rows: jax.Array, places: Places, room: int, axis: str) -> jax.Array:
    """Rows (N, D) sorted by expert -> the rows (R, D) of all devices for my experts, sorted by expert, R = room.

    Rows past those that came are 0. Its gradient is `fetch`.
    """
    return _send(room, axis, rows, places)


def fetch(rows: jax.Array, places: Places, room: int, axis: str) -> jax.Array:
    """`send`'s way back: (R, D) -> (N, D), N = room; 0 for rows that weren't sent."""
    return _fetch(room, axis, rows, places)


# ragged_all_to_all has a gradient of its own, which keeps an output to write into; both ways are known here.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(room, axis, rows, places):
    return move(rows, room, places.home, places.sent, places.there, places.came, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fetch(room, axis, rows, places):
    return move(rows, room, places.here, places.came, places.back, places.sent, axis)


def _forward(function, room, axis, rows, places):
    return function(room, axis, rows, places), (rows.shape[0], places)


def _backward(function, room, axis, residuals, grad):
    count, places = residuals
    return function(count, axis, grad, places), None


_send.defvjp(functools.partial(_forward, _send), functools.partial(_backward, _fetch))
_fetch.defvjp(functools.partial(_forward, _fetch), functools.partial(_backward, _send))


def move(rows, room, first, sizes, to, coming, axis):
    """(N, D) -> (room, D): the part i of rows, `sizes`[i] from `first`[i], comes to stand at `to`[i] on device i·S // E
    of `axis`; `coming`: sizes of the parts that come here. Zeros elsewhere."""
    empty = jnp.zeros((room, rows.shape[1]), rows.dtype)
    varying = tuple(sorted(jax.typeof(rows).manual_axis_type.varying))
    empty = lax.pcast(empty, varying, to="varying")
    return lax.ragged_all_to_all(rows, empty, first, sizes, to, coming, axis_name=axis)
