"""Safetensors files: 8 bytes of length, a JSON header, then the tensors' bytes. Read through a memory map.

Written here because a checkpoint has to be checked before it is trusted and streamed in both directions: a tensor is
never copied before it is used, and a shard is written one tensor at a time. The `safetensors` package (0.8.0) does
neither for numpy: `save_file` wants all tensors of a shard at once, and float8 is no dtype that it reads.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError, reading

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Shard:
    """One file, open for reading. `tensors` maps each name to its (dtype name, shape).

    Raises:
      UserError: the file can't be read, is no safetensors file, is cut short, or holds a dtype that isn't known.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > size - 8:
                raise UserError(f"{path} is cut short or is no safetensors file: its header does not fit into it")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise UserError(f"{path} is no safetensors file: its header can't be read") from error
        if not isinstance(header, dict):
            raise UserError(f"{path} is no safetensors file: its header is no JSON object")
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._places: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in header.items():
            dtype, shape, begin, end = _entry(path, name, entry)
            if dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name} is {dtype}, which can't be held; known: {', '.join(DTYPES)}")
            if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize or begin < 0:
                raise UserError(f"{path}: tensor {name} {shape} {dtype} takes {end - begin} bytes; the header is wrong")
            if self._start + end > size:
                raise UserError(f"{path} is cut short: tensor {name} ends at byte {self._start + end} of {size}")
            self.tensors[name] = dtype, shape
            self._places[name] = begin, end
        last = 0
        for name, (begin, end) in sorted(self._places.items(), key=lambda place: place[1]):
            if begin != last:
                raise UserError(f"{path}: tensor {name} begins at byte {begin}, the one before it ends at {last}: the "
                                "header is wrong; fetch the file again")  # fmt: skip
            last = end
        if self._start + last != size:
            longer = size - self._start - last
            raise UserError(f"{path} is {longer} bytes longer than its tensors: fetch the file again")

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of the file: pages come in as they are touched and can be dropped again."""
        dtype, shape = self.tensors[name]
        begin, end = self._places[name]
        if begin == end:
            return np.zeros(shape, DTYPES[dtype])
        with reading(self.path):
            raw = np.memmap(self.path, np.uint8, "r", self._start + begin, (end - begin,))
        return raw.view(DTYPES[dtype]).reshape(shape)


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte past the last of a header's entry."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if all(type(size) is int and size >= 0 for size in shape):
                return dtype, tuple(shape), begin, end
    raise UserError(f"{path}: the header's entry of tensor {name} is wrong: it needs a dtype's name, a list of sizes "
                    "and two data_offsets; fetch the file again")  # fmt: skip


def open_folder(folder: Path) -> dict[str, Shard]:
    """Tensor name -> the shard that holds it, for a folder with one file or with shards and an index.

    Raises:
      UserError: there are no safetensors files, a shard is missing or damaged, or a shard lacks an indexed tensor.
    """
    if (folder / INDEX).is_file():
        try:
            with reading(folder / INDEX):
                text = (folder / INDEX).read_text(encoding="utf-8")
            where = json.loads(text)["weight_map"]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX} can't be read: it needs a `weight_map`") from error
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{folder / INDEX}: its `weight_map` must be an object, a file's name for each tensor")
        files = sorted(set(where.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:3])}")
        shards = {name: Shard(folder / name) for name in files}
        for tensor, file in where.items():
            if tensor not in shards[file].tensors:
                raise UserError(f"{folder / file} lacks the tensor {tensor} that {INDEX} promises in it")
    else:
        paths = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{folder} holds no safetensors files: give a folder with {SINGLE} or {INDEX}")
        shards = {path.name: Shard(path) for path in paths}
    found: dict[str, Shard] = {}
    for shard in shards.values():
        for tensor in shard.tensors:
            if tensor in found:
                raise UserError(f"{folder}: tensor {tensor} is in {found[tensor].path.name} and in {shard.path.name}")
            found[tensor] = shard
    return found


def write(path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[np.ndarray]) -> None:
    """Writes one file: `specs` gives (dtype name, shape) of each tensor and `tensors` their values in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
            assert (NAMES[tensor.dtype], tensor.shape) == (dtype, shape), name
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
