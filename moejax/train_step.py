"""One training step: loss, gradients over microbatches, optax, then the bias rule. Pure functions of arrays.

Counts and statistics span all microbatches and all devices of a step, exactly as one batch would. The load-balance
losses are taken per microbatch (over all devices) and averaged, weighted by unmasked tokens: means over tokens, such
as the z-loss, are then those of one batch.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from moejax import balance, optimizer, routing_stats, sharding
from moejax.config import Config, MoEConfig
from pallas_kernels import remote_ffn

# The weight of each loss that an MoE layer returns, as its field of MoEConfig.
LOSS_WEIGHTS = {
    "load_balance_loss": "load_balance_weight",
    "sequence_balance_loss": "sequence_balance_weight",
    "router_z_loss": "router_z_weight",
    "importance_loss": "importance_weight",
    "load_loss": "load_weight",
    "mtp_loss": "mtp_weight",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes.

    step () i32: steps done. params: in the model's `param_dtype`, as are moments. router_state: selection biases, moved
    by rule. opt_state: optax's. load: counts (MoE layers, E) i32 since the last logged line, for dead experts; None for
    a dense model.
    """

    step: jax.Array
    params: Any
    router_state: Any
    opt_state: Any
    load: jax.Array | None


PROBE = (1, 128)  # B, L of the tokens that parameters are shaped with; TPU attention takes L in multiples of 128


def init(model: nn.Module, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    # What layers sow says how many there are; the values are not used, and so not computed.
    variables = nn.unbox(model.init(key, jnp.zeros(PROBE, jnp.int32), mutable=True))
    router_state = arranged(model, variables.get("router_state", {}))
    tallies = layer_tallies(variables.get("intermediates", {}))
    params = jax.tree.map(lambda p: p.astype(model.param_dtype), variables["params"])  # type: ignore[attr-defined]
    params = arranged(model, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router_state=router_state,
        opt_state=tx.init(params),
        load=jnp.zeros_like(tallies["selected"]) if tallies else None,
    )


def arranged(model: nn.Module, tree: Any, *take: Any) -> Any:
    """A collection of the model's `init` as training keeps it: the research LM says how, families keep it as it is."""
    return model.arranged(tree, *take) if hasattr(model, "arranged") else tree


def as_kept(model: nn.Module, trees: dict[str, Any]) -> dict[str, Any]:
    """params and router_state of a checkpoint as training keeps them now: unrolled runs once stacked their layers."""
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros(PROBE, jnp.int32)), jax.random.key(0))
    wanted = jax.eval_shape(lambda tree: arranged(model, tree), nn.unbox(shapes["params"]))
    if not hasattr(model, "rearranged") or _paths(trees["params"]) == _paths(wanted):
        return trees
    return {name: model.rearranged(tree) for name, tree in trees.items()}


