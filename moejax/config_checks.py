"""Which configs can't be meant: values out of range and fields that contradict one another.

Each check raises one line that says what was given, what is needed and what to do.
"""

import inspect
import math
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moejax import attention, dotted, exchange, schema
from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moejax.data import DataConfig
from moejax.errors import UserError
from moejax.models.lm import layer_plan
from moejax.moe import abstract_decision, reads_logits, sample_decision
from moejax.routing import ExpertChoice, Routing
from pallas_kernels import grouped_matmul


def check(config: Config) -> None:
    """Raises UserError for the first thing in `config` that can't be meant."""
    check_model(config.model)
    if config.model.moe is not None:
        check_moe(config.model.moe, config.mesh)
    _check_data(config.data, config.train)
    _check_optimizer(config.optimizer)
    _check_train(config.train)
    _check_mesh(config.mesh)
    check_seed(config.seed, "config.seed")


def check_seed(seed: int, name: str) -> None:
    """A seed that both the data's order and `jax.random.key` take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{name}={seed} must be at least 0 and below 2^63")


def check_model(model: ModelConfig) -> None:
    """Sizes of the decoder: positive, and heads that divide."""
    _at_least(1, "model", model, "num_layers", "width", "num_heads", "num_kv_heads", "ffn_width", "moe_every")
    _at_least(1, "model", model, "head_dim", "vocab_size")
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} is no multiple of num_kv_heads={model.num_kv_heads}: "
            "every key-value head serves the same number of query heads"
        )
    if model.head_dim is None and model.width % model.num_heads:
        raise UserError(
            f"config.model.width={model.width} is no multiple of num_heads={model.num_heads}; "
            "change one of them or set model.head_dim"
        )
    head_dim = model.head_dim or model.width // model.num_heads
    if head_dim % 2:
        raise UserError(f"config.model: head_dim={head_dim} is odd; rotary positions turn pairs, so it must be even")
    if not 0 <= model.first_dense_layers <= model.num_layers:
        raise UserError(
            f"config.model.first_dense_layers={model.first_dense_layers} must lie in 0 … num_layers={model.num_layers}"
        )
    _above_zero("model", model, "rope_theta", "norm_eps", "init_scale")
    _one_of("model.attention_implementation", model.attention_implementation, attention.IMPLEMENTATIONS)
    layer_plan(model)


def check_moe(moe: MoEConfig, mesh: MeshConfig | None = None) -> None:
    """Experts, capacity and the router with its options."""
    _at_least(1, "model.moe", moe, "num_experts", "experts_per_token", "expert_width", "exchange_chunks")
    _at_least(
        0, "model.moe", moe, "shared_experts", "load_balance_weight", "sequence_balance_weight", "router_z_weight",
        "importance_weight", "load_weight", "bias_update_rate", "input_jitter",
    )  # fmt: skip
    if moe.experts_per_token > moe.num_experts:
        raise UserError(
            f"config.model.moe.experts_per_token={moe.experts_per_token} is more than num_experts={moe.num_experts}; "
            "a token can choose each expert once"
        )
    _above_zero("model.moe", moe, "capacity_factor", "eval_capacity_factor")
    _one_of("model.moe.implementation", moe.implementation, grouped_matmul.IMPLEMENTATIONS)
    if moe.exchange is not None:
        exchange.pick(moe.exchange)
    _above_zero("model.moe", moe, "exchange_factor")
    if moe.exchange_factor is not None and moe.exchange in (None, "gather"):
        raise UserError(
            f"config.model.moe.exchange_factor={moe.exchange_factor} does nothing with exchange={moe.exchange!r}: "
            "leave it out or set model.moe.exchange to 'all_to_all', 'ragged' or 'remote'"
        )
    if mesh is not None and mesh.expert > 1 and moe.num_experts % mesh.expert:
        raise UserError(
            f"config.model.moe.num_experts={moe.num_experts} can't be shared evenly by mesh.expert={mesh.expert} "
            "devices; make num_experts a multiple of mesh.expert"
        )
    router = dotted.resolve(moe.router)
    _check_router(moe, router)
    decision = _decision(moe, router)
    if isinstance(decision, ExpertChoice):
        if moe.exchange not in (None, "gather"):
            raise UserError(
                f"config.model.moe.exchange={moe.exchange!r} can't move rows of {moe.router}, where experts choose "
                "tokens: give 'gather'"
            )
        own = inspect.signature(router).parameters
        hint = "; its own is router_options.capacity_factor" if "capacity_factor" in own else ""
        _refuse(
            moe, "experts choose tokens", hint, "capacity_factor", "eval_capacity_factor", "load_balance_weight",
            "sequence_balance_weight",
        )  # fmt: skip
    if not reads_logits(router):
        _refuse(
            moe, "no router is learned", "", "load_balance_weight", "sequence_balance_weight", "router_z_weight",
            "importance_weight", "input_jitter",
        )  # fmt: skip


def _refuse(moe: MoEConfig, why: str, capacity_hint: str, *names: str) -> None:
    """Settings that would be silently without effect."""
    for name in names:
        value = getattr(moe, name)
        if value:
            hint = capacity_hint if "capacity" in name else ""
            raise UserError(
                f"config.model.moe.{name}={value} does nothing with {moe.router}, where {why}: leave it out{hint}"
            )


def _decision(moe: MoEConfig, router: Callable) -> Routing | ExpertChoice:
    """What the router returns, as shapes; UserError where it refuses E, K or its options, fails, or returns what no
    layer can take."""
    try:
        decision = abstract_decision(moe)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"router {moe.router} fails{_place(router, error)}: {type(error).__name__}: {reason}; it is called as "
            "router(logits, experts_per_token=K) with those of tokens, mask, bias, noise_logits and key (None outside "
            "training) that it names"
        ) from error
    if not isinstance(decision, ExpertChoice | Routing):
        kind = type(decision).__name__
        raise UserError(f"router {moe.router} returns a {kind}: it must return a Routing or an ExpertChoice")
    if isinstance(decision, Routing):
        T, K, E = decision.scores.shape[1], moe.experts_per_token, moe.num_experts
        for field, letters in (("experts", "TK"), ("weights", "TK"), ("keep", "TK"), ("scores", "TE")):
            found, wanted = getattr(decision, field).shape[1:], (T, E if letters == "TE" else K)
            if found != wanted:
                raise UserError(
                    f"router {moe.router} returns {field} of shape {found} for T={T}, K={K} and E={E}: it must be "
                    f"({letters[0]}, {letters[1]})"
                )
    return decision


def check_choices(moe: MoEConfig) -> None:
    """UserError where a router of the user's own makes choices that no layer can take, for logits drawn at random.

    Layers don't check them: an expert that isn't there, or the same one twice, would train and mean nothing.
    """
    if moe.router.startswith("moejax."):
        return
    decision = jax.device_get(sample_decision(moe))
    if isinstance(decision, ExpertChoice):
        what, choices, kept, most = "token", decision.tokens, decision.weights != 0, decision.scores.shape[1]
    else:
        what, choices, kept, most = "expert", decision.experts, decision.keep, moe.num_experts
    wrong = choices[kept & ((choices < 0) | (choices >= most))]
    if wrong.size:
        raise UserError(f"router {moe.router} chooses {what} {wrong[0]}: there are 0 to {most - 1}")
    for row, its in zip(choices.reshape(-1, choices.shape[-1]), kept.reshape(-1, choices.shape[-1]), strict=True):
        if len(set(row[its])) < its.sum():
            raise UserError(f"router {moe.router} chooses {row[its].tolist()}: each {what} may be there once")
    if not np.isfinite(decision.weights[kept]).all():
        raise UserError(f"router {moe.router} gives weights that are not finite, for logits of some -4 to 4")


def _place(router: Callable, error: Exception) -> str:
    """The line of the router's own file in which it failed, if it was there and the router is a function."""
    code = getattr(inspect.unwrap(router), "__code__", None)
    file = code and code.co_filename
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


