"""The Hopper kernels: in the interpreter with its race detector on a CPU, and on a GPU (`pytest -m gpu`)."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.grouped_matmul import group_metadata, grouped_matmul, hopper, mosaic_gpu, schedule, tilings
from pallas_kernels.grouped_matmul.hopper import Tiling

# the interpreter multiplies poisoned rows in numpy, which says so
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow).* encountered in matmul:RuntimeWarning")

TWO_BLOCKS = Tiling(stages=5, pieces=4, blocks=2), Tiling(stages=6, pieces=2, blocks=2)


def operands(sizes, M, K, N, seed=0, dtype=jnp.bfloat16):
    """lhs, rhs, grad; NaN or infinity in the rows past the sum."""
    rng = np.random.default_rng(seed)
    lhs, grad = rng.normal(size=(M, K)), rng.normal(size=(M, N))
    lhs[sum(sizes) :], grad[sum(sizes) :] = np.nan, np.inf
    return tuple(jnp.asarray(x, dtype) for x in (lhs, rng.normal(size=(len(sizes), K, N)), grad))


def exact(lhs, rhs, grad, sizes):
    """out, dlhs, drhs in float64, by a loop."""
    lhs, rhs, grad = (np.asarray(x.astype(jnp.float32), np.float64) for x in (lhs, rhs, grad))
    out, dlhs, drhs = np.zeros(grad.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    ends = np.cumsum(sizes)
    for g, rows in enumerate(map(slice, ends - sizes, ends)):
        out[rows], dlhs[rows], drhs[g] = lhs[rows] @ rhs[g], grad[rows] @ rhs[g].T, lhs[rows].T @ grad[rows]
    return out, dlhs, drhs


def assert_close(got, want, bound=3e-3):
    """Relative to the whole: rounding a result to bfloat16 is 1.7e-3."""
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def interpreted(function, capfd, detect_races=True):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        result = jax.block_until_ready(function())
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    return result


# 70 | 0 | 51: a whole tile's half and a part, an empty group, unaligned starts, 7 rows past the sum; with 70 + 51 rows
# the second group's tile starts at row 64. 3 | 5 | 60: groups within one group of eight. M = 99: off the eight.
# 128 | 24 | 56 | 88: a tile each, of which 128, 32, 64 and 96 rows are loaded.
@pytest.mark.parametrize(
    "sizes, M, N, dtype, one_warp",
    [
        ((70, 0, 51), 128, 256, jnp.bfloat16, True),
        ((3, 5, 60), 128, 192, jnp.bfloat16, True),
        ((0, 99, 0), 99, 128, jnp.bfloat16, True),
        ((40, 60), 128, 64, jnp.float16, False),
        ((128, 24, 56, 88), 296, 128, jnp.bfloat16, True),
    ],
)
def test_forward(sizes, M, N, dtype, one_warp, capfd):
    lhs, rhs, grad = operands(sizes, M, 128, N, dtype=dtype)
    sizes = np.array(sizes, np.int32)
    metadata = group_metadata(jnp.asarray(sizes), M)
    tiles = dataclasses.replace(TWO_BLOCKS[0], one_warp=one_warp)
    out = interpreted(lambda: mosaic_gpu.forward(lhs, rhs, jnp.asarray(sizes), metadata, False, dtype, tiles), capfd)
    want = exact(lhs, rhs, grad, sizes)[0]
    assert_close(out, want)
    assert (np.asarray(out[sizes.sum() :].astype(jnp.float32)) == 0).all()


@jax.jit  # traced once for all sizes
def value_and_gradients_interpreted(lhs, rhs, grad, sizes):
    product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_gpu")
    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(grad)


@st.composite
def group_sizes(draw, E=3, M=126):
    """Sizes of E groups, summing to at most M: cuts of [0, M], some of them equal."""
    return np.diff([0, *sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))]).astype(np.int32)


@pytest.mark.slow
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=group_sizes())
@example(sizes=np.array([0, 70, 51], np.int32))
@example(sizes=np.array([126, 0, 0], np.int32))
@example(sizes=np.array([1, 2, 0], np.int32))
@example(sizes=np.array([0, 0, 0], np.int32))
def test_gradients_through_the_public_function(sizes, capfd):
    """M off the eight; NaN and infinity past the sum."""
    args = operands(sizes, 126, 128, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_gpu, "_hopper", lambda: True)
        patch.setattr(tilings, "pick", lambda op, *_: TWO_BLOCKS[op == "drhs"])
        got = interpreted(lambda: value_and_gradients_interpreted(*args, jnp.asarray(sizes)), capfd)
    for ours, want in zip(got, exact(*args, sizes), strict=True):
        assert_close(ours, want)
    assert not np.any(np.asarray(got[2])[sizes == 0])
    assert not np.any(np.asarray(got[0])[sizes.sum() :]) and not np.any(np.asarray(got[1])[sizes.sum() :])


def test_transposed_weights_are_read_as_they_lie(capfd):
    """384 columns: a pair of 128 each and a last one of 64 each."""
    sizes = np.array([70, 0, 51], np.int32)
    lhs, rhs, grad = operands(sizes, 128, 64, 384)
    metadata = group_metadata(jnp.asarray(sizes), 128)
    turned = jnp.swapaxes(rhs, 1, 2)
    out = interpreted(
        lambda: mosaic_gpu.forward(lhs, turned, jnp.asarray(sizes), metadata, True, jnp.float32, TWO_BLOCKS[0]), capfd
    )
    assert out.dtype == jnp.float32
    assert_close(out, exact(lhs, rhs, grad, sizes)[0], 1e-5)


def test_few_rows_make_small_tiles(capfd):
    """9 rows over 3 groups: tiles of 32, of which the 16 that hold all rows are loaded."""
    sizes = np.array([3, 0, 5], np.int32)
    lhs, rhs, grad = operands(sizes, 9, 192, 192)
    metadata = group_metadata(jnp.asarray(sizes), 9)
    tiles = Tiling(stages=7, pieces=2, blocks=2)
    args = lhs, rhs, jnp.asarray(sizes), metadata, False, jnp.bfloat16, tiles
    out = interpreted(lambda: mosaic_gpu.forward(*args), capfd)
    assert_close(out, exact(lhs, rhs, grad, sizes)[0])


def test_tile_rows_by_hand():
    # 2, 16, 32, 128, 128 and 250 rows a group
    cases = (16, 8), (512, 32), (2048, 64), (1024, 8), (2048, 16), (1000, 4)
    assert [schedule.tile_rows(*case) for case in cases] == [32, 64, 128, 128, 192, 192]


def test_heights_by_hand():
    # 64s in tiles of three and of two; a single one has a tile of two
    units = [0, 1, 2, 3, 4, 5, 6, 7, 12, 22]
    want = [(0, 0), (0, 1), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (1, 2), (4, 0), (6, 2)]
    assert [schedule.heights(n) for n in units] == want
    high, low = schedule.heights(jnp.array(units), jnp.minimum)
    np.testing.assert_array_equal(np.stack([high, low], 1), want)


def test_tall_row_tiles_by_hand():
    # rows 0-129: three 64s; none; 130-629: eight, from row 128 on; 630-639, nobody's: one from 624 on
    sizes = jnp.array([130, 0, 500], jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    counts, tiles = schedule.row_tiles(ends - sizes, ends, 640)
    np.testing.assert_array_equal(counts, [3, 2])
    np.testing.assert_array_equal(
        tiles[:3], [[0, 0, 0, 130, 0, 1, 0], [2, 16, 2, 192, 1, 2, 2], [2, 40, 0, 192, 1, 2, 2]]
    )
    low = tiles[-schedule.most_low(3) :]
    np.testing.assert_array_equal(low[:2], [[2, 64, 0, 118, 0, 1, 2], [3, 78, 6, 16, 1, 1, 3]])


def test_an_infinity_stays_in_its_group(capfd):
    """Rows 0-69 | none | 70-120: both groups have rows in stages of the other's."""
    sizes = np.array([70, 0, 51], np.int32)
    lhs, _, grad = operands(sizes, 128, 64, 64)
    lhs, grad = lhs.at[70:121].set(jnp.inf), grad.at[70:121].set(jnp.nan)
    metadata = group_metadata(jnp.asarray(sizes), 128)
    out = interpreted(
        lambda: mosaic_gpu.drhs(lhs, grad, jnp.asarray(sizes), metadata, jnp.bfloat16, TWO_BLOCKS[1]), capfd
    )
    first, second = (np.asarray(x.astype(jnp.float32), np.float64)[:70] for x in (lhs, grad))
    assert_close(out[0], first.T @ second)
    assert (out[1] == 0).all()
    assert np.isnan(np.asarray(out[2].astype(jnp.float32))).all()


