"""Ways to bring rows to the devices that hold their experts, and results back; called inside `expert_parallel`'s
shard_map, where the `expert` axis is manual.

`gather` brings all tokens to all devices. `all_to_all` sends each choice's row to its expert's device, in equal pieces:
`Parcels` says which row stands where; a token with several experts on one device is sent once for each. With `remote`
each device reads the row of every token that its experts are chosen by, once, where it stands in another's memory
(`pallas_kernels.remote_exchange`). `ragged` is in ragged.py.

Letters: T tokens of one device, D model width, E experts, K experts per token, S devices on the expert axis, C rows
from one device to another, R rows that come to one device.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moejax import dispatch, sharding
from moejax.errors import UserError
from moejax.routing import ExpertChoice, Routing
from moejax.routing_select import rank_in_expert
from pallas_kernels import remote_exchange

AXIS = "expert"
NAMES = ("gather", "all_to_all", "ragged", "remote")


def pick(name: str | None, token_choice: bool = True, rows: Any = None) -> str:
    """The exchange that runs for `model.moe.exchange` = name; UserError for one that doesn't exist.

    None is, of those without a bound, so that nothing is dropped: where tokens choose experts `ragged` on TPU, and
    `remote` on a host's linked GPUs where it takes `rows` (…, D), a shape and dtype; else `gather`.
    """
    if name is None:
        platform = sharding.platform()
        name = "gather"
        if token_choice and platform == "tpu":
            name = "ragged"
        if token_choice and platform == "gpu" and rows is not None and _linked() and why_not_remote(rows) is None:
            name = "remote"
        _say_pick(name, platform)
    if name not in NAMES:
        raise UserError(
            f"config.model.moe.exchange={name!r} does not exist; there is {', '.join(NAMES)}: choose it or leave it out"
        )
    return name


def _linked() -> bool:
    """Whether every GPU of a host reads every other one's memory over NVLink; boards and parts of a GPU may not."""
    return not re.search("PCIe|NVL|MIG", jax.devices()[0].device_kind)


@functools.cache
def _say_pick(name: str, platform: str) -> None:
    logging.getLogger(__name__).info("exchange of expert rows: %s, picked on %s", name, platform)


def check_experts(num_experts: int, devices: int) -> None:
    """UserError unless E divides over S devices."""
    if num_experts % devices:
        raise UserError(
            f"{num_experts} experts can't be shared evenly by the {devices} devices of mesh axis 'expert'; "
            "make num_experts a multiple of mesh.expert"
        )


def gather(tree: Any) -> Any:
    """Arrays split on their first axis over the expert axis, whole on each of its devices: (n, …) -> (S·n, …).

    The gradient is a sum over the devices that leaves each with its part.
    """
    with jax.named_scope("exchange"):
        return jax.tree.map(lambda a: lax.all_gather(a, AXIS, tiled=True), tree)


def sum_back(y: jax.Array) -> jax.Array:
    """(S·T, D) float32 sums over this device's experts -> (T, D): this device's tokens, summed over all devices."""
    with jax.named_scope("exchange"):
        return lax.psum_scatter(y, AXIS, tiled=True)


def of_my_experts(decision: Routing | ExpertChoice, mine: int) -> Routing | ExpertChoice:
    """The part of a flat decision that falls on this device's `mine` = E/S experts, which are renumbered from 0."""
    return local_experts(decision, lax.axis_index(AXIS) * mine, mine)


def local_experts(decision: Routing | ExpertChoice, first: jax.Array, mine: int) -> Routing | ExpertChoice:
    """The part of a flat decision on experts first … first + mine − 1, renumbered from 0; other choices aren't kept."""
    if isinstance(decision, ExpertChoice):
        cut: Callable = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=mine)
        return dataclasses.replace(decision, tokens=cut(decision.tokens), weights=cut(decision.weights))
    experts = decision.experts - first.astype(decision.experts.dtype)
    here = (experts >= 0) & (experts < mine)
    return dataclasses.replace(decision, experts=jnp.where(here, experts, 0), keep=decision.keep & here)


# ---- all_to_all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parcels:
    """The S·C places for rows that leave a device, C for each of S devices, in the order of devices, then of choices.

    plan: rows of the device's tokens in these places (`dispatch.gather`) and the way back (`dispatch.combine`); every
    place counts as a row, an empty one has weight 0. expert (S·C,) i32: the expert's number on the device that the row
    goes to, E/S in an empty place. overflow () i32: choices that found no place.
    """

    plan: dispatch.Plan
    expert: jax.Array
    overflow: jax.Array


def rows_per_pair(factor: float | None, tokens: int, experts_per_token: int, mine: int, devices: int) -> int:
    """C = ceil(factor · T · K / S), at most T · min(K, E/S): what a device with `mine` = E/S experts can be sent, and
    what None gives. UserError where the factor leaves less than one row."""
    choices = tokens * experts_per_token
    of = f"a pair of devices, of {tokens} tokens · {experts_per_token} experts each on {devices} devices"
    return _bounded(factor, choices / devices, tokens * min(experts_per_token, mine), of)


