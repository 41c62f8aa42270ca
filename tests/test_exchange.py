"""Experts on several devices against the oracle that runs every expert on every token."""

import dataclasses
import functools
import math
import re
import types

import emulated_remote
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.ad_checkpoint import print_saved_residuals

from experiments.exchanged_rows import layer_arguments
from moejax import (
    config_checks,
    exchange,
    exchanged,
    expert_parallel,
    experts,
    optimizer,
    routing_stats,
    sharding,
    train_step,
)  # fmt: skip
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.routing import ExpertChoice, Routing
from moejax.work import Work
from pallas_kernels import gated_ffn as kernels
from pallas_kernels import remote_exchange
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.vary import vary_alike

B, L, D, F, E, K = 8, 4, 8, 16, 8, 2


def inputs(kind: str):
    """x, a decision whose rows fall unevenly on experts, and weights."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, weights = normal(B, L, D), {"gate": normal(E, D, F), "up": normal(E, D, F), "down": normal(E, F, D)}
    scores = jnp.full((B, L, E), 1 / E, jnp.float32)
    if kind == "expert_choice":
        tokens = jnp.asarray(np.stack([[rng.permutation(L)[:2] for _ in range(E)] for _ in range(B)]), jnp.int32)
        return x, ExpertChoice(tokens, normal(B, E, 2), scores), weights
    keep = np.ones((B, L, K), bool)
    if kind == "one_expert":  # all first choices to expert 5, no second ones: all but one device get nothing
        chosen = np.stack([np.full((B, L), 5), np.full((B, L), 0)], -1)
        keep[..., 1] = False
    else:
        chosen = np.argsort(rng.random((B, L, E)), axis=-1)[..., :K]
        keep[rng.random((B, L, K)) < 0.2] = False
    if kind == "one_token":  # on each device, and it has one expert
        keep[:, 1:], keep[..., 1] = False, False
    return x, Routing(jnp.asarray(chosen, jnp.int32), normal(B, L, K), scores, jnp.asarray(keep)), weights


def small_mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh on as many devices as it needs, all eight for a -1."""
    count = math.prod(sizes.values())
    return sharding.make_mesh(sizes, devices=jax.devices()[: count if count > 0 else 8])


def value_and_gradients(layer):
    def objective(x, gates, weights, decision):
        y = layer(x, dataclasses.replace(decision, weights=gates), weights)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("way", "sizes", "kind"),
    [
        ("gather", {"expert": 8}, "uneven"),
        ("gather", {"data": 2, "expert": 4}, "uneven"),
        ("gather", {"fsdp": 4, "expert": 2}, "uneven"),
        ("gather", {"data": 2, "expert": -1}, "one_expert"),
        ("gather", {"data": 2, "expert": 4}, "expert_choice"),
        ("all_to_all", {"expert": 2}, "uneven"),
        ("all_to_all", {"data": 2, "expert": 4}, "uneven"),
        ("all_to_all", {"expert": 8}, "one_expert"),
        ("all_to_all", {"expert": 8}, "one_token"),
        pytest.param("remote", {"expert": 8}, "uneven", marks=pytest.mark.long),
        ("remote", {"data": 2, "expert": 4}, "uneven"),
        ("remote", {"expert": 8}, "one_expert"),
        pytest.param("remote", {"expert": 8}, "one_token", marks=pytest.mark.long),
    ],
)
def test_every_way_equals_the_dense_oracle_in_values_and_gradients(way, sizes, kind, monkeypatch):
    if way == "remote":
        emulated_remote.install(monkeypatch)
    x, decision, weights = inputs(kind)
    arguments = (x, decision.weights, weights, decision)
    (_, wanted), wanted_grads = value_and_gradients(expert_parallel.dense_mixture)(*arguments)
    layer = value_and_gradients(lambda *a: expert_parallel.mixture(*a, num_experts=E, way=way))
    with jax.set_mesh(small_mesh(sizes)):
        (_, y), grads = layer(*arguments)
    assert small.largest_difference(wanted, y) < 1e-5
    assert small.largest_difference(wanted_grads, grads) < 1e-5


