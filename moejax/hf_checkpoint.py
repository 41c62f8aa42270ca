"""Hugging Face checkpoints to and from moejax's own, streamed: one tensor group is in memory at a time.

    DIRECTORY/checkpoints/0/    the checkpoint, as `checkpoint.save` would write it; its config holds `family` and `hf`
              tokenizer/        what lay beside the source: tokenizer files, generation_config.json, code

orbax writes a tree that is in memory. Here it writes the tree with a single number in every place, and the arrays then
replace the numbers one at a time in orbax's own store (zarr in OCDBT), before the folder gets its name.
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

from moejax import checkpoint, hf_export, hf_import, hf_tensors, schema
from moejax.errors import UserError, writing
from moejax.models.family import Family

CHUNK_BYTES = 64 * 2**20  # arrays are stored in pieces of about this size, so that a mesh reads what it needs
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
      UserError: as `hf_import.load`; the workdir has checkpoints; the disk is too small.
    """
    source, workdir = Path(source), Path(workdir)
    tensors, family, config, raw = hf_import.open_checkpoint(source, families)
    found = hf_import.parameters(tensors, family, config, None if dtype is None else jnp.dtype(dtype))
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
    with writing(workdir):
        root.mkdir(parents=True, exist_ok=True)
        hf_export.check_room(workdir, size)
    try:
        if partial.is_dir():
            shutil.rmtree(partial)
        write_streamed(partial, shapes, found)
        # Code that config.json's auto_map names goes along.
        beside = [name for name in BESIDE if (source / name).is_file()] + [path.name for path in source.glob("*.py")]
        (workdir / "tokenizer").mkdir(exist_ok=True)
        for name in beside:
            shutil.copyfile(source / name, workdir / "tokenizer" / name)
        manifest = {
            "step": 0, "data": {},
            "config": {"family": family.name, "model": schema.to_dict(config), "hf": raw, "dtype": dtype},
            "trees": sorted({path.partition("/")[0] for path in shapes}), "files": checkpoint.file_sizes(partial),
        }  # fmt: skip
        with open(partial / checkpoint.MANIFEST, "w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=1))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(root / "0")
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    count = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("params/"))
    told = {"family": family.name, "parameters": count, "tensors": len(tensors.shapes), "left_out": tensors.left_out}
    return told | {"bytes": size}


def write_streamed(folder: Path, shapes: Mapping[str, Any], arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """orbax's trees in `folder` from (path, array), each path "params/…" or "router_state/…" once."""
    places = hf_tensors.unflatten({path: np.zeros((1,), np.float32) for path in shapes})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        trees = {name: ocp.args.StandardSave(tree) for name, tree in places.items()}
        writer.save(folder.absolute(), args=ocp.args.Composite(**trees))
    for path, array in arrays:
        spec = _spec(folder, path)
        with ts.Transaction(atomic=True) as transaction:
            store = ts.open(
                spec,
                dtype=ts.dtype(array.dtype),
                shape=array.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=_chunk(array)),
                create=True,
                delete_existing=True,
                transaction=transaction,
            ).result()
            store.write(array).result()


def _spec(folder: Path, path: str) -> dict[str, Any]:
    tree, _, rest = path.partition("/")
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute() / tree}/", "path": rest.replace("/", ".") + "/"}
    return {"driver": "zarr", "kvstore": store}


def _chunk(array: np.ndarray) -> list[int]:
    """The array's shape, its first axes cut until a piece is small."""
    chunk = list(array.shape)
    for axis in range(array.ndim):
        rest = math.prod(chunk[axis + 1 :]) * array.itemsize
        chunk[axis] = max(1, min(chunk[axis], CHUNK_BYTES // max(1, rest)))
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
        self.step, self.run = found.step, found.config.get("run")  # the training run's config; None: as imported
        self.family = families[found.config["family"]]
        self.config = schema.parse(self.family.config, found.config["model"])
        self.shapes = {path: leaf.shape for path, leaf in hf_import.abstract(self.family.model(self.config)).items()}

    def open(self, path: str) -> Any:
        return ts.open(_spec(self.folder, path), open=True, read=True).result()

    def dtype(self, path: str) -> np.dtype:
        """Of one parameter."""
        return np.dtype(self.open(path).dtype.numpy_dtype)

    def read(self, path: str) -> np.ndarray:
        """One parameter."""
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
            kept = jnp.dtype(jnp.float32) if path.startswith("router_state/") else dtype
            array = self.read(path).astype(kept, copy=False)
            variables[path] = array if on_host else jax.device_put(array)
        return self.family.model(self.config, dtype=dtype), hf_tensors.unflatten(variables)
