"""Times the grouped products at the named shapes beside a dense product of the same FLOPs and the peers.

    python -m pallas_kernels.benchmark [--op forward,dlhs,drhs,gated_ffn,…|all] [--shape training,decode|olmoe-1b-7b,…]
        [--sizes dirichlet] [--implementation mosaic_gpu,xla] [--peer_python PATH] [--json FILE] [--rounds 5]

--op: forward, dlhs and drhs of the products up and down, and both, all three; gated_ffn, combine and spread, and
gated_ffn_both and combine_both, which are values and all gradients (`block_ops`); all: every one of these.

Peers on a GPU: a dense product of the same FLOPs, `lax.ragged_dot` (as "xla", for up to 32 experts: it takes the work
and the memory of all), tokamax where it is installed, and with --peer_python torch's grouped product. --implementation
names what is timed beside the dense product, peers among it: each must run every operation that is timed, here.
--json is written after each case.

Medians of five rounds, or --rounds, in which every implementation of a case has its turn, torch in a process of its own
among them, with the fastest and slowest round. A turn begins with a tenth of a second of untimed calls, so that each is
timed at the clocks that it leaves the chip. Weights of a case are larger than the caches wherever GB/s matter: the
last-level cache is flushed by the case itself. The group metadata is given, as a layer gives it to its six products. A
decode shape's product runs eight times, over other rows, in one program, as a model's layers do: launched from Python
one by one, as torch's are, products of 100 µs leave gaps between them.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_ops, shapes
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, group_metadata, grouped_matmul, named, pick, schedule
from pallas_kernels.peers import jax_products
from pallas_kernels.timing import rounds

OPS = ("forward", "dlhs", "drhs", "both")
_EVERY = (*OPS, *block_ops.OPS)
_AGAIN = 8  # times a decode shape's product runs in one program
_SETTLE = 0.1  # seconds
_SLOW = ("xla",)  # its products are launched once a round
_FEW_EXPERTS = 32
_PEER = Path(__file__).parent / "peers" / "torch_products.py"


def cases(ops, names, kind) -> list[dict]:
    """One for each shape, up and down, and one for its operations of the whole block, if any is named."""
    parts = [("up", OPS), ("down", OPS), ("block", block_ops.OPS)]
    out = []
    for name, shape in shapes.named(names).items():
        for part, its in parts:
            chosen = [op for op in ops if op in its]
            if not chosen:
                continue
            M, E, K, N = product = (
                (shape.rows, shape.experts, shape.D, 3 * shape.F) if part == "block" else shape.product(part)
            )
            case = {"name": f"{name}/{part}", "ops": chosen, "product": product, "tokens": (shape.T, shape.K)}
            launches = int(np.clip(6e12 // (2.0 * M * K * N), 3, 20))
            again = _AGAIN if name in shapes.DECODE and part != "block" else 1
            sizes = shapes.group_sizes(kind, M, E).tolist()
            out.append(case | {"sizes": sizes, "launches": launches, "again": again})
    return out


def operands(case):
    """`again` of lhs (M, K), rhs (E, K, N), `again` of grad (M, N), sizes and metadata."""
    M, E, K, N = case["product"]
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    first, second, third = jax.random.split(jax.random.key(0), 3)
    lhs = tuple(normal(key, (M, K)) for key in jax.random.split(first, case["again"]))
    grad = tuple(normal(key, (M, N)) for key in jax.random.split(third, case["again"]))
    sizes = jnp.asarray(case["sizes"], jnp.int32)
    return lhs, normal(second, (E, K, N)), grad, sizes, jax.jit(group_metadata, static_argnums=1)(sizes, M)


def product(op, implementation, lhs, rhs, grad, sizes, metadata):
    """One of the three products, or all, as differentiating makes them; implementation: ours, or a peer's name."""

    def forward(lhs, rhs):
        if peer := jax_products.present().get(implementation):
            return peer(lhs, rhs, sizes)
        return grouped_matmul(lhs, rhs, sizes, metadata=metadata, implementation=implementation)

    if op == "forward":
        return forward(lhs, rhs)
    out, pull = jax.vjp(forward, lhs, rhs)
    return (out, *pull(grad)) if op == "both" else pull(grad)[OPS.index(op) - 1]