def rows_received(factor: float | None, tokens: int, experts_per_token: int, mine: int, devices: int) -> int:
    """R = ceil(factor · T · K), at most S · T · min(K, E/S): what a device with `mine` = E/S experts can be sent, and
    what None gives. UserError where the factor leaves less than one row."""
    of = f"a device, of {tokens} tokens · {experts_per_token} experts each"
    most = devices * tokens * min(experts_per_token, mine)
    return _bounded(factor, tokens * experts_per_token, most, of)


def _bounded(factor: float | None, share: float, most: int, of: str) -> int:
    if factor is None:
        return most
    rows = factor * share
    if rows < 1:
        raise UserError(
            f"config.model.moe.exchange_factor={factor} leaves {rows:.3g} rows for {of}: give at least "
            f"{1 / share:.3g}, or leave it out"
        )
    # the small subtraction keeps 1.1 · 100 / 10 = 11.000000000000002 at 11
    return min(math.ceil(rows - 1e-9), most)


def pack(decision: Routing, mine: int, devices: int, rows: int) -> Parcels:
    """Places for the choices of a flat decision (T, K), `rows` = C for each device; earlier tokens have precedence."""
    T, K = decision.experts.shape
    places = devices * rows
    expert, keep = decision.experts.reshape(T * K), decision.keep.reshape(T * K)
    device = expert // mine
    rank = rank_in_expert(device, keep, devices)
    fits = keep & (rank < rows)
    place = jnp.where(fits, device * rows + rank, places)
    choice = jnp.full((places,), T * K, jnp.int32).at[place].set(jnp.arange(T * K, dtype=jnp.int32), mode="drop")
    used = choice < T * K
    choice = jnp.where(used, choice, 0)
    plan = dispatch.Plan(
        token=choice // K,
        weight=jnp.where(used, decision.weights.astype(jnp.float32).reshape(T * K)[choice], 0),
        group_sizes=jnp.full((devices,), rows, jnp.int32),
        slot=place.reshape(T, K),
    )
    return Parcels(plan, jnp.where(used, expert[choice] % mine, mine), jnp.sum(keep & ~fits, dtype=jnp.int32))


def swap(a: jax.Array) -> jax.Array:
    """(S·C, …) -> (S·C, …): piece i goes to device i, and the piece from device i comes to place i. Its own inverse
    and its own gradient."""
    with jax.named_scope("exchange"):
        return lax.all_to_all(a, AXIS, split_axis=0, concat_axis=0, tiled=True)


def arrived(expert: jax.Array, mine: int) -> Routing:
    """The rows that came, as tokens of one choice each: expert (R,) i32 on this device, `mine` where there is none."""
    ones = jnp.ones((expert.shape[0], 1), jnp.float32)
    there = (expert < mine)[:, None]
    return Routing(jnp.where(there, expert[:, None], 0), ones, ones, there)


# ---- remote


def why_not_remote(rows: Any) -> str | None:
    """None where rows (…, D), which may be a shape and dtype alone, can go by remote references here; else the need."""
    return remote_exchange.why_not(jax.ShapeDtypeStruct((math.prod(rows.shape[:-1]), rows.shape[-1]), rows.dtype))


def check_remote(x: Any) -> None:
    """UserError unless x (…, D), which may be a shape and dtype alone, can go by remote references here."""
    reason = why_not_remote(x)
    if reason is not None:
        raise UserError(
            f"config.model.moe.exchange='remote' can't move {x.dtype} rows of width {x.shape[-1]} on "
            f"{jax.default_backend()}: {reason}; give 'gather' or 'all_to_all'"
        )


def routes(
    decision: Routing, mine: int, devices: int, factor: float | None, parts: tuple[int, ...] = ()
) -> tuple[remote_exchange.Routes, Routing, jax.Array]:
    """Where this device's tokens go, the choices (S·T, K) of those that come, on its experts renumbered from 0, and how
    many of its tokens' choices found no room among the `rows_received` of a device, () i32.

    Choices travel ahead, all to all devices: 8 bytes each where a row has 2·D; every count and place follows from them.
    Gradients reach decision.weights (T, K).
    """
    none = devices * mine
    chosen = jnp.where(decision.keep, decision.experts, none).astype(jnp.int32)
    experts, weights = gather((chosen, decision.weights.astype(jnp.float32)))
    me, lost = lax.axis_index(AXIS), jnp.int32(0)
    if factor is not None:
        T, K = decision.experts.shape
        rows = rows_received(factor, T, K, mine, devices)
        experts, losses = remote_exchange.within(experts, mine=mine, devices=devices, rows=rows)
        lost = losses[me]
    found = remote_exchange.routes(experts, me, mine=mine, devices=devices, parts=parts)
    found = jax.tree.map(lambda a: checkpoint_name(a, "routing"), found)

    def came(a, fill):
        return a.at[found.source].get(mode="fill", fill_value=fill, unique_indices=True)

    local = came(experts, none) - me * mine
    here = (local >= 0) & (local < mine)
    scores = jnp.ones((len(experts), 1), jnp.float32)
    return found, Routing(jnp.where(here, local, 0), came(weights, 0.0), scores, here), lost
