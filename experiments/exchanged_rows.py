"""What benchmark_exchange.py and trace_exchange.py run, count and read, without their flags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax import routing
from moejax.errors import UserError

LAYERS = {"OLMoE-1B-7B": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8)}  # D, F, E, K


def layer_arguments(sizes: tuple[int, int, int, int], tokens: int, devices: int, num_experts: int) -> tuple:
    """(gradient of y, x, decision, weights) of an MoE layer of `sizes` D, F, E, K, with num_experts in place of E and
    `tokens` on each device, four rows of the batch: random bfloat16, by a random router."""
    D, F, _, K = sizes
    keys = jax.random.split(jax.random.key(0), 6)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    x, grad = (normal(key, (devices * 4, tokens // 4, D)) for key in keys[:2])
    router = jax.random.normal(keys[2], (D, num_experts), jnp.float32) * D**-0.5
    shapes = {"gate": (num_experts, D, F), "up": (num_experts, D, F), "down": (num_experts, F, D)}
    weights = {w: normal(k, shapes[w]) * jnp.bfloat16(D**-0.5) for w, k in zip(shapes, keys[3:], strict=True)}
    logits = (x.reshape(-1, D) @ router.astype(x.dtype)).astype(jnp.float32)
    decision = routing.top_k(logits, experts_per_token=K, mask=jnp.ones(logits.shape[0], bool))
    return grad, x, jax.tree.map(lambda a: a.reshape(devices * 4, tokens // 4, *a.shape[1:]), decision), weights


def destinations(S: int, T: int) -> np.ndarray:
    """(S, T) i32: the device that each row goes to."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(S, T, p=rng.dirichlet(np.full(S, 8.0))) for _ in range(S)]).astype(np.int32)


def busiest(to: np.ndarray, D: int) -> int:
    """Bytes: the most that a device sends or receives off the chip."""
    S = to.shape[0]
    counts = np.stack([np.bincount(row, minlength=S) for row in to])
    np.fill_diagonal(counts, 0)
    return int(max(counts.sum(0).max(), counts.sum(1).max())) * D * 2


def shape_of(text: str) -> tuple[int, int]:
    try:
        T, D = (int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--shape={text}: need two numbers, T,D, as in --shape=16384,7168") from None
    return T, D
