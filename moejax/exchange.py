"""Ways to bring rows to the devices that hold their experts, and results back; called inside `expert_parallel`'s
shard_map, where the `expert` axis is manual.

Letters: T tokens of one device, D model width, E experts, S devices on the expert axis.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.errors import UserError
from moejax.routing import ExpertChoice, Routing

AXIS = "expert"
NAMES = ("gather",)


def pick(name: str | None) -> str:
    """The exchange that runs for `model.moe.exchange` = name; UserError for one that doesn't exist."""
    if name is None:
        _say_pick(jax.default_backend())
        return "gather"
    if name not in NAMES:
        raise UserError(
            f"config.model.moe.exchange={name!r} does not exist; there is {', '.join(NAMES)}: choose it or leave it out"
        )
    return name


@functools.cache
def _say_pick(platform: str) -> None:
    logging.getLogger(__name__).info("exchange of expert rows: gather, picked on %s", platform)


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