@jax.custom_vjp
def poisoned(a, real):
    """`a` with NaN from row `real` on; so is its gradient."""
    return jnp.where((jnp.arange(a.shape[0]) < real)[:, None], a, jnp.nan)


poisoned.defvjp(lambda a, real: (poisoned(a, real), real), lambda real, grad: (poisoned(grad, real), None))


@pytest.mark.parametrize(("way", "kind"), [("gather", "uneven"), ("all_to_all", "one_token")])
def test_nobody_reads_what_experts_leave_undefined(way, kind, monkeypatch):
    """As on Hopper GPUs, but for the kernels: rows past the last one that came, and their gradients, are NaN here."""
    plain = kernels.gated_ffn

    def gated_ffn(rows, gate, up, down, sizes, **options):
        assert not options["metadata"].tail
        real = jnp.sum(sizes)
        rows = poisoned(*vary_alike(rows, real))
        return poisoned(*vary_alike(plain(rows, gate, up, down, sizes, **options | {"implementation": "blocks"}), real))

    monkeypatch.setattr(experts, "pick", lambda *_: "mosaic_gpu")
    monkeypatch.setattr(kernels, "gated_ffn", gated_ffn)
    assert_exchanged_equals_dense(way, kind, 4)


def assert_exchanged_equals_dense(way, kind, devices, factor=None):
    x, decision, weights = inputs(kind)
    arguments = (x, decision.weights, weights, decision)
    (_, wanted), wanted_grads = value_and_gradients(expert_parallel.dense_mixture)(*arguments)
    run = functools.partial(exchanged.mixture, num_experts=E, work=Work(), way=way, factor=factor, chunks=1)
    spec = {"in_specs": jax.P("expert"), "out_specs": jax.P("expert")}
    layer = jax.shard_map(lambda *a: run(*a)[0], mesh=small_mesh({"expert": devices}), **spec)
    (_, y), grads = value_and_gradients(layer)(*arguments)
    assert small.largest_difference(wanted, y) < 1e-5
    assert small.largest_difference(wanted_grads, grads) < 1e-5


@pytest.mark.parametrize(
    ("kind", "devices", "factor", "parts"),
    [
        ("uneven", 4, None, 2),
        ("uneven", 2, None, 1),
        ("uneven", 8, 1.25, 2),  # room for ten rows, which the busiest device gets
        ("one_expert", 4, None, 2),
        pytest.param("one_token", 8, None, 2, marks=pytest.mark.long),
    ],
)
def test_remote_with_products_beside_it_equals_the_dense_oracle(kind, devices, factor, parts, monkeypatch):
    """Own tokens' rows apart, and not, where there are two devices; NaN in all that a kernel leaves undefined."""
    emulated_remote.install(monkeypatch)
    emulated_remote.install_products(monkeypatch)
    send, sent = emulated_remote.send, []
    monkeypatch.setattr(
        remote_exchange.mosaic_gpu, "send", lambda *a, **options: sent.append(options["first"]) or send(*a, **options)
    )
    monkeypatch.setattr(experts, "pick", lambda *_: "mosaic_gpu")
    assert_exchanged_equals_dense("remote", kind, devices, factor)
    there = [0, 1] if parts == 2 else [0]
    assert sent == [*there, *there]  # forward and backward


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu' or len(jax.devices()) < 2")
@pytest.mark.parametrize("apart", (2, 99))
def test_remote_equals_gather_on_the_gpus_of_a_host(apart, monkeypatch):
    """The layer by its kernels, own tokens' rows apart or not: values and gradients, bit-equal three times."""
    monkeypatch.setattr(exchanged, "_APART", apart)
    devices, mesh = len(jax.devices()), sharding.make_mesh({"expert": -1})
    _, x, decision, weights = layer_arguments((512, 256, 0, 4), 1500, devices, 8 * devices)
    arguments = jax.device_put((x, decision.weights, weights, decision), jax.NamedSharding(mesh, jax.P("expert")))

    def layer(way, *arguments):
        return expert_parallel.mixture(*arguments, num_experts=8 * devices, way=way).astype(jnp.float32)

    with jax.set_mesh(mesh):
        wanted = value_and_gradients(functools.partial(layer, "gather"))(*arguments)
        remote = value_and_gradients(functools.partial(layer, "remote"))
        found = [remote(*arguments) for _ in range(3)]
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted), strict=True):
        one, other = (np.asarray(a.astype(jnp.float32), np.float64) for a in (one, other))
        assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(other)
    for again in found[1:]:
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(again), strict=True))


