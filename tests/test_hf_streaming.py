"""Importing and exporting piece by piece: what is in memory meanwhile, and a disk that fills up in the middle."""

import contextlib
import json
import math
import resource
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moejax import checkpoint, errors, hf_checkpoint, hf_export, hf_import, hf_tensors, models, safetensors
from moejax.errors import UserError

TINY = Path(__file__).parent / "data" / "hf_tiny"
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 4096}
EXPERTS = 32


def fabricated(folder, name, quantised=False):
    """A checkpoint in bfloat16 whose layer has 32 experts of 128 kB a matrix; experts in MXFP4 if `quantised`."""
    family = models.FAMILIES[name]
    raw = json.loads((TINY / name / "config.json").read_text()) | SIZES | {"layer_types": None}
    raw["num_experts" if name == "olmoe" else "num_local_experts"] = EXPERTS
    raw = {key: value for key, value in raw.items() if value is not None}
    config = family.read_config(raw)
    shapes = {path: leaf.shape for path, leaf in hf_import.abstract(family.model(config)).items()}
    tensors, rng = {}, np.random.default_rng(0)
    for tensor, shape in hf_tensors.expected(family.rules(config), shapes).items():
        if quantised and tensor.endswith(("gate_up_proj", "down_proj")):
            blocks = (EXPERTS, shape[2], shape[1] // 32, 16)
            tensors[f"{tensor}_blocks"] = rng.integers(0, 256, blocks, dtype=np.uint8)
            tensors[f"{tensor}_scales"] = rng.integers(120, 130, blocks[:-1], dtype=np.uint8)
        else:
            bits = rng.integers(0x3000, 0x4000, shape, dtype=np.uint16)  # no NaN, and nothing that compresses
            tensors[tensor] = bits.view(ml_dtypes.bfloat16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    specs = {tensor: (safetensors.NAMES[value.dtype], value.shape) for tensor, value in tensors.items()}
    safetensors.write(folder / safetensors.SINGLE, specs, tensors.values())
    return folder


@pytest.mark.parametrize(("name", "quantised"), [("olmoe", False), ("gpt_oss", False), ("gpt_oss", True)])
def test_a_wider_dtype_makes_no_array_larger_than_a_few_pieces(tmp_path, name, quantised):
    """numpy's own memory, to which views of the file don't count. A layer's gates alone are 8.4 MB in float32."""
    folder = fabricated(tmp_path / "source", name, quantised)
    source, family, config, _ = hf_import.open_checkpoint(folder, models.FAMILIES)
    shapes = hf_import.check(source, family, config)
    size, seen = 2**19, dict.fromkeys(shapes, 0)
    tracemalloc.start()
    for path, first, array in hf_import.pieces(source, family, config, shapes, size, np.dtype(np.float32)):
        assert array.nbytes <= size and array.dtype == np.float32 and first == seen[path]
        seen[path] += len(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == {path: shape[0] for path, shape in shapes.items()}
    # finding a NaN looks at 2^22 numbers; dequantising one expert's codes takes eight times their float32
    assert peak < 3 * 2**22


@pytest.mark.parametrize(("name", "quantised"), [("olmoe", False), ("gpt_oss", True)])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_pieces_are_the_whole(tmp_path, name, quantised, dtype, monkeypatch):
    folder = fabricated(tmp_path / "source", name, quantised)
    monkeypatch.setattr(hf_checkpoint, "PIECE_BYTES", 3 * 2**18 + 1)  # experts in threes, and two remain
    hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES, dtype)
    stored = hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES)
    source, family, config, _ = hf_import.open_checkpoint(folder, models.FAMILIES)
    for path, array in hf_import.parameters(source, family, config, dtype):
        assert stored.dtype(path) == array.dtype
        np.testing.assert_array_equal(stored.read(path), array)


# ---- a full disk


@contextlib.contextmanager
def files_of_at_most(size):
    """A limit of this process, which fails a write as a full disk does: tensorstore's too, that no patch reaches."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_import_whose_disk_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    folder = fabricated(tmp_path / "source", "olmoe")
    line = r"run can't be written \(File too large\): free its disk, .*or name another folder"
    with files_of_at_most(2**20), pytest.raises(UserError, match=line) as error:
        hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)
    assert "\n" not in str(error.value)
    assert checkpoint.restore(tmp_path / "run") is None and not (tmp_path / "run" / "checkpoints").exists()
    hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)  # and with room again
    assert checkpoint.restore(tmp_path / "run", {}) is not None


def test_an_export_whose_disk_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    model, variables = models.load_hf(TINY / "mixtral")
    family = models.FAMILIES["mixtral"]
    line = r"out can't be written \(File too large\): free its disk, .*or name another folder"
    with files_of_at_most(2**16), pytest.raises(UserError, match=line):
        hf_export.export_variables(tmp_path / "out", family, model.config, variables)
    assert list(tmp_path.iterdir()) == []
    # the last file of all
    with files_of_at_most(2**20), pytest.raises(UserError, match=line):
        beside = {"tokenizer.json": "x" * 2**21}
        hf_export.export_variables(tmp_path / "out", family, model.config, variables, beside=beside)
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_complains_of_is_told_and_other_errors_stay(tmp_path):
    told = ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"), errors.writing(tmp_path):
        raise told
    for error in (ValueError("of someone else"), KeyError("x"), UserError("a line of its own")):
        with pytest.raises(type(error)) as found, errors.writing(tmp_path):
            raise error
        assert found.value is error


def test_how_many_rows_make_a_piece():
    assert hf_import.rows_of_piece((10, 4, 8), 4, 3 * 128) == 3
    assert hf_import.rows_of_piece((10, 4, 8), 4, 1) == 1
    assert hf_import.rows_of_piece((10, 4, 8), 4, math.inf) == 10
