"""torch's dense and grouped products, for `python -m pallas_kernels.benchmark --peer_python=PATH`, which runs this file
with PATH, an environment that has torch and a GPU. Reads JSON cases from stdin, prints one JSON line for each."""

import functools
import json
import statistics
import sys
import time

import torch


def microseconds(function, launches):
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(launches):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / launches * 1e6)
    return statistics.median(times), min(times), max(times)


def main():
    for case in json.load(sys.stdin):
        (M, E, K, N), sizes = case["product"], case["sizes"]
        ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
        lhs = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        rhs = torch.randn(E, K, N, device="cuda", dtype=torch.bfloat16) * 0.02
        grad = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        run = {
            "dense": functools.partial(torch.matmul, lhs, rhs[0]),
            "forward": functools.partial(torch._grouped_mm, lhs, rhs, offs=ends),
            "dlhs": functools.partial(torch._grouped_mm, grad, rhs.transpose(1, 2), offs=ends),
            "drhs": functools.partial(torch._grouped_mm, lhs.t(), grad, offs=ends),
        }
        times = {op: microseconds(run[op], case["launches"]) for op in ("dense", *case["ops"])}
        print(json.dumps(times), flush=True)
        del lhs, rhs, grad, run


if __name__ == "__main__":
    main()
