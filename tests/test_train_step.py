"""One training step: the same on any mesh and in any number of microbatches, and its rules by hand."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import optimizer, sharding, train_step
from moejax.config import Config
from moejax.models.lm import LM

ROWS, LENGTH = 16, 12  # T = 192 = 3 · 64: no weight has a size divisible by 3, so what has is tokens
T = ROWS * LENGTH
WEIGHTS = {
    "switch": {"load_balance_weight": 0.01, "router_z_weight": 1e-3, "input_jitter": 0.1},
    "top_k": {"load_balance_weight": 0.01, "importance_weight": 0.01},
    "aux_free": {"router_z_weight": 1e-3},
    "expert_choice": {"router_z_weight": 1e-3},
}
MESHES = {"2x4": {"data": 2, "fsdp": 4}, "4x2": {"data": 4, "expert": 2}, "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}
ON_A_MESH = [
    ("dense", "2x4"), ("switch", "4x2"), ("aux_free", "2x4"), ("aux_free", "4x2"),
    ("expert_choice", "2x4"),
    pytest.param("top_k", "2x2x2", marks=pytest.mark.long),  # tests/test_exchange.py has its mesh
]  # fmt: skip


def batch():
    """Row i ends in i % 5 places of padding, so devices and microbatches differ in how much counts."""
    full = small.batch(rows=ROWS, length=LENGTH)
    mask = np.arange(LENGTH)[None, :] < LENGTH - np.arange(ROWS)[:, None] % 5
    return full | {"mask": mask, "segment_ids": full["segment_ids"] * mask, "target_bytes": 777}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step of one small model on one mesh."""

    name: str
    config: Config
    mesh: Mesh
    shardings: train_step.TrainState
    compiled: jax.stages.Compiled

    def start(self, change=lambda state: state):
        """A fresh initial state on the mesh, the same for every mesh; `change` may edit it."""
        _, variables = small.initialised(self.name)
        state = change(initial(self.config, variables))
        # Copied: the step is given its state's buffers, and these are the cache's.
        return jax.device_put(jax.tree.map(np.array, state), self.shardings)

    def __call__(self, state):
        with jax.set_mesh(self.mesh):
            return self.compiled(state, train_step.to_devices(batch(), sharding.batch_sharding(self.mesh)))


def initial(config, variables):
    moe, model = config.model.moe, LM(config.model)
    params = train_step.arranged(model, variables["params"])
    return train_step.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router_state=train_step.arranged(model, variables.get("router_state", {})),
        opt_state=optimizer.make(config.optimizer).init(params),
        load=None if moe is None else jnp.zeros((config.model.num_layers, moe.num_experts), jnp.int32),
    )


def program(name, mesh=None, microbatches=1, scan_layers=True) -> Program:
    return compile_program(name, mesh, microbatches, scan_layers)


@functools.lru_cache
def compile_program(name, mesh, microbatches, scan_layers):
    moe = small.ROUTERS[name]
    moe = moe and dataclasses.replace(moe, **WEIGHTS[name])
    config = small.config(moe, model={"scan_layers": scan_layers}, train={"accumulation_steps": microbatches})
    # Unclipped, so that Adam's first moment after one step is (1 − b1) times the gradient.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=None))
    mesh = sharding.make_mesh(MESHES[mesh]) if mesh else sharding.make_mesh({}, devices=jax.devices()[:1])
    model, tx = LM(config.model), optimizer.make(config.optimizer)
    shardings = train_step.state_shardings(model, tx, mesh)
    places = jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch())
    arrays = batch() | {"target_bytes": np.zeros(ROWS, np.int32)}
    shapes = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arrays, places)
    state = jax.eval_shape(functools.partial(train_step.init, model, tx), jax.random.key(0))
    state = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state, shardings)
    with jax.set_mesh(mesh):
        compiled = train_step.compiled_step(model, tx, config, shardings).lower(state, shapes).compile()
    return Program(name, config, mesh, shardings, compiled)


@functools.lru_cache
def stepped(name, mesh=None, microbatches=1, scan_layers=True):
    """(state, metrics) after one step, as numpy arrays; gradients as `grads` among the metrics."""
    run = program(name, mesh, microbatches, scan_layers)
    state, metrics = jax.tree.map(np.asarray, run(run.start()))
    return state, metrics | {"grads": gradients(run, state)}


def gradients(run, state):
    b1 = run.config.optimizer.betas[0]
    return jax.tree.map(lambda m: m / (1 - b1), optax.tree.get(state.opt_state, "mu"))


