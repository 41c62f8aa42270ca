"""One case of each Hopper kernel, none of them a good fit for its tiles: `python memcheck_cases.py` runs all.

`test_memcheck.py` runs it under compute-sanitizer. Prints each case's name when its results are there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import few_rows, remote_exchange
from pallas_kernels.combine import combine, spread
from pallas_kernels.gated_ffn import gated_ffn
from pallas_kernels.grouped_matmul import group_metadata, grouped_matmul
from pallas_kernels.top_k import top_k

T, K, D, F = 45, 3, 192, 320
WIDTH = 384  # of rows that are moved: in multiples of 128
SIZES = (70, 0, 3, 60)  # of 135 rows, two of which are nobody's
M, E = T * K, len(SIZES)
TALL, TALL_M = (70, 0, 203, 560), 837  # more than 192 rows a group: tiles of 192 and 128
LOW = (200, 220, 210, 207)  # as many, but each is two tiles of 128


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def with_gradients(function, *args):
    out, pull = jax.vjp(function, *args)
    return out, pull(out)


def products(sizes, transposed, M=M, N=F):
    run = functools.partial(grouped_matmul, transpose_rhs=transposed, implementation="mosaic_gpu")
    rhs = normal(E, N, D) if transposed else normal(E, D, N)
    return with_gradients(lambda lhs, rhs: run(lhs, rhs, sizes), normal(M, D), rhs)


def gated(sizes, hidden, tail, M=M):
    metadata = group_metadata(sizes, M, tail=tail)
    run = functools.partial(gated_ffn, metadata=metadata, implementation="mosaic_gpu")
    weights = normal(E, D, hidden), normal(E, D, hidden), normal(E, hidden, D)
    return with_gradients(lambda rows, *weights: run(rows, *weights, sizes), normal(M, D), *weights)


def moved(slot):
    rows = spread(normal(T, WIDTH), slot, M, implementation="mosaic_gpu")
    weight = jnp.linspace(0.1, 1.0, M, dtype=jnp.float32)
    run = functools.partial(combine, implementation="mosaic_gpu")
    return with_gradients(lambda rows, weight: run(rows, slot, weight), rows, weight)


def few(chosen):
    return few_rows.products(normal(2, 256), chosen, (normal(E, 256, 384), normal(E, 256, 384)))


def exchanged(places, source, starts, stops):
    routes = remote_exchange.Routes(places, source, starts, stops)

    def there_and_back(x):
        rows = remote_exchange.send(x, routes, axis="expert")
        return rows, remote_exchange.collect(rows, routes, axis="expert")

    mesh = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1])
    run = jax.shard_map(there_and_back, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    return run(normal(T, WIDTH))


def cases():
    rng = np.random.default_rng(0)
    sizes, slot = jnp.asarray(SIZES, jnp.int32), jnp.asarray(rng.permutation(M).reshape(T, K), jnp.int32)
    tokens, tall, low = jnp.arange(T, dtype=jnp.int32), jnp.asarray(TALL, jnp.int32), jnp.asarray(LOW, jnp.int32)
    pairs = functools.partial(products, transposed=True, M=TALL_M, N=WIDTH)  # two row tiles for the last 128 columns
    return {
        "grouped_matmul": (functools.partial(products, transposed=False), sizes),
        "grouped_matmul, transposed": (functools.partial(products, transposed=True), sizes),
        "gated_ffn": (functools.partial(gated, hidden=F, tail=True), sizes),
        "gated_ffn, no tail": (functools.partial(gated, hidden=WIDTH, tail=False), sizes),
        "grouped_matmul, tall tiles": (functools.partial(products, transposed=False, M=TALL_M), tall),
        "gated_ffn, tall tiles": (functools.partial(gated, hidden=F, tail=True, M=TALL_M), tall),
        "grouped_matmul, pairs of row tiles": (pairs, tall),
        "grouped_matmul, pairs of low ones": (pairs, low),
        "combine": (moved, slot),
        "few_rows": (few, jnp.array([0, 2, 3, 3], jnp.int32)),
        "top_k": (functools.partial(top_k, k=3), jax.random.normal(jax.random.key(0), (192, 24))),
        "remote_exchange": (exchanged, tokens[:, None], tokens, jnp.array([0], jnp.int32), jnp.array([T], jnp.int32)),
    }


if __name__ == "__main__":
    for name, (run, *args) in cases().items():
        jax.block_until_ready(jax.jit(run)(*args))
        print(name, flush=True)
