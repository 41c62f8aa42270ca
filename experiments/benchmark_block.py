"""The expert block with gather and combine on this machine's first device: TFLOP/s forward and backward.

  python experiments/benchmark_block.py
  python experiments/benchmark_block.py --shape=4096,512,128,8,32768

A shape is D,F,E,K,T: model and expert width, experts, experts per token, tokens. bfloat16; experts drawn uniformly
without repetition, as a balanced router would. The plan is made once, outside; beside the block stand its expert
products alone, over rows already sorted: the difference is what gathering and combining cost. A training forward also
stores what the backward needs; the backward's time is that of both less a training forward's, as in the published ones.

Each is timed twice: by itself, in rounds of its own, as published figures are, and in turns with all others, where a
forward begins on a chip that a backward has heated. A forward "by dense and copy" takes its products at the rate
of a dense product of the same FLOPs and the rows' bytes at the rate of a copy, both of this run.
"""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from moejax import dispatch
from moejax.errors import UserError
from moejax.experts import gated_ffn
from moejax.routing import Routing
from pallas_kernels import benchmark
from pallas_kernels.grouped_matmul import group_metadata, pick
from pallas_kernels.timing import rounds

PUBLISHED = ("4096,512,128,8,32768", "1536,256,128,8,24576", "4096,1024,128,8,32768")  # Dao-AILab/sonic-moe's plots
_SHAPE = flags.DEFINE_multi_string("shape", list(PUBLISHED), "D,F,E,K,T; may be given several times.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Rounds of each case; the median counts.", lower_bound=1)


def block(x, gate, up, down, plan, metadata):
    """(T, D) -> (T, D): gather, gated experts, combine."""
    rows = dispatch.gather(x, plan)
    return dispatch.combine(gated_ffn(rows, gate, up, down, plan.group_sizes, metadata=metadata), plan, x.shape[0])


def products(rows, gate, up, down, plan, metadata):
    """The same without moving rows: (R, D) -> (R, D)."""
    return gated_ffn(rows, gate, up, down, plan.group_sizes, metadata=metadata)


def training(function):
    """(x, gate, up, down, …) -> the result and what its backward needs beside the arguments."""

    def run(x, gate, up, down, *rest):
        given = jax.tree.leaves((x, gate, up, down, *rest))
        out, pull = jax.vjp(lambda *args: function(*args, *rest), x, gate, up, down)
        # returned, an argument would be copied
        return out, [kept for kept in jax.tree.leaves(pull) if all(kept is not a for a in given)]

    return run


def both(function):
    """(grad, x, gate, up, down, …) -> the result, so that no part of the forward is dropped, and all gradients."""

    def run(grad, x, gate, up, down, *rest):
        out, pull = jax.vjp(lambda *args: function(*args, *rest), x, gate, up, down)
        return out, *pull(grad)

    return run


def cases(D: int, F: int, E: int, K: int, T: int) -> dict[str, Callable[[], object]]:
    """name -> a call, compiled; each with operands of its own kind."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    x, grad = normal(keys[0], (T, D)), normal(keys[1], (T, D))
    scale = jnp.bfloat16(D**-0.5)
    gate, up, down = (normal(k, s) * scale for k, s in zip(keys[2:5], ((E, D, F), (E, D, F), (E, F, D)), strict=True))
    _, experts = jax.lax.top_k(jax.random.uniform(keys[5], (T, E)), K)
    weights = jnp.full((T, K), 1 / K)
    routing = Routing(experts.astype(jnp.int32), weights, jnp.full((T, E), 1 / E), jnp.ones((T, K), bool))
    plan = jax.jit(dispatch.plan, static_argnums=1)(routing, E)
    metadata = jax.jit(group_metadata, static_argnums=1)(plan.group_sizes, T * K)
    rows, rows_grad = (jax.jit(dispatch.gather)(a, plan) for a in (x, grad))
    calls = {
        "block forward": (block, (x,)),
        "block training forward": (training(block), (x,)),
        "block both": (both(block), (grad, x)),
        "products forward": (products, (rows,)),
        "products training forward": (training(products), (rows,)),
        "products both": (both(products), (rows_grad, rows)),
    }
    args = {name: (*first, gate, up, down, plan, metadata) for name, (_, first) in calls.items()}
    calls["dense"], args["dense"] = (jnp.matmul, ()), (rows, jnp.concatenate([gate[0], up[0], down[0].T], axis=1))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a Hopper kernel takes seconds to compile
        jobs = {name: pool.submit(compiled, calls[name][0], *args[name]) for name in calls}
        return {name: functools.partial(job.result(), *args[name]) for name, job in jobs.items()}


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def rates(shape: tuple[int, ...], us: dict[str, float]) -> dict[str, float]:
    """TFLOP/s: 6·T·K·D·F forward, twice that backward, whose time is that of both less the training forward's."""
    D, F, _, K, T = shape
    flops = 6.0 * T * K * D * F
    out = {"dense product": flops / us["dense"] / 1e6}
    for what in ("block", "products"):
        for forward in (f"{what} forward", f"{what} training forward"):
            out[forward] = flops / us[forward] / 1e6
        out[f"{what} backward"] = 2 * flops / (us[f"{what} both"] - us[f"{what} training forward"]) / 1e6
    return out


def by_dense_and_copy(shape: tuple[int, ...], dense: float, copied: float) -> float:
    """TFLOP/s of a block's forward at `dense` TFLOP/s and, for its rows, gathered and combined, `copied` GB/s."""
    D, F, _, K, T = shape
    flops, moved = 6.0 * T * K * D * F, 2.0 * 2 * (T + T * K) * D
    return flops / (flops / dense + moved * 1e3 / copied)


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds, in turns."""
    return {name: median for name, (median, _, _) in rounds(calls, _REPEATS.value, launches=5).items()}


def main() -> None:
    copied = benchmark.copy_rate()
    print(f"copy {copied:.0f} GB/s")
    for text in _SHAPE.value:
        try:
            D, F, E, K, T = shape = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"--shape={text}: need five numbers, D,F,E,K,T, as in --shape={PUBLISHED[0]}") from None
        implementation = pick(
            jax.ShapeDtypeStruct((T * K, D), jnp.bfloat16), jax.ShapeDtypeStruct((E, D, F), jnp.bfloat16)
        )
        calls = cases(*shape)
        in_turns = medians(calls)
        alone = {name: us for name, call in calls.items() for us in medians({name: call}).values()}
        print(f"D {D}, F {F}, E {E}, K {K}, T {T}, {implementation}, {jax.devices()[0].device_kind}: TFLOP/s")
        print(f"  {'':27}by itself  in turns")
        table = [rates(shape, each) for each in (alone, in_turns)]
        for each in table:
            each["forward by dense and copy"] = by_dense_and_copy(shape, each["dense product"], copied)
        for name in table[0]:
            print(f"  {name:27}{table[0][name]:9.3g} {table[1][name]:9.3g}", flush=True)


if __name__ == "__main__":
    cli.run(main)
