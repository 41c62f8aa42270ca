"""Hugging Face checkpoints to and from moejax's own, streamed: a piece of one tensor group is in memory at a time.

    DIRECTORY/checkpoints/0/    the checkpoint, as `checkpoint.save` would write it; its config holds `family` and `hf`
              tokenizer/        what lay beside the source: tokenizer files, generation_config.json, code

orbax writes a tree that is in memory. Here it writes the tree with a single number in every place, and the arrays then
replace the numbers, piece by piece, in orbax's own store (zarr in OCDBT), before the folder gets its name.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moejax import checkpoint, hf_export, hf_import, hf_tensors, host_memory, schema
from moejax.errors import UserError, writing
from moejax.models.family import Family

# What is converted at a time, and stored as one, so that a mesh reads what it needs. Each piece costs the store another
# copy of its table of contents: of large models they are larger.
PIECE_BYTES, MOST_PIECES = 32 * 2**20, 8192
BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "tiktoken.model",
)  # fmt: skip


def convert(
    source: str | Path, workdir: str | Path, families: Mapping[str, Family], dtype: str | None = None
) -> dict[str, Any]:
    """Writes the checkpoint of a Hugging Face folder into `workdir`; dtype None keeps each tensor's.

    Returns {"family", "parameters", "tensors", "left_out", "bytes"}. Every name and shape is checked before anything is
    written, and the disk; a failure in the middle leaves nothing that looks like a checkpoint.

    Raises:
      UserError: as `hf_import.load`; the workdir has checkpoints; the disk is too small, or fills up meanwhile.
    """
    source, workdir = Path(source), Path(workdir)
    tensors, family, config, raw = hf_import.open_checkpoint(source, families)
    shapes = hf_import.check(tensors, family, config)
    root = workdir / "checkpoints"
    partial = root / "0.orbax-checkpoint-tmp-import"
    if root.is_dir() and any(path != partial for path in root.iterdir()):  # a killed import may have left that
        raise UserError(f"{workdir} has checkpoints already; give a new folder")
    size = sum(
        math.prod(shapes[path]) * hf_import.parameter_dtype(tensors, rule, path, dtype).itemsize
        for rule in family.rules(config)
        for path in rule.paths
    )
    piece = max(PIECE_BYTES, size // MOST_PIECES)
    found = hf_import.pieces(tensors, family, config, shapes, piece, None if dtype is None else jnp.dtype(dtype))
    # Code that config.json's auto_map names goes along.
    names = [*BESIDE, *sorted(path.name for path in source.glob("*.py"))]
    beside = {name: hf_export.content(source / name) for name in names if (source / name).is_file()}
    tokenizer = workdir / "tokenizer"
    with writing(workdir):
        root.mkdir(parents=True, exist_ok=True)
        hf_export.check_room(workdir, size + sum(map(len, beside.values())))
        ours = not tokenizer.exists()
        try:
            if partial.is_dir():
                shutil.rmtree(partial)
            write_streamed(partial, shapes, piece, found)
            tokenizer.mkdir(exist_ok=True)
            for name, content in beside.items():
                (tokenizer / name).write_bytes(content)
            described = {"family": family.name, "model": schema.to_dict(config), "hf": raw, "dtype": dtype}
            described["tensors"] = _as_found(tensors, family, config, dtype)
            _write_manifest(partial, shapes, described)
            partial.rename(root / "0")
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            if ours:
                shutil.rmtree(tokenizer, ignore_errors=True)
            raise
    count = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("params/"))
    told = {"family": family.name, "parameters": count, "tensors": len(tensors.shapes), "left_out": tensors.left_out}
    return told | {"bytes": size}


def _as_found(source: hf_import.Source, family: Family, config: Any, dtype: str | None) -> dict[str, Any]:
    """What an export has to know of the source's tensors: which repeated ones there were, and the biases' dtype."""
    rules = [rule for rule in family.rules(config) if _is_bias(rule.paths[0])]
    biases = {source.dtype(name).name for rule in rules for name in rule.names}
    return {
        "repeated": sorted(family.repeats(config).keys() & source.shapes.keys()),
        "biases": biases.pop() if dtype is None and len(biases) == 1 else "float32",
    }


def _is_bias(path: str) -> bool:
    return path.startswith("router_state/")


def _write_manifest(folder: Path, shapes: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    trees = sorted({path.partition("/")[0] for path in shapes})
    manifest = {"step": 0, "data": {}, "config": config, "trees": trees, "files": checkpoint.file_sizes(folder)}
    with open(folder / checkpoint.MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())


def write_streamed(
    folder: Path, shapes: Mapping[str, Any], size: int, pieces: Iterator[tuple[str, int, np.ndarray]]
) -> None:
    """orbax's trees in `folder` from `hf_import.pieces` of `size` bytes, each path "params/…" or "router_state/…"."""
    places = hf_tensors.unflatten({path: np.zeros((1,), np.float32) for path in shapes})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        trees = {name: ocp.args.StandardSave(tree) for name, tree in places.items()}
        writer.save(folder.absolute(), args=ocp.args.Composite(**trees))
    stores: dict[str, Any] = {}
    under_way: Any = None
    written = 0
    try:
        for path, first, array in pieces:  # while one is written the next is made
            if path not in stores:
                stores[path] = _created(folder, path, shapes[path], array.dtype, size)
            if under_way is not None:
                under_way.result()
            # tensorstore would copy what it is to write; so what is a view of a file stays one
            place = stores[path][first : first + len(array)]
            under_way = place.write(array, can_reference_source_data_indefinitely=True)
            written += array.nbytes
            if written > 8 * size:  # small pieces freed by several threads lie scattered
                host_memory.give_freed_memory_back()
                written = 0
    finally:
        if under_way is not None:  # also where making the next one failed: or it would write while all is taken away
            under_way.result()


