"""The named shapes and the benchmark's arithmetic."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, block_ops, shapes
from pallas_kernels.timing import rounds


def test_products_by_hand():
    # 16384 tokens · 8 of 64 experts; up to gate and up at once
    assert shapes.TRAINING["olmoe-1b-7b"].product("up") == (131072, 64, 2048, 2048)
    assert shapes.TRAINING["olmoe-1b-7b"].product("down") == (131072, 64, 1024, 2048)
    # 32 of 256 experts are local, so an eighth of 16384 · 8 rows
    assert shapes.TRAINING["deepseek-v3-ep8"].product("up") == (16384, 32, 7168, 4096)
    # 64 tokens on each of eight devices
    assert shapes.DECODE["deepseek-v3-ep8-decode-64"].product("down") == (512, 32, 2048, 7168)


@pytest.mark.parametrize("kind", shapes.SIZES)
@pytest.mark.parametrize("M, E", [(16384, 32), (16, 8), (2, 8), (1, 1)])
def test_sizes_sum_to_the_rows(kind, M, E):
    if kind == "quarter_empty" and E == 1:
        return
    sizes = shapes.group_sizes(kind, M, E)
    assert sizes.shape == (E,)
    assert sizes.dtype == np.int32
    assert (sizes >= 0).all()
    assert sizes.sum() == M
    assert (sizes == shapes.group_sizes(kind, M, E)).all()


def test_sizes_have_their_shape():
    assert set(shapes.group_sizes("uniform", 64, 8)) == {8}
    assert np.count_nonzero(shapes.group_sizes("one_hot", 64, 8)) == 1
    assert list(np.flatnonzero(shapes.group_sizes("quarter_empty", 64, 8) == 0)) == [1, 5]
    # Zipf(1.2) over 8: the largest has 1 / Σ i^-1.2 = 1 / 2.333 of the rows, and what rounding leaves
    assert shapes.group_sizes("zipf", 1000, 8).max() == pytest.approx(1000 / 2.333, abs=8)


def test_cases_by_name():
    training = benchmark.cases(["forward"], ["training"], "uniform")
    assert len(training) == 2 * len(shapes.TRAINING)
    one = benchmark.cases(["drhs"], ["switch-base"], "uniform")
    assert [case["name"] for case in one] == ["switch-base/up", "switch-base/down"]
    assert one[0]["sizes"] == [256] * 128


def test_report_by_hand():
    # 2 experts, one has all 192 rows: two tiles of 128, 0.75 real; 2 · 192 · 64 · 32 = 786432 operations in 1 µs;
    # bytes 2 · (192 · (64 + 32) + 1 · 64 · 32) = 40960
    case = {"name": "x", "ops": ["forward"], "product": (192, 2, 64, 32), "sizes": [192, 0], "launches": 1}
    times = {("dense", "jax"): (0.5, 0.4, 0.6), ("forward", "blocks"): (1.0, 1.0, 1.0), ("both", "blocks"): (6.0,) * 3}
    result = benchmark.report(case, times, 81.92)
    assert result["real_rows"] == 0.75
    ours = result["rates"][1]
    assert ours["tflops"] == pytest.approx(0.786432)
    assert ours["gbs"] == pytest.approx(40.96)
    assert ours["of_dense"] == 0.5
    assert ours["of_copy"] == pytest.approx(0.5)
    # three products in 6 µs, each of the dense one's 0.5
    assert result["rates"][2]["of_dense"] == pytest.approx(0.25)


def test_a_peer_of_this_process_is_timed_beside_ours(monkeypatch):
    monkeypatch.setattr(benchmark.jax_products, "present", lambda: {"theirs": jax.lax.ragged_dot})
    case = {"name": "x", "ops": ["forward", "both"], "product": (8, 2, 8, 8), "sizes": [5, 3]}
    case |= {"launches": 2, "again": 1}
    times = benchmark.bench(case, ["blocks", "xla", "theirs"])
    assert set(times) == {("dense", "jax"), *((op, i) for op in case["ops"] for i in ("blocks", "xla", "theirs"))}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert benchmark.timed(case)[1:] == ["xla", "theirs"]


@pytest.mark.parametrize(
    "ops, product, again", [(benchmark.OPS, (64, 2, 16, 16), 2), (block_ops.OPS, (16, 2, 8, 24), 1)]
)
def test_bench_runs_every_op(ops, product, again):
    M = product[0]
    case = {"name": "x", "ops": list(ops), "product": product, "sizes": [M - 6, 6], "launches": 1, "again": again}
    times = benchmark.bench(case | {"tokens": (16, 2)}, ["blocks"])
    assert set(times) == {("dense", "jax"), *((op, "blocks") for op in ops)}
    assert all(0 < least <= us <= most for us, least, most in times.values())


def test_a_block_of_each_shape_by_hand():
    (case,) = benchmark.cases(["combine", "gated_ffn"], ["deepseek-v3-ep8"], "uniform")
    # an eighth of 16384 · 8 choices; gate, up and down are as one product of 3 · 2048 columns
    assert (case["name"], case["product"], case["tokens"]) == (
        "deepseek-v3-ep8/block",
        (16384, 32, 7168, 6144),
        (16384, 8),
    )
    up, down, block = benchmark.cases(["forward", "spread"], ["olmoe-1b-7b-decode-8"], "uniform")
    assert [c["ops"] for c in (up, down, block)] == [["forward"], ["forward"], ["spread"]]
    assert [c["again"] for c in (up, down, block)] == [8, 8, 1]


def test_slots_are_sorted_by_group():
    """6 of 8 choices are here: 4 and 2 of two groups, whose rows are in the order of tokens; the others say 6."""
    slot = block_ops.slots({"product": (6, 2, 8, 24), "tokens": (4, 2), "sizes": [4, 2]})
    assert sorted(slot.ravel()) == [0, 1, 2, 3, 4, 5, 6, 6]
    here = [int(row) for row in slot.ravel() if row < 6]
    assert [row for row in here if row < 4] == [0, 1, 2, 3]
    assert [row for row in here if row >= 4] == [4, 5]


def test_work_by_hand():
    # 6 rows, one of two groups has them all, D = 8, F = 4 (12 columns), 4 tokens
    case = {"product": (6, 2, 8, 12), "tokens": (4, 2), "sizes": [6, 0]}
    rows, tokens, weights = 2 * 6 * 8, 2 * 4 * 8, 2 * 8 * 12
    assert block_ops.work("gated_ffn", case) == (2 * 6 * 8 * 12, 2 * rows + weights)
    assert block_ops.work("gated_ffn_both", case) == (3 * 2 * 6 * 8 * 12, 4 * rows + 2 * weights)
    assert block_ops.work("combine", case) == block_ops.work("spread", case) == (0, rows + tokens)
    # rows, tokens; then rows and the gradient of tokens, and the gradient of rows
    assert block_ops.work("combine_both", case) == (0, 3 * rows + 2 * tokens)


def test_an_unknown_shape_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--shape", "olmo"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "no shape matches 'olmo'; there are mixtral-8x7b" in capsys.readouterr().err


PEER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print("a note of some library")
    print(json.dumps({} if "case" in asked else {"us": 2.0 * asked["launches"]}), flush=True)
"""


