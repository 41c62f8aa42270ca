"""Where the rows of each expert are computed: the one shard_map of the MoE layer.

Each device sorts the rows of its own part of the batch and runs them through all experts, whose weights are
gathered for it (data parallel and FSDP). On a mesh with an expert axis each device keeps its E/S experts and tokens
come to them (`exchange`); on one with a tensor axis it keeps a part of their hidden width. Means and counts over
tokens stay outside, so they are global.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moejax import dispatch, exchange, exchanged, few_tokens, ragged, routing, sharding
from moejax.errors import UserError
from moejax.work import Work, sorted_mixture


def mixture(x: jax.Array, decision, weights: dict[str, jax.Array], **options) -> jax.Array:
    """`mixture_and_overflow` without the overflow."""
    return mixture_and_overflow(x, decision, weights, **options)[0]


def mixture_and_overflow(
    x: jax.Array,
    decision,
    weights: dict[str, jax.Array],
    *,
    num_experts: int,
    implementation: str | None = None,
    way: str | None = None,
    factor: float | None = None,
    chunks: int = 1,
    apply: Callable | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Σ_k weight · expert(x) for x (B, L, D) and a decision with leading axis B; (B, L, D) in x's dtype.

    `decision` holds either Routing fields (B, L, K) or ExpertChoice fields (B, E, C) with token positions inside the
    row; one leading group that spans the batch, (1, E, C), runs without shard_map. `weights`: gate, up (E, D, F) and
    down (E, F, D). `way` names the exchange (`model.moe.exchange`) and `factor` bounds its pieces
    (`exchange.rows_per_pair`), `chunks` in how many equal parts a device's tokens are exchanged and bounded. The second
    value is the number of choices, () i32 over all devices, that found no room in them and are missing from the result;
    None where nothing is exchanged.

    `apply(rows (R, D), weights, group_sizes)` -> (R, D), one function for all layers, takes the place of
    `experts.gated_ffn`. It may use further weights gate_bias, up_bias (E, F) and down_bias (E, D), and must be linear
    in down and down_bias.

    Raises UserError where E does not divide over the expert axis, for a bound below one row, for expert choice by
    another way than gather, for remote off the GPUs of one host, for ragged on CPU, and for chunks that don't divide.
    """
    run = functools.partial(_mixture, num_experts=num_experts, work=Work(implementation, apply))
    axes = sharding.batch_axes()
    groups = jax.tree.leaves(decision)[0].shape[0]
    if groups != x.shape[0]:
        return run(x, decision, weights)
    if exchange.AXIS in axes:
        exchange.check_experts(num_experts, jax.sharding.get_abstract_mesh().shape[exchange.AXIS])
        way = exchange.pick(way, isinstance(decision, routing.Routing), x)
        if way != "gather" and not isinstance(decision, routing.Routing):
            raise UserError(f"config.model.moe.exchange={way!r} can't move rows of expert choice: give 'gather'")
        if way == "remote":
            exchange.check_remote(x)
        if way == "ragged":
            ragged.check_platform()
        run = functools.partial(run, way=way, factor=factor, chunks=chunks)
    run = functools.partial(run, layout=layout_here())
    rows = PartitionSpec(axes or None)
    held = {name: weight_spec(name) for name in weights}
    everywhere = sharding.on_each_device(run, in_specs=(rows, rows, held), out_specs=(rows, rows))
    y, overflow = everywhere(x, decision, weights)
    return y, overflow if overflow is None else jnp.sum(overflow, dtype=jnp.int32)