def for_each(op, implementation, lhs, rhs, grad, *rest):
    """The product of every lhs and grad, in one program."""
    once = jax.jit(functools.partial(product, op, implementation))
    return [once(rows, rhs, its, *rest) for rows, its in zip(lhs, grad, strict=True)]


def dense(lhs, weights):
    return [rows @ weights for rows in lhs]


def bench(case, implementations: Mapping[str, list[str]], peer=None, repeats: int = 5) -> dict:
    """(op, implementation) -> times of one call; a dense product of the same FLOPs among them.

    implementations: of each op; peer: a `Torch`; repeats: rounds.
    """
    one: Callable
    if case["ops"][0] in block_ops.OPS:
        one, args = block_ops.run, block_ops.operands(case)
        rows, gate, up, down, *_ = args
        plain = (rows,), jnp.concatenate([gate[0], up[0], down[0].T], axis=1)
    else:
        one, args = for_each, operands(case)
        plain = args[0], args[1][0]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {
            (op, i): pool.submit(compiled, functools.partial(one, op, i), *args)
            for op, its in implementations.items()
            for i in its
        }
        runs = {("dense", "jax"): functools.partial(compiled(dense, *plain), *plain)}
        runs |= {name: functools.partial(job.result(), *args) for name, job in jobs.items()}
    elsewhere = peer.products(case) if peer else {}
    slow = {name for name in runs if name[1] in _SLOW and name[0] not in block_ops.MOVING}
    launches = {name: 1 if name in slow else case["launches"] for name in runs}
    times = rounds(runs, repeats, launches, elsewhere, settle=_SETTLE)
    again = {name: 1 if name in elsewhere else case["again"] for name in times}
    return {name: tuple(us / again[name] for us in found) for name, found in times.items()}


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


class PeerError(Exception):
    """The peer can't be run, or stopped."""


