"""The configuration of a run: frozen dataclasses inside, an ml_collections ConfigDict or a plain dict at the edge.

`from_config_dict` turns what a config file or a stored config.json says into a `Config` and refuses what can't be
meant: an unknown field (naming the nearest), a wrong type, values that contradict one another. Core functions take
values from these dataclasses; none takes a ConfigDict. Units: sizes in elements, steps in optimizer steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import config_dict

from moejax import schema
from moejax.data import DataConfig
from moejax.errors import UserError
from moejax.schema import to_config_dict, to_dict

__all__ = [
    "Ablation", "Config", "DataConfig", "MeshConfig", "MoEConfig", "ModelConfig", "OptimizerConfig", "TrainConfig",
    "ablation_from_config_dict", "diff", "from_config_dict", "settle", "to_config_dict", "to_dict",
    "with_experts_per_token",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sparse FFN of a block."""

    router: str = "moejax.routing:top_k"  # dotted name of a router function; a file of yours works: "my.py:route"
    # Passed to the router by keyword. hash=False: jit wants hashable static arguments, and a dict has no hash.
    router_options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    num_experts: int = 16  # E, the routed ones
    experts_per_token: int = 1  # K
    shared_experts: int = 0  # experts of expert_width that every token uses
    expert_width: int | None = None  # F; None: model.ffn_width
    capacity_factor: float | None = None  # rows per expert = ceil(factor · T_group · K / E); None: dropless
    eval_capacity_factor: float | None = None  # None: capacity_factor
    group: Literal["sequence", "batch"] = "sequence"  # capacity and expert choice are decided inside a group
    load_balance_weight: float = 0.0
    sequence_balance_weight: float = 0.0
    router_z_weight: float = 0.0
    importance_weight: float = 0.0
    load_weight: float = 0.0  # V-MoE's load loss: needs a noisy router
    mtp_weight: float = 0.0  # of a published model's prediction modules (DeepSeek-V3); the research LM has none
    bias_update_rate: float = 0.0  # u of the aux-loss-free rule b += u·sign(mean(c) − c); 0: no bias
    input_jitter: float = 0.0  # router inputs are multiplied by uniform(1 − jitter, 1 + jitter) in training
    dispatch: Literal["sorted", "dense"] = "sorted"  # dense: the oracle, every expert on every token
    implementation: str | None = None  # of the grouped matmul; None: the fastest that runs here
    exchange: str | None = None  # how rows reach experts on other devices (mesh.expert > 1); None: by platform
    exchange_factor: float | None = None  # all_to_all: rows from a device to another = ceil(factor · T_device · K / S),
    # ragged, remote: rows that come to a device = ceil(factor · T_device · K); more is left out and counted
    # (overflow_fraction); None: as many as there can be
    exchange_chunks: int = 1  # equal parts of a device's tokens, each exchanged while experts work on another one, and
    # with a bound of its own: T_device is the tokens of a part


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder language model."""

    num_layers: int = 4
    width: int = 128  # D
    num_heads: int = 4  # H
    num_kv_heads: int = 4  # keys and values are shared by groups of num_heads / num_kv_heads queries
    head_dim: int | None = None  # None: width / num_heads
    ffn_width: int = 512  # hidden width of a dense SwiGLU FFN
    moe: MoEConfig | None = None  # None: every FFN is dense
    first_dense_layers: int = 0  # the first n layers are dense …
    moe_every: int = 1  # … and after them the FFN of every m-th layer is sparse
    vocab_size: int | None = None  # None: the tokenizer's
    qk_norm: bool = True
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_scale: float = 1.0  # multiplies the standard deviation 1 / √fan_in of every matrix
    dtype: Literal["bfloat16", "float32"] = "float32"  # of the compute; the router's is float32
    param_dtype: Literal["bfloat16", "float32"] = "float32"  # of parameters and of the optimizer's moments
    attention_implementation: str | None = None  # of attention.attend; None: the fastest that runs here
    scan_layers: bool = True  # False: layer by layer, an array each (longer compile, less memory; the
    # same values, but that adafactor clips each layer's update by itself)
    remat: Literal["none", "full", "dots"] = "none"  # dots: keep what products and attention give


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Adafactor or Muon, and the learning rate over a horizon of its own."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    schedule: Literal["cosine", "wsd", "constant", "steps"] = "cosine"  # see optimizer.schedule
    warmup_steps: int = 20
    decay_steps: int | None = None  # the horizon, warm-up included; None: train.steps of the first run, then stored
    weight_decay: float = 0.1  # of matrices; norms, biases and other vectors have none
    clip_norm: float | None = 1.0  # of the gradient's global norm; None: no clipping
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: its length and how often it reports, evaluates and saves."""

    steps: int = 1000
    log_every: int = 10
    eval_every: int = 200  # 0: at the end alone
    eval_batches: int = 16
    checkpoint_every: int = 200  # and at the end; 0: at the end alone
    keep_checkpoints: int = 2
    accumulation_steps: int = 1  # microbatches per step
    init_from: str | None = None  # start from the parameters of this run or checkpoint directory
    profile_steps: tuple[int, ...] = ()  # (first, last): trace these steps with jax.profiler


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: what the others leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run. Equal configs and seeds give equal runs."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Arms to be compared: whole configs by name, each trained with every seed.

    `classes` names groups of arms of equal compute, where not all arms are meant to be equal; None: one class.
    """

    arms: dict[str, Config]
    seeds: tuple[int, ...]
    classes: dict[str, tuple[str, ...]] | None


def from_config_dict(values: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Parses and checks. Fields left out take their defaults.

    Raises:
      UserError: an unknown field, a wrong type, or values that contradict one another.
    """
    from moejax.config_checks import check  # it reads the dataclasses of this module

    if "arms" in values:
        raise UserError("config has `arms`: it is an ablation; run it with experiments/ablate.py")
    config = schema.parse(Config, values)
    check(config)
    return config


