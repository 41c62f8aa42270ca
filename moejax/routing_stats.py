"""What a router does, measured: `tallies` are sums over tokens, `summarise` turns them into the figures of a report.

Sums can be added over microbatches, layers' groups and steps before they are summarised, and, taken outside
`shard_map`, span all devices. Letters: T tokens (any leading axes), E experts, K experts per token, C capacity.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.balance import expert_counts
from moejax.routing import ExpertChoice, Routing, chosen
from moejax.routing_select import multi_hot, spread

Array = jax.Array


def tallies(decision: Routing | ExpertChoice, mask: Array, overflow: Array | None = None) -> dict[str, Array]:
    """Additive counts of one layer's decision over unmasked tokens.

    For a Routing, whatever its leading axes (…, K), mask (…) bool:
      selected (E,) i32: choices before capacity, what the bias rule and the balance loss count;
      dropped () i32: choices lost to capacity; assignments () i32: T·K, those that a router gave up among them;
      gate (E,) f32: the gates of the kept choices, summed;
      together (E, E) i32: tokens that chose both i and j (the diagonal: `selected`).
    For an ExpertChoice of tokens (…, E, C) in groups, mask (…, T_group), the same, where no token has K choices of its
    own: there a token is one assignment, `dropped` if no expert took it, and T of them are the `assignments`.
    overflow () i32: kept choices that the exchange between devices had no room for; passed on if given.
    """
    extra = {} if overflow is None else {"overflow": overflow}
    if isinstance(decision, ExpertChoice):
        return _expert_choice_tallies(decision, mask) | extra
    num_experts = decision.scores.shape[-1]
    choices = chosen(decision, mask)
    kept = choices & decision.keep
    gates = spread(jnp.where(kept, decision.weights, 0.0), decision.experts, num_experts)
    return {
        "selected": expert_counts(decision.experts, choices, num_experts),
        "dropped": jnp.sum(choices & ~kept, dtype=jnp.int32),
        "assignments": jnp.sum(mask, dtype=jnp.int32) * choices.shape[-1],
        "gate": jnp.sum(gates, axis=tuple(range(mask.ndim))),
        "together": _together(multi_hot(decision.experts, choices, num_experts)),
    } | extra


def _expert_choice_tallies(decision: ExpertChoice, mask: Array) -> dict[str, Array]:
    num_experts, capacity = decision.tokens.shape[-2:]
    used = decision.weights != 0

    def one_group(tokens, used):
        empty = jnp.zeros((num_experts, mask.shape[-1]), bool)
        return empty.at[jnp.arange(num_experts)[:, None], tokens].set(used).T

    taken = jax.vmap(one_group)(
        decision.tokens.reshape(-1, num_experts, capacity), used.reshape(-1, num_experts, capacity)
    )
    taken = taken.reshape(*mask.shape, num_experts) & mask[..., None]
    groups = tuple(range(mask.ndim - 1))
    return {
        "selected": jnp.sum(taken, axis=(*groups, mask.ndim - 1), dtype=jnp.int32),
        "dropped": jnp.sum(mask & ~jnp.any(taken, axis=-1), dtype=jnp.int32),
        "assignments": jnp.sum(mask, dtype=jnp.int32),
        "gate": jnp.sum(decision.weights, axis=(*groups, -1)),
        "together": _together(taken),
    }


def _together(hits: Array) -> Array:
    """(E, E) i32: how many rows of hits (…, E) bool have both; exact up to 2²⁴ per pair and call."""
    rows = hits.reshape(-1, hits.shape[-1]).astype(jnp.float32)
    return jnp.round(rows.T @ rows).astype(jnp.int32)


def summarise(tallies: Mapping[str, Array]) -> dict[str, Array]:
    """Figures from (sums of) `tallies`, float32; a leading axis, such as layers, is kept.

    load (…, E): each expert's share of the choices, before capacity; 0 for all when nothing was routed.
    max_violation (…): MaxVio = (max load − mean load) / mean load, before capacity (Wang et al. 2024, eq. 4); 0 when
    nothing was routed.
    entropy (…): of the load, over ln E: 1 when uniform, 0 when one expert has all.
    dropped_fraction (…): dropped / assignments of `tallies`: of T·K choices those lost to capacity; in expert choice,
    of the tokens those that no expert took.
    overflow_fraction (…): overflow / assignments, where `tallies` has one; its choices are in all other figures.
    gate_share (…, E): each expert's share of the summed gates, after capacity.
    coactivation (…, E, E): of the tokens that chose i, the share that also chose j; the diagonal is 1 where i is used.
    """
    selected = tallies["selected"].astype(jnp.float32)
    num_experts = selected.shape[-1]
    load = selected / jnp.maximum(jnp.sum(selected, axis=-1, keepdims=True), 1.0)
    entropy = -jnp.sum(jnp.where(load > 0, load * jnp.log(jnp.where(load > 0, load, 1.0)), 0.0), axis=-1)
    gate = tallies["gate"]
    used = jnp.sum(selected, axis=-1) > 0
    assignments = jnp.maximum(tallies["assignments"], 1).astype(jnp.float32)
    figures = {
        "load": load,
        "max_violation": jnp.where(used, jnp.max(load, axis=-1) * num_experts - 1, 0.0),
        "entropy": entropy / np.float32(np.log(max(num_experts, 2))),
        "dropped_fraction": tallies["dropped"].astype(jnp.float32) / assignments,
        "gate_share": gate / jnp.maximum(jnp.sum(gate, axis=-1, keepdims=True), 1e-20),
        "coactivation": tallies["together"].astype(jnp.float32) / jnp.maximum(selected, 1.0)[..., None],
    }
    if "overflow" in tallies:
        figures["overflow_fraction"] = tallies["overflow"].astype(jnp.float32) / assignments
    return figures


def dead_experts(selected: Array | np.ndarray) -> np.ndarray:
    """(…, E) bool: experts without a token, from `selected` summed over a window of steps; none if all are 0.

    metrics.jsonl counts them over one logged line, the warning of `dead_line` over several.
    """
    selected = np.asarray(selected)
    return (selected == 0) & (selected.sum(axis=-1, keepdims=True) > 0)


def dead_line(selected: Array | np.ndarray, steps: int) -> str | None:
    """One line that names the experts without a token in `steps` steps, or None. selected (layers, E), summed."""
    dead = dead_experts(selected)
    if not dead.any():
        return None
    layers = [
        f"layer {layer}: {', '.join(map(str, np.flatnonzero(row)))}" for layer, row in enumerate(dead) if row.any()
    ]
    count = int(dead.sum())
    noun = "expert" if count == 1 else "experts"
    return f"warning: {count} dead {noun}, without a token in the last {steps} steps ({'; '.join(layers)})"
