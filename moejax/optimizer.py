"""AdamW, Adafactor and Muon from optax, and the learning rate over a horizon of its own.

Which rule treats a parameter is read off its name and rank, so it holds for scanned layers (a leading layer axis) and
for stacks of experts (a leading E axis) alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from moejax.config import OptimizerConfig

FLOOR = 0.1  # where cosine and wsd end, as a share of the peak; a run that goes on past its horizon still learns
WSD_DECAY_FROM = 0.8  # of the horizon
STEPS_FACTOR, STEPS_AT = 0.316, (0.8, 0.9)  # DeepSeekMoE (Dai 2024, validation experiments)

VECTORS = ("scale", "bias", "sinks")  # by name: under nn.scan they have two axes like a matrix
# Muon is for hidden matrices; tables of vectors and the router's small head stay with Adam (Jordan 2024).
NOT_MUON = (*VECTORS, "embedding", "unembedding", "router", "noise")
# The input and output axes of a matrix that is stored with its heads apart: (D, H, hd) and (H, hd, D).
HEADS = {
    "query": MuonDimensionNumbers((-3,), (-2, -1)),
    "key": MuonDimensionNumbers((-3,), (-2, -1)),
    "value": MuonDimensionNumbers((-3,), (-2, -1)),
    "out": MuonDimensionNumbers((-3, -2), (-1,)),
}


def schedule(config: OptimizerConfig) -> Callable[[jax.Array | int], jax.Array]:
    """Steps already taken (int scalar) -> the learning rate of the next one (f32 scalar).

    A linear warm-up, peak · (step + 1) / warmup_steps, then until the horizon `decay_steps` (warm-up included):
    constant; cosine: from the peak to FLOOR of it (Loshchilov & Hutter 2017); wsd: the peak, and over the last fifth
    of the horizon linearly to FLOOR of it (Hu 2024); steps: × 0.316 at 80% and again at 90%. After it, as at its end.
    """
    if config.decay_steps is None:
        raise ValueError("optimizer.decay_steps is None; config.settle takes it from train.steps")
    peak, warmup, horizon = config.learning_rate, config.warmup_steps, config.decay_steps

    def share(step: jax.Array) -> jax.Array:
        if config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(horizon - warmup, 1), 0.0, 1.0)
            return FLOOR + (1 - FLOOR) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if config.schedule == "wsd":
            start = WSD_DECAY_FROM * horizon
            return 1 - (1 - FLOOR) * jnp.clip((step - start) / (horizon - start), 0.0, 1.0)
        if config.schedule == "steps":
            return jnp.prod(jnp.stack([jnp.where(step >= at * horizon, STEPS_FACTOR, 1.0) for at in STEPS_AT]))
        return jnp.ones((), jnp.float32)

    def learning_rate(step: jax.Array | int) -> jax.Array:
        now = jnp.asarray(step).astype(jnp.float32)
        warm = jnp.minimum(1.0, (now + 1) / max(warmup, 1))
        return peak * warm * share(now)

    return learning_rate


def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer; use it through `apply`, or by itself: `update` needs `params`.

    `decay_steps` must be settled. Weight decay is decoupled and scaled by the learning rate, on matrices
    alone. muon: hidden matrices, one of every layer and expert by itself, with updates of AdamW's size (0.2 · √max(fan
    in, fan out), Liu 2025), so learning rates carry over; Adam without decay on the rest. adafactor: Shazeer & Stern
    2018 without momentum and without scaling by the parameter's size.
    """
    rate = schedule(config)
    b1, b2 = config.betas
    if config.name == "adamw":
        core = optax.adamw(rate, b1, b2, config.eps, weight_decay=config.weight_decay, mask=decayed)
    elif config.name == "muon":
        core = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            eps=config.eps,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    else:
        core = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return _relaxed(optax.chain(clip, core))


def apply(tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """One update: (parameters, optimizer state) after it, in the parameters' dtypes."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def decayed(params: Any) -> Any:
    """True for the leaves with weight decay: matrices, not norms, biases or other vectors."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim >= 2 and _name(path) not in VECTORS, params)


def muon_dimensions(params: Any) -> Any:
    """For each leaf the axes that form a matrix (all others are batches of matrices), or None: Adam's."""

    def dimensions(path: Any, x: Any) -> MuonDimensionNumbers | None:
        if x.ndim < 2 or _name(path) in NOT_MUON:
            return None
        return HEADS.get(_name(path), MuonDimensionNumbers((-2,), (-1,)))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def _relaxed(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax mixes int32 counts, Python numbers and f32 arrays: it alone may, where promotion is strict."""

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return transform.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, params)

    return optax.GradientTransformation(init, update)