def _paths(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def param_shardings(model: nn.Module, mesh: Mesh) -> Any:
    """NamedShardings of the parameters that training keeps, by their logical axes."""
    boxed = jax.eval_shape(lambda key: model.init(key, jnp.zeros(PROBE, jnp.int32)), jax.random.key(0))
    return arranged(model, sharding.shardings(mesh, boxed["params"]), sharding.of_slice)


def state_shardings(model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """A TrainState of NamedShardings: parameters by their logical axes, moments like their parameters."""
    of_params = param_shardings(model, mesh)
    state = jax.eval_shape(functools.partial(init, model, tx), jax.random.key(0))
    shapes = jax.tree_util.tree_flatten_with_path(state.params)[0]
    known = {path: (leaf.shape, place) for (path, leaf), place in zip(shapes, jax.tree.leaves(of_params), strict=True)}
    everywhere: Any = sharding.replicated(mesh)

    def moments(path, leaf):
        # A moment stands at some path of optax's that ends in its parameter's; factored ones have another shape.
        for start in range(len(path)):
            shape, place = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return place
        return everywhere

    return TrainState(
        step=everywhere,
        params=of_params,
        router_state=jax.tree.map(lambda _: everywhere, state.router_state),
        opt_state=jax.tree_util.tree_map_with_path(moments, state.opt_state),
        load=jax.tree.map(lambda _: everywhere, state.load),
    )


def create(model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The initial state, made in place on `mesh`: no device ever holds more than its shards."""
    make = jax.jit(functools.partial(init, model, tx), out_shardings=state_shardings(model, tx, mesh))
    # No mesh is set: the one row that shapes the parameters could not be split over the batch axes.
    return make(jax.random.key(seed))


def places(tree: Any, name: str) -> list[Any]:
    """What stands under the key `name` at any depth of nested dicts, in the order of the layers: 2 before 10."""
    if not isinstance(tree, dict):
        return []
    if name in tree:
        return [tree[name]]
    return [hit for key in layer_order(tree) for hit in places(tree[key], name)]


def layer_order(tree: dict[str, Any]) -> list[str]:
    """The keys of a tree of parameters: layer_2 before layer_10, and both before mtp_0."""
    return sorted(tree, key=lambda key: (len(key), key) if key.startswith("layer_") else (1000, key))


def layer_tallies(intermediates: Any) -> dict[str, jax.Array]:
    """The tallies that MoE layers sowed, stacked by layer; {} for a dense model.

    The research LM's scan leaves them stacked; a published family sows layer by layer, its prediction modules last.
    """
    found = places(intermediates, "routing")
    if not found:
        return {}
    if found[0]["selected"].ndim == 2:
        (scanned,) = found
        return scanned
    return jax.tree.map(lambda *layers: jnp.stack(layers), *found)


def moved_biases(router_state: Any, selected: jax.Array, rate: float) -> Any:
    """The selection biases after the rule (`balance.bias_update`): a tree of (layers, E), or of one (E,) for each row
    of selected (layers, E) i32, in the order of `places`."""
    biases = places(router_state, "bias")
    if len(biases) == 1 and biases[0].ndim == 2:
        return jax.tree.map(lambda bias: balance.bias_update(bias, selected, rate=rate), router_state)
    assert len(biases) in (0, len(selected)), f"{len(biases)} biases and {len(selected)} MoE layers"
    rows = iter(selected)

    def move(tree):
        if "bias" in tree:
            return {"bias": balance.bias_update(tree["bias"], next(rows), rate=rate)}
        return {key: move(tree[key]) for key in layer_order(tree)}

    return move(router_state)


def forward(model, params, router_state, batch, mode, key=None):
    """(nats, losses, tallies): nats the sum over unmasked targets, f32; losses unweighted; tallies {} for a dense
    model, else stacked by layer."""
    variables = {"params": params} | ({"router_state": router_state} if router_state else {})
    (nats, losses), sown = model.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch.get("segment_ids"),
        return_losses=True,
        mode=mode,
        targets=batch["targets"],
        mask=batch["mask"],
        rngs=None if key is None else {"routing": key},
        mutable=["intermediates"],
    )
    return nats, losses, layer_tallies(sown.get("intermediates", {}))


def weighted(moe: MoEConfig, losses: dict[str, jax.Array]) -> jax.Array:
    """Σ weight · loss over the auxiliary losses, as the config weighs them."""
    total = jnp.zeros((), jnp.float32)
    for name, loss in losses.items():
        total += getattr(moe, LOSS_WEIGHTS[name]) * loss
    return total


def loss_fn(params, router_state, batch, key, *, model, moe, count):
    """nats / count + this part's share of the `count` tokens · auxiliary losses, and what the step reports: sums that
    add up over microbatches."""
    nats, losses, tallies = forward(model, params, router_state, batch, "train", key)
    share = jnp.sum(batch["mask"], dtype=jnp.float32) / count
    losses = jax.tree.map(lambda loss: share * loss, losses)
    total = nats / count + weighted(moe, losses)
    return total, {"total_loss": total, "nats": nats, "losses": losses, "tallies": tallies}


def gradients(state: TrainState, batch: dict[str, jax.Array], key: jax.Array, *, model, moe, microbatches: int):
    """Gradients of the step's loss and its reported sums, over `microbatches` parts of the batch (B, L)."""
    count = jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)
    one = jax.grad(functools.partial(loss_fn, model=model, moe=moe, count=count), has_aux=True)
    if microbatches == 1:
        return one(state.params, state.router_state, batch, key)

    def part(a):
        # Every device keeps its own rows: part i takes rows i, i + A, i + 2A, …
        return jnp.moveaxis(a.reshape(-1, microbatches, *a.shape[1:]), 1, 0)

    parts = jax.tree.map(part, batch)
    keys = jax.random.split(key, microbatches)

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, one(state.params, state.router_state, *inputs)), None

    shapes = jax.eval_shape(one, state.params, state.router_state, jax.tree.map(lambda a: a[0], parts), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, keys))[0]


