"""The CPU figures of this repository, ours and the peer's in one run: medians of interleaved repeats.

  python experiments/benchmark_cpu.py --only=experts,step
  python experiments/benchmark_cpu.py --peer_python=PATH

PATH is an interpreter that has torch and transformers; without it the peer section times ours alone.
"""

import functools
import os
import platform
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments import benchmark_cpu_model, cli
from moejax.errors import UserError
from moejax.experts import gated_ffn
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.timing import rounds

_ONLY = flags.DEFINE_list("only", [], "Sections to run, of: experts, step, peer, compile. Default: all.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "An interpreter with torch and transformers, for `peer`.")
_REPEATS = flags.DEFINE_integer("repeats", 11, "Repeats of each case; the median counts.", lower_bound=1)


def medians(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: median * 1e-6 for name, (median, _, _) in rounds(cases, repeats).items()}


def benchmark_experts(repeats: int) -> None:
    """Dropless expert products at E 64, D 256, F 128, R 8192, float32, against lax.ragged_dot and a dense product."""
    R, E, D, F = 8192, 64, 256, 128
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    def dense_ffn(rows, gate, up, down):
        return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down

    def grouped_ffn(rows, gate, up, down, sizes):
        return gated_ffn(rows, gate, up, down, sizes)

    rows, grad, ffn_grad = normal(R, D), normal(R, F), normal(R, D)
    gate, up, down = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    shares = {"uniform": np.ones(E), "Dirichlet(4)": rng.dirichlet(np.full(E, 4.0)), "Zipf(1.2)": _zipf(E, 1.2)}
    loads = {name: jnp.asarray(rng.multinomial(R, share / share.sum()), jnp.int32) for name, share in shares.items()}
    # what: (ours, the dense product of equal FLOPs, lax.ragged_dot, operands)
    products = {
        "forward": (grouped_matmul, jnp.matmul, lax.ragged_dot, (rows, gate)),
        "gradient": (*map(_gradient, (grouped_matmul, jnp.matmul, lax.ragged_dot)), (grad, rows, gate)),
        "gated FFN": (grouped_ffn, dense_ffn, None, (rows, gate, up, down)),
        "gated FFN, both": (_both(grouped_ffn), _both(dense_ffn), None, (ffn_grad, rows, gate, up, down)),
    }
    cases: dict[str, Callable[[], object]] = {}
    for what, (ours, dense, ragged, operands) in products.items():
        cases[f"dense {what}"] = functools.partial(jax.jit(dense), *(a[0] if a.ndim == 3 else a for a in operands))
        for load, sizes in loads.items():
            cases[f"{load} {what}"] = functools.partial(jax.jit(ours), *operands, sizes)
            if load == "uniform" and ragged:
                cases[f"ragged_dot {what}"] = functools.partial(jax.jit(ragged), *operands, sizes)
    seconds = medians(cases, repeats)

    print(f"\nexpert products: E {E}, D {D}, F {F}, R {R}, float32; medians of {repeats}")
    print(f"{'load':14}{'what':18}{'ours':>9}{'of dense rate':>15}{'ragged_dot':>12}{'faster':>9}{'error':>9}")
    for load in loads:
        for what in products:
            ours = seconds[f"{load} {what}"]
            line = f"{load:14}{what:18}{ours * 1e3:7.1f}ms{seconds[f'dense {what}'] / ours:15.2f}"
            if load == "uniform" and f"ragged_dot {what}" in cases:
                slow = seconds[f"ragged_dot {what}"]
                error = _error(cases[f"{load} {what}"](), cases[f"ragged_dot {what}"]())
                line += f"{slow * 1e3:10.0f}ms{slow / ours:8.0f}×{error:9.0e}"
            print(line)


def _zipf(E: int, power: float) -> np.ndarray:
    return 1 / np.arange(1, E + 1) ** power


def _error(got, want) -> float:
    """Largest difference over the largest value, of the worst array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def _gradient(product):
    """(grad, lhs, rhs, *sizes) -> both gradients alone: the compiler drops the unused forward product."""

    def run(grad, lhs, rhs, *sizes):
        return jax.vjp(lambda lhs, rhs: product(lhs, rhs, *sizes), lhs, rhs)[1](grad)

    return run


def _both(ffn):
    """(grad, rows, gate, up, down, *sizes) -> output and gradients."""

    def run(grad, rows, *rest):
        out, pull = jax.vjp(lambda rows, *weights: ffn(rows, *weights, *rest[3:]), rows, *rest[:3])
        return out, pull(grad)

    return run


SECTIONS: dict[str, Callable[[int], None]] = {
    "experts": benchmark_experts,
    "step": lambda repeats: benchmark_cpu_model.benchmark_step(medians, repeats),
    "peer": lambda repeats: benchmark_cpu_model.benchmark_peer(medians, repeats, _PEER_PYTHON.value),
    "compile": lambda repeats: benchmark_cpu_model.benchmark_compile(),
}


def main() -> None:
    if unknown := sorted(set(_ONLY.value) - SECTIONS.keys()):
        raise UserError(f"--only={','.join(unknown)}: no such section; there are {', '.join(SECTIONS)}")
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, jax {jax.__version__}, load average "
          f"{os.getloadavg()[0]:.1f} at the start")  # fmt: skip
    for name in _ONLY.value or SECTIONS:
        SECTIONS[name](_REPEATS.value)


if __name__ == "__main__":
    cli.run(main)
