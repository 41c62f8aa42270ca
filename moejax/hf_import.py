"""Hugging Face checkpoints into moejax: every tensor is accounted for on both sides before anything is loaded."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax import hf_config, hf_tensors, safetensors
from moejax.errors import UserError
from moejax.hf_numbers import dequantise_fp8, dequantise_mxfp4, has_infinity, has_nan
from moejax.hf_tensors import Shape
from moejax.models import parts
from moejax.models.family import Family

_ALL = slice(None)


class Source:
    """The tensors of a checkpoint's folder by name, dequantised: `shapes` of all, `read` of one.

    X with X_scale_inv beside it (float8, a scale per 128 × 128 block: DeepSeek-V3) and X_blocks with X_scales (MXFP4:
    gpt-oss) come out under the name X, as bfloat16 where no dtype is asked for. `ignored` is a regular expression of
    names that are left out; how many is in `left_out`. `prefix` is taken off the names that begin with it.
    """

    def __init__(self, folder: Path, ignored: str, prefix: str = ""):
        self.folder = folder
        files = safetensors.open_folder(folder)
        # read under a shorter name, kept under their own in the file
        self._names = {name.removeprefix(prefix): name for name in files}
        if len(self._names) < len(files):
            twice = next(name for name in files if self._names[name.removeprefix(prefix)] != name)
            raise UserError(f"{folder} holds {twice} with and without {prefix!r} before it: take away one of the two")
        self._shards = {name: files[full] for name, full in self._names.items()}
        self.shapes: dict[str, Shape] = {}
        self.left_out = 0
        for name, shard in self._shards.items():
            shape = shard.tensors[self._names[name]][1]
            if re.fullmatch(ignored, name):
                self.left_out += 1
            elif name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self._shards:
                held = shard.tensors[self._names[name]][0]
                if held != "U8" or len(shape) != 4:
                    raise UserError(f"{folder}: tensor {name} is {held} {shape}: MXFP4 blocks are U8 with four axes")
                # (E, out, groups, 16 bytes of two codes) -> (E, in, out)
                self.shapes[name.removesuffix("_blocks")] = (shape[0], shape[2] * shape[3] * 2, shape[1])
            elif not self._is_scale(name):
                self.shapes[name] = shape
        self._check_quantised()

    def _check_quantised(self) -> None:
        """UserError where a tensor is there both as it is and quantised, or has scales and isn't."""
        for name, shard in self._shards.items():
            whole = name.removesuffix("_blocks")
            if whole != name and whole in self._shards:
                raise UserError(f"{self.folder} holds {whole} and {name}: take away one of the two")
            held = shard.tensors[self._names[name]][0]
            if name + "_scale_inv" in self._shards and not held.startswith("F8_"):
                raise UserError(f"{self.folder}: tensor {name} is {held} and has {name}_scale_inv beside it, as only "
                                "float8 tensors have: take the scales away if it has been dequantised")  # fmt: skip

    def _is_scale(self, name: str) -> bool:
        if name.endswith("_scales"):
            return name.removesuffix("_scales") + "_blocks" in self._shards
        return name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in self._shards

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives where none is asked for."""
        if name not in self._shards or name + "_scale_inv" in self._shards:
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(safetensors.DTYPES[self._shards[name].tensors[self._names[name]][0]])

    def read(self, name: str, dtype: Any = None, rows: slice = _ALL) -> np.ndarray:
        """One tensor. UserError where it holds a NaN, isn't of floats, or is quantised in a way that isn't known.

        dtype: of a float8 tensor, rounded to it once; every other keeps its own (bfloat16 holds MXFP4 exactly).
        rows: of the first axis, the only ones that are read and checked (of a float8 tensor all are).
        """
        if name not in self._shards or name + "_scale_inv" in self._shards:
            try:
                tensor = self._dequantised(name, dtype, rows)
            except UserError as error:
                raise UserError(f"{self.folder}: tensor {name}: {error}") from None
        else:
            tensor = self._raw(name, rows)
            if tensor.dtype.itemsize == 1:
                raise UserError(f"{self.folder}: tensor {name} is {tensor.dtype} without a {name}_scale_inv beside it")
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise UserError(f"{self.folder}: tensor {name} is {tensor.dtype}: parameters are floats")
            return tensor
        if has_infinity(tensor):
            raise UserError(f"{self.folder}: tensor {name}, dequantised, goes beyond what {tensor.dtype} holds")
        return tensor

    def _dequantised(self, name: str, dtype: Any, rows: slice) -> np.ndarray:
        if name not in self._shards:
            return dequantise_mxfp4(self._raw(name + "_blocks", rows), self._raw(name + "_scales", rows))
        return dequantise_fp8(self._raw(name), self._raw(name + "_scale_inv"), dtype or self.dtype(name))[rows]

    def _raw(self, name: str, rows: slice = _ALL) -> np.ndarray:
        tensor = self._shards[name].read(self._names[name])[rows]
        if has_nan(tensor):
            raise UserError(f"{self._shards[name].path}: tensor {name} holds a NaN")
        return tensor


class _Nothing(parts.Block):
    """A block without parameters."""

    def __call__(self, x, inputs):
        return x, {}


def abstract(model: parts.Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Every variable of a model by path, "params/layer_0/…", as shapes: nothing is allocated.

    Layers of one kind have the same parameters, so one of each kind is traced: 60 layers take no longer than two.
    """
    config, dtype = model.config, jnp.dtype(jnp.float32)
    outer = type("Outer", (type(model),), {"block": _Nothing})(config)
    key, tokens = jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    found = _shapes(outer, key, tokens)
    kinds: dict[bool, dict[str, jax.ShapeDtypeStruct]] = {}
    sparse = getattr(config, "sparse", lambda _: True)
    places = {f"layer_{i}": i for i in range(config.num_hidden_layers)} | model.further_blocks(config)
    for name, i in places.items():
        kind = sparse(i)
        if kind not in kinds:
            x = jnp.zeros((1, 2, config.hidden_size))
            kinds[kind] = _shapes(model.block(config, i, dtype), key, x, parts.Inputs(tokens, tokens, tokens))
        for path, leaf in kinds[kind].items():
            collection, _, rest = path.partition("/")
            found[f"{collection}/{name}/{rest}"] = leaf
    return found