WEIGHTS = {
    "gate": ("experts", "embed", "expert_mlp"),
    "up": ("experts", "embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "embed"),
    "gate_bias": ("experts", "expert_mlp"),
    "up_bias": ("experts", "expert_mlp"),
    "down_bias": ("experts", "embed"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How experts lie over the mesh in use: `copied` along these axes; split along `width_on` by model width, which
    each use gathers; along `hidden_on` by hidden width, where each device's results are terms of a sum."""

    copied: tuple[str, ...] = ()
    width_on: str | None = None
    hidden_on: str | None = None


def layout_here() -> Layout:
    data, width_on, hidden_on = (axis if sharding.splits(axis) else None for axis in ("data", "fsdp", "tensor"))
    return Layout((data,) if data else (), width_on, hidden_on)


def weight_spec(name: str) -> PartitionSpec:
    """Of gate and up (E, D, F), down (E, F, D) and biases, along axes of more than one device."""
    layout, experts_on = layout_here(), exchange.AXIS if sharding.splits(exchange.AXIS) else None
    named = {"experts": experts_on, "embed": layout.width_on, "expert_mlp": layout.hidden_on}
    return PartitionSpec(*(named[axis] for axis in WEIGHTS[name]))


_STATIC = ("num_experts", "work", "way", "factor", "chunks", "layout")


@functools.partial(jax.jit, static_argnames=_STATIC)  # traced and lowered once, not in each of a model's layers
def _mixture(x, decision, weights, *, num_experts, work, way=None, factor=None, chunks=1, layout=Layout()):
    """One device's part of x, decision and weights, the latter as `layout` says; overflow (1,) i32 or None."""

    def run(x, decision, weights):
        if layout.hidden_on:
            y, overflow = parts(lax.pcast(x, layout.hidden_on, to="varying"), decision, weights)
            return lax.psum(y, layout.hidden_on), overflow
        return parts(x, decision, weights)

    def parts(x, decision, weights):
        weights = {name: whole(name, weight) for name, weight in weights.items()}
        if way is not None:
            options = {"num_experts": num_experts, "work": work, "way": way, "factor": factor, "chunks": chunks}
            return exchanged.mixture(x, decision, weights, **options)
        return _local(x, decision, weights, num_experts, work), None

    def whole(name, weight):
        # Gradients: the gather's is a sum that leaves each device its part; the cast's, from replicated to different
        # on each device, is the sum over devices.
        if layout.width_on:
            if "embed" in WEIGHTS[name]:
                weight = lax.all_gather(weight, layout.width_on, axis=WEIGHTS[name].index("embed"), tiled=True)
            else:
                weight = lax.pcast(weight, layout.width_on, to="varying")
        if layout.hidden_on and name == "down_bias":  # of all terms of the sum one has it
            weight = jnp.where(lax.axis_index(layout.hidden_on) == 0, weight, 0)
        return lax.pcast(weight, layout.copied, to="varying") if layout.copied else weight

    if layout.copied or layout.width_on:
        # Else whole weights would be kept for the backward pass: the experts of all layers, on every device. There they
        # are gathered again. This must stay inside of jit, whose own inputs aren't kept twice.
        run = jax.checkpoint(run, prevent_cse=False, policy=functools.partial(_keep, layout))
    return run(x, decision, weights)


def _keep(layout, primitive, *_, **parameters) -> bool:
    of_weights = layout.width_on in jax.tree.leaves(parameters.get("axis_name"))
    return primitive.name != "pvary" and not (primitive.name == "all_gather" and of_weights)


def _local(x, decision, weights, num_experts, work):
    tokens = x.reshape(-1, x.shape[-1])
    flat = dispatch.flatten(decision, tokens.shape[0])
    if work.apply is None and few_tokens.suits(flat, work.implementation):
        return few_tokens.mixture(tokens, flat, weights).reshape(x.shape)
    return sorted_mixture(tokens, flat, weights, num_experts, work, x.dtype).reshape(x.shape)


def dense_mixture(x: jax.Array, decision, weights: dict[str, jax.Array]) -> jax.Array:
    """The oracle of `mixture`: every expert on every token, masked by the gates. Same arguments, same result."""
    tokens = x.reshape(-1, x.shape[-1])

    def every_expert(tokens):
        hidden = jax.nn.silu(jnp.einsum("td,edf->etf", tokens, weights["gate"]))
        hidden *= jnp.einsum("td,edf->etf", tokens, weights["up"])
        return jnp.einsum("etf,efd->etd", hidden, weights["down"])

    return dispatch.dense(tokens, dispatch.flatten(decision, tokens.shape[0]), every_expert).reshape(x.shape)