def assert_same_step(found, wanted, skip=()):
    (state, metrics), (other, reference) = found, wanted
    np.testing.assert_array_equal(state.load, other.load)
    jax.tree.map(np.testing.assert_array_equal, state.router_state, other.router_state)
    assert metrics.keys() == reference.keys()
    for name in reference.keys() - {"grads", "load", *skip}:
        if reference[name] is not None:
            np.testing.assert_allclose(metrics[name], reference[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert small.largest_difference(reference["grads"], metrics["grads"]) < 1e-5


@pytest.mark.parametrize(("name", "mesh"), ON_A_MESH)
def test_eight_devices_take_the_same_step_as_one(name, mesh):
    assert_same_step(stepped(name, mesh), stepped(name))


@pytest.mark.parametrize("mesh", [None, "2x4"])
def test_layers_one_by_one_take_the_same_step_as_a_scan(mesh):
    apart = LM(program("aux_free", mesh, 1, False).config.model)
    state, metrics = stepped("aux_free")
    wanted = dataclasses.replace(state, router_state=apart.arranged(state.router_state))
    metrics = metrics | {"grads": apart.arranged(metrics["grads"])}
    assert_same_step(stepped("aux_free", mesh, 1, False), (wanted, metrics))


def test_microbatches_on_a_mesh_take_the_same_step_as_one_batch():
    """Also where some have more padding than others. The balance loss is each microbatch's own."""
    assert_same_step(stepped("aux_free", "2x4", 2), stepped("aux_free"), skip=["load_balance_loss"])
    split, whole = (stepped("aux_free", *how)[1]["load_balance_loss"] for how in (("2x4", 2), ()))
    assert split != whole


@pytest.mark.parametrize(("name", "mesh"), ON_A_MESH)
def test_state_keeps_its_shardings(name, mesh):
    run = program(name, mesh)
    state, _ = run(run.start())
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(run.shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), jax.tree_util.keystr(path)
    # Parameters are split, and moments as they are.
    unembedding = ("unembedding",) if mesh != "4x2" else ("layers", "moe", "gate")
    for tree in (state.params, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        leaf = functools.reduce(lambda node, key: node[key], unembedding, tree)
        assert leaf.addressable_shards[0].data.size < leaf.size


GATHERED = re.compile(r"= \(?([^=]*?)\)? all-gather(?:-start)?\(")


def gathers_scores(text: str, tokens: int, num_experts: int) -> list[str]:
    """The shapes of all-gathers in compiled HLO that hold a value for each token (in any split) and expert."""
    found = []
    for shapes in GATHERED.findall(text):
        for shape in re.findall(r"\w+\[([\d,]+)\]", shapes):
            sizes = [int(size) for size in shape.split(",")]
            # no weight of the small models has such a size: see T
            if num_experts in sizes and np.prod(sizes) == tokens * num_experts:
                found.append(shape)
    return found


@pytest.mark.parametrize(("name", "mesh"), [case for case in ON_A_MESH if case[0] != "dense"])
def test_scores_of_all_tokens_are_gathered_nowhere(name, mesh):
    run = program(name, mesh)
    text = run.compiled.as_text()
    if mesh != "4x2":
        assert GATHERED.search(text), "FSDP gathers weights: the pattern no longer finds all-gathers"
    assert gathers_scores(text, T, run.config.model.moe.num_experts) == []


def test_a_gather_of_scores_would_be_seen():
    mesh = sharding.make_mesh({"data": 8})
    scores = jax.ShapeDtypeStruct((ROWS, LENGTH, 4), jnp.float32, sharding=sharding.batch_sharding(mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(scores).compile().as_text()
    assert gathers_scores(text, T, 4)


def test_total_loss_is_cross_entropy_and_weighted_losses():
    _, metrics = stepped("switch")
    # switch: 0.01 · balance + 0.001 · z
    wanted = metrics["loss"] + 0.01 * metrics["load_balance_loss"] + 1e-3 * metrics["router_z_loss"]
    np.testing.assert_allclose(metrics["total_loss"], wanted, rtol=1e-6)
    # summed nats / ln 2 / bytes
    nats = metrics["loss"] * batch()["mask"].sum()
    np.testing.assert_allclose(metrics["bits_per_byte"], nats / np.log(2) / 777, rtol=1e-6)
    squares = sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(metrics["grads"]))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(squares), rtol=1e-5)


def test_metrics_of_a_dense_model_have_no_routing():
    state, metrics = stepped("dense")
    assert state.load is None and state.router_state == {}
    assert metrics.keys() == {"loss", "total_loss", "bits_per_byte", "grad_norm", "learning_rate", "grads"}


@pytest.mark.parametrize("how", [(), ("2x4",), ("2x4", 2)], ids=str)
def test_bias_rule_by_hand_over_the_global_batch(how):
    """With a router of zeros every score is 1/2 and the bias alone decides: by hand, whatever the tokens."""
    # Two layers, eight experts, two for each token: the first layer takes experts 1 and 6, the second 0 and 7.
    bias = np.array([[0, 4, 0, 0, 0, 0, 3, 0], [2, 0, 0, 0, 0, 0, 0, 9]], np.float32)

    def change(state):
        moe = state.params["layers"]["moe"]
        layers = state.params["layers"] | {"moe": moe | {"router": np.zeros_like(moe["router"])}}
        return dataclasses.replace(
            state, params=state.params | {"layers": layers}, router_state={"layers": {"moe": {"bias": bias}}}
        )

    run = program("aux_free", *how)
    state, metrics = run(run.start(change))
    # 16 rows of 12 less 0 + 1 + 2 + 3 + 4 (three times over) + 0 places of padding: 192 − 30 = 162 tokens
    counts = 162 * (bias > 0)
    np.testing.assert_array_equal(state.load, counts)
    np.testing.assert_array_equal(metrics["load"], counts)
    # mean = 162 · 2 / 8 = 40.5: the used ones go down by the rate 0.01, the others up
    wanted = bias + np.float32(0.01) * np.where(counts > 40.5, -1, 1).astype(np.float32)
    np.testing.assert_array_equal(state.router_state["layers"]["moe"]["bias"], wanted)
    # MaxVio = 162 / 40.5 − 1 = 3; entropy = ln 2 / ln 8 = 1/3; nothing is dropped
    np.testing.assert_allclose(metrics["max_violation_per_layer"], [3, 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["routing_entropy"], 1 / 3, rtol=1e-6)
    assert metrics["dropped_fraction"] == 0


def test_loads_add_up_over_steps():
    run = program("aux_free")
    state, first = run(run.start())
    first = np.asarray(first["load"])
    np.testing.assert_array_equal(first.sum(axis=1), [162 * 2] * 2)
    state, second = run(state)
    np.testing.assert_array_equal(np.asarray(second["load"]).sum(axis=1), [162 * 4] * 2)
    assert np.all(second["load"] >= first)
    assert int(state.step) == 2


def test_initial_state_is_the_same_on_a_mesh_and_made_in_shards():
    run = program("aux_free", "2x4")
    model, tx = LM(run.config.model), optimizer.make(run.config.optimizer)
    state = train_step.create(model, tx, run.mesh, seed=0)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    wanted = run.start()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), state, wanted)


def test_moments_of_other_optimizers_follow_their_parameters():
    """Factored moments have shapes of their own and are replicated; Muon's momentum is split like its matrix."""
    mesh = sharding.make_mesh(MESHES["2x4"])
    config = small.config(small.ROUTERS["top_k"])
    model = LM(config.model)
    for name in ("muon", "adafactor"):
        tx = optimizer.make(dataclasses.replace(config.optimizer, name=name))
        shardings = train_step.state_shardings(model, tx, mesh)
        state = jax.eval_shape(functools.partial(train_step.init, model, tx), jax.random.key(0))
        gate = shardings.params["layers"]["moe"]["gate"]
        split = [
            place.is_equivalent_to(gate, leaf.ndim)
            for (path, leaf), place in zip(
                jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
            )
            if "gate" in jax.tree_util.keystr(path) and leaf.shape == (2, 8, 32, 16)
        ]
        assert split and all(split), name


def test_empty_batch_gives_zero_loss_and_no_nan():
    run = program("aux_free")
    empty = batch() | {"mask": np.zeros((ROWS, LENGTH), bool), "segment_ids": np.zeros((ROWS, LENGTH), np.int32)}
    with jax.set_mesh(run.mesh):
        state, metrics = run.compiled(
            run.start(), train_step.to_devices(empty | {"target_bytes": 0}, sharding.batch_sharding(run.mesh))
        )
    assert metrics["loss"] == metrics["total_loss"] == metrics["bits_per_byte"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, metrics)))


@pytest.mark.parametrize("scanned", [True, False])
def test_trees_of_either_form_are_taken_as_kept(scanned):
    """As `evaluate` takes them: of a run whose layers were stacked, or not."""
    _, variables = small.initialised("aux_free")
    models = [LM(small.model_config(small.ROUTERS["aux_free"], scan_layers=way)) for way in (scanned, not scanned)]
    wanted, other = (
        {name: train_step.arranged(model, variables[name]) for name in ("params", "router_state")} for model in models
    )
    for given in (wanted, other):
        found = train_step.as_kept(models[0], given)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("scanned", [True, False])
def test_bfloat16_parameters_start_as_the_rounded_float32_ones(scanned):
    """They are made layer by layer in a loop and rounded there, also where the step unrolls the layers."""
    wide = small.model_config(small.ROUTERS["switch"])
    narrow = dataclasses.replace(wide, param_dtype="bfloat16", scan_layers=scanned)
    tx, key = optimizer.make(small.config().optimizer), jax.random.key(0)
    wide = LM(dataclasses.replace(wide, scan_layers=scanned))
    expected = jax.tree.map(lambda p: p.astype(jnp.bfloat16), train_step.init(wide, tx, key).params)
    found = train_step.init(LM(narrow), tx, key).params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
