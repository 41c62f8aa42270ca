"""config.json of a checkpoint as a family's frozen dataclass, strictly: every key is used, or known to be harmless.

A family's dataclass carries transformers 5's names and defaults. Older spellings are read too: `aliases` maps a key to
today's name, and `rope_theta` with `rope_scaling` becomes `rope_parameters`.
"""

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moejax import hf_config_checks, schema
from moejax.errors import UserError, reading
from moejax.rope import Rope

_LABEL, _LIBRARY, _SHAPE = "who and what made it", "how a library calls or returns", "of models of another kind"
DROPOUT = "dropout in training, which is not applied here"
LOSSES = "weights of losses in training, which the config of a run gives (model.moe)"
# Keys that are taken and change nothing that is computed, each with the reason; a family's `harmless` adds its own.
HARMLESS: dict[str, str] = {
    **dict.fromkeys(("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version"), _LABEL),
    **dict.fromkeys(
        ("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
         "use_cache"), _LIBRARY),
    **dict.fromkeys(("id2label", "label2id", "problem_type", "is_decoder"), _SHAPE),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "ids, of which generate reads the ends"),
    **dict.fromkeys(("dtype", "torch_dtype"), "how the tensors are stored, which they say themselves"),
    "attention_dropout": DROPOUT,
    "initializer_range": "how parameters began",
    "max_position_embeddings": "the longest sequence meant; read where rotary scaling counts from it, else no limit",
    "router_aux_loss_coef": LOSSES,
}  # fmt: skip
# Keys of which one value is harmless, whatever the family.
_FIXED: dict[str, tuple[Any, ...]] = {"add_cross_attention": (False,), "is_encoder_decoder": (False,)}
_ROPE_KEYS = {field.name for field in dataclasses.fields(Rope)}


def read_json(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder; UserError where there is none or it can't be read."""
    path = folder / "config.json"
    if next(folder.glob("checkpoints/*/checkpoint.json"), None):
        raise UserError(f"{folder} is a run or an import of moejax's: give what experiments/export_hf.py makes of it")
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} can't be read as JSON") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold one JSON object")
    return raw


def parse(
    cls: Any,
    raw: Mapping[str, Any],
    *,
    aliases: Mapping[str, str] | None = None,
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    harmless: Collection[str] = (),
    zero: frozenset[str] = frozenset(),
) -> Any:
    """A `cls` from the keys of config.json; fields that are left out take their defaults.

    fixed: keys whose value may only be one of those given, the ones that the family computes. harmless: keys beside
    `HARMLESS` that change nothing. zero: counts that may be 0.

    Raises:
      UserError: an unknown key, a wrong type, a value of a fixed key that isn't supported, or values that can't be.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    fixed = _FIXED | dict(fixed or {})
    values: dict[str, Any] = {}
    rope: dict[str, Any] = {}
    if "rope" in fields:
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        name = "max_seq_len" if "max_seq_len" in defaults else "max_position_embeddings"  # the first is DBRX's
        longest = raw.get(name, defaults.get(name))
        raw, rope["rope"] = _rope(raw, defaults["rope"], longest)
    for key, value in raw.items():
        name = (aliases or {}).get(key, key)
        if name in fields:
            if name in values and values[name] != value:
                raise UserError(f"config.json gives {name} twice, as {values[name]!r} and as {key}={value!r}")
            values[name] = value
        elif name in fixed:
            if value not in fixed[name]:
                allowed = " or ".join(map(repr, fixed[name]))
                raise UserError(f"config.json: {key}={value!r} is not supported; this family computes {allowed}")
        elif name not in HARMLESS and name not in harmless:
            near = difflib.get_close_matches(name, sorted(fields), n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"config.json: unknown attribute {key}={str(value)[:60]!r}{hint}")
    # The rotary settings last: they may hold a context length whose own key is to be named.
    config = schema.parse(cls, values | rope)
    hf_config_checks.check(config, zero)
    return config


def inner(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object inside config.json; {} where there is none."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key}={str(value)[:60]!r}: it needs an object, {{...}}, or to be left out")
    return dict(value)


def _rope(raw: Mapping[str, Any], default: Any, longest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rest of `raw`, and its rotary settings in one dict, whichever way they are spelled."""
    found, scaling, theta = inner(raw, "rope_parameters"), inner(raw, "rope_scaling"), raw.get("rope_theta")
    rest = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    if "original_max_position_embeddings" in rest:
        (scaling or found).setdefault("original_max_position_embeddings", rest.pop("original_max_position_embeddings"))
    for old in (found, scaling):
        kind = old.pop("type", None)
        if kind is not None and old.setdefault("rope_type", kind) != kind:
            raise UserError(f"config.json gives two rope types, {kind!r} and {old['rope_type']!r}")
        if old.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config.json: partial_rotary_factor other than 1 is not supported by this family")
    if theta is None:
        theta = getattr(default, "rope_theta", 10_000.0)
        lost = found.get("rope_theta", theta)
        if scaling and lost != scaling.get("rope_theta", theta):
            raise UserError(f"config.json gives rope_theta={lost} in rope_parameters, in whose place rope_scaling is "
                            "read: give rope_theta there, or rope_parameters alone")  # fmt: skip
        if not found and not scaling and isinstance(default, Rope):
            return rest, schema.to_dict(default)
    found = scaling or found
    found.setdefault("rope_theta", theta)
    if found.get("rope_type", "default") == "default":
        unused = _ROPE_KEYS - {"rope_type", "rope_theta"}
        found = {key: value for key, value in found.items() if key not in unused}
    elif found["rope_type"] == "dynamic":
        found["original_max_position_embeddings"] = longest  # it grows from there on, whatever else is said
    elif found["rope_type"] in ("yarn", "llama3", "longrope"):
        original = found.get("original_max_position_embeddings")
        # what is no number is refused with its type later
        if found.get("factor") is None and _is_size(longest) and _is_size(original):
            found["factor"] = longest / original
        found.setdefault("original_max_position_embeddings", longest)
    return rest, found


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """`Rope` as config.json holds it: without what is unset."""
    values = {name: value for name, value in schema.to_dict(rope).items() if value is not None}
    if rope.rope_type != "yarn":
        values.pop("truncate")
    if rope.rope_type == "dynamic":
        values.pop("original_max_position_embeddings")
    return values


def to_json(config: Any, architecture: str, model_type: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a family's dataclass, in the spelling of transformers 5; `extra` adds keys or replaces them."""
    values = {name: value for name, value in schema.to_dict(config).items() if name != "rope"}
    if hasattr(config, "rope"):
        values["rope_parameters"] = rope_parameters(config.rope)
    return {"architectures": [architecture], "model_type": model_type} | values | dict(extra)
