"""The mixture for one or two tokens on a GPU: a decode step of small batches is a few small operations, not a sort.

Sorting rows, laying out tiles and calling kernels costs more there than reading the chosen experts' weights. Each
choice multiplies its row with its expert's weights where they lie; XLA fuses the choosing into the reduction.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from moejax import experts
from moejax.routing import Routing
from pallas_kernels import few_rows

MOST = 16  # choices: each reads its expert, also where two choose the same
_PARTS = 4  # of a sum, taken side by side: one gives a GPU too little to do at a time


def suits(decision, implementation: str | None) -> bool:
    """Whether `mixture` is the way for a decision over T tokens: few choices, on a GPU, and no kernel asked for."""
    few = isinstance(decision, Routing) and decision.experts.size <= MOST
    return few and implementation is None and jax.default_backend() == "gpu"


def mixture(x: jax.Array, decision: Routing, weights: dict[str, jax.Array]) -> jax.Array:
    """Σ_k weight · expert(x): x (T, D), gate, up (E, D, F), down (E, F, D) of one dtype -> (T, D) of it.

    Sums are float32, as in `experts.gated_ffn`, and products are rounded where it rounds them.
    """
    T, K = decision.experts.shape
    chosen = decision.experts.reshape(T * K)

    if all(few_rows.why_not(kernel) is None for kernel in weights.values()):
        # its own kernel reads both at once, and nearer to the memory's rate
        products = few_rows.products(x, chosen, (weights["gate"], weights["up"]))
        gate, up = (_total(parts).astype(x.dtype) for parts in products)
        (down,) = few_rows.products(experts.ACTIVATIONS["silu"](gate) * up, chosen, (weights["down"],))
        return _weighted(down, decision, x.dtype)

    def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        """(R, A) × (E, A, N) -> (R, parts, N) f32, to be summed over the parts."""
        E, A, N = kernel.shape
        parts = _PARTS if A % _PARTS == 0 else 1
        own = kernel.reshape(E, parts, A // parts, N).at[chosen].get(mode="clip").astype(jnp.float32)
        return jnp.sum(rows.astype(jnp.float32).reshape(-1, parts, A // parts, 1) * own, axis=2)

    gate = product(jnp.repeat(x, K, axis=0), weights["gate"])
    # One after the other: as one fusion with two sums they were read at a tenth of the rate (162 µs against 13 for
    # half of it; OLMoE-1B-7B on an H200).
    x, gate = lax.optimization_barrier((x, gate))
    up = lax.optimization_barrier(product(jnp.repeat(x, K, axis=0), weights["up"]))
    gate, up = (jnp.sum(parts, axis=1).astype(x.dtype) for parts in (gate, up))
    down = lax.optimization_barrier(product(experts.ACTIVATIONS["silu"](gate) * up, weights["down"]))
    return _weighted(down, decision, x.dtype)


def _total(parts: jax.Array) -> jax.Array:
    """The sum of parts (R, P, N) over P, term by term: so XLA puts what comes next, and a second sum, in one kernel."""
    return functools.reduce(operator.add, (parts[:, p] for p in range(parts.shape[1])))


def _weighted(down: jax.Array, decision: Routing, dtype) -> jax.Array:
    """Parts of the experts' results (T·K, parts, D) f32 -> (T, D): summed, rounded to dtype, times their gates."""
    T, K = decision.experts.shape
    each = _total(down).astype(dtype).astype(jnp.float32).reshape(T, K, -1)
    # behind a barrier, or every block of the sum's kernel would choose the experts again to know their gates
    gates = lax.optimization_barrier(jnp.where(decision.keep, decision.weights, 0).astype(jnp.float32))
    return jnp.sum(each * gates[:, :, None], axis=1).astype(dtype)