def _check_router(moe: MoEConfig, router: Callable[..., Any]) -> None:
    parameters = inspect.signature(router).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    given_by_layer = ("experts_per_token", "tokens", "mask", "bias", "key", "noise_logits")
    options = [name for name in list(parameters)[1:] if name not in given_by_layer]
    for name in moe.router_options:
        if name not in options and not takes_any:
            raise schema.unknown_field(f"model.moe.router_options.{name}", options, Config)
    for name in options:
        needed = parameters[name].default is inspect.Parameter.empty
        if needed and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD and name not in moe.router_options:
            raise UserError(f"router {moe.router} needs the option config.model.moe.router_options.{name}")
    _check_option_types(moe, parameters)
    groups = moe.router_options.get("groups")
    if isinstance(groups, int) and (groups < 1 or moe.num_experts % groups):
        raise UserError(
            f"config.model.moe.num_experts={moe.num_experts} is no multiple of router_options.groups={groups}"
        )
    # A router that takes a key may make its noise from that; if it makes none, the loss itself says so.
    if moe.load_weight and not {"noise_logits", "key"} & parameters.keys() and not takes_any:
        raise UserError(
            f"config.model.moe.load_weight={moe.load_weight}: the load loss needs a noisy router "
            f"(moejax.routing:noisy_top_k or vmoe), not {moe.router}"
        )
    if moe.bias_update_rate and "bias" not in parameters and not takes_any:
        raise UserError(
            f"config.model.moe.bias_update_rate={moe.bias_update_rate} needs a router with a selection bias "
            f"(moejax.routing:sigmoid_top_k), not {moe.router}"
        )


