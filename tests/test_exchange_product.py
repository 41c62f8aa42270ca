"""A training step by every way of exchange, on every mesh, with every router, is that of one device."""

import itertools

import emulated_ragged
import emulated_remote
import jax
import numpy as np
import pytest
import small
from test_exchange import step_on

MESHES = ((("data", 2), ("expert", 4)), (("expert", 8),), (("fsdp", 4), ("expert", 2)), (("expert", 4), ("tensor", 2)))
EIGHT_EXPERTS = ("top_k", "aux_free")
ROUTERS = tuple(name for name in small.ROUTERS if name != "dense")
WAYS = ("gather", "all_to_all", "ragged", "remote")
TRIED = ((MESHES[0], "aux_free", "gather"), (MESHES[3], "top_k", "ragged"))  # by every run of the suite


def product():
    """(mesh, router, way, chunks): every way on every mesh with two routers, with every router on 2 × 4 and, of the
    rest, wherever experts divide; in one chunk and in two by turns, of ways and of routers."""
    for mesh, (i, router), (j, way) in itertools.product(MESHES, enumerate(ROUTERS), enumerate(WAYS)):
        if way != "gather" and router == "expert_choice":
            continue  # a mistake of the user
        if dict(mesh)["expert"] == 8 and router not in EIGHT_EXPERTS:
            continue  # four experts
        # a device of 8 has one row of the batch, which expert choice leaves whole
        chunks = 1 if router == "expert_choice" else 1 + (i + j) % 2
        seldom = () if (mesh, router, way) in TRIED else (pytest.mark.long,)
        yield pytest.param(mesh, router, way, chunks, marks=(pytest.mark.slow, *seldom))


@pytest.mark.parametrize(("mesh", "router", "way", "chunks"), list(product()))
def test_a_step_is_that_of_one_device(mesh, router, way, chunks, monkeypatch):
    """Loss and gradients of all parameters to 1e-5; counts and biases, moved by signs, exactly; nothing overflows."""
    emulated_ragged.install(monkeypatch)
    emulated_remote.install(monkeypatch)
    loss, grads, counts, bias, _ = step_on((("data", 1),), router, None)
    found = step_on(mesh, router, way, chunks)
    assert small.largest_difference((loss, grads), found[:2]) < 1e-5
    np.testing.assert_array_equal(counts, found[2])
    jax.tree.map(np.testing.assert_array_equal, bias, found[3])
    if way != "gather":
        np.testing.assert_array_equal(found[4], [0, 0])
