"""Ways to move rows between this host's GPUs, and the MoE layer over them: GB/s, and throughput per GPU.

  python experiments/benchmark_exchange.py
  python experiments/benchmark_exchange.py --part=rows --shape=16384,7168
  python experiments/benchmark_exchange.py --part=layer --layer=OLMoE-1B-7B --way=remote --chunks=1

First rows alone, T rows of width D on each GPU (bfloat16), shared among the GPUs by Dirichlet(8) of each sender: the
rows are drawn in token order. GB/s = the larger of the bytes that the busiest GPU sends and receives off the chip, over
the time. `equal copy` writes T/S rows into each GPU's buffer by remote references, the rate that the link gives.
`ragged_all_to_all` gets rows sorted by destination, for nothing. What `send` and `fetch` move is compared with
`all_gather` and a take, bit for bit.

Then the layer, forward and backward, at published sizes, four times in a program as layers are in a step: throughput
per GPU over that of one GPU which computes as many rows with as many experts and exchanges nothing. Random inputs, a
random router; printed is how many rows the busiest GPU has, of the mean. `remote` is compiled without CUDA graphs, as a
training step with it is.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments import cli
from experiments.exchanged_rows import LAYERS, busiest, destinations, layer_arguments, shape_of
from moejax import expert_parallel, routing, sharding
from moejax.errors import UserError
from pallas_kernels import remote_exchange
from pallas_kernels.remote_ffn import COMPILER_OPTIONS
from pallas_kernels.timing import rounds

_FACTORS = {"gather": None, "all_to_all": 1.25, "remote": None}  # of room, by way
_SHAPE = flags.DEFINE_multi_string("shape", ["16384,7168", "8192,2048"], "T,D of a GPU; may be given several times.")
_PART = flags.DEFINE_multi_enum(
    "part", ["ragged", "rows", "layer"], ["ragged", "rows", "layer"], "What to time; ragged runs in its own processes."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of each case; the median counts.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 16384, "Tokens of a GPU in the layer.", lower_bound=1)
_LAYER = flags.DEFINE_multi_enum("layer", list(LAYERS), list(LAYERS), "Whose sizes the layer has.")
_WAY = flags.DEFINE_multi_enum("way", list(_FACTORS), list(_FACTORS), "Ways of exchange that the layer is timed with.")
_CHUNKS = flags.DEFINE_multi_integer("chunks", [4], "Time the layer in so many chunks, too.", lower_bound=1)

_DECOMPOSER = "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true"
AXIS = "expert"
_PASSES = 4  # of the layer in one program, so that what a program's start costs counts a quarter


def over(mesh, run):
    """`run` of arrays split over the devices of the mesh, compiled."""
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS)))


def equal_copy(x, S: int):
    """(T, D) -> (T, D): piece s of T/S rows goes to device s, by the copy engine through shared memory."""
    T, D = x.shape
    piece, stages, tile, blocks = T // S, 4, (64, 256), 132

    def at(device):
        return {AXIS: device}

    def body(x, out, ring, arrived):
        me, done = lax.axis_index(AXIS), pl.get_global(plgpu.SemaphoreType.REGULAR)
        for turn in range(S):
            peer = lax.rem(me + jnp.int32(turn), jnp.int32(S))
            there = plgpu.remote_ref(out, at(peer))

            @plgpu.nd_loop((piece // tile[0], D // tile[1]), collective_axes="block")
            def _(info, peer=peer, there=there):
                row, column = (index * size for index, size in zip(info.index, tile, strict=True))
                columns, slot = pl.ds(column, tile[1]), lax.rem(jnp.int32(info.local_index), jnp.int32(stages))
                plgpu.wait_smem_to_gmem(stages - 1, wait_read_only=True)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(peer * piece + row, tile[0]), columns], ring.at[slot], arrived)
                plgpu.barrier_wait(arrived)
                plgpu.copy_smem_to_gmem(ring.at[slot], there.at[pl.ds(me * piece + row, tile[0]), columns])

            plgpu.wait_smem_to_gmem(0)
        for device in range(S):
            pl.semaphore_signal(done, device_id=at(jnp.int32(device)))
        pl.semaphore_wait(done, value=S * blocks, decrement=False)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, D), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((stages, *tile), x.dtype), plgpu.Barrier()],
        kernel_name="equal_copy",
    )
    return kernel(x)


def sharded(mesh, array):
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(AXIS)))


def rows_of(mesh, T: int, D: int):
    S = mesh.size
    return over(mesh, lambda key: jax.random.normal(key[0], (T, D), jnp.bfloat16))(
        sharded(mesh, jax.random.split(jax.random.key(0), S))
    )


def ragged(mesh, T: int, D: int) -> None:
    S, to = mesh.size, destinations(mesh.size, T)
    counts = np.stack([np.bincount(row, minlength=S) for row in to]).astype(np.int32)
    zero = np.zeros((1, S), np.int32)
    starts = np.concatenate([zero.T, np.cumsum(counts, 1)[:, :-1]], 1).astype(np.int32)
    lands = np.concatenate([zero, np.cumsum(counts, 0)[:-1]], 0).astype(np.int32)
    tables = [sharded(mesh, jnp.asarray(t.reshape(-1))) for t in (starts, counts, lands, counts.T.copy())]

    def run(x, *tables):
        out = lax.pcast(jnp.zeros((S * T, D), x.dtype), AXIS, to="varying")
        return lax.ragged_all_to_all(x, out, *tables, axis_name=AXIS)

    x, move = rows_of(mesh, T, D), over(mesh, run)
    name = "ragged_all_to_all" + (", decomposer" if _DECOMPOSER in os.environ.get("XLA_FLAGS", "") else "")
    _say(rounds({name: lambda: move(x, *tables)}, _REPEATS.value), {name: busiest(to, D)}, T, D)


def rows(mesh, T: int, D: int) -> None:
    S, to = mesh.size, destinations(mesh.size, T)
    x, experts = rows_of(mesh, T, D), sharded(mesh, jnp.asarray(to.reshape(-1, 1)))

    def routes(experts):
        everyone = lax.all_gather(experts, AXIS, tiled=True)
        return remote_exchange.routes(everyone, lax.axis_index(AXIS), mine=1, devices=S)

    table = over(mesh, routes)(experts)
    send = over(mesh, lambda x, table: remote_exchange.send(x, table, axis=AXIS))
    fetch = over(mesh, lambda y, table: remote_exchange.collect(y, table, axis=AXIS))
    swap = over(mesh, lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True))
    equal = jax.jit(
        jax.shard_map(
            functools.partial(equal_copy, S=S), mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS), check_vma=False
        )
    )  # its loops don't follow which values differ between devices
    everyone = over(mesh, lambda x: lax.all_gather(x, AXIS, tiled=True))
    came = send(x, table)
    cases = {
        "equal copy": (lambda: equal(x), T * D * 2 * (S - 1) // S),
        "all_to_all, equal": (lambda: swap(x), T * D * 2 * (S - 1) // S),
        "all_gather": (lambda: everyone(x), T * D * 2 * (S - 1)),
        "remote send": (lambda: send(x, table), busiest(to, D)),
        "remote fetch": (lambda: fetch(came, table), busiest(to, D)),
    }
    same = over(mesh, functools.partial(_same, tokens=S * T))
    print("sent rows are the ones meant:", bool(jnp.all(same(x, came, table.source))), flush=True)
    print("rows fetched back are the sent:", bool(jnp.all(fetch(came, table) == x)), flush=True)
    print("equal copy is all_to_all's:", bool(jnp.all(equal(x) == swap(x))), flush=True)
    times = rounds({name: run for name, (run, _) in cases.items()}, _REPEATS.value, launches=10)
    _say(times, {name: size for name, (_, size) in cases.items()}, T, D)


def _same(x, came, source, *, tokens):
    meant = lax.all_gather(x, AXIS, tiled=True).at[source].get(mode="clip")
    return jnp.all((meant == came) | (source >= tokens)[:, None])[None]


def _say(times, sizes, T, D) -> None:
    for name, (median, least, most) in times.items():
        rate = sizes[name] / median / 1e3
        print(f"{T}x{D} {name:28} {median:9.1f} us ({least:.1f}-{most:.1f}) {rate:6.1f} GB/s", flush=True)


def layer(mesh, name: str) -> None:
    sizes, T, S = LAYERS[name], _TOKENS.value, mesh.size
    E = sizes[2]
    arguments = functools.partial(layer_arguments, sizes, T)

    def passes(grad, x, decision, weights, *, num_experts, **options):
        def run(x, gates, weights):
            made = routing.Routing(decision.experts, gates, decision.scores, decision.keep)
            y, lost = expert_parallel.mixture_and_overflow(x, made, weights, num_experts=num_experts, **options)
            return y, jnp.int32(0) if lost is None else lost

        y, pull, lost = jax.vjp(run, x, decision.weights, weights, has_aux=True)
        y, grad = lax.optimization_barrier((y, grad))  # the backward pass comes after the forward one
        return y, lost, pull(grad)

    def several(*args, **options):
        """_PASSES one after another, as layers are in a step; what the last one gives."""

        def one(_, carry):
            args, _ = lax.optimization_barrier(carry)  # nothing of it before the last one's end
            return args, passes(*args, **options)

        shapes = jax.eval_shape(functools.partial(passes, **options), *args)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return lax.fori_loop(0, _PASSES, one, (args, nothing))[1]

    alone = jax.jit(functools.partial(several, num_experts=E // S))
    own = jax.device_put(arguments(1, E // S), jax.devices()[0])
    runs, found = {"no exchange": lambda: alone(*own)}, {}
    with jax.set_mesh(mesh):
        held = jax.jit(functools.partial(arguments, S, E), out_shardings=jax.NamedSharding(mesh, jax.P(AXIS)))()
        of_gpu = np.bincount(np.asarray(held[2].experts).reshape(-1) // (E // S), minlength=S)
        print(f"{name}: rows of the busiest GPU {of_gpu.max() / of_gpu.mean():.3f} of the mean", flush=True)
        for way, factor, chunks in _ways():
            try:
                exchange = {"way": way, "factor": factor, "chunks": chunks}
                way += "" if chunks == 1 else f", {chunks} chunks"
                run = jax.jit(functools.partial(several, num_experts=E, **exchange))
                options = COMPILER_OPTIONS if exchange["way"] == "remote" else None
                step = run.lower(*held).compile(options)  # this way it may be called without the mesh
                _, lost, _ = found[way] = step(*held)
                print(f"{name} {way}: choices without room {int(lost)}", flush=True)
            except Exception as error:  # the other ways are still worth their time
                print(f"{name} {way} failed: {error!r:.400}", flush=True)
                found.pop(way, None)
                continue
            runs[way] = functools.partial(step, *held)
        _compare(found)
    found.clear()
    times = rounds(runs, _REPEATS.value, launches=3)
    for way, of_program in times.items():
        median, least, most = (time / _PASSES for time in of_program)
        share = times["no exchange"][0] / of_program[0]
        print(
            f"{name} {way:20} {median:9.1f} us ({least:.1f}-{most:.1f}) {T / median:.2f} tokens/us {share:.3f}",
            flush=True,
        )


def _ways() -> list[tuple[str, float | None, int]]:
    """(way, factor, chunks) of every layer that is timed."""
    return [(way, _FACTORS[way], chunks) for chunks in dict.fromkeys((1, *_CHUNKS.value)) for way in _WAY.value]


def _compare(found) -> None:
    """The largest difference of results and gradients from gather's, by the largest value."""
    leaves = {way: [out[0], *jax.tree.leaves(out[2])] for way, out in found.items()}
    distance = jax.jit(
        lambda a, b: jnp.max(jnp.abs(a - b).astype(jnp.float32)) / jnp.max(jnp.abs(b).astype(jnp.float32))
    )
    for way in leaves.keys() - {"gather"} if "gather" in leaves else ():
        far = [float(distance(a, b)) for a, b in zip(leaves[way], leaves["gather"], strict=True)]
        print(f"{way} from gather, y and gradients: " + ", ".join(f"{d:.1e}" for d in far), flush=True)


def main() -> None:
    shapes = [shape_of(text) for text in _SHAPE.value]
    if "ragged" in _PART.value and len(_PART.value) > 1:
        # flags of the compiler are a process's, and its memory must be free again before this one begins
        for flag in ("", _DECOMPOSER):
            options = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
            again = [sys.executable, __file__, "--part=ragged"]
            again += [f"--shape={shape}" for shape in _SHAPE.value]
            try:
                if subprocess.run(again, env=options, check=False, timeout=120).returncode == 2:
                    sys.exit(2)  # it said why
            except subprocess.TimeoutExpired:
                print(f"ragged_all_to_all {flag}: no end after 120 s", flush=True)
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        raise UserError(
            f"{jax.device_count()} {jax.default_backend()} device(s) here; the exchange needs 2 GPUs or more"
        )
    mesh = sharding.make_mesh({"expert": -1})
    print(f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for T, D in shapes:
        if _PART.value == ["ragged"]:
            ragged(mesh, T, D)
        elif "rows" in _PART.value:
            rows(mesh, T, D)
    if "layer" in _PART.value:
        for name in _LAYER.value:
            layer(mesh, name)


if __name__ == "__main__":
    cli.run(main)