class Torch:
    """torch's products in a process of its own: `python peers/torch_products.py`, a context that ends it."""

    def __init__(self, python: str):
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        try:
            self._process = subprocess.Popen(
                [python, _PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True
            )
        except OSError as error:
            self._complaints.close()
            raise PeerError(f"--peer_python={python} can't be run: {error.strerror}") from error

    def __enter__(self) -> "Torch":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def products(self, case) -> dict:
        """(op, "torch") -> a function that gives microseconds of one call, for `rounds`."""
        self._ask(case=case)
        return {
            (op, "torch"): lambda op=op: self._ask(op=op, launches=case["launches"], settle=_SETTLE)["us"]
            for op in ("dense", *case["ops"])
        }

    def _ask(self, **what) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
            print(json.dumps(what), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print something of their own
                return json.loads(line)
        self._complaints.seek(0)
        last = (self._complaints.read().strip().splitlines() or ["no output"])[-1]
        raise PeerError(f"torch's process stopped: {last}")


def report(case, times, copied: float) -> dict:
    """Rates of one case: TFLOP/s by the real rows, also as a share of the dense product's; GB/s by weights of the
    experts that have rows (dense: by one matrix), and rows, also as a share of `copied`, a copy's."""
    M, _, K, N = case["product"]
    touched = int(np.count_nonzero(case["sizes"]))
    one = 2.0 * M * K * N, 2.0 * (M * (K + N) + touched * K * N)
    rates = []
    for (op, name), (us, least, most) in times.items():
        flops, moved = block_ops.work(op, case) if op in block_ops.OPS else one
        if op == "dense":
            moved = 2.0 * (M * (K + N) + K * N)
        if op == "both":
            flops, moved = 3 * flops, 3 * moved
        rates.append(
            {
                "op": op,
                "implementation": name,
                "us": us,
                "least": least,
                "most": most,
                "tflops": flops / us / 1e6,
                "gbs": moved / us / 1e3,
                "of_copy": moved / us / 1e3 / copied,
                "of_dense": flops / one[0] * times["dense", "jax"][0] / us,
            }
        )
    return {**case, "real_rows": real_share(case["sizes"]), "megabytes": one[1] / 1e6, "rates": rates}


def real_share(sizes: list[int]) -> float:
    """Of the rows in the Hopper kernels' row tiles for groups of these sizes: the share that is a group's own."""
    ends = np.cumsum(sizes, dtype=np.int32)
    M, E = int(ends[-1]), len(ends)
    counts, _ = schedule.row_tiles(jnp.asarray(ends - np.array(sizes, np.int32)), jnp.asarray(ends), M, tail=False)
    rows = schedule.tile_rows(M, E)
    heights = (rows, schedule.ROWS) if rows == schedule.TALL else (rows,)
    return M / max(sum(int(n) * height for n, height in zip(counts, heights, strict=True)), 1)


def show(result) -> None:
    decode = result["product"][0] < 4096
    rates = " | ".join(
        f"{row['op']} {row['implementation']} {row['us']:.0f} us [{row['least']:.0f}, {row['most']:.0f}] "
        + (
            f"{row['gbs']:.0f} GB/s {row['of_copy']:.2f}"
            if decode or not row["tflops"]
            else f"{row['tflops']:.0f} TFLOP/s {row['of_dense']:.3f}"
        )
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


def timed(op: str, case, names: list[str]) -> list[str]:
    """The implementations of `op` that are timed: `names`, or else what is picked and, of products on a GPU, the peers.

    Raises ValueError, NotImplementedError as `taken`.
    """
    which = block_ops.taken if op in block_ops.OPS else taken
    if names:
        return [which(op, name, case) for name in names]
    own = which(op, None, case)
    if op in block_ops.OPS or jax.default_backend() != "gpu":
        return [own]
    few = case["product"][1] <= _FEW_EXPERTS
    return list(dict.fromkeys([own, *(["xla"] if few else []), *jax_products.present()]))


def taken(op: str, implementation: str | None, case) -> str:
    """`implementation`, or with None what is picked, if this machine runs the case's products with it.

    Raises ValueError, NotImplementedError as `grouped_matmul`, the latter for a peer without a GPU too.
    """
    del op  # what runs one of a product's three runs all
    if implementation in jax_products.present():
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"{implementation} needs a GPU")
        return implementation
    M, E, K, N = case["product"]
    lhs, rhs = jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((E, K, N), jnp.bfloat16)
    return named(implementation, lhs, rhs) if implementation else pick(lhs, rhs)


def plan(todo: list[dict], names: list[str]) -> list[tuple[dict, dict[str, list[str]]]]:
    """Each case with the implementations of its ops, as `bench` takes them.

    Raises:
      ValueError: one of `names` doesn't run one of the ops on this machine; in one line.
    """
    out = []
    for case in todo:
        implementations = {}
        for op in case["ops"]:
            try:
                implementations[op] = timed(op, case, names)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"{op} of {case['name']}: {error}") from error
        out.append((case, implementations))
    return out


def run(planned, peer: Torch | None, sizes: str, file: Path | None, repeats: int) -> None:
    """Shows each case's report when it is done, and writes those so far: a later case may fail."""
    copied = copy_rate()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, copy {copied:.0f} GB/s, sizes {sizes}")
    print("[fastest and slowest round]; then the share of the dense product's rate, or of the copy's")
    results = []
    for case, implementations in planned:
        results.append(report(case, bench(case, implementations, peer, repeats), copied))
        show(results[-1])
        if file:
            file.write_text(json.dumps(results))


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of rounds; give 1 or more")
    return int(text)


def writable(text: str) -> Path:
    """An argparse type: a file that can be written, which is left as it is."""
    file = Path(text)
    new = not file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be written: {error.strerror}; give another file") from error
    if new:
        file.unlink()
    return file


def main() -> None:
    known = (*IMPLEMENTATIONS, *jax_products.present())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="forward,dlhs,drhs", type=shapes.listed("op", ("all", *_EVERY)))
    parser.add_argument("--shape", default="training", type=shapes.listed("shape", shapes.NAMES))
    parser.add_argument("--sizes", default="dirichlet", choices=shapes.SIZES)
    parser.add_argument("--implementation", default=[], type=shapes.listed("implementation", known))
    parser.add_argument("--peer_python")
    parser.add_argument("--json", type=writable)
    parser.add_argument("--rounds", type=positive, default=5)
    flags = parser.parse_args()
    if flags.peer_python:  # both processes hold operands: jax takes memory as it needs it
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    todo = cases(_EVERY if "all" in flags.op else flags.op, flags.shape, flags.sizes)
    try:
        planned = plan(todo, flags.implementation)
    except ValueError as error:
        parser.error(str(error))
    try:
        with Torch(flags.peer_python) if flags.peer_python else contextlib.nullcontext() as peer:
            run(planned, peer, flags.sizes, flags.json, flags.rounds)
    except PeerError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
