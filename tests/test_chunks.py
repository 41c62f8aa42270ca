"""Tokens exchanged in chunks: the results of one device, the order of what runs, and counts of what has no room."""

import dataclasses
import functools
import re

import emulated_ragged
import emulated_remote
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_exchange import E, inputs, small_mesh, value_and_gradients

from moejax import config_checks, exchanged, expert_parallel
from moejax.errors import UserError


def emulate(way: str, monkeypatch) -> None:
    for name, emulated in (("remote", emulated_remote), ("ragged", emulated_ragged)):
        if way == name:
            emulated.install(monkeypatch)


@pytest.mark.parametrize(
    ("way", "sizes", "kind", "chunks"),
    [
        ("gather", {"expert": 4}, "uneven", 4),
        ("gather", {"fsdp": 2, "expert": 2}, "expert_choice", 2),
        ("all_to_all", {"data": 2, "expert": 2}, "uneven", 4),
        ("ragged", {"expert": 2, "tensor": 2}, "uneven", 2),
        pytest.param("ragged", {"expert": 4}, "one_expert", 4, marks=pytest.mark.long),
        ("remote", {"fsdp": 2, "expert": 4}, "uneven", 4),  # a row of 4 tokens a device: one token is a chunk
        pytest.param("remote", {"expert": 4}, "one_token", 8, marks=pytest.mark.long),
    ],
)
def test_every_way_in_chunks_equals_the_dense_oracle_in_values_and_gradients(way, sizes, kind, chunks, monkeypatch):
    emulate(way, monkeypatch)
    x, decision, weights = inputs(kind)
    arguments = (x, decision.weights, weights, decision)
    (_, wanted), wanted_grads = value_and_gradients(expert_parallel.dense_mixture)(*arguments)
    layer = value_and_gradients(lambda *a: expert_parallel.mixture(*a, num_experts=E, way=way, chunks=chunks))
    with jax.set_mesh(small_mesh(sizes)):
        (_, y), grads = layer(*arguments)
    assert small.largest_difference(wanted, y) < 1e-5
    assert small.largest_difference(wanted_grads, grads) < 1e-5


def test_a_bound_is_of_a_chunk_and_what_finds_no_room_is_counted_over_all(monkeypatch):
    """Four tokens of each of 8 devices, all to expert 5, in two chunks of two. all_to_all by factor 4: 4 · 2 · 2 / 8 =
    2 rows for a pair: all find room; factor 2 leaves 1 row, for the first token of each chunk: 16 of 32 are lost.
    ragged and remote by factor 2: 2 · 2 · 2 = 8 of the 16 rows of a chunk, those of devices 0 to 3 and, nearest to
    expert 5's first, 5, 6, 7 and 0: again 16."""
    x, decision, weights = inputs("one_expert")
    wanted = jax.jit(expert_parallel.dense_mixture)(x, decision, weights)
    emulated_ragged.install(monkeypatch)
    emulated_remote.install(monkeypatch)

    def run(way, factor):
        layer = functools.partial(expert_parallel.mixture_and_overflow, num_experts=E, chunks=2, way=way, factor=factor)
        with jax.set_mesh(small_mesh({"expert": 8})):
            return jax.jit(layer)(x, decision, weights)

    y, overflow = run("all_to_all", 4.0)
    assert overflow == 0 and small.largest_difference(wanted, y) < 1e-5
    y, overflow = run("all_to_all", 2.0)
    assert overflow == 16 and (y[:, 1::2] == 0).all()
    assert small.largest_difference(wanted[:, ::2], y[:, ::2]) < 1e-5
    for way, there, lost in ("ragged", [0, 1, 2, 3], [4, 5, 6, 7]), ("remote", [5, 6, 7, 0], [1, 2, 3, 4]):
        y, overflow = run(way, 2.0)
        assert overflow == 16 and (y[jnp.array(lost)] == 0).all()
        assert small.largest_difference(wanted[jnp.array(there)], y[jnp.array(there)]) < 1e-5


