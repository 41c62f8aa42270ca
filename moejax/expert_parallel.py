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
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moejax import dispatch, exchange, experts, few_tokens, ragged, routing, sharding
from moejax.errors import UserError
from pallas_kernels import remote_exchange


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
    apply: Callable | None = None,
    gates_first: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Σ_k weight · expert(x) for x (B, L, D) and a decision with leading axis B; (B, L, D) in x's dtype.

    `decision` holds either Routing fields (B, L, K) or ExpertChoice fields (B, E, C) with token positions inside the
    row; one leading group that spans the batch, (1, E, C), runs without shard_map. `weights`: gate, up (E, D, F) and
    down (E, F, D). `way` names the exchange (`model.moe.exchange`) and `factor` bounds its pieces
    (`exchange.rows_per_pair`). The second value is the number of choices, () i32 over all devices, that found no room
    in them and are missing from the result; None where nothing is exchanged.

    `apply(rows (R, D), weights, group_sizes)` -> (R, D), one function for all layers, takes the place of
    `experts.gated_ffn`. It may use further weights gate_bias, up_bias (E, F) and down_bias (E, D), and must be linear
    in down and down_bias. gates_first: gates multiply what goes into experts, not what comes out.

    Raises UserError where E does not divide over the expert axis, for a bound below one row, for expert choice by
    another way than gather, for remote off the GPUs of one host, and for ragged on CPU.
    """
    run = functools.partial(_mixture, num_experts=num_experts, work=Work(implementation, apply, gates_first))
    axes = sharding.batch_axes()
    groups = jax.tree.leaves(decision)[0].shape[0]
    if groups != x.shape[0]:
        return run(x, decision, weights)
    if exchange.AXIS in axes:
        exchange.check_experts(num_experts, jax.sharding.get_abstract_mesh().shape[exchange.AXIS])
        way = exchange.pick(way, isinstance(decision, routing.Routing))
        if way != "gather" and not isinstance(decision, routing.Routing):
            raise UserError(f"config.model.moe.exchange={way!r} can't move rows of expert choice: give 'gather'")
        if way == "remote":
            exchange.check_remote(x)
        if way == "ragged":
            ragged.check_platform()
        run = functools.partial(run, way=way, factor=factor)
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
class Work:
    """What experts do with rows: arguments of `mixture_and_overflow`."""

    implementation: str | None = None
    apply: Callable | None = None
    gates_first: bool = False

    def experts(self, rows, weights, group_sizes, scale=None):
        """(R, D) sorted by expert -> (R, D)."""
        with jax.named_scope("experts"):
            if self.apply is not None:
                return self.apply(rows, weights, group_sizes)
            gate, up, down = (weights[name] for name in ("gate", "up", "down"))
            return experts.gated_ffn(rows, gate, up, down, group_sizes, scale=scale, implementation=self.implementation)

    def gates_inside(self, rows, plan, weights):
        """Whether experts' own kernel applies the gates: its results needn't then be kept for the gates' gradient."""
        plain = self.apply is None and not self.gates_first and plan.slot is not None
        return plain and experts.takes_scale(rows, weights["gate"], self.implementation)

    def rows(self, tokens, plan):
        """(T, D) -> (R, D), times their gates where these come first."""
        rows = dispatch.gather(tokens, plan)
        return rows * plan.weight[:, None].astype(rows.dtype) if self.gates_first else rows

    def sums(self, rows, plan, num_tokens):
        """(R, D) -> (T, D), times their gates where these didn't come first."""
        if self.gates_first:
            plan = dataclasses.replace(plan, weight=jnp.ones_like(plan.weight))
        return dispatch.combine(rows, plan, num_tokens)


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


_STATIC = ("num_experts", "work", "way", "factor", "layout")


@functools.partial(jax.jit, static_argnames=_STATIC)  # traced and lowered once, not in each of a model's layers
def _mixture(x, decision, weights, *, num_experts, work, way=None, factor=None, layout=Layout()):
    """One device's part of x, decision and weights, the latter as `layout` says; overflow (1,) i32 or None."""

    def run(x, decision, weights):
        if layout.hidden_on:
            y, overflow = parts(lax.pcast(x, layout.hidden_on, to="varying"), decision, weights)
            return lax.psum(y, layout.hidden_on), overflow
        return parts(x, decision, weights)

    def parts(x, decision, weights):
        weights = {name: whole(name, weight) for name, weight in weights.items()}
        if way == "gather":
            return _by_gather(x, decision, weights, work), None
        if way == "all_to_all":
            return _by_all_to_all(x, decision, weights, num_experts, work, factor)
        if way == "ragged":
            return _by_ragged(x, decision, weights, num_experts, work, factor)
        if way == "remote":
            return _by_remote(x, decision, weights, num_experts, work, factor)
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
    flat = flatten(decision, tokens.shape[0])
    plain = work.apply is None and not work.gates_first
    if plain and few_tokens.suits(flat, work.implementation):
        return few_tokens.mixture(tokens, flat, weights).reshape(x.shape)
    return _sorted(tokens, flat, weights, num_experts, work, x.dtype).reshape(x.shape)


def _sorted(tokens, decision, weights, num_experts, work, dtype):
    """Σ_k weight · expert(token) for tokens (T, D) and a flat decision over `weights`' experts; (T, D) in `dtype`."""
    with jax.named_scope("dispatch"):
        plan = dispatch.plan(decision, num_experts)
        rows = work.rows(tokens, plan)
    if work.gates_inside(rows, plan, weights):
        rows = checkpoint_name(rows, "experts")  # kept in the room of the results that needn't be
        rows = work.experts(rows, weights, plan.group_sizes, plan.weight)
        plan = dataclasses.replace(plan, weight=None)
    else:
        rows = work.experts(rows, weights, plan.group_sizes)
    with jax.named_scope("combine"):
        return work.sums(rows.astype(dtype), plan, tokens.shape[0])


