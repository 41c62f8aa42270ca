"""moejax parameters as a Hugging Face checkpoint: safetensors shards, an index, config.json, by the import's rules.

Written beside its place and renamed into it, so a folder that is there is whole.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import hf_import, hf_tensors, safetensors
from moejax.errors import UserError, reading, writing
from moejax.models.family import Family

SHARD_BYTES = 5 * 10**9
Spec = tuple[str, tuple[int, ...]]  # dtype name, shape


def export(
    target: str | Path,
    family: Family,
    config: Any,
    read: Callable[[str], np.ndarray],
    dtypes: Mapping[str, np.dtype],
    *,
    raw: Mapping[str, Any] | None = None,
    beside: Mapping[str, Path | str] | None = None,
    repeated: Collection[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a checkpoint into the new folder `target`; returns its bytes.

    read: path ("params/layer_0/…") -> array. dtypes: of each path. raw: the config.json that the
    model came with, written back as it was but for how weights are stored; None: made from `config`. beside: further
    files by name, such as the tokenizer's, each as a path or as its text. repeated: which of `family.repeats` are
    written; None: its duplicates. One rule's arrays are in memory at a time.

    Raises:
      UserError: the target exists or can't be written, the disk is too small or fills up, or a dtype has no name in
        safetensors.
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists; give the name of a folder that is to be made")
    shapes = {path: leaf.shape for path, leaf in hf_import.abstract(family.model(config)).items()}
    rules = family.rules(config)
    tensors = hf_tensors.expected(rules, shapes)
    named = {rule.names[0]: rule for rule in rules}
    wanted = family.duplicates(config) if repeated is None else repeated
    for name, original in ((name, of) for name, of in family.repeats(config).items() if name in wanted):
        rules.append(dataclasses.replace(named[original], names=(name,)))
        tensors[name] = tensors[original]
    names = {name: _dtype_name(dtypes[rule.paths[0]]) for rule in rules for name in rule.names}
    specs = {name: (names[name], tensors[name]) for rule in rules for name in rule.names}
    shards = _split(specs, shard_bytes)
    total = sum(map(_bytes, specs.values()))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    further = {name: content(file) for name, file in (beside or {}).items()}
    with writing(target):
        partial.mkdir(parents=True)
    values = _values(rules, read)
    with writing(target), _removed_on_failure(partial):
        check_room(partial, total + sum(map(len, further.values())))
        for file, part in shards.items():
            safetensors.write(partial / file, part, (next(values) for _ in part))
        if len(shards) > 1:
            where = {name: file for file, part in shards.items() for name in part}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (partial / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        whole = config_json(family, config, dtypes, raw)
        (partial / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        for name, whole_file in further.items():
            (partial / name).write_bytes(whole_file)
        partial.rename(target)
    return total


def content(file: Path | str) -> bytes:
    """Of the file at a path, or of a text. UserError where it can't be read."""
    if isinstance(file, str):
        return file.encode()
    with reading(file):
        return file.read_bytes()


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def config_json(family: Family, config: Any, dtypes: Mapping[str, np.dtype], raw: Mapping[str, Any] | None) -> dict:
    """config.json: `raw` or one made from `config`, with the dtype that most parameters have, and no quantisation."""
    counts: dict[str, int] = {}
    for dtype in dtypes.values():
        counts[str(dtype)] = counts.get(str(dtype), 0) + 1
    most = max(counts, key=lambda name: counts[name])
    if raw is None:
        return family.write_config(config) | {"dtype": most}
    if family.wrapped and raw.get("text_config"):  # what is written is the text model alone
        raw = raw["text_config"] | {"architectures": [family.architecture], "model_type": family.name}
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    return kept | {("torch_dtype" if "torch_dtype" in kept else "dtype"): most}


def export_variables(target: str | Path, family: Family, config: Any, variables: Mapping[str, Any], **options) -> int:
    """`export` of variables in memory: {"params": …, "router_state": …}."""
    flat = hf_tensors.flatten({k: v for k, v in variables.items() if k in ("params", "router_state")})
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in flat.items()}
    return export(target, family, config, lambda path: np.asarray(jax.device_get(flat[path])), dtypes, **options)


def check_room(folder: Path, needed: int) -> None:
    """UserError where the disk of `folder` has no room for `needed` bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01 + 2**20:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed: give another disk"
        )


def _values(rules: list[hf_tensors.Rule], read: Callable[[str], np.ndarray]) -> Iterator[np.ndarray]:
    for rule in rules:
        yield from rule.write([read(path) for path in rule.paths])


def _dtype_name(dtype: np.dtype) -> str:
    if dtype not in safetensors.NAMES:
        raise UserError(f"parameters of {dtype} can't be written to safetensors; convert them to bfloat16 or float32")
    return safetensors.NAMES[dtype]


def _bytes(spec: Spec) -> int:
    return math.prod(spec[1]) * np.dtype(safetensors.DTYPES[spec[0]]).itemsize


def _split(specs: Mapping[str, Spec], shard_bytes: int) -> dict[str, dict[str, Spec]]:
    """Tensors in their order, in files of at most `shard_bytes` (or of one tensor)."""
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + _bytes(spec) > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += _bytes(spec)
    if len(parts) == 1:
        return {safetensors.SINGLE: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
