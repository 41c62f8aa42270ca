"""What a published family declares beside its model, and the tensor names that most families share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moejax import hf_config, hf_tensors
from moejax.hf_tensors import Rule
from moejax.models.parts import Decoder


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One published architecture.

    name: its `model_type`. architecture: transformers' class. config: the dataclass of its config.json. rules: the
    tensors of a config's parameters. presets: published sizes by name. aliases, fixed, zero: see `hf_config.parse`.
    harmless: keys of config.json that change nothing, each with the reason. ignored: a regular expression of tensor
    names that hold no parameter. wrapped: architectures that hold this one inside, its tensors under `prefix`.
    reconcile: the config for the tensors that are there, where some may be absent. duplicates: tensors that repeat
    another, by name. Where config.json nests, `read` turns it into the flat form that `config` has, and `write` turns
    it back.
    """

    name: str
    architecture: str
    config: type
    model: type[Decoder]
    rules: Callable[[Any], list[Rule]]
    presets: Mapping[str, Any]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: Mapping[str, str] = dataclasses.field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    ignored: str = r".*rotary_emb\.inv_freq"
    wrapped: tuple[str, ...] = ()
    prefix: str = ""
    reconcile: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    duplicates: Callable[[Any], dict[str, str]] = lambda config: {}
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict
    write: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def experts(self, config: Any) -> tuple[int, int]:
        """(experts per token, routed experts), whatever the family calls them."""
        used = next(getattr(config, name) for name in ("num_experts_per_tok", "moe_top_k") if hasattr(config, name))
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return used, next(getattr(config, name) for name in names if hasattr(config, name))

    def repeats(self, config: Any) -> dict[str, str]:
        """Tensors that may be there and repeat another, by name: `duplicates`, and a tied unembedding."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        return tied | self.duplicates(config)

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        """The family's config from what config.json holds; UserError for what isn't known."""
        return hf_config.parse(
            self.config,
            self.read(dict(raw)),
            aliases=self.aliases,
            fixed=self.fixed,
            harmless=self.harmless,
            zero=self.zero,
        )

    def write_config(self, config: Any) -> dict[str, Any]:
        """What config.json holds, in transformers 5's spelling."""
        fixed = {name: values[0] for name, values in self.fixed.items()}
        return self.write(hf_config.to_json(config, self.architecture, self.name, fixed))


def without_unused_window(raw: dict[str, Any]) -> dict[str, Any]:
    """Qwen's config.json, in which transformers writes a window of 0 where windows are off."""
    unused = raw.get("sliding_window") == 0 and not raw.get("use_sliding_window")
    return raw | {"sliding_window": None} if unused else raw


def in_old_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with `rope_theta` and `rope_scaling`, as code published beside a checkpoint reads it."""
    turns = raw.pop("rope_parameters")
    raw["rope_theta"] = turns.pop("rope_theta")
    kind = turns.pop("rope_type")
    return raw if kind == "default" else raw | {"rope_scaling": {"type": kind} | turns}


def outer_rules(config: Any) -> list[Rule]:
    """Embedding, last norm, and the unembedding where it isn't tied."""
    rules = [
        hf_tensors.copy("params/embedding", "model.embed_tokens.weight"),
        hf_tensors.copy("params/final_norm/scale", "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        rules.append(hf_tensors.linear("params/unembedding", "lm_head.weight"))
    return rules


def norm_rules(layer: int, ours: str | None = None) -> list[Rule]:
    """The two norms of a pre-norm block; `ours` where it isn't params/layer_…"""
    ours, theirs = ours or f"params/layer_{layer}", f"model.layers.{layer}"
    return [
        hf_tensors.copy(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        hf_tensors.copy(f"{ours}/ffn_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
    ]


def attention_rules(layer: int, biased: str = "") -> list[Rule]:
    """Queries, keys, values and output; `biased`: the letters of "qkvo" that have a bias."""
    ours, theirs = f"params/layer_{layer}/attention", f"model.layers.{layer}.self_attn"
    rules = []
    for letter, name in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
        rules.append(hf_tensors.linear(f"{ours}/{name}", f"{theirs}.{letter}_proj.weight", 2 if letter == "o" else 1))
        if letter in biased:
            rules.append(hf_tensors.flat(f"{ours}/{name}_bias", f"{theirs}.{letter}_proj.bias"))
    return rules


def ffn_rules(ours: str, theirs: str) -> list[Rule]:
    """A dense SwiGLU."""
    return [hf_tensors.linear(f"{ours}/{name}", f"{theirs}.{name}_proj.weight") for name in ("gate", "up", "down")]


def expert_rules(ours: str, theirs: str, count: int, names=("gate_proj", "up_proj", "down_proj")) -> list[Rule]:
    """One SwiGLU per expert; `names` are those of gate, up and down."""
    pairs = zip(("gate", "up", "down"), names, strict=True)
    return [hf_tensors.experts(f"{ours}/{our}", f"{theirs}.{{}}.{name}.weight", count) for our, name in pairs]