def test_remote_says_what_its_kernels_cannot_take(monkeypatch):
    """Before a kernel is lowered: the same lines as without an exchange."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    x, decision, _ = inputs("uneven")
    run = functools.partial(expert_parallel.mixture, num_experts=E, way="remote", implementation="mosaic_gpu")
    x = jnp.repeat(x, 16, axis=-1)  # 128 wide

    def trace(dtype, of_weights, hidden):
        shapes = {"gate": (E, 128, hidden), "up": (E, 128, hidden), "down": (E, hidden, 128)}
        with jax.set_mesh(small_mesh({"expert": 4})):
            jax.eval_shape(run, x.astype(dtype), decision, {n: jnp.ones(s, of_weights) for n, s in shapes.items()})

    with pytest.raises(NotImplementedError, match="needs bfloat16 or float16; implementation='blocks' would"):
        trace(jnp.float32, jnp.float32, 64)
    with pytest.raises(NotImplementedError, match="needs K and N in multiples of 64"):
        trace(jnp.bfloat16, jnp.bfloat16, 96)
    with pytest.raises(UserError, match=r"one dtype; got bfloat16, float32, .*: cast the weights"):
        trace(jnp.bfloat16, jnp.float32, 64)


def test_remote_lowers_with_products_beside_it(monkeypatch):
    """For Hopper GPUs: the kernels, what is on a stream of its own, and what makes XLA put something beside the last of
    it: the gradients of x and of the three weights are there together."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    bf16, f32, i32 = (functools.partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.bfloat16, jnp.float32, jnp.int32))
    gates = f32((8, 16, K))
    decision = Routing(i32((8, 16, K)), gates, f32((8, 16, E)), jax.ShapeDtypeStruct((8, 16, K), jnp.bool_))
    weights = {"gate": bf16((E, 256, 128)), "up": bf16((E, 256, 128)), "down": bf16((E, 128, 256))}

    def objective(x, gates, weights, decision):
        decision = dataclasses.replace(decision, weights=gates)
        options = {"num_experts": E, "way": "remote", "implementation": "mosaic_gpu"}
        return jnp.sum(expert_parallel.mixture(x, decision, weights, **options).astype(jnp.float32))

    with jax.set_mesh(small_mesh({"expert": 4})):
        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))
        traced = run.trace(bf16((8, 16, 256)), gates, weights, decision)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    experts_own = ("gated_ffn_hidden", "gated_ffn_gradients", "gated_ffn_dlhs", "grouped_matmul_drhs")
    for name in ("send_rows", "collect_rows", "combine_rows", *experts_own):
        assert name in text
    # forward one part each way, backward one of two parts that come and all that goes home
    assert len(re.findall("call @compute_on", text)) == 4
    of_weights = ", ".join(["tensor<2x256x128xbf16>"] * 2 + ["tensor<2x128x256xbf16>"])
    assert "optimization_barrier" in text and f": tensor<32x256xbf16>, {of_weights}" in text