def _created(folder: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, size: int) -> Any:
    """The store of a parameter, in place of the number that orbax wrote there, in chunks of `size` bytes."""
    return ts.open(
        _spec(folder, path),
        dtype=ts.dtype(dtype),
        shape=shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=_chunk(shape, dtype.itemsize, size)),
        create=True,
        delete_existing=True,
    ).result()


def _spec(folder: Path, path: str) -> dict[str, Any]:
    tree, _, rest = path.partition("/")
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute() / tree}/", "path": rest.replace("/", ".") + "/"}
    return {"driver": "zarr", "kvstore": store}


def _chunk(shape: tuple[int, ...], itemsize: int, size: int) -> list[int]:
    """The shape, its first axes cut until a chunk is small; along the first as `hf_import.pieces` cuts it."""
    chunk = list(shape)
    for axis in range(len(chunk)):
        chunk[axis] = hf_import.rows_of_piece(shape[axis:], itemsize, size)
        if chunk[axis] > 1:
            break
    return chunk


class Stored:
    """A checkpoint of a published family in a workdir, read one array at a time.

    Raises:
      UserError: there is no checkpoint, or it is of the research LM.
    """

    def __init__(self, workdir: str | Path, families: Mapping[str, Family]):
        found = checkpoint.restore(workdir, {})
        if found is None:
            raise UserError(f"{workdir}: there is no checkpoint; import one with experiments/import_hf.py")
        if found.config.get("family") not in families:
            raise UserError(f"{workdir} holds a research LM, which is of no published family")
        self.folder, self.workdir, self.raw = found.path, Path(workdir), found.config["hf"]
        told = found.config.get("tensors", {})  # checkpoints from before have none
        self.repeated: list[str] | None = told.get("repeated")
        self._biases = np.dtype(told.get("biases", "float32"))
        self.step, self.run = found.step, found.config.get("run")  # the training run's config; None: as imported
        self.family = families[found.config["family"]]
        self.config = schema.parse(self.family.config, found.config["model"])
        self.shapes = {path: leaf.shape for path, leaf in hf_import.abstract(self.family.model(self.config)).items()}

    def open(self, path: str) -> Any:
        return ts.open(_spec(self.folder, path), open=True, read=True).result()

    def dtype(self, path: str) -> np.dtype:
        """Of one parameter; of a selection bias the source's, where that holds it."""
        if _is_bias(path):
            kept = self._whole(path)
            return self._biases if np.array_equal(kept.astype(self._biases).astype(kept.dtype), kept) else kept.dtype
        return np.dtype(self.open(path).dtype.numpy_dtype)

    def read(self, path: str) -> np.ndarray:
        """One parameter, in its `dtype`."""
        return self._whole(path).astype(self.dtype(path), copy=False) if _is_bias(path) else self._whole(path)

    def _whole(self, path: str) -> np.ndarray:
        return self.open(path).read().result()

    def beside(self) -> dict[str, Path]:
        """The tokenizer's files and others that came with the source, by name."""
        folder = self.workdir / "tokenizer"
        return {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def load(self, dtype: Any = None, on_host: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        """(model, variables), parameters and compute in `dtype`; None: as stored.

        On the default device, or as numpy arrays, for a mesh.
        """
        dtype = jnp.dtype(dtype or self.dtype("params/embedding"))
        variables = {}
        for path in self.shapes:
            kept = jnp.dtype(jnp.float32) if _is_bias(path) else dtype
            array = self.read(path).astype(kept, copy=False)
            variables[path] = array if on_host else jax.device_put(array)
        return self.family.model(self.config, dtype=dtype), hf_tensors.unflatten(variables)
