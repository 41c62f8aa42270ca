"""Two checkouts' kernels in one process."""

import sys
from pathlib import Path

import pytest

from pallas_kernels import benchmark, compare

ROOT = Path(__file__).parents[2]
CASE = {"product": (64, 4, 32, 16), "sizes": [20, 0, 34, 10], "tokens": (32, 2), "launches": 1, "again": 1}


@pytest.fixture
def other(tmp_path):
    """A checkout whose `blocks` gives twice the product."""
    (tmp_path / "pallas_kernels").mkdir()
    for file in (ROOT / "pallas_kernels").rglob("*.*"):
        if file.suffix in (".py", ".json"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(file.read_text())
    blocks = tmp_path / "pallas_kernels/grouped_matmul/blocks.py"
    blocks.write_text(blocks.read_text() + "\n_plain = forward\ndef forward(*args):\n    return 2 * _plain(*args)\n")
    return tmp_path


@pytest.mark.parametrize("op", ["both", "gated_ffn"])
def test_each_tree_runs_its_own_kernels(op, other):
    before = dict(sys.modules)
    this = compare.Tree(ROOT)
    case = CASE if op != "gated_ffn" else CASE | {"product": (64, 4, 32, 48)}
    times, apart = compare.bench(case, op, "blocks", {"this": this, "same": compare.Tree(ROOT)}, settle=0.0)
    assert apart == 0.0 and list(times) == ["this", "same"] and min(times["this"]) > 0
    _, apart = compare.bench(case, op, "blocks", {"this": this, "other": compare.Tree(other)}, settle=0.0)
    assert apart == pytest.approx(1.0) if op != "gated_ffn" else apart > 1
    assert sys.modules["pallas_kernels.benchmark"] is benchmark and compare.benchmark is benchmark
    assert {name: module for name, module in sys.modules.items() if name in before} == before


def test_the_command(other, monkeypatch, capsys):
    case = CASE | {"name": "tiny/up", "ops": ["forward"], "again": 2}
    monkeypatch.setattr(benchmark, "cases", lambda *_: [case])
    monkeypatch.setattr(sys, "argv", ["compare", f"--other={other}", "--implementation=blocks"])
    compare.main()
    _, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("tiny/up forward blocks: this ") and line.endswith(" times as fast, 1.0e+00 apart")
    assert last.startswith("all 1: ")


def test_a_tree_that_cannot_be_loaded_is_one_line(other):
    (other / "pallas_kernels/block_ops.py").unlink()
    with pytest.raises(ValueError, match=r"can't be loaded: .*'block_ops'.*; give a newer checkout"):
        compare.Tree(other)
    assert sys.modules["pallas_kernels.benchmark"] is benchmark


def test_a_folder_without_kernels_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", f"--other={tmp_path}", "--shape=olmoe-1b-7b"])
    with pytest.raises(SystemExit):
        compare.main()
    assert f"{tmp_path} holds no pallas_kernels; give the folder of a checkout" in capsys.readouterr().err