@pytest.mark.parametrize(
    ("kind", "width", "token_choice", "wanted"),
    [
        ("NVIDIA H200", 256, True, "remote"),
        ("NVIDIA H200", 96, True, "gather"),
        ("NVIDIA H200", 256, False, "gather"),
        ("NVIDIA H100 PCIe", 256, True, "gather"),
    ],
)
def test_left_out_a_hosts_linked_gpus_exchange_by_remote(kind, width, token_choice, wanted, monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    rows = jax.ShapeDtypeStruct((2, 8, width), jnp.bfloat16)
    assert exchange.pick(None, token_choice, rows) == wanted
    assert exchange.pick("all_to_all", token_choice, rows) == "all_to_all"


def test_the_collectives_are_the_ones_meant_and_expert_weights_stay():
    x, decision, weights = inputs("uneven")
    mesh = sharding.make_mesh({"expert": 4})
    split = jax.NamedSharding(mesh, jax.P("expert"))
    arguments = jax.device_put((x, decision, weights), split)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: expert_parallel.mixture(*a, num_experts=E))
        text = run.lower(*arguments).compile().as_text()
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", text)
    assert f"f32[{B},{L},{D}]" in gathered  # the tokens
    assert not [shape for shape in gathered if f"{D},{F}]" in shape or f"{F},{D}]" in shape]
    assert "reduce-scatter(" in text


def test_all_to_all_moves_rows_alone():
    x, decision, weights = inputs("uneven")
    mesh = small_mesh({"expert": 4})
    arguments = jax.device_put((x, decision.weights, weights, decision), jax.NamedSharding(mesh, jax.P("expert")))
    with jax.set_mesh(mesh):
        run = value_and_gradients(lambda *a: expert_parallel.mixture(*a, num_experts=E, way="all_to_all"))
        text = run.lower(*arguments).compile().as_text()
    assert " all-to-all(" in text
    assert " all-gather" not in text and " reduce-scatter" not in text
    # C = T · min(K, E/S) = 8 · 2 rows from each of 4 devices to each, with their experts' numbers; no weights
    moved = set(re.findall(r"(\w+\[[\d,]*\])[^=]* all-to-all\(", text))
    assert moved == {f"f32[16,{D}]", "s32[16]"}


def test_choices_are_packed_by_device_and_overflow_is_counted():
    """Experts 0, 1 on device 0, 2, 3 on device 1; two rows for each. Token 2's second choice is the third for device 1
    (after token 0's second and token 2's first); token 1's second isn't kept and takes no room."""
    decision = Routing(
        experts=jnp.array([[0, 2], [1, 0], [3, 2]], jnp.int32),
        weights=jnp.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], jnp.float32),
        scores=jnp.ones((3, 4), jnp.float32),
        keep=jnp.array([[True, True], [True, False], [True, True]]),
    )
    found = exchange.pack(decision, mine=2, devices=2, rows=2)
    assert found.overflow == 1
    np.testing.assert_array_equal(found.plan.token, [0, 1, 0, 2])
    np.testing.assert_array_equal(found.expert, [0, 1, 0, 1])
    np.testing.assert_array_equal(found.plan.slot, [[0, 2], [1, 4], [3, 4]])
    np.testing.assert_allclose(found.plan.weight, [0.6, 0.7, 0.4, 0.8])
    spare = exchange.pack(decision, mine=2, devices=2, rows=3)  # a third place: empty for device 0, taken for 1
    assert spare.overflow == 0
    np.testing.assert_array_equal(spare.expert, [0, 1, 2, 0, 1, 0])


