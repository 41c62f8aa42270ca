"""Times the Hopper kernels' tilings at the named shapes and keeps the best of each bucket of shapes in `tilings.json`.

    python -m pallas_kernels.tune [--op forward,drhs] [--shape training,decode|olmoe-1b-7b,…] [--write] [--json FILE]

Prints, per product, each candidate's microseconds and the kept tiling's time over it; then, per bucket, the geometric
means of those ratios. --write puts a bucket's best into the file in place of the kept one where it wins by more than
3%, which two runs may differ by. A candidate that needs more shared memory than there is is left out. It needs a
Hopper GPU.
"""

import argparse
import collections
import concurrent.futures
import datetime
import functools
import itertools
import json
import math

import jax

from pallas_kernels import benchmark, shapes
from pallas_kernels.grouped_matmul import mosaic_gpu, schedule, tilings
from pallas_kernels.grouped_matmul.hopper import COLUMNS, STEP, Tiling
from pallas_kernels.timing import rounds

_SHARED = 227 * 1024  # bytes a block may have
_BARRIERS = 1024
_NOISE = 1.03


def candidates(op: str, rows: int) -> list[Tiling]:
    """Rings and staging buffers that fit beside each other; rows: of a row tile, which a stage holds with COLUMNS."""
    stage = 2 * STEP * (max(rows, 64) + COLUMNS)
    plain = op == "forward"  # a piece more, for rows that lie beside others' (`hopper.launch`)
    return [
        Tiling(stages, pieces)
        for stages, pieces in itertools.product((3, 4, 5, 6, 7), (1, 2, 3, 4))
        # pieces are each of two warpgroups'
        if stages * stage + (pieces + plain) * 2 * (8 << 10) + _BARRIERS <= _SHARED
    ]


def place(case, op: str) -> tuple[int, str]:
    """(rows of a tile, bucket) of a case's product."""
    M, E, K, _ = case["product"]
    rows, depth = (schedule.tile_rows(M, E), K) if op == "forward" else (max(mosaic_gpu.drhs_heights(K)), M // E)
    return rows, tilings.bucket(op, rows, depth)


def product(op, tiles, lhs, rhs, grad, sizes, metadata):
    """The product of every lhs and grad, in one program."""
    if op == "forward":
        return [mosaic_gpu.forward(rows, rhs, sizes, metadata, False, rows.dtype, tiles) for rows in lhs]
    return [mosaic_gpu.drhs(*rows, sizes, metadata, rhs.dtype, tiles) for rows in zip(lhs, grad, strict=True)]


def tune(case, op) -> dict[Tiling, float]:
    """Median microseconds of each candidate."""
    args = benchmark.operands(case)
    todo = candidates(op, place(case, op)[0])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = {t: pool.submit(benchmark.compiled, functools.partial(product, op, t), *args) for t in todo}
        runs = {t: functools.partial(job.result(), *args) for t, job in compiled.items()}
    return {t: us / case["again"] for t, (us, _, _) in rounds(runs, launches=case["launches"]).items()}


def summary(kept: Tiling, found: list[dict[Tiling, float]]) -> dict[Tiling, float]:
    """Geometric mean over the products of the kept tiling's time over each candidate's: above 1 is faster."""
    return {t: math.exp(sum(math.log(times[kept] / times[t]) for times in found) / len(found)) for t in found[0]}


def best(kept: Tiling, means: dict[Tiling, float]) -> Tiling:
    """What a bucket takes from now on."""
    first = max(means, key=lambda t: means[t])
    return first if means[first] > _NOISE else kept


def run(ops: list[str], names: list[str], chip: str) -> tuple[list[dict], dict[str, dict[str, Tiling]]]:
    """Every case's times, and op -> bucket -> what it takes from now on; prints both."""
    rows: list[dict] = []
    chosen: dict[str, dict[str, Tiling]] = {op: {} for op in ops}
    for op in ops:
        found = collections.defaultdict(list)
        for case in benchmark.cases([op], names, "dirichlet"):
            _, bucket = place(case, op)
            kept, times = tilings.table(chip)[op][bucket], tune(case, op)
            found[bucket].append(times)
            for t, us in times.items():
                rows.append({"name": case["name"], "op": op, "stages": t.stages, "pieces": t.pieces, "us": us})
                print(f"{case['name']} {op} {show(t)}: {us:.0f} us, {times[kept] / us:.3f}", flush=True)
        for bucket, its in found.items():
            kept = tilings.table(chip)[op][bucket]
            means = summary(kept, its)
            chosen[op][bucket] = best(kept, means)
            for t, mean in sorted(means.items(), key=lambda item: -item[1]):
                print(f"{op}, {bucket}, {show(t)}: {mean:.3f}" + " (kept)" * (t == kept))
    return rows, chosen


def show(t: Tiling) -> str:
    return f"stages {t.stages} pieces {t.pieces}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="forward,drhs", type=shapes.listed("tuned op", tilings.BUCKETS))
    parser.add_argument("--shape", default="training,decode", type=shapes.listed("shape", shapes.NAMES))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=benchmark.writable)
    flags = parser.parse_args()
    chip = jax.devices()[0].device_kind
    if not mosaic_gpu._hopper():
        parser.exit(1, f"error: this machine's device is {chip!r}; tuning needs a Hopper GPU: run it where one is\n")
    rows, chosen = run(flags.op, flags.shape, chip)
    if flags.write:
        tilings.write(chip, f"{datetime.date.today()}, jax {jax.__version__}", chosen)
        print(f"wrote {tilings.FILE}")
    if flags.json:
        flags.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