def ablation_from_config_dict(values: Mapping[str, Any] | config_dict.ConfigDict) -> Ablation:
    """Parses a config with `arms` (name -> nested changes), `seeds` and, if need be, `classes`.

    Every arm is the rest of the config with the arm's changes merged in.

    Raises:
      UserError: as `from_config_dict`, with the arm named; no arms or seeds; a class with an unknown arm.
    """
    plain = schema.plain(values)
    for name in ("arms", "seeds"):
        if not plain.get(name):
            raise UserError(
                f"config.{name} is missing or empty: an ablation needs `arms` and `seeds`; "
                "experiments/train.py runs a single config"
            )
    changes, seeds, classes = plain.pop("arms"), plain.pop("seeds"), plain.pop("classes", None)
    arms = {}
    for name, change in changes.items():
        if not isinstance(change, dict):
            raise UserError(f"config.arms: {name!r} is {change!r}; give a dict of the fields that this arm changes")
        try:
            arms[name] = from_config_dict(schema.merge(plain, change))
        except UserError as error:
            raise UserError(f"arm {name!r}: {error}") from error
    seeds = schema.parse_value(tuple[int, ...], seeds, "seeds")
    if classes is not None:
        classes = schema.parse_value(dict[str, tuple[str, ...]], classes, "classes")
        members = sorted(arm for names in classes.values() for arm in names)
        if members != sorted(arms):
            raise UserError(f"config.classes must hold every arm once: it holds {members}, the arms are {sorted(arms)}")
    return Ablation(arms, seeds, classes)


# What a resumed run may change: how long it runs, where, how it reports, and by which code, not what it computes.
NO_CHANGE = (
    "train.steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every",
    "train.keep_checkpoints", "train.profile_steps", "mesh", "data.cache_dir", "model.remat",
    "model.attention_implementation", "model.moe.implementation", "model.moe.exchange",
    "model.moe.exchange_chunks",
)  # fmt: skip


def diff(stored: Config, new: Config) -> list[str]:
    """The fields in which `new` is another experiment than `stored`, each as "path: old -> new".

    `optimizer.decay_steps` and `model.vocab_size` left at None agree with whatever the first run stored.
    """
    before, after = dict(schema.leaves(to_dict(stored))), dict(schema.leaves(to_dict(new)))
    changed = []
    for path in sorted(before.keys() | after.keys()):
        old, now = before.get(path), after.get(path)
        ignored = any(path == name or path.startswith(name + ".") for name in NO_CHANGE)
        filled_in = now is None and path in ("optimizer.decay_steps", "model.vocab_size")
        if old != now and not ignored and not filled_in:
            changed.append(f"{path}: {old!r} -> {now!r}")
    return changed


def settle(config: Config, stored: Config | None = None) -> Config:
    """Fills `optimizer.decay_steps` from the stored run, or from train.steps if this is the first.

    So a longer second run continues the schedule of the first and does not bend its past.
    """
    if config.optimizer.decay_steps is not None:
        return config
    horizon = config.train.steps if stored is None else stored.optimizer.decay_steps
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=horizon))


def with_experts_per_token(config: Config, experts_per_token: int | None) -> Config:
    """The config evaluated with another number of experts per token than it was trained with; None changes nothing.

    Raises:
      UserError: a dense model; a number out of range; expert choice, where experts choose and K is only the capacity.
    """
    from moejax.config_checks import check
    from moejax.moe import abstract_decision
    from moejax.routing import ExpertChoice

    if experts_per_token is None:
        return config
    moe = config.model.moe
    if moe is None:
        raise UserError("experts_per_token was given for a dense model: leave it out")
    if isinstance(abstract_decision(moe), ExpertChoice):
        raise UserError("experts_per_token has no meaning in expert choice, where experts choose tokens: leave it out")
    moe = dataclasses.replace(moe, experts_per_token=experts_per_token)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    check(config)
    return config
