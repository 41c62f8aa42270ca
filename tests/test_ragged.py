"""The ragged exchange: its places against plain loops, and end to end by an emulated ragged_all_to_all."""

import functools

import emulated_ragged
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exchange import E, inputs, small_mesh, value_and_gradients

from moejax import expert_parallel, ragged
from moejax.errors import UserError

counts_and_room = st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(0, 4), min_size=n[0] * n[1], max_size=n[0] * n[1]), min_size=n[0], max_size=n[0]),
        st.integers(0, 30),
    )
)


def exchanged(rows: list[list], counts: np.ndarray, room: int) -> tuple[list[list], list[list]]:
    """Every device's rows sorted by expert, to their experts' devices and home again: (what comes, what comes back)."""
    S = len(rows)
    all_places = [jax.tree.map(np.asarray, ragged.places(jnp.asarray(counts), me, room)) for me in range(S)]
    each = counts.shape[1] // S
    came, back = [[None] * room for _ in rows], [[None] * len(own) for own in rows]
    for me, places in enumerate(all_places):
        for i, (first, size, to) in enumerate(zip(places.home, places.sent, places.there, strict=True)):
            for n in range(size):
                assert came[i // each][to + n] is None  # no two rows in one place
                came[i // each][to + n] = rows[me][first + n]
            assert all_places[i // each].came[me * each + i % each] == size
            assert all_places[i // each].here[me * each + i % each] == to
    for me, places in enumerate(all_places):
        for i, (first, size, to) in enumerate(zip(places.here, places.came, places.back, strict=True)):
            for n in range(size):
                back[i // each][to + n] = came[me][first + n]
            assert all_places[i // each].sent[me * each + i % each] == size
    for me, places in enumerate(all_places):
        sizes = np.cumsum(places.group_sizes)
        assert [row[1] for row in came[me][: sizes[-1]]] == [
            me * each + int(np.searchsorted(sizes, n, side="right")) for n in range(sizes[-1])
        ]
        assert came[me][sizes[-1] :] == [None] * (room - sizes[-1])
        assert places.overflow == sum(row is None for row in back[me])
    return came, back


@given(counts_and_room)
@settings(deadline=None, max_examples=25)
def test_rows_come_sorted_by_expert_and_return_where_they_were(case):
    """Of any counts, in any room: a row is (device, expert, which). What has no room is counted by its sender, and what
    a device can't take is no more than what it is sent beyond its room."""
    counts, room = np.array(case[0], np.int32), case[1]
    S, _ = counts.shape
    rows = [[(me, e, n) for e, count in enumerate(own) for n in range(count)] for me, own in enumerate(counts)]
    came, back = exchanged(rows, counts, room)
    for own, returned in zip(rows, back, strict=True):
        assert all(row in (None, mine) for mine, row in zip(own, returned, strict=True))
    for_device = counts.reshape(S, S, -1).sum(axis=(0, 2))
    assert [sum(row is not None for row in device) for device in came] == list(np.minimum(for_device, room))


def test_places_by_hand():
    """Two devices of two experts. Device 0 has 1, 0, 2, 1 rows for experts 0 to 3, device 1 has 2, 1, 0, 3. To device 1
    come, by expert and source, 2 0 1 3 of experts 2, 2, 3, 3: from places 0, 2, 2, 3. There is room for five of six."""
    counts = jnp.array([[1, 0, 2, 1], [2, 1, 0, 3]], jnp.int32)
    found = ragged.places(counts, 1, 5)
    np.testing.assert_array_equal(found.home, [0, 2, 3, 3])
    np.testing.assert_array_equal(found.sent, [2, 1, 0, 2])
    np.testing.assert_array_equal(found.there, [1, 3, 2, 3])  # expert 0: after device 0's one
    np.testing.assert_array_equal(found.came, [2, 1, 0, 2])  # experts 2, 3 of device 0, then of device 1
    np.testing.assert_array_equal(found.here, [0, 2, 2, 3])
    np.testing.assert_array_equal(found.back, [1, 3, 3, 3])
    np.testing.assert_array_equal(found.group_sizes, [2, 3])
    assert found.overflow == 1


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [({"data": 2, "expert": 4}, "uneven"), ({"expert": 8}, "one_expert"), ({"expert": 2, "tensor": 2}, "uneven"),
     ({"expert": 4}, "one_token")],
)  # fmt: skip
def test_emulated_it_equals_the_dense_oracle_in_values_and_gradients(sizes, kind, monkeypatch):
    emulated_ragged.install(monkeypatch)
    x, decision, weights = inputs(kind)
    arguments = (x, decision.weights, weights, decision)
    (_, wanted), wanted_grads = value_and_gradients(expert_parallel.dense_mixture)(*arguments)
    layer = value_and_gradients(lambda *a: expert_parallel.mixture(*a, num_experts=E, way="ragged"))
    with jax.set_mesh(small_mesh(sizes)):
        (_, y), grads = layer(*arguments)
    assert small.largest_difference(wanted, y) < 1e-5
    assert small.largest_difference(wanted_grads, grads) < 1e-5


def test_what_overflows_is_missing_from_the_result_and_reported(monkeypatch):
    """All 32 tokens of 8 devices to expert 5, factor 2: room for 2 · 4 · 2 = 16 rows, those of devices 0 to 3."""
    emulated_ragged.install(monkeypatch)
    x, decision, weights = inputs("one_expert")
    wanted = jax.jit(expert_parallel.dense_mixture)(x, decision, weights)
    run = functools.partial(expert_parallel.mixture_and_overflow, num_experts=E, factor=2.0, way="ragged")
    with jax.set_mesh(small_mesh({"expert": 8})):
        y, overflow = jax.jit(run)(x, decision, weights)
    assert overflow == 16
    assert small.largest_difference(wanted[:4], y[:4]) < 1e-5
    assert (y[4:] == 0).all() and (wanted[4:] != 0).any()


def test_what_cannot_be_meant_is_one_line():
    x, decision, weights = inputs("uneven")
    with (
        jax.set_mesh(small_mesh({"expert": 8})),
        pytest.raises(UserError, match="'ragged' is XLA's ragged_all_to_all, which cpu doesn't have: give 'gather' or"),
    ):
        expert_parallel.mixture(x, decision, weights, num_experts=E, way="ragged")
