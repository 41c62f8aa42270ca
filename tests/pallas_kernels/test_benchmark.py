"""The named shapes and the benchmark's arithmetic."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, shapes
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
    result = benchmark.report(case, {("dense", "jax"): (0.5, 0.4, 0.6), ("forward", "blocks"): (1.0, 1.0, 1.0)})
    assert result["real_rows"] == 0.75
    ours = result["rates"][1]
    assert ours["tflops"] == pytest.approx(0.786432)
    assert ours["gbs"] == pytest.approx(40.96)
    assert ours["of_dense"] == 0.5


def test_bench_runs_every_op():
    case = {"name": "x", "ops": list(benchmark.OPS), "product": (64, 2, 16, 16), "sizes": [40, 24], "launches": 1}
    times = benchmark.bench(case, ["blocks"])
    assert set(times) == {("dense", "jax"), *((op, "blocks") for op in benchmark.OPS)}
    assert all(0 < least <= us <= most for us, least, most in times.values())


def test_an_unknown_shape_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--shape", "olmo"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "no shape matches 'olmo'; there are mixtral-8x7b" in capsys.readouterr().err


def test_a_peer_that_stops_is_reported(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("import sys; sys.exit('no such module')")
    monkeypatch.setattr(benchmark, "_PEER", tmp_path / "peer.py")
    case = {"name": "x", "ops": ["forward"], "product": (8, 1, 8, 8), "sizes": [8], "launches": 1}
    with pytest.raises(RuntimeError, match="stopped after 0 of 1 cases: no such module"):
        benchmark.peers(sys.executable, [case])
    (tmp_path / "peer.py").write_text(f"print({json.dumps(json.dumps({'dense': [1, 1, 1], 'forward': [2, 1, 3]}))})")
    assert benchmark.peers(sys.executable, [case])[0]["forward", "torch"] == (2, 1, 3)


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
