"""Times the grouped products at the named shapes beside a dense product of the same FLOPs and the peers.

    python -m pallas_kernels.benchmark [--op forward,dlhs,drhs] [--shape olmoe,…|training|decode] [--sizes dirichlet]
        [--implementation mosaic_gpu,xla] [--peer_python PATH] [--json FILE]

Medians of five rounds, in which every implementation of a case runs in turn (so that all see the same clocks), with the
fastest and slowest round. Weights of a case are larger than the caches wherever GB/s matter: the last-level cache is
flushed by the case itself. The group metadata is given, as a layer gives it to its six products.
"""

import argparse
import concurrent.futures
import functools
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import shapes
from pallas_kernels.grouped_matmul import group_metadata, grouped_matmul, pick
from pallas_kernels.timing import rounds

OPS = ("forward", "dlhs", "drhs")
_PEER = Path(__file__).parent / "peers" / "torch_products.py"


def cases(ops, names, kind) -> list[dict]:
    """One for each shape, up and down."""
    known = shapes.TRAINING | shapes.DECODE
    groups = {"training": shapes.TRAINING, "decode": shapes.DECODE}
    out = []
    for name, shape in known.items():
        if not any(n == name or name in groups.get(n, ()) for n in names):
            continue
        for part in ("up", "down"):
            M, E, K, N = product = shape.product(part)
            sizes = shapes.group_sizes(kind, M, E).tolist()
            launches = int(np.clip(6e12 // (2.0 * M * K * N), 3, 20))
            out.append({"name": f"{name}/{part}", "ops": ops, "product": product, "sizes": sizes, "launches": launches})
    return out


def operands(case):
    M, E, K, N = case["product"]
    keys = jax.random.split(jax.random.key(0), 3)
    lhs = jax.random.normal(keys[0], (M, K), jnp.bfloat16)
    rhs = jax.random.normal(keys[1], (E, K, N), jnp.bfloat16)
    grad = jax.random.normal(keys[2], (M, N), jnp.bfloat16)
    sizes = jnp.asarray(case["sizes"], jnp.int32)
    return lhs, rhs, grad, sizes, jax.jit(group_metadata, static_argnums=1)(sizes, M)


def product(op, implementation, lhs, rhs, grad, sizes, metadata):
    """One of the three products: as differentiating `grouped_matmul` makes them."""

    def forward(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, metadata=metadata, implementation=implementation)

    if op == "forward":
        return forward(lhs, rhs)
    return jax.vjp(forward, lhs, rhs)[1](grad)[OPS.index(op) - 1]


def bench(case, implementations) -> dict:
    """(op, implementation) -> times; a dense product of the same FLOPs among them."""
    args = operands(case)
    lhs, rhs, *_ = args
    functions = {(op, i): functools.partial(product, op, i) for op in case["ops"] for i in implementations}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(compiled, function, *args) for name, function in functions.items()}
        runs = {("dense", "jax"): functools.partial(compiled(jnp.matmul, lhs, rhs[0]), lhs, rhs[0])}
        runs |= {name: functools.partial(job.result(), *args) for name, job in jobs.items()}
    return rounds(runs, launches=case["launches"])


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def peers(python: str, todo: list[dict]) -> list[dict]:
    """torch's times from a process of its own: (op, "torch") -> times, for each case."""
    done = subprocess.run([python, _PEER], input=json.dumps(todo), capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) < len(todo):
        raise RuntimeError(f"the peer stopped after {len(lines)} of {len(todo)} cases: {done.stderr[-500:]}")
    return [{(op, "torch"): tuple(us) for op, us in line.items()} for line in lines]


def report(case, times) -> dict:
    """Rates of one case: TFLOP/s by the real rows, GB/s by weights of the experts that have rows, and rows."""
    M, _, K, N = case["product"]
    touched = int(np.count_nonzero(case["sizes"]))
    flops, moved = 2.0 * M * K * N, 2.0 * (M * (K + N) + touched * K * N)
    rates = [
        {
            "op": op,
            "implementation": name,
            "us": us,
            "least": least,
            "most": most,
            "tflops": flops / us / 1e6,
            "gbs": moved / us / 1e3,
            "of_dense": times["dense", "jax"][0] / us,
        }
        for (op, name), (us, least, most) in times.items()
    ]
    tiles = sum(-(-size // 128) for size in case["sizes"])
    return {**case, "real_rows": M / (128 * max(tiles, 1)), "megabytes": moved / 1e6, "rates": rates}


def show(result) -> None:
    decode = result["product"][0] < 4096
    rates = " | ".join(
        f"{row['op']} {row['implementation']} {row['us']:.0f} us [{row['least']:.0f}, {row['most']:.0f}] "
        + (f"{row['gbs']:.0f} GB/s" if decode else f"{row['tflops']:.0f} TFLOP/s {row['of_dense']:.3f}")
        for row in result["rates"]
    )
    note = f"{result['megabytes']:.0f} MB" if decode else f"real rows {result['real_rows']:.3f}"
    print(f"{result['name']} ({note}): {rates}", flush=True)


def copy_rate() -> float:
    """GB/s of a device copy, read and written bytes counted."""
    x = jnp.ones((1 << 29,), jnp.float32)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype)).lower(x).compile()
    (us, _, _) = rounds({"copy": lambda: copy(x)}, launches=5)["copy"]
    return 2 * x.nbytes / us / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="forward,dlhs,drhs")
    parser.add_argument("--shape", default="training")
    parser.add_argument("--sizes", default="dirichlet", choices=shapes.SIZES)
    parser.add_argument("--implementation", default="")
    parser.add_argument("--peer_python")
    parser.add_argument("--json")
    flags = parser.parse_args()
    todo = cases(flags.op.split(","), flags.shape.split(","), flags.sizes)
    if not todo:
        parser.error(f"no shape matches {flags.shape!r}; there are {', '.join(shapes.TRAINING | shapes.DECODE)}")
    named = [name for name in flags.implementation.split(",") if name]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, copy {copy_rate():.0f} GB/s, sizes {flags.sizes}")
    done = []
    for case in todo:
        M, E, K, N = case["product"]
        own = pick(jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((E, K, N), jnp.bfloat16))
        done.append(bench(case, named or [own]))
        show(report(case, done[-1]))
    results = [report(case, times) for case, times in zip(todo, done, strict=True)]
    if flags.peer_python:
        print("beside torch, in a process of its own:")
        found = peers(flags.peer_python, todo)
        results = [report(case, a | b) for case, a, b in zip(todo, done, found, strict=True)]
        for result in results:
            show(result)
    if flags.json:
        Path(flags.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
