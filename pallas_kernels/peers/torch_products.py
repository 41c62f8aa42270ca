"""torch's dense and grouped products, for `python -m pallas_kernels.benchmark --peer_python=PATH`, which runs this file
with PATH, an environment that has torch and a GPU. Answers each line of JSON with one: {"case": …} makes its operands
and runs its products; {"op": …, "launches": n, "settle": s} gives {"us": …}, microseconds of one of n calls after s
seconds of untimed ones."""

import functools
import json
import sys
import time

import torch


def microseconds(function, launches, settle=0.0):
    before = time.perf_counter()
    while time.perf_counter() - before < settle:
        microseconds(function, launches)
    start = time.perf_counter()
    for _ in range(launches):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / launches * 1e6


def gated_ffn(rows, gate, up, down, ends):
    hidden = torch.nn.functional.silu(torch._grouped_mm(rows, gate, offs=ends)) * torch._grouped_mm(rows, up, offs=ends)
    return torch._grouped_mm(hidden, down, offs=ends)


def combine(rows, slot, weight):
    """rows (M, D), slot (T, K), M where a choice has no row; weight (M,) float32."""
    here = slot < len(rows)
    slot = slot.clamp(max=len(rows) - 1)
    return torch.einsum("tkd,tk->td", rows[slot], (weight[slot] * here).to(rows.dtype))


def spread(tokens, slot, num_rows):
    token = torch.zeros(num_rows + 1, dtype=torch.long, device=slot.device)
    token[slot.flatten()] = torch.arange(len(slot), device=slot.device).repeat_interleave(slot.shape[1])
    return tokens[token[:num_rows]]


def both(function, grad, *args):
    """The value and the gradients of args."""
    leaves = [a.detach().requires_grad_() for a in args]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def products(case, normal, ends):
    M, E, K, N = case["product"]
    lhs, rhs, grad = normal(M, K), normal(E, K, N) * 0.02, normal(M, N)
    three = {
        "forward": functools.partial(torch._grouped_mm, lhs, rhs, offs=ends),
        "dlhs": functools.partial(torch._grouped_mm, grad, rhs.transpose(1, 2), offs=ends),
        "drhs": functools.partial(torch._grouped_mm, lhs.t(), grad, offs=ends),
    }
    all_three = list(three.values())
    dense = functools.partial(torch.matmul, lhs, rhs[0])
    return {"dense": dense, **three, "both": lambda: [run() for run in all_three]}


def block(case, normal, ends):
    (M, E, D, wide), (T, K) = case["product"], case["tokens"]
    F = wide // 3
    rows, grad, tokens, plain = normal(M, D), normal(M, D), normal(T, D), normal(D, wide)
    weights = normal(E, D, F) * D**-0.5, normal(E, D, F) * D**-0.5, normal(E, F, D) * F**-0.5
    slot = torch.randperm(T * K, device="cuda").clamp(max=M).reshape(T, K)
    weight = torch.rand(M, device="cuda")
    experts, moved = functools.partial(gated_ffn, ends=ends), lambda rows, weight: combine(rows, slot, weight)
    return {
        "dense": functools.partial(torch.matmul, rows, plain),
        "gated_ffn": functools.partial(experts, rows, *weights),
        "gated_ffn_both": functools.partial(both, experts, grad, rows, *weights),
        "combine": functools.partial(moved, rows, weight),
        "combine_both": functools.partial(both, moved, tokens, rows, weight),
        "spread": functools.partial(spread, tokens, slot, M),
    }


def prepared(case):
    """op -> its product, and "dense", each run once."""
    normal = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(case["sizes"], device="cuda").cumsum(0).to(torch.int32)
    run = (block if case["name"].endswith("/block") else products)(case, normal, ends)
    for op in ("dense", *case["ops"]):
        microseconds(run[op], 1)
    return run


def main():
    run: dict = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "case" in asked:
            run.clear()
            torch.cuda.empty_cache()
            run |= prepared(asked["case"])
            answer = {}
        else:
            answer = {"us": microseconds(run[asked["op"]], asked["launches"], asked["settle"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