def test_a_peer_takes_its_turns_and_is_reported_where_it_stops(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(benchmark, "_PEER", tmp_path / "peer.py")
    case = {"name": "x", "ops": ["forward"], "product": (8, 1, 8, 8), "sizes": [8], "launches": 3, "again": 1}
    with benchmark.Torch(sys.executable) as peer:
        times = benchmark.bench(case, ["blocks"], peer)
    assert set(times) == {("dense", "jax"), ("forward", "blocks"), ("dense", "torch"), ("forward", "torch")}
    assert times["forward", "torch"] == times["dense", "torch"] == (6.0, 6.0, 6.0)
    (tmp_path / "peer.py").write_text("import sys; sys.exit('no such module')")
    with benchmark.Torch(sys.executable) as peer, pytest.raises(benchmark.PeerError, match="stopped: no such module"):
        peer.products(case)


def test_an_interpreter_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--shape=switch-base", "--op=forward", "--peer_python=/no/python"])
    monkeypatch.setattr(benchmark, "copy_rate", lambda: 1.0)
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "error: --peer_python=/no/python can't be run: No such file" in capsys.readouterr().err


def test_a_step_that_donates_its_state_can_be_timed():
    """As training steps do: what one call returned is deleted by the next."""
    step = jax.jit(lambda state: state + 1, donate_argnums=0)
    state = jnp.zeros(4)

    def run():
        nonlocal state
        state = step(state)
        return state

    assert set(rounds({"step": run}, repeats=3)) == {"step"}
    np.testing.assert_array_equal(state, [5.0] * 4)  # two untimed calls and three timed ones
