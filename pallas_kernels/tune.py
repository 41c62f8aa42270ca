"""Times the Hopper kernels' tilings at the named shapes, beside the ones that `grouped_matmul.mosaic_gpu` keeps.

    python -m pallas_kernels.tune [--op forward,drhs] [--shape olmoe-1b-7b,…|training|decode] [--json FILE]

Prints, per product, microseconds and the kept tiling's time over each candidate's; last, per candidate, the geometric
mean of those ratios. A candidate that needs more shared memory than there is is left out. What wins by more than the
spread between two runs (a few per cent) is written into FORWARD or DRHS by hand, with a line in experiments/LOG.md.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
from pathlib import Path

from pallas_kernels import benchmark
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.hopper import Tiling
from pallas_kernels.timing import rounds

KEPT = {"forward": mosaic_gpu.FORWARD, "drhs": mosaic_gpu.DRHS}
_SHARED = 227 * 1024  # bytes a block may have
_BARRIERS = 1024


def candidates() -> list[Tiling]:
    """Rings and staging buffers that fit: a stage is 32 KiB, a staged piece 8 KiB for each of two warpgroups."""
    return [
        Tiling(stages, pieces)
        for stages, pieces in itertools.product((3, 4, 5, 6), (1, 2, 4))
        if stages * (32 << 10) + pieces * 2 * (8 << 10) + _BARRIERS <= _SHARED
    ]


def product(op, tiles, lhs, rhs, grad, sizes, metadata):
    if op == "forward":
        return mosaic_gpu.forward(lhs, rhs, sizes, metadata, False, lhs.dtype, tiles)
    return mosaic_gpu.drhs(lhs, grad, sizes, metadata, rhs.dtype, tiles)


def tune(case, op) -> dict[Tiling, float]:
    """Median microseconds of each candidate."""
    (lhs,), rhs, (grad,), *rest = benchmark.operands(case | {"again": 1})
    args = lhs, rhs, grad, *rest
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = {t: pool.submit(benchmark.compiled, functools.partial(product, op, t), *args) for t in candidates()}
        runs = {t: functools.partial(job.result(), *args) for t, job in compiled.items()}
    return {t: us for t, (us, _, _) in rounds(runs, launches=case["launches"]).items()}


def summary(op: str, found: list[dict[Tiling, float]]) -> dict[Tiling, float]:
    """Geometric mean over the products of the kept tiling's time over each candidate's: above 1 is faster."""
    return {t: math.exp(sum(math.log(times[KEPT[op]] / times[t]) for times in found) / len(found)) for t in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="forward,drhs")
    parser.add_argument("--shape", default="training")
    parser.add_argument("--json")
    flags = parser.parse_args()
    rows = []
    for op in flags.op.split(","):
        if op not in KEPT:
            parser.error(f"no op {op!r} to tune; there are {', '.join(KEPT)}")
        found = []
        for case in benchmark.cases([op], flags.shape.split(","), "dirichlet"):
            found.append(tune(case, op))
            for t, us in found[-1].items():
                ratio = found[-1][KEPT[op]] / us
                rows.append({"name": case["name"], "op": op, "stages": t.stages, "pieces": t.pieces, "us": us})
                print(f"{case['name']} {op} stages {t.stages} pieces {t.pieces}: {us:.0f} us, {ratio:.3f}", flush=True)
        if not found:
            parser.error(f"no shape matches {flags.shape!r}")
        for t, mean in sorted(summary(op, found).items(), key=lambda item: -item[1]):
            print(f"{op} stages {t.stages} pieces {t.pieces}: {mean:.3f}" + " (kept)" * (t == KEPT[op]))
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