def _by_gather(x, decision, weights, work):
    """All tokens of the expert axis on every one of its devices, which runs those that chose its experts.

    Dropless: the plan has room for every row of every device. Sums over experts are taken in float32, across devices
    too.
    """
    everyone = exchange.gather(x)
    tokens = everyone.reshape(-1, x.shape[-1])
    mine = weights["gate"].shape[0]
    with jax.named_scope("dispatch"):
        flat = flatten(exchange.gather(decision), tokens.shape[0])
        here = exchange.of_my_experts(flat, mine)
    y = _sorted(tokens, here, weights, mine, work, jnp.float32)
    return exchange.sum_back(y).astype(x.dtype).reshape(x.shape)


def _by_all_to_all(x, decision, weights, num_experts, work, factor):
    """Rows go to their experts' devices and come back; gates are applied at home, where the sum is in float32."""
    tokens = x.reshape(-1, x.shape[-1])
    flat = flatten(decision, tokens.shape[0])
    mine = weights["gate"].shape[0]
    devices = num_experts // mine
    T, K = flat.experts.shape
    room = exchange.rows_per_pair(factor, T, K, mine, devices)
    with jax.named_scope("dispatch"):
        parcels = exchange.pack(flat, mine, devices, room)
        sent = work.rows(tokens, parcels.plan)
    came, expert = exchange.swap(sent), exchange.swap(parcels.expert)
    there = dataclasses.replace(work, gates_first=False)
    done = _sorted(came, exchange.arrived(expert, mine), weights, mine, there, x.dtype)
    back = exchange.swap(done)
    with jax.named_scope("combine"):
        return work.sums(back, parcels.plan, tokens.shape[0]).reshape(x.shape), parcels.overflow[None]


def _by_remote(x, decision, weights, num_experts, work, factor):
    """Each token goes once to every device with experts for it, where its rows are summed with their gates in float32;
    the sums come back in x's dtype and are summed in float32 at home."""
    tokens = x.reshape(-1, x.shape[-1])
    flat = flatten(decision, tokens.shape[0])
    mine = weights["gate"].shape[0]
    devices = num_experts // mine
    T, K = flat.experts.shape
    room = exchange.rows_received(factor, T, K, devices * T)  # a token is one row here, however many of mine it chose
    with jax.named_scope("dispatch"):
        routes, here = exchange.routes(flat, mine, devices, room)
    with jax.named_scope("exchange"):
        came = remote_exchange.send(tokens, routes, axis=exchange.AXIS)
    done = _sorted(came, here, weights, mine, work, x.dtype)
    with jax.named_scope("exchange"):
        y = remote_exchange.collect(done, routes, axis=exchange.AXIS)
    return y.reshape(x.shape), routes.overflow[None]


def _by_ragged(x, decision, weights, num_experts, work, factor):
    """Rows sorted by expert go straight to their places on the experts' devices, and results back; gates as above."""
    tokens = x.reshape(-1, x.shape[-1])
    flat = flatten(decision, tokens.shape[0])
    mine = weights["gate"].shape[0]
    T, K = flat.experts.shape
    room = exchange.rows_received(factor, T, K, num_experts // mine * T * min(K, mine))
    with jax.named_scope("dispatch"):
        plan = dispatch.plan(flat, num_experts)
        rows = work.rows(tokens, plan)
    with jax.named_scope("exchange"):
        counts = lax.all_gather(plan.group_sizes, exchange.AXIS)
        places = ragged.places(counts, lax.axis_index(exchange.AXIS), room)
        rows = ragged.send(rows, places, room, exchange.AXIS)
    rows = work.experts(rows, weights, places.group_sizes)
    with jax.named_scope("exchange"):
        rows = ragged.fetch(rows, places, T * K, exchange.AXIS)
    with jax.named_scope("combine"):
        return work.sums(rows, plan, T).reshape(x.shape), places.overflow[None]


def flatten(decision, num_tokens: int):
    """A decision of N routing groups (leading axis N) as one decision over all T = num_tokens tokens.

    Routing: every field (N, T/N, …) becomes (T, …). ExpertChoice: tokens and weights (N, E, C) become (E, N·C) with
    token numbers in 0 … T − 1, and scores (T, E).
    """
    if isinstance(decision, routing.Routing):
        return jax.tree.map(lambda a: a.reshape(num_tokens, *a.shape[2:]), decision)
    groups, num_experts, _ = decision.tokens.shape
    first = (jnp.arange(groups, dtype=decision.tokens.dtype) * (num_tokens // groups))[:, None, None]

    def by_expert(a):
        return jnp.swapaxes(a, 0, 1).reshape(num_experts, -1)

    return routing.ExpertChoice(
        by_expert(decision.tokens + first), by_expert(decision.weights), decision.scores.reshape(num_tokens, -1)
    )


def dense_mixture(x: jax.Array, decision, weights: dict[str, jax.Array]) -> jax.Array:
    """The oracle of `mixture`: every expert on every token, masked by the gates. Same arguments, same result."""
    tokens = x.reshape(-1, x.shape[-1])

    def every_expert(tokens):
        hidden = jax.nn.silu(jnp.einsum("td,edf->etf", tokens, weights["gate"]))
        hidden *= jnp.einsum("td,edf->etf", tokens, weights["up"])
        return jnp.einsum("etf,efd->etd", hidden, weights["down"])

    return dispatch.dense(tokens, flatten(decision, tokens.shape[0]), every_expert).reshape(x.shape)