def test_what_overflows_is_missing_from_the_result_and_reported(monkeypatch):
    """Four tokens a device, all to expert 5: factor 2 leaves 2 · 4 · 2 / 8 = 2 rows for a pair, so tokens 2 and 3 of
    each of 8 devices find no room: 16 choices of 8 · 4 · 2. By remote copies factor 2 leaves 2 · 4 · 2 = 16 rows for a
    device, those of tokens of 5, 6, 7 and 0; those of devices 1 to 4 find none, 16 as well."""
    x, decision, weights = inputs("one_expert")
    wanted = jax.jit(expert_parallel.dense_mixture)(x, decision, weights)
    run = functools.partial(expert_parallel.mixture_and_overflow, num_experts=E, factor=2.0)
    emulated_remote.install(monkeypatch)
    with jax.set_mesh(small_mesh({"expert": 8})):
        y, overflow = jax.jit(functools.partial(run, way="all_to_all"))(x, decision, weights)
        z, as_many = jax.jit(functools.partial(run, way="remote"))(x, decision, weights)
    there = jnp.array([5, 6, 7, 0])
    assert as_many == 16 and (z[1:5] == 0).all()
    assert small.largest_difference(wanted[there], z[there]) < 1e-5
    assert overflow == 16
    assert small.largest_difference(wanted[:, :2], y[:, :2]) < 1e-5
    assert (y[:, 2:] == 0).all() and (wanted[:, 2:] != 0).any()
    tallies = routing_stats.tallies(decision, jnp.ones((B, L), bool), overflow)
    assert routing_stats.summarise(tallies)["overflow_fraction"] == 16 / 64


@pytest.mark.parametrize("devices", (2, 4))
def test_products_beside_an_exchange_leave_out_the_same_choices(devices, monkeypatch):
    """Room for 12 rows on each of four devices, which get 10, 9, 18 and 13, or 24 on each of two, which get 19 and 31:
    both ways of `remote` give the same result and gradients, and each count is right."""
    x, decision, weights = inputs("uneven")
    emulated_remote.install(monkeypatch)
    run = functools.partial(exchanged.mixture, num_experts=E, work=Work(), way="remote", factor=0.75, chunks=1)
    mesh, split = small_mesh({"expert": devices}), jax.P("expert")

    def both():
        layer = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split)
        lost = jax.jit(layer)(x, decision, weights)[1]
        found = value_and_gradients(lambda *a: layer(*a)[0])(x, decision.weights, weights, decision)
        return found, lost.sum()

    wanted, lost = both()
    emulated_remote.install_products(monkeypatch)
    monkeypatch.setattr(experts, "pick", lambda *_: "mosaic_gpu")
    found, as_many = both()
    assert lost == as_many == 7
    assert small.largest_difference(wanted, found) < 1e-5


def test_rows_for_a_pair_of_devices():
    assert exchange.rows_per_pair(None, 16, 4, mine=2, devices=4) == 16 * 2  # of 4 choices 2 can be on one device
    assert exchange.rows_per_pair(1.1, 10, 4, mine=2, devices=4) == 11
    assert exchange.rows_per_pair(9.0, 16, 4, mine=2, devices=4) == 32
    with pytest.raises(UserError, match=r"exchange_factor=0.2 leaves 0.8 rows .* give at least 0.25"):
        exchange.rows_per_pair(0.2, 4, 4, mine=2, devices=4)


def test_copies_of_expert_weights_are_not_kept_for_the_backward_pass(capsys):
    """Kept, those of all devices would be residuals of 8·E experts."""
    x, decision, weights = inputs("uneven")
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 4})):
        print_saved_residuals(
            lambda x, weights: expert_parallel.mixture(x, decision, weights, num_experts=E), x, weights
        )
    kept = re.findall(r"^\w+\[([\d,]*)\]", capsys.readouterr().out, re.MULTILINE)
    assert f"{E},{D},{F}" in kept  # the weights as they are
    assert not {f"{8 * E},{D},{F}", f"{8 * E},{F},{D}"} & set(kept)


