"""What `benchmark` times besides single products: the gated experts over sorted rows, and rows to tokens and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.combine import combine, spread
from pallas_kernels.combine import pick as pick_moving
from pallas_kernels.gated_ffn import gated_ffn
from pallas_kernels.grouped_matmul import group_metadata, named, pick

MOVING = ("combine", "combine_both", "spread")  # rows alone, without products
OPS = ("gated_ffn", "gated_ffn_both", *MOVING)  # _both: the value and all gradients


def operands(case) -> tuple:
    """rows (M, D), gate, up, down, their gradient (M, D), sizes, metadata, slot (T, K), weight (M,), tokens (T, D)."""
    (M, E, D, wide), T = case["product"], case["tokens"][0]
    F = wide // 3  # gate, up and down are one product of 3 F columns
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 7)
    rows, grad, tokens = (normal(key, (n, D)) for key, n in zip(keys[:3], (M, M, T), strict=True))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = (normal(key, s) * jnp.bfloat16(s[1] ** -0.5) for key, s in zip(keys[3:6], shapes, strict=True))
    sizes = jnp.asarray(case["sizes"], jnp.int32)
    metadata = jax.jit(group_metadata, static_argnums=1)(sizes, M)
    weight = jax.random.uniform(keys[6], (M,))
    return rows, *weights, grad, sizes, metadata, jnp.asarray(slots(case)), weight, tokens


def slots(case) -> np.ndarray:
    """(T, K) i32: choices fall on groups at random, and a group's rows are in the order of tokens; M: not here."""
    (M, E, _, _), (T, K) = case["product"], case["tokens"]
    group = np.full(T * K, E)
    group[:M] = np.repeat(np.arange(E), case["sizes"])
    slot = np.empty(T * K, np.int32)
    slot[np.argsort(np.random.default_rng(0).permutation(group), kind="stable")] = np.arange(T * K)
    return np.minimum(slot, M).reshape(T, K)


def run(op, implementation, rows, gate, up, down, grad, sizes, metadata, slot, weight, tokens):
    """One of OPS; implementation: of grouped_matmul, or, for one of MOVING, of combine."""

    def experts(rows, gate, up, down):
        return gated_ffn(rows, gate, up, down, sizes, metadata=metadata, implementation=implementation)

    def tokens_of(rows, weight):
        return combine(rows, slot, weight, implementation=implementation)

    match op:
        case "gated_ffn":
            return experts(rows, gate, up, down)
        case "gated_ffn_both":
            out, pull = jax.vjp(experts, rows, gate, up, down)
            return out, *pull(grad)
        case "combine":
            return tokens_of(rows, weight)
        case "combine_both":
            out, pull = jax.vjp(tokens_of, rows, weight)
            return out, *pull(tokens)
        case "spread":
            return spread(tokens, slot, rows.shape[0], implementation=implementation)


def taken(op, implementation: str | None, case) -> str:
    """`implementation`, or with None what is picked, if this machine runs the case's op with it.

    Raises ValueError, NotImplementedError as `gated_ffn` and `combine`.
    """
    (M, E, D, wide), choices = case["product"], case["tokens"]
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    rows = shape((M, D))
    if op in MOVING:
        name = implementation or pick_moving(rows)
        moving = functools.partial(combine, weight=None, implementation=name)
        jax.eval_shape(moving, rows, shape(choices, dtype=jnp.int32))
        return name
    F = wide // 3
    name = implementation or pick(rows, shape((E, D, F)))
    named(name, rows, shape((E, D, F)))
    return named(name, shape((M, F)), shape((E, F, D)))


def work(op, case) -> tuple[float, float]:
    """(operations, least bytes) of a call: each array once, weights of the groups that have rows."""
    (M, _, D, wide), T = case["product"], case["tokens"][0]
    touched = np.count_nonzero(case["sizes"])
    rows, tokens, weights = 2.0 * M * D, 2.0 * T * D, 2.0 * touched * D * wide
    products = 2.0 * M * D * wide
    return {
        "gated_ffn": (products, 2 * rows + weights),
        "gated_ffn_both": (3 * products, 4 * rows + 2 * weights),
        "combine": (0.0, rows + tokens),
        "combine_both": (0.0, 3 * rows + 2 * tokens),
        "spread": (0.0, rows + tokens),
    }[op]