class Recorder(exchanged.Way):
    """Adds what is called to every value that depends on it."""

    def plan(self, x, decision):
        return {f"x{decision}"}, decision

    def send(self, out, state):
        assert state < 2 or f"done{state - 2}" in out
        return {f"came{state}", *out}

    def all_there(self, values):
        done, *others = values
        everything = done.union(*(value for some in others for value in some))
        return everything, *([everything for _ in some] for some in others)

    def work(self, came, state):
        before = [f"done{i}" for i in range(state)] + [f"home{i}" for i in range(state - 1)]
        assert {name for name in came if name[0] != "x"} == {*before, *(f"came{i}" for i in range(state + 1))}
        return {f"done{state}", *came}

    def fetch(self, done, state):
        assert f"done{state}" in done and f"done{state + 1}" not in done
        return {f"home{state}", *done}

    def finish(self, home, state):
        return home, None


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_what_crosses_beside_the_work_on_a_chunk_neither_needs_it_nor_is_needed_by_it(chunks):
    """Work on i needs all that was worked on before, and fetched of it up to i − 2: not that i − 1 is fetched, nor that
    i + 1 is sent, which itself needs work up to i − 1 alone (asserted where it is called)."""
    way = Recorder({}, 0, None)  # type: ignore[arg-type]
    results = exchanged.pipelined(way, [(None, i) for i in range(chunks)])
    for i, (needs, _) in enumerate(results):
        assert {f"x{i}", f"came{i}", f"done{i}", f"home{i}"} <= needs


@pytest.mark.parametrize(
    ("way", "moved", "shape", "count"), [("gather", "all-gather", "4,2,8", 4), ("all_to_all", "all-to-all", "4,8", 8)]
)
def test_every_chunk_has_collectives_of_its_own(way, moved, shape, count):
    """2 rows of 4 tokens a device in 4 chunks of 2 tokens: all of 4 devices' 2 tokens are gathered, and 2 · min(2, 2)
    rows go from each of them to each, there and back. XLA has not made one collective of them."""
    x, decision, weights = inputs("uneven")
    mesh = small_mesh({"expert": 4})
    arguments = jax.device_put((x, decision, weights), jax.NamedSharding(mesh, jax.P("expert")))
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(expert_parallel.mixture, num_experts=E, way=way, chunks=4))
        text = run.lower(*arguments).compile().as_text()
    assert len(re.findall(rf"= \(?f32\[{shape}\][^=]* {moved}(?:-start)?\(", text)) == count


def test_chunks_that_cannot_be_meant_are_one_line():
    moe = dataclasses.replace(small.ROUTERS["top_k"], exchange_chunks=0)
    with pytest.raises(UserError, match=r"config\.model\.moe\.exchange_chunks=0 must be at least 1"):
        config_checks.check_moe(moe)
    with pytest.raises(UserError, match=r"exchange_chunks=3 does not divide the 2 rows of 4 tokens .* divisor of 8"):
        exchanged.check_chunks(3, 2, 4)
    with pytest.raises(UserError, match=r"exchange_chunks=4 does not divide the 2 rows .* whole in expert choice"):
        exchanged.check_chunks(4, 2, 4, token_choice=False)
    x, decision, weights = inputs("uneven")
    with jax.set_mesh(small_mesh({"expert": 4})):
        with pytest.raises(UserError, match="exchange_chunks=5 does not divide"):
            expert_parallel.mixture(x, decision, weights, num_experts=E, way="gather", chunks=5)
        with pytest.raises(UserError, match=r"exchange_factor=0.3 leaves 0.3 rows for a pair of devices, of 2 tokens"):
            expert_parallel.mixture(x, decision, weights, num_experts=E, way="all_to_all", chunks=4, factor=0.3)


def test_without_an_expert_axis_chunks_change_nothing():
    """Nothing is exchanged: the same config runs on one device, whatever divides."""
    x, decision, weights = inputs("uneven")
    run = jax.jit(functools.partial(expert_parallel.mixture, num_experts=E, chunks=7))
    with jax.set_mesh(small_mesh({"data": 2})):
        assert np.isfinite(np.asarray(run(x, decision, weights))).all()
