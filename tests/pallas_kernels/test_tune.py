"""Tuning: which candidates there are, what wins, and the table that keeps it."""

import json
import sys

import jax
import pytest

from pallas_kernels import benchmark, tune
from pallas_kernels.grouped_matmul import tilings
from pallas_kernels.grouped_matmul.hopper import Tiling


def kept(op, bucket):
    return tilings.table("NVIDIA H200")[op][bucket]


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A table of its own, so that a test may write it."""
    file = tmp_path / "tilings.json"
    file.write_text(tilings.FILE.read_text())
    monkeypatch.setattr(tilings, "FILE", file)
    tilings.table.cache_clear()
    yield file
    tilings.table.cache_clear()


def test_candidates_fit_and_hold_the_kept():
    for op, buckets in tilings.BUCKETS.items():
        for bucket in buckets:
            tall = op == "drhs" or bucket == "many rows"
            assert kept(op, bucket) in tune.candidates(op, 64 if bucket == "few rows" else 192 if tall else 128)
    # 6 stages are 192 KiB; with three pieces for each of two warpgroups (48 KiB) they would need 240
    assert Tiling(6, 2) in tune.candidates("drhs", 128)
    assert Tiling(6, 3) not in tune.candidates("drhs", 128)
    # the forward product has one more, for rows beside others'
    assert Tiling(6, 1) in tune.candidates("forward", 128) and Tiling(6, 2) not in tune.candidates("forward", 128)
    # tiles of up to 64 rows: 24 KiB a stage, so seven fit; of 192: 40 KiB, so five
    assert Tiling(7, 2) in tune.candidates("forward", 32)
    assert max(t.stages for t in tune.candidates("drhs", 192)) == 5


def test_buckets_by_hand():
    assert tilings.bucket("forward", 64, 4096) == "few rows"
    assert tilings.bucket("forward", 192, 1024) == "many rows"
    assert [tilings.bucket("forward", 128, K) for K in (768, 1024, 1408)] == ["short sums", "short sums", "long sums"]
    cases = benchmark.cases(["drhs"], ["qwen3-30b-a3b", "deepseek-v3-ep8"], "uniform")
    # 131072 rows over 128 experts are 1024 each, 16384 over 32 experts 512
    assert {case["name"]: tune.place(case, "drhs")[1] for case in cases if case["name"].endswith("/up")} == {
        "qwen3-30b-a3b/up": "long sums",
        "deepseek-v3-ep8/up": "short sums",
    }


def test_a_chip_without_figures_takes_the_measured_ones(own_file):
    assert tilings.table("NVIDIA H100 80GB HBM3") == tilings.table("NVIDIA H200")
    tilings.write("NVIDIA H100 80GB HBM3", "today", {"drhs": {"short sums": Tiling(3, 2)}})
    assert tilings.table("NVIDIA H100 80GB HBM3")["drhs"]["short sums"] == Tiling(3, 2)
    assert tilings.table("NVIDIA H100 80GB HBM3")["drhs"]["long sums"] == kept("drhs", "long sums")
    assert kept("drhs", "short sums") != Tiling(3, 2)


def test_what_a_chip_takes_from_another_says_so(own_file):
    theirs = json.loads(own_file.read_text())["NVIDIA H200"]
    for _ in range(2):  # the second finds the chip's own entries
        tilings.write("NVIDIA H100 80GB HBM3", "today", {"drhs": {"short sums": Tiling(4, 2)}})
    written = json.loads(own_file.read_text())
    assert written["NVIDIA H200"] == theirs
    for op, buckets in tilings.BUCKETS.items():
        for bucket in buckets:
            measured = written["NVIDIA H100 80GB HBM3"][op][bucket]["measured"]
            taken = f"of an NVIDIA H200, {theirs[op][bucket]['measured']}"
            assert measured == ("today" if (op, bucket) == ("drhs", "short sums") else taken)


def test_summary_by_hand():
    first, other = kept("forward", "long sums"), Tiling(4, 4)
    # 2 / 1 and 2 / 4: the geometric mean of 2 and 1/2 is 1
    assert tune.summary(first, [{first: 2.0, other: 1.0}, {first: 2.0, other: 4.0}])[other] == pytest.approx(1)
    assert tune.summary(first, [{first: 3.0, other: 2.0}])[other] == pytest.approx(1.5)
    assert tune.best(first, {first: 1.0, other: 1.5}) == other
    assert tune.best(first, {first: 1.0, other: 1.02}) == first


def test_prints_the_best_first_and_writes_it(monkeypatch, capsys, tmp_path, own_file):
    times = {t: 10.0 + t.stages for t in tune.candidates("drhs", 192)}
    monkeypatch.setattr(tune, "tune", lambda case, op: times)
    device = {"device_kind": "NVIDIA H200", "platform": "gpu", "compute_capability": "9.0"}
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), device)])
    file = tmp_path / "tuned.json"
    argv = ["tune", "--op", "drhs", "--shape", "switch-base", "--write", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", argv)
    tune.main()
    lines = capsys.readouterr().out.splitlines()
    best = next(i for i, line in enumerate(lines) if line.startswith("drhs"))
    assert lines[best].startswith("drhs, short sums, stages 3")
    assert sum("(kept)" in line for line in lines) == 1
    assert kept("drhs", "short sums").stages == 3
    assert kept("drhs", "long sums").stages != 3
    assert file.stat().st_size > 100


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--op=forward,dlhs"], "no tuned op 'dlhs'; there are forward, drhs"),
        (["--shape=switch-base,olmo"], "no shape 'olmo'; there are training, decode, mixtral-8x7b,"),
        (["--json=/no/folder/x.json"], "/no/folder/x.json can't be written"),
        ([], "error: this machine's device is 'cpu'; tuning needs a Hopper GPU: run it where one is"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_a_line(flags, line, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": "cpu", "platform": "cpu"})])
    monkeypatch.setattr(sys, "argv", ["tune", *flags])
    with pytest.raises(SystemExit):
        tune.main()
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_products_are_the_kernels(monkeypatch):
    """`tune` compiles what it says: here the compiler and the clock are replaced, the kernels' tracing is not."""
    seen = []

    def trace(function, *args):
        seen.append(function.args[1])
        assert [out.shape for out in jax.eval_shape(function, *args)] == [(2, 64, 64)] * 2
        return lambda *_: None

    monkeypatch.setattr(benchmark, "compiled", trace)
    monkeypatch.setattr(tune, "rounds", lambda runs, launches: dict.fromkeys(runs, (2.0, 1.0, 3.0)))
    case = {"name": "x", "product": (64, 2, 64, 64), "sizes": [40, 24], "launches": 1, "again": 2}
    assert set(tune.tune(case, "drhs").values()) == {1.0}
    assert set(seen) == set(tune.candidates("drhs", 128))