def _shapes(module: nn.Module, key: jax.Array, *inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    variables = nn.unbox(jax.eval_shape(module.init, key, *inputs))
    return hf_tensors.flatten({name: tree for name, tree in variables.items() if name in ("params", "router_state")})


def read_config(folder: Path, families: Mapping[str, Family]) -> tuple[Family, Any, dict[str, Any]]:
    """The family of a checkpoint's config.json, the family's config, and the JSON itself.

    Raises:
      UserError: an architecture that isn't known, or a config that the family refuses.
    """
    raw = hf_config.read_json(folder)
    kinds = {name: family for family in families.values() for name in (family.architecture, *family.wrapped)}
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{folder}: config.json's architectures={named!r}: it needs a list of names, such as "
                        f"{[family.architecture for family in families.values()][:1]}")  # fmt: skip
    family = next((kinds[name] for name in named if name in kinds), None)
    if not named:
        family = families.get(str(raw.get("model_type")))
    if family is None:
        shown = ", ".join(map(str, named)) or raw.get("model_type")
        raise UserError(f"{folder}: architecture {shown} is not known; there are {', '.join(sorted(kinds))}")
    return family, family.read_config(raw), raw


def open_checkpoint(folder: str | Path, families: Mapping[str, Family]) -> tuple[Source, Family, Any, dict[str, Any]]:
    """(tensors, family, config, config.json) of a folder; the config is the one of the tensors that are there."""
    family, config, raw = read_config(Path(folder), families)
    source = Source(Path(folder), family.ignored, family.prefix)
    return source, family, family.reconcile(config, source.shapes), raw


def check(source: Source, family: Family, config: Any) -> dict[str, Shape]:
    """Shape of every parameter by path; UserError unless the source has exactly the tensors that make them up."""
    shapes = {path: leaf.shape for path, leaf in abstract(family.model(config)).items()}
    tensors = hf_tensors.expected(family.rules(config), shapes)
    present = dict(source.shapes)
    for name, original in family.repeats(config).items():
        if not present.pop(name, None) or original not in source.shapes:  # a missing one is told below
            continue
        if not np.array_equal(source.read(name), source.read(original)):
            raise UserError(f"{source.folder}: {name} differs from {original}, and the model shares the two")
    hf_tensors.check(str(source.folder), tensors, present)
    return shapes


def parameter_dtype(source: Source, rule: hf_tensors.Rule, path: str, dtype: Any = None) -> np.dtype:
    """What `parameters` gives a path: `dtype`, or where None the one that holds all its tensors without rounding.

    Selection biases are float32.
    """
    if path.startswith("router_state/"):
        return np.dtype(np.float32)
    held = {source.dtype(name) for name in rule.names}
    if dtype is not None or len(held) == 1:
        return np.dtype(dtype or held.pop())
    # float32 for float16 and bfloat16 too: neither holds the other.
    return np.dtype(np.float64 if np.dtype(np.float64) in held else np.float32)


