"""Tuning: which candidates there are, and what wins."""

import sys

import pytest

from pallas_kernels import benchmark, tune
from pallas_kernels.grouped_matmul.hopper import Tiling


def test_candidates_fit_and_hold_the_kept():
    found = tune.candidates()
    assert set(tune.KEPT.values()) <= set(found)
    # 6 stages are 192 KiB; with four pieces for each of two warpgroups (64 KiB) they would need 256
    assert Tiling(6, 2) in found
    assert Tiling(6, 4) not in found


def test_summary_by_hand():
    kept, other = tune.KEPT["forward"], Tiling(4, 4)
    # 2 / 1 and 2 / 4: the geometric mean of 2 and 1/2 is 1
    assert tune.summary("forward", [{kept: 2.0, other: 1.0}, {kept: 2.0, other: 4.0}])[other] == pytest.approx(1)
    assert tune.summary("forward", [{kept: 3.0, other: 2.0}])[other] == pytest.approx(1.5)


def test_prints_the_best_first(monkeypatch, capsys, tmp_path):
    times = {t: 10.0 + t.stages for t in tune.candidates()}
    monkeypatch.setattr(tune, "tune", lambda case, op: times)
    file = tmp_path / "tuned.json"
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "drhs", "--shape", "switch-base", "--json", str(file)])
    tune.main()
    lines = capsys.readouterr().out.splitlines()
    best = next(i for i, line in enumerate(lines) if line.startswith("drhs"))
    assert lines[best].startswith("drhs stages 3")
    assert sum("(kept)" in line for line in lines) == 1
    assert file.stat().st_size > 100


def test_unknown_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "dlhs"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "no op 'dlhs' to tune; there are forward, drhs" in capsys.readouterr().err


def test_products_are_the_kernels(monkeypatch):
    """`tune` compiles what it says: here the compiler and the clock are replaced, the kernels' tracing is not."""
    seen = []
    monkeypatch.setattr(benchmark, "compiled", lambda f, *args: seen.append(f.args[1]) or (lambda *a: 0))
    case = {"name": "x", "ops": ["drhs"], "product": (64, 2, 64, 64), "sizes": [40, 24], "launches": 1}
    assert set(tune.tune(case, "drhs")) == set(tune.candidates()) == set(seen)
