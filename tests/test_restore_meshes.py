"""A checkpoint from any mesh restores onto any other: parameters, router state, optimizer state and loads."""

import functools
import itertools

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec

from moejax import beginning, checkpoint, optimizer, sharding
from moejax.models.lm import LM
from moejax.train_step import init, state_shardings

MESHES = ((1, 1), (2, 4), (4, 2), (8, 1))  # (fsdp, expert)
SETTINGS = small.config(small.ROUTERS["aux_free"])
MODEL, TX = LM(SETTINGS.model), optimizer.make(SETTINGS.optimizer)


@functools.cache
def shardings(sizes):
    fsdp, expert = sizes
    return state_shardings(MODEL, TX, sharding.make_mesh({"fsdp": fsdp, "expert": expert}))


@functools.cache
def wanted():
    """A state in which no two entries of an array are equal, so none can stand in another's place; step 7."""
    shapes = jax.eval_shape(functools.partial(init, MODEL, TX), jax.random.key(0))
    seeds = itertools.count(1)

    def fill(leaf):
        values = np.arange(leaf.size) + next(seeds) * 100_000  # exact in float32: below 2^24
        return values.astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir for each mesh with the checkpoint of a state that lay on it."""
    folders = {sizes: tmp_path_factory.mktemp("from") for sizes in MESHES}
    for sizes, folder in folders.items():
        state = jax.device_put(wanted(), shardings(sizes))
        with checkpoint.Checkpointer(folder) as saver:
            trees = {name: getattr(state, name) for name in beginning.TREES}
            saver.save(7, trees, data={"content_hash": "c"}, config={})
    return folders


@pytest.mark.parametrize(("before", "now"), list(itertools.permutations(MESHES, 2)))
def test_any_mesh_restores_onto_any(saved, before, now):
    found = beginning.restore(saved[before], wanted(), shardings(now), "c")
    assert int(found.step) == 7
    assert jax.tree.structure(found) == jax.tree.structure(wanted())
    for name in beginning.TREES:
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(wanted(), name))
        jax.tree.map(lambda a, place: check_place(a, place, now), getattr(found, name), getattr(shardings(now), name))


def check_place(array, place, sizes):
    assert array.sharding == place
    assert len(array.sharding.device_set) == sizes[0] * sizes[1]


@pytest.mark.parametrize("sizes", MESHES)
def test_experts_and_their_moments_lie_in_pieces(sizes):
    """A gate (2 layers, E 8, D 32, F 16) over expert and fsdp: (2, 8/expert, 32/fsdp, 16) on each device."""
    fsdp, expert = sizes
    state = shardings(sizes)
    moments = [place for path, place in jax.tree_util.tree_leaves_with_path(state.opt_state) if "'gate'" in str(path)]
    gates = [state.params["layers"]["moe"]["gate"], *(moment for moment in moments if len(moment.spec) == 4)]
    assert len(gates) == 3  # the parameter, and AdamW's two moments
    for place in gates:
        assert place.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
        assert place.shard_shape((2, 8, 32, 16)) == (2, 8 // expert, 32 // fsdp, 16)