def parameters(source: Source, family: Family, config: Any, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every parameter, one rule at a time, after all names and shapes were checked.

    dtype: of the parameters; None keeps each tensor's, or the one that holds all tensors of a parameter. Selection
    biases stay float32.
    """
    shapes = check(source, family, config)
    return ((path, array) for path, _, array in pieces(source, family, config, shapes, math.inf, dtype))


def pieces(
    source: Source, family: Family, config: Any, shapes: Mapping[str, Shape], size: float, dtype: Any = None
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(path, first, array) of every parameter: rows first … of its first axis, in their order.

    shapes: as `check` gave them. size: bytes of a piece, or one row where that is more. Nothing larger is made on the
    way (but of float8, whose tensors are dequantised whole), so a wider dtype or quantised experts take no more memory
    than they must.
    """
    for rule in family.rules(config):
        targets = {path: parameter_dtype(source, rule, path, dtype) for path in rule.paths}
        rows = {path: rows_of_piece(shapes[path], targets[path].itemsize, size) for path in rule.paths}
        step = min(rows.values()) if rule.parts > 1 else 1
        for first in range(0, rule.parts, step):
            last = min(first + step, rule.parts)
            tensors = _tensors(source, rule, first, last, dtype)
            each = [(shapes[path][0] * (last - first) // rule.parts, *shapes[path][1:]) for path in rule.paths]
            for path, array in zip(rule.paths, rule.read(each, tensors), strict=True):
                for begin in range(0, len(array), rows[path]):
                    piece = array[begin : begin + rows[path]]
                    yield path, first + begin, _cast(piece, targets[path], rule.names[0])


def rows_of_piece(shape: Shape, itemsize: int, size: float) -> int:
    """How many rows of an array's first axis make a piece of at most `size` bytes, at least 1."""
    fit = size / max(1, math.prod(shape[1:]) * itemsize)
    return max(1, int(min(fit, shape[0])))


def _tensors(source: Source, rule: hf_tensors.Rule, first: int, last: int, dtype: Any) -> list[np.ndarray]:
    """What the parts first … last of a rule are read from, in one dtype."""
    each_its_own = len(rule.names) == rule.parts
    names = rule.names[first:last] if each_its_own else rule.names
    rows = _ALL if each_its_own else slice(first, last)
    tensors = [source.read(name, dtype, rows) for name in names]
    several = len({tensor.dtype for tensor in tensors}) > 1  # as one array they would have the first one's dtype
    if several or (each_its_own and len(names) > 1):  # while it is known whose number may be too large
        target = parameter_dtype(source, rule, rule.paths[0], dtype)
        tensors = [_cast(tensor, target, name) for tensor, name in zip(tensors, names, strict=True)]
    return tensors


def _cast(array: np.ndarray, target: np.dtype, name: str) -> np.ndarray:
    """The array in `target`; UserError, by the tensor's name, where a number is too large for it."""
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(target)
    narrower = jnp.finfo(target).max < jnp.finfo(array.dtype).max
    if narrower and has_infinity(out) and not has_infinity(array):
        raise UserError(f"tensor {name} goes beyond what {target} holds, {jnp.finfo(target).max}: ask for a wider one")
    return out


def load(folder: str | Path, families: Mapping[str, Family], dtype: Any = jnp.float32) -> tuple[nn.Module, dict]:
    """(model, variables) of a Hugging Face checkpoint; parameters and compute in `dtype`; UserError: no float's."""
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise UserError(f"dtype={dtype!r} is no float that parameters can have: give float32, bfloat16 or float16")
    source, family, config, _ = open_checkpoint(folder, families)
    found = parameters(source, family, config, dtype)
    # Copied: a view of the file would follow the file.
    variables = {path: jnp.array(array, copy=True) for path, array in found}
    return family.model(config, dtype=jnp.dtype(dtype)), hf_tensors.unflatten(variables)


def eos_ids(folder: Path, raw: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, from generation_config.json in `folder` or else config.json `raw`; [] without either."""
    path = folder / "generation_config.json"
    told: Any = {}
    if path.is_file():
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} can't be read as JSON: mend it, or take it away") from error
    found = told.get("eos_token_id") if isinstance(told, dict) else told
    if found is None:
        found = raw.get("eos_token_id", hf_config.inner(raw, "text_config").get("eos_token_id"))
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not isinstance(told, dict) or not all(type(each) is int for each in ids):
        raise UserError(f"{folder}: generation_config.json or config.json gives eos_token_id={found!r}: it needs an "
                        "id or a list of ids")  # fmt: skip
    return ids