def test_choices_of_other_devices_are_left_out_and_mine_are_renumbered():
    """Of choices 0, 3 | 2, 1, experts 2 and 3 are here: 3 becomes 1 and 2 becomes 0."""
    experts = jnp.array([[0, 3], [2, 1]], jnp.int32)
    ones = jnp.ones((2, 2), jnp.float32)
    decision = Routing(experts, ones, jnp.ones((2, 4), jnp.float32), jnp.ones((2, 2), bool))
    mine = exchange.local_experts(decision, jnp.int32(2), 2)
    np.testing.assert_array_equal(mine.keep, [[False, True], [True, False]])
    np.testing.assert_array_equal(mine.experts, [[0, 1], [0, 0]])


def test_what_cannot_be_meant_is_one_line():
    with pytest.raises(UserError, match="8 experts can't be shared evenly by the 3 devices"):
        exchange.check_experts(8, 3)
    moe = dataclasses.replace(small.ROUTERS["top_k"], exchange="telepathy")
    with pytest.raises(UserError, match=r"moe\.exchange='telepathy' does not exist; there is gather, all_to_all, rag"):
        config_checks.check_moe(moe)
    with pytest.raises(UserError, match=r"moe\.exchange_factor=2\.0 does nothing with exchange=None"):
        config_checks.check_moe(dataclasses.replace(small.ROUTERS["top_k"], exchange_factor=2.0))
    with pytest.raises(UserError, match=r"'all_to_all' can't move rows of moejax\.routing:expert_choice"):
        config_checks.check_moe(dataclasses.replace(small.ROUTERS["expert_choice"], exchange="all_to_all"))
    x, decision, weights = inputs("expert_choice")
    with jax.set_mesh(small_mesh({"expert": 8})):
        for way in ("all_to_all", "remote"):
            with pytest.raises(UserError, match=f"exchange='{way}' can't move rows of expert choice"):
                expert_parallel.mixture(x, decision, weights, num_experts=E, way=way)
        x, decision, weights = inputs("uneven")
        with pytest.raises(UserError, match=r"'remote' can't move float32 rows of width 8 on cpu: .*; give 'gat"):
            expert_parallel.mixture(x, decision, weights, num_experts=E, way="remote")
    assert exchange.rows_received(None, 16, 4, mine=2, devices=4) == 4 * 16 * 2
    assert exchange.rows_received(1.1, 10, 2, mine=4, devices=2) == 22
    assert exchange.rows_received(9.0, 10, 2, mine=4, devices=2) == 40
    with pytest.raises(UserError, match=r"exchange_factor=0.1 leaves 0.8 rows for a device.* give at least 0.125"):
        exchange.rows_received(0.1, 4, 2, mine=2, devices=2)


@functools.lru_cache
def step_on(sizes: tuple[tuple[str, int], ...], router: str, way: str | None, chunks: int = 1):
    """Loss, gradients, counts, biases after the rule and overflow of one step of the small model."""
    settings = small.config(dataclasses.replace(small.ROUTERS[router], exchange=way, exchange_chunks=chunks))
    model, (_, variables) = LM(settings.model), small.initialised(router)
    moe = settings.model.moe
    assert moe is not None

    def run(params, router_state, batch):
        state = train_step.TrainState(jnp.int32(0), params, router_state, None, None)
        grads, sums = train_step.gradients(state, batch, jax.random.key(0), model=model, moe=moe, microbatches=1)
        tallies = sums["tallies"]
        biases = train_step.moved_biases(router_state, tallies["selected"], 0.01)
        return sums["total_loss"], grads, tallies["selected"], biases, tallies.get("overflow")

    mesh = small_mesh(dict(sizes))
    params = jax.device_put(
        variables["params"], train_step.state_shardings(model, optimizer.make(settings.optimizer), mesh).params
    )
    router_state = jax.device_put(variables.get("router_state", {}), sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        batch = train_step.to_devices(small.batch(padded=3), sharding.batch_sharding(mesh))
        return jax.tree.map(np.asarray, jax.jit(run)(params, router_state, batch))
