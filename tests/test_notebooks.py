"""Notebooks: the .py and .ipynb of a pair say the same, hold no outputs, and run."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
PAIRS = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_every_notebook_has_its_twin():
    assert PAIRS and sorted(path.stem for path in FOLDER.glob("*.ipynb")) == PAIRS


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_is_in_sync_and_without_outputs(name):
    text, notebook = jupytext.read(FOLDER / f"{name}.py"), nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in text.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ], f"run: jupytext --sync notebooks/{name}.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow  # trains two models for two steps in a fresh kernel
def test_switch_vs_fine_grained_runs_from_a_clean_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_NOTEBOOK_RUNS", str(tmp_path / "demo"))  # nothing there
    monkeypatch.setenv("MOEJAX_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    # compiled as a user's programs are; here computing takes longer than that does
    monkeypatch.delenv("XLA_FLAGS")
    notebook = nbformat.read(FOLDER / "01_switch_vs_fine_grained.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # losses, loads, co-activation, specialisation
    printed = "".join(output.get("text", "") for output in outputs)
    assert "switch: by layer, MaxVio" in printed
    assert (tmp_path / "notebook_2" / "switch" / "seed_0" / "result.json").is_file()