def test_a_weight_gradient_by_two_clusters(capfd):
    """Six tiles, three rounds, by four blocks; the largest group comes first, the empty one last."""
    sizes = np.array([51, 0, 70], np.int32)
    lhs, rhs, grad = operands(sizes, 128, 128, 384)
    metadata = group_metadata(jnp.asarray(sizes), 128)
    tiles = dataclasses.replace(TWO_BLOCKS[1], blocks=4)
    out = interpreted(lambda: mosaic_gpu.drhs(lhs, grad, jnp.asarray(sizes), metadata, jnp.bfloat16, tiles), capfd)
    assert_close(out, exact(lhs, rhs, grad, sizes)[2])
    assert (np.asarray(out[1].astype(jnp.float32)) == 0).all()


def test_a_weight_gradient_of_rows_in_two_arrays(capfd):
    """Groups of which one array or the other has none, a part of a stage, or several stages; NaN past each sum."""
    first, second = np.array([51, 0, 0, 9], np.int32), np.array([70, 40, 0, 3], np.int32)
    parts = [
        (sizes, *operands(sizes, M, 64, 128, seed)) for seed, (sizes, M) in enumerate([(first, 68), (second, 128)])
    ]
    given = [(lhs, grad, group_metadata(jnp.asarray(sizes), len(lhs), tail=False)) for sizes, lhs, _, grad in parts]
    out = interpreted(lambda: mosaic_gpu.drhs_of(given, jnp.bfloat16, TWO_BLOCKS[1]), capfd)
    assert_close(out, sum(exact(lhs, rhs, grad, sizes)[2] for sizes, lhs, rhs, grad in parts))
    assert (np.asarray(out[2].astype(jnp.float32)) == 0).all()


