"""How much of the exchange between devices runs while expert products run, read from a trace of an MoE layer.

  python experiments/trace_exchange.py
  python experiments/trace_exchange.py --exchange=gather --chunks=8

Forward and backward of OLMoE's layer (or --layer), with --tokens on each GPU, in one chunk and in --chunks. It runs on
one GPU as well, which exchanges with itself: `remote` then reads and sums rows where they are. Random inputs, a random
router. --trace=FOLDER keeps the traces, for a viewer.
"""

import functools
import os
import tempfile

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from experiments.exchanged_rows import LAYERS, layer_arguments
from moejax import exchanged, routing, scopes, sharding
from moejax.errors import UserError
from moejax.exchange import AXIS
from moejax.work import Work
from pallas_kernels.timing import rounds

_WAY = flags.DEFINE_enum("exchange", "remote", list(exchanged.WAYS), "The way of exchange.")
_CHUNKS = flags.DEFINE_multi_integer("chunks", [4], "Beside one chunk: so many.", lower_bound=2)
_LAYER = flags.DEFINE_enum("layer", "OLMoE-1B-7B", list(LAYERS), "Whose sizes the layer has.")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "Tokens of a GPU.", lower_bound=4)
_TRACE = flags.DEFINE_string("trace", None, "A folder for the traces; a temporary one by default.")

# names of kernels: those of pallas_kernels, and NCCL's
EXCHANGE, PRODUCTS = ("send_rows", "collect_rows", "nccl"), ("gated_ffn", "grouped_matmul")


def passes(mesh, chunks: int, num_experts: int):
    """(x, decision, weights) -> (y, gradients of |y|² / 2, whose backward pass follows the forward one)."""
    run = functools.partial(
        exchanged.mixture, num_experts=num_experts, work=Work(), way=_WAY.value, factor=None, chunks=chunks
    )
    # not expert_parallel's shard_map, which has nothing to exchange on one device
    layer = jax.shard_map(run, mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS))

    def forward_and_backward(x, decision, weights):
        def y(x, gates, weights):
            made = routing.Routing(decision.experts, gates, decision.scores, decision.keep)
            return layer(x, made, weights)[0]

        out, pull = jax.vjp(y, x, decision.weights, weights)
        return out, pull(out)

    return jax.jit(forward_and_backward)


def distance(a, b) -> float:
    """The largest difference, by the largest value of b."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def report(name: str, folder: str) -> None:
    """One line for each device of the trace."""
    for device, kernels in sorted(scopes.kernels(folder).items()):
        found = {
            kind: [(start, end) for kernel, start, end in kernels if any(part in kernel for part in parts)]
            for kind, parts in (("exchange", EXCHANGE), ("products", PRODUCTS))
        }
        whole, beside = scopes.overlap(found["exchange"], found["products"])
        longest = sorted(kernels, key=lambda kernel: kernel[1] - kernel[2])[:5]
        nothing = "none of it seen among " + ", ".join(kernel for kernel, _, _ in longest)
        share = f"{beside / whole:.1%} of it while products ran" if whole else nothing
        products = scopes.overlap(found["products"], found["products"])[0]
        print(
            f"{name} {device}: exchange {whole / 1e3:.1f} us in {len(found['exchange'])} kernels, {share}; "
            f"products {products / 1e3:.1f} us in {len(found['products'])}",
            flush=True,
        )


def main() -> None:
    # in a CUDA graph a profile doesn't tell one kernel from the next
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if jax.default_backend() != "gpu":
        raise UserError(f"a trace of kernels needs a GPU; here is {jax.default_backend()}")
    mesh, sizes = sharding.make_mesh({"expert": -1}), LAYERS[_LAYER.value]
    kind = jax.devices()[0].device_kind
    print(f"{mesh.size} x {kind}, jax {jax.__version__}, {_LAYER.value}, {_WAY.value}", flush=True)
    split = jax.NamedSharding(mesh, jax.P(AXIS))
    inputs = functools.partial(layer_arguments, sizes, _TOKENS.value, mesh.size, sizes[2])
    arguments = jax.jit(lambda: inputs()[1:], out_shardings=split)()
    runs, first = {}, None
    for chunks in (1, *_CHUNKS.value):
        step = passes(mesh, chunks, sizes[2]).lower(*arguments).compile()
        name = f"{chunks} chunk" + "s" * (chunks > 1)
        runs[name] = functools.partial(step, *arguments)
        out = jax.block_until_ready(runs[name]())
        first = first or out
        far = jax.tree.leaves(jax.tree.map(distance, out, first))
        print(f"{name}: from one chunk's, y and gradients: " + ", ".join(f"{d:.1e}" for d in far), flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = f"{_TRACE.value}/{chunks}" if _TRACE.value else temporary
            with jax.profiler.trace(folder):
                jax.block_until_ready(runs[name]())
            report(name, folder)
    for name, (median, least, most) in rounds(runs, launches=3).items():
        print(f"{name}: {median:.1f} us ({least:.1f}-{most:.1f}) forward and backward", flush=True)


if __name__ == "__main__":
    cli.run(main)