_KINDS = {bool: "True or False", int: "an int", float: "a number", str: "a string", types.NoneType: "None"}


def _check_option_types(moe: MoEConfig, parameters: Mapping[str, inspect.Parameter]) -> None:
    """An option must be of the type that the router's signature gives it, by annotation or else by its default."""
    for name, value in moe.router_options.items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        either = typing.get_origin(parameter.annotation) in (types.UnionType, typing.Union)
        kinds = typing.get_args(parameter.annotation) if either else (parameter.annotation,)
        if parameter.annotation is inspect.Parameter.empty and parameter.default is not None:
            kinds = (type(parameter.default),)
        taken = type(value) in kinds or (float in kinds and type(value) is int)
        if all(kind in _KINDS for kind in kinds) and not taken:  # of any other kind nothing is known
            needed = " or ".join(words for kind, words in _KINDS.items() if kind in kinds)
            raise UserError(f"config.model.moe.router_options.{name}={value!r}: router {moe.router} needs {needed}")


def _check_data(data: DataConfig, train: TrainConfig) -> None:
    _at_least(1, "data", data, "sequence_length", "batch_size")
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"config.data.eval_fraction={data.eval_fraction} must be at least 0 and less than 1")
    if train.accumulation_steps >= 1 and data.batch_size % train.accumulation_steps:
        raise UserError(
            f"config.data.batch_size={data.batch_size} is no multiple of "
            f"train.accumulation_steps={train.accumulation_steps}"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _above_zero("optimizer", optimizer, "learning_rate", "eps", "clip_norm")
    _at_least(0, "optimizer", optimizer, "warmup_steps", "weight_decay")
    _at_least(1, "optimizer", optimizer, "decay_steps")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"config.optimizer.betas={optimizer.betas} must both lie in [0, 1)")


def _check_train(train: TrainConfig) -> None:
    _at_least(1, "train", train, "steps", "log_every", "eval_batches", "keep_checkpoints", "accumulation_steps")
    _at_least(0, "train", train, "eval_every", "checkpoint_every")
    if train.profile_steps and (len(train.profile_steps) != 2 or train.profile_steps[0] > train.profile_steps[1]):
        raise UserError(f"config.train.profile_steps={train.profile_steps} must be (first, last), or () for none")


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = {name: getattr(mesh, name) for name in ("data", "fsdp", "expert", "tensor")}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{name}={size} must be at least 1, or -1 for what the other axes leave")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"config.mesh: only one axis may be -1, given {sizes}")


def _one_of(path: str, value: str | None, options: Iterable[str]) -> None:
    if value is not None and value not in options:
        raise UserError(f"config.{path}={value!r} must be one of {', '.join(options)}, or None for the fastest here")


def _at_least(lowest: int, path: str, group: object, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= lowest:
            raise UserError(f"config.{path}.{name}={value} must be at least {lowest}")


def _above_zero(path: str, group: object, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"config.{path}.{name}={value} must be finite and more than 0")