Batch = dict[str, jax.Array]


def train_step(
    state: TrainState, batch: Batch, *, model: nn.Module, tx: optax.GradientTransformation, config: Config
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step. Returns the next state and the step's metrics, named as in metrics.jsonl, as arrays on the device."""
    moe = config.model.moe or MoEConfig()
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    parts = config.train.accumulation_steps
    grads, sums = gradients(state, batch, key, model=model, moe=moe, microbatches=parts)
    with jax.named_scope("optimizer"):
        params, opt_state = optimizer.apply(tx, grads, state.opt_state, state.params)
    router_state, load = state.router_state, state.load
    metrics = {
        "loss": sums["nats"] / jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0),
        "total_loss": sums["total_loss"],
        "bits_per_byte": bits_per_byte(sums["nats"], batch["target_bytes"]),
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optimizer.schedule(config.optimizer)(state.step),
    }
    if load is not None:
        with jax.named_scope("statistics"):
            metrics |= {name: sums["losses"].get(name) for name in ("load_balance_loss", "router_z_loss", "mtp_loss")}
            metrics |= layer_statistics(sums["tallies"])
            load = load + sums["tallies"]["selected"]
            metrics["load"] = load
            if moe.bias_update_rate:
                router_state = moved_biases(router_state, sums["tallies"]["selected"], moe.bias_update_rate)
    return TrainState(state.step + 1, params, router_state, opt_state, load), metrics


def bits_per_byte(nats: jax.Array, target_bytes: jax.Array) -> jax.Array:
    """Σ nats / ln 2 / UTF-8 bytes of the targets; target_bytes (B,) int, 1 where there are none."""
    return nats / jnp.log(2.0) / jnp.maximum(jnp.sum(target_bytes), 1).astype(jnp.float32)


def layer_statistics(tallies: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Statistics of a step over MoE layers, from its tallies (leading axis: layer)."""
    layers = routing_stats.summarise(tallies)
    overflow = layers.get("overflow_fraction")
    return {
        "max_violation": jnp.mean(layers["max_violation"]),
        "max_violation_per_layer": layers["max_violation"],
        "dropped_fraction": jnp.mean(layers["dropped_fraction"]),
        "routing_entropy": jnp.mean(layers["entropy"]),
    } | ({} if overflow is None else {"overflow_fraction": jnp.mean(overflow)})


# XLA would compile and time many kernels of its own for each product and fusion: a quarter of the time to compile and
# more, and no shorter steps for it (experiments/LOG.md). Experts and attention have kernels; cuBLAS has the rest.
_ON_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_experimental_enable_fusion_autotuner": False}


def compiled_step(
    model: nn.Module, tx: optax.GradientTransformation, config: Config, shardings: TrainState
) -> jax.stages.Wrapped:
    """`train_step` under jit: the state is donated and keeps its shardings (Auto mode may lose them otherwise)."""
    step = functools.partial(train_step, model=model, tx=tx, config=config)
    mesh = jax.tree.leaves(shardings)[0].mesh
    (platform,) = {device.platform for device in mesh.devices.flat}
    beside = remote_ffn.COMPILER_OPTIONS if mesh.shape["expert"] > 1 else {}
    options = _ON_GPU | beside if platform == "gpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def to_devices(batch: dict[str, Any], placement: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a host batch, as global arrays split over the batch axes of the mesh."""
    rows = len(batch["tokens"])
    # The count of bytes goes as a column whose first row holds it: sums over rows are then global sums.
    bytes_column = np.zeros(rows, np.int32)
    bytes_column[0] = batch["target_bytes"]
    arrays = batch | {"target_bytes": bytes_column}
    return {name: jax.make_array_from_process_local_data(placement, array) for name, array in arrays.items()}