def test_row_tiles_by_hand():
    # rows 0-129 | none | 130-299, then 20 rows of nobody: tiles of 128 from rows 0, 128 | 128 (130 down to an eight),
    # 256 | 296 (300 down to an eight)
    sizes = jnp.array([130, 0, 170], jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    count, tiles = schedule.row_tiles(ends - sizes, ends, 320)
    assert count == 5
    np.testing.assert_array_equal(
        tiles[:5],
        [
            [0, 0, 0, 128, 0, 2, 0],
            [0, 16, 0, 2, 0, 2, 0],
            [2, 16, 2, 128, 2, 2, 0],
            [2, 32, 0, 44, 2, 2, 0],
            [3, 37, 4, 24, 4, 1, 0],
        ],
    )


def lists_of(counts, tiles, E):
    """The lists that row_tiles gives: one, or the tall ones and the low ones."""
    tiles = np.asarray(tiles)
    starts = (0, len(tiles) - schedule.most_low(E))[: len(counts)]
    ends = (starts[1] if len(counts) == 2 else len(tiles), len(tiles))
    for count, start, end in zip(counts, starts, ends, strict=False):
        assert count <= end - start
    return [tiles[start : start + int(count)] for start, count in zip(starts, counts, strict=True)]


def drawn(seed, E=9):
    """Sizes of E groups, and M: of few rows, whose tiles are of 64 or 32, of some, or of many."""
    rng = np.random.default_rng(seed)
    M = int(rng.integers(*((1, 200), (200, 192 * E), (192 * E + 1, 9000))[seed % 3]))
    return rng.multinomial(rng.integers(0, M + 1), rng.dirichlet(np.full(E, 0.3))).astype(np.int32), M


@pytest.mark.parametrize("seed", range(6))
def test_row_tiles_cover_every_row_once(seed):
    sizes, M = drawn(seed)
    ends = np.cumsum(sizes)
    counts, tiles = schedule.row_tiles(jnp.asarray(ends - sizes, jnp.int32), jnp.asarray(ends, jnp.int32), M)
    assert len(counts) == (2 if M > 192 * 9 else 1)
    owner = np.full(M, -1)
    for one in lists_of(counts, tiles, 9):
        for group, eighth, start, stop, sweep, size, _ in one:
            assert 0 <= start < stop <= schedule.TALL
            rows = slice(eighth * 8 + start, eighth * 8 + stop)
            assert (owner[rows] == -1).all()
            owner[rows] = group
            assert 1 <= size <= schedule.WIDTH
            assert set(one[sweep : sweep + size, 0]) == {group}
    np.testing.assert_array_equal(owner, np.repeat(np.arange(10), [*sizes, M - sizes.sum()]))


@pytest.mark.parametrize("clusters", [1, 2, 5])
@pytest.mark.parametrize("N", [192, 768, 128, 640])
def test_tall_and_low_tiles_are_dealt_evenly_and_in_order(clusters, N, monkeypatch):
    """Every row's every column once, groups in their order, no two clusters more than a tall tile apart. Both blocks of
    a cluster go through as many stages, also where they have rows of their own (128 and 640 columns)."""
    sizes, M = drawn(5)
    ends = np.cumsum(sizes)
    counts, tiles = schedule.row_tiles(jnp.asarray(ends - sizes, jnp.int32), jnp.asarray(ends, jnp.int32), M)
    taken, loads = np.zeros((M, N), int), []
    for cluster, pair in itertools.product(range(clusters), range(2)):
        at = {"block": jnp.int32(cluster), "pair": jnp.int32(pair)}
        monkeypatch.setattr(hopper.lax, "axis_index", at.get)
        columns, rounds = -(-N // 256), Tiling(4, 4, blocks=2 * clusters)
        heights, (mine, state, take) = hopper.walk_rows(rounds, counts, tiles, 192, 9, columns, N)
        assert heights == (192, 128)
        load, leads, groups = 0, [], []
        for _ in range(int(mine)):
            tile, state = take(state)
            leads.append(int(tile.lead))
            groups.append(int(tile.group))

            def body(first, width, tile=tile):
                taken[tile.row * 8 + tile.start : tile.row * 8 + tile.stop, int(first) : int(first) + width] += 1

            monkeypatch.setattr(hopper.pl, "when", lambda condition: lambda some: condition and some())
            hopper.place_columns(tile, heights, N, body)
            load += 3 if tile.tall else 2
        assert pair == 0 or groups == sorted(groups)  # a pair of two groups has the place of its second
        loads.append((load, leads))
    assert (taken == 1).all()
    assert loads[::2] == loads[1::2]
    assert max(loads)[0] - min(loads)[0] <= 3


class Table:
    """An array that refuses indices outside of it, negative ones too."""

    def __init__(self, values):
        self._values, self.shape = np.asarray(values), values.shape

    def __getitem__(self, at):
        assert all(0 <= int(i) < n for i, n in zip(np.atleast_1d(at), self.shape, strict=True))
        return jnp.asarray(self._values[at])


@pytest.mark.parametrize("sizes", [(200, 220, 210, 207), (70, 0, 203, 560), (0, 0, 0, 0)])
@pytest.mark.parametrize("N", [192, 384])
def test_no_turn_reads_outside_the_table(sizes, N, monkeypatch):
    """Nor the one after the last, which is read ahead; of the first sizes no tile is tall, some clusters have none."""
    ends = np.cumsum(sizes)
    starts, ends = jnp.asarray(ends - sizes, jnp.int32), jnp.asarray(ends, jnp.int32)
    counts, tiles = schedule.row_tiles(starts, ends, 837, tail=False)
    assert (int(counts[0]) > 0) == (560 in sizes)
    for cluster, pair in itertools.product((0, 7, 65), range(2)):
        monkeypatch.setattr(hopper.lax, "axis_index", {"block": jnp.int32(cluster), "pair": jnp.int32(pair)}.get)
        walk = hopper.walk_rows(Tiling(4, 4), Table(counts), Table(tiles), 192, 4, -(-N // 256), N)
        mine, state, take = walk[1]
        for _ in range(int(mine) + 1):
            _, state = take(state)


@pytest.mark.parametrize("turn", [schedule.round_robin, schedule.back_and_forth])
@pytest.mark.parametrize("count", [0, 3, 5, 12, 20, 23])
def test_turns_take_every_tile_once(turn, count):
    """By 5 clusters: none, fewer than one each, whole rounds, and a last one of two or three, forth and back."""
    taken = []
    for cluster in range(5):
        nth = functools.partial(turn, cluster=cluster, clusters=5)
        taken += [int(nth(jnp.int32(i))) for i in range(int(schedule.turns(count, nth, 5)))]
    assert sorted(taken) == list(range(count))


@pytest.mark.parametrize(
    ("turn", "sums"),
    [(schedule.round_robin, [1050, 1030, 1010, 990, 970]), (schedule.back_and_forth, [1010] * 5)],
)
def test_largest_first_back_and_forth_evens_out(turn, sums):
    """Costs 100, 99, …, 1 for 5 clusters."""
    tiles = np.stack([turn(jnp.arange(20, dtype=jnp.int32), cluster, 5) for cluster in range(5)])
    np.testing.assert_array_equal((100 - tiles).sum(1), sums)


def test_halves_by_hand():
    """By 5 clusters: 12 tiles leave two for the last round, which are four halves; 13 leave three, which stay whole."""
    assert [int(x) for x in schedule.halves(jnp.int32(12), 5)] == [14, 10]
    assert [int(x) for x in schedule.halves(jnp.int32(13), 5)] == [13, 13]
    assert [int(x) for x in schedule.halves(jnp.int32(10), 5)] == [10, 10]
    assert [int(x) for x in schedule.halves(jnp.int32(2), 5)] == [4, 0]
    tile, half = schedule.half_of(jnp.arange(8, 14), 10)
    np.testing.assert_array_equal(tile, [8, 9, 10, 10, 11, 11])
    np.testing.assert_array_equal(half, [0, 0, 1, 2, 1, 2])


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_a_last_round_in_halves(transpose_rhs, capfd):
    """Three tiles for two clusters: one each, and half of the third each.

    Weights as they lie take a stage in two views, wide and narrow. The race detector takes all stages of both for one
    place, so it is asked where there is one view; the barriers are the same.
    """
    sizes = np.array([70, 10, 48], np.int32)
    lhs, rhs, grad = operands(sizes, 128, 64, 256)
    metadata = group_metadata(jnp.asarray(sizes), 128)
    assert metadata.row_tiles is None and schedule.row_tiles(metadata.starts, metadata.ends, 128)[0] == 3
    weights = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    tiles = dataclasses.replace(TWO_BLOCKS[0], blocks=4)
    args = lhs, weights, jnp.asarray(sizes), metadata, transpose_rhs, jnp.bfloat16, tiles
    out = interpreted(lambda: mosaic_gpu.forward(*args), capfd, detect_races=transpose_rhs)
    assert_close(out, exact(lhs, rhs, grad, sizes)[0])


@pytest.mark.parametrize("M, N, transpose_rhs", [(408, 384, False), (400, 384, True), (408, 320, True)])
def test_tall_tiles(M, N, transpose_rhs, capfd):
    """Two clusters; of the first group one tile of 128, of the second two of 192, of nobody's 8 rows one of 128.

    The last 128 of 384 columns are taken by the two of 192 at once, a block each, and by those of 128, or by the one
    there is; the last 64 of 320 by one block. See test_a_last_round_in_halves about races.
    """
    sizes = np.array([70, 330], np.int32)
    lhs, rhs, grad = operands(sizes, M, 64, N)
    metadata = group_metadata(jnp.asarray(sizes), M)
    weights = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    args = lhs, weights, jnp.asarray(sizes), metadata, transpose_rhs, jnp.bfloat16, Tiling(4, 4, blocks=4)
    out = interpreted(lambda: mosaic_gpu.forward(*args), capfd, detect_races=transpose_rhs)
    assert_close(out, exact(lhs, rhs, grad, sizes)[0])
    assert not np.any(np.asarray(out)[400:])


def test_long_sums_from_either_end(capfd, monkeypatch):
    """As `test_tall_tiles`, three steps a tile, every second tile's taken from the last."""
    monkeypatch.setattr(mosaic_gpu, "_LONG", 3)
    pipeline, alternate = hopper.pipeline, []
    monkeypatch.setattr(hopper, "pipeline", lambda *args: alternate.append(args[-1]) or pipeline(*args))
    sizes = np.array([70, 330], np.int32)
    lhs, rhs, grad = operands(sizes, 400, 192, 256)
    metadata = group_metadata(jnp.asarray(sizes), 400)
    args = lhs, rhs, jnp.asarray(sizes), metadata, False, jnp.bfloat16, Tiling(4, 4, blocks=2)
    out = interpreted(lambda: mosaic_gpu.forward(*args), capfd, detect_races=False)
    assert alternate == [True]
    assert_close(out, exact(lhs, rhs, grad, sizes)[0])


@pytest.mark.parametrize("K, groups", [(192, 3), (320, 3), (384, 6)])
def test_a_weight_gradient_in_tall_tiles(K, groups, capfd):
    """192 rows of K and, at 320, 128 more, whose stage is another view of the same memory: see the races above. Of six
    groups one is large: its 384 rows are three times 128, the others' twice 192."""
    sizes = np.array([51, 0, 130, 0, 0, 0][:groups], np.int32)
    lhs, rhs, grad = operands(sizes, 208, K, 128)
    metadata = group_metadata(jnp.asarray(sizes), 208)
    assert int(schedule.by_size(metadata.starts, metadata.ends)[-1]) == (groups == 6)
    args = lhs, grad, jnp.asarray(sizes), metadata, jnp.bfloat16, Tiling(5, 1, blocks=4)
    out = interpreted(lambda: mosaic_gpu.drhs(*args), capfd, detect_races=K == 192)
    assert_close(out, exact(lhs, rhs, grad, sizes)[2])
    assert not np.any(np.asarray(out)[1])


def test_by_size():
    starts, ends = jnp.array([0, 3, 3, 9]), jnp.array([3, 3, 9, 12])
    np.testing.assert_array_equal(schedule.by_size(starts, ends), [2, 0, 3, 1, 0])
    starts, ends = jnp.array([0, 1, 2, 3, 22]), jnp.array([1, 2, 3, 22, 22])  # 19 rows are more than 4 times 22 / 5
    np.testing.assert_array_equal(schedule.by_size(starts, ends), [3, 0, 1, 2, 4, 1])


@pytest.mark.parametrize("K", [384, 640, 1408, 320, 128])
def test_weight_gradients_are_dealt_evenly_and_in_order(K, monkeypatch):
    """Every group's every row and column of weights once, the groups largest first. A group of 1500 of 1800 rows has
    low tiles alone where K is made of them, and no cluster has more than one of its tiles and of the next group's more
    than another."""
    sizes = np.array([30, 1500, 0, 20, 60, 90, 40, 60], np.int32)
    E, clusters, columns = len(sizes), 5, 2
    ends = np.cumsum(sizes)
    starts, ends = jnp.asarray(ends - sizes, jnp.int32), jnp.asarray(ends, jnp.int32)
    order = schedule.by_size(starts, ends)
    assert order[E] == 1
    taken, loads = np.zeros((E, K // 64, columns), int), []
    for cluster in range(clusters):
        monkeypatch.setattr(hopper.lax, "axis_index", lambda _, cluster=cluster: jnp.int32(cluster))
        tiling = Tiling(4, 2, blocks=2 * clusters)
        heights, (mine, state, take) = mosaic_gpu._walk_drhs(tiling, order, [(starts, ends)], E, K, columns)
        load, ranks = 0, []
        for _ in range(int(mine)):
            (group, first, column, eighth, start, end, tall), state = take(state)
            assert (eighth, start, end) == (starts[group] // 8, starts[group], ends[group])
            units = heights[0 if tall or len(heights) == 1 else 1] // 64
            assert group != 1 or K % 128 or units == 2
            taken[group, int(first) : int(first) + units, int(column)] += 1
            load += units * int(sizes[group])
            ranks.append(int(np.flatnonzero(order[:E] == group)[0]))
        assert ranks == sorted(ranks)
        loads.append(load)
    assert (taken == 1).all()
    assert max(loads) - min(loads) <= (2 if K % 128 == 0 else 5) * (1500 + 90)


def test_place_takes_every_tile_once():
    ends = jnp.array([2500] + 13 * [2600], jnp.int32)  # 14 groups: few enough rows for tiles of one height
    count, tiles = schedule.row_tiles(jnp.append(0, ends[:-1]).astype(jnp.int32), ends, 2600)
    lin = jnp.arange(int(count[0]) * 3)
    first, size = tiles[lin // 3, 4], tiles[lin // 3, 5]
    tile, column = schedule.place(lin, first, size, 3)
    assert len(set(zip(tile.tolist(), column.tolist(), strict=True))) == len(lin)
    assert int(jnp.max(tile)) == int(count[0]) - 1


@pytest.mark.parametrize(
    "dtype, K, N, need", [(jnp.float32, 64, 64, "bfloat16 or float16"), (jnp.bfloat16, 64, 96, "multiples of 64")]
)
def test_refuses_what_it_cannot_take(dtype, K, N, need):
    lhs, rhs, _ = operands((8,), 8, K, N, dtype=dtype)
    with pytest.raises(NotImplementedError, match=need):
        grouped_matmul(lhs, rhs, jnp.array([8], jnp.int32), implementation="mosaic_gpu")


def test_refuses_this_machine():
    lhs, rhs, _ = operands((8,), 8, 64, 64)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU; implementation='blocks' would"):
        grouped_matmul(lhs, rhs, jnp.array([8], jnp.int32), implementation="mosaic_gpu")


def test_lowers_inside_shard_map_and_vmap(monkeypatch):
    """The kernels' types know of no mesh: forward and both gradients, over a mesh of two and over a batch."""
    monkeypatch.setattr(mosaic_gpu, "_hopper", lambda: True)

    def value_and_gradients(lhs, rhs, sizes, grad):
        product = functools.partial(grouped_matmul, group_sizes=sizes[0], implementation="mosaic_gpu")
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(grad)

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("x"), PartitionSpec()
    sharded = jax.shard_map(
        value_and_gradients, mesh=mesh, in_specs=(split, whole, split, split), out_specs=(split, split, whole)
    )
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = bf16((256, 128)), bf16((4, 128, 256)), jax.ShapeDtypeStruct((2, 4), jnp.int32), bf16((256, 256))
    text = jax.jit(sharded).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3
    batched = jax.vmap(functools.partial(grouped_matmul, implementation="mosaic_gpu"), in_axes=(0, None, 0))
    jax.jit(batched).trace(bf16((2, 128, 128)), args[1], args[2]).lower(lowering_platforms=("cuda",))


def test_lowers_inside_a_rematerialised_scan(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_hopper", lambda: True)

    def loss(rhs, lhs, sizes):
        @jax.checkpoint
        def layer(x, weights):
            return grouped_matmul(x, weights, sizes, implementation="mosaic_gpu"), None

        return jnp.sum(jax.lax.scan(layer, lhs, rhs)[0].astype(jnp.float32))

    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = bf16((3, 4, 128, 128)), bf16((64, 128)), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert "mosaic_gpu" in jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def _value_and_gradients(lhs, rhs, grad, sizes, transpose_rhs=False):
    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs, implementation="mosaic_gpu")

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(grad)


@pytest.mark.gpu
@pytest.mark.parametrize("M, K", [(1000, 192), (3000, 384)])
def test_random_sizes_on_a_gpu(M, K):
    """200 draws at one compiled shape, tiles of 128 rows or also 192, with pairs of them in the last of K's columns:
    values and both gradients, bit-equal in three runs."""
    E, N = 12, 320
    rng = np.random.default_rng(0)
    for draw in range(200):
        total = M if draw % 2 else int(rng.integers(0, M + 1))
        sizes = rng.multinomial(total, rng.dirichlet(np.full(E, 0.4))).astype(np.int32)
        args = operands(sizes, M, K, N, draw)
        got = _value_and_gradients(*args, jnp.asarray(sizes))
        for ours, want in zip(got, exact(*args, sizes), strict=True):
            assert_close(ours, want, 2.5e-3)
        if draw < 20:
            for _ in range(2):
                again = _value_and_gradients(*args, jnp.asarray(sizes))
                assert all((a == b).all() for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("M, E, K, N", [(2, 8, 256, 512), (1024, 4, 2048, 768), (4096, 8, 704, 1408)])
def test_shapes_on_a_gpu(M, E, K, N, dtype):
    sizes = np.random.default_rng(M).multinomial(M, np.full(E, 1 / E)).astype(np.int32)
    args = operands(sizes, M, K, N, dtype=dtype)
    for ours, want in zip(_value_and_gradients(*args, jnp.asarray(sizes)), exact(*args, sizes), strict=True):
        assert_close(ours, want, 2.5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("spare", (0, 16))
def test_a_weight_gradient_of_rows_in_two_arrays_on_a_gpu(spare):
    """Random sizes, each array with groups of its own that are empty; three runs bit-equal."""
    rng = np.random.default_rng(spare)
    M, E, K, N = 2000, 12, 256, 512
    drawn = [rng.multinomial(M - 77, rng.dirichlet(np.full(E, 0.4))).astype(np.int32) for _ in range(2)]
    parts = [(sizes, *operands(sizes, M, K, N, seed)) for seed, sizes in enumerate(drawn)]
    metadata = [dataclasses.replace(group_metadata(jnp.asarray(s), M, tail=False), spare=spare) for s in drawn]
    given = [(lhs, grad, m) for (_, lhs, _, grad), m in zip(parts, metadata, strict=True)]
    outs = [jax.jit(lambda: mosaic_gpu.drhs_of(given, jnp.bfloat16))() for _ in range(3)]
    assert_close(outs[0], sum(exact(lhs, rhs, grad, sizes)[2] for sizes, lhs, rhs, grad in parts), 2.5e-3)
    assert all((outs[0] == out).all() for out in outs[1:])


@pytest.mark.gpu
def test_the_kernels_run_and_none_else():
    args = operands((64, 64), 128, 128, 128)
    text = _value_and_gradients.lower(*args, jnp.array([64, 64], jnp.int32)).compile().as_text()
    assert "grouped_matmul_drhs" in text
    assert "cublas" not in text
    assert not re.search(r"= \S+ (dot|transpose)\(", text)


PEER = os.environ.get("PEER_PYTHON")


@pytest.mark.gpu
@pytest.mark.skipif(not PEER, reason="needs PEER_PYTHON, an environment's python that has torch")
def test_error_beside_torch(tmp_path):
    """Against float64: the value's and both gradients' error is at most 1.5 times torch's."""
    sizes = np.array([700, 0, 1000, 348], np.int32)
    args = operands(sizes, 2048, 512, 384)
    want = exact(*args, sizes)
    case = {name: np.asarray(a.astype(jnp.float32)) for name, a in zip(("lhs", "rhs", "grad"), args, strict=True)}
    np.savez(tmp_path / "case.npz", **case, sizes=sizes, **{f"want_{i}": right for i, right in enumerate(want)})
    script = Path(mosaic_gpu.__file__).parents[1] / "peers" / "torch_errors.py"
    command = [PEER, script, "grouped_matmul", tmp_path / "case.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    got = _value_and_gradients(*args, jnp.asarray(sizes))
    for ours, right, bound in zip(got, want, json.loads(done.stdout), strict=True):
        ours = np.asarray(ours.astype(jnp.float32), np.float64)
        assert np.linalg.norm(ours - right) <= 1.5 * bound * np.linalg.norm(right)
