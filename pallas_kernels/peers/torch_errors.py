"""torch's own errors against float64, for the tests that hold ours to 1.5 times them (`pytest -m gpu`).

    python torch_errors.py grouped_matmul|gated_ffn|combine FILE.npz

FILE: the arguments in float32 (values of bfloat16) by name, and the right results as want_0, want_1 …: the value and
the gradients, in the order of the arguments. Prints one JSON list, torch's relative error of each.
"""

import functools
import json
import sys

import numpy as np
import torch
from torch_products import both, combine, gated_ffn


def main():
    what, data = sys.argv[1], np.load(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(name, dtype=torch.bfloat16):
        return torch.tensor(data[name], device=device).to(dtype)

    ends = None if what == "combine" else tensor("sizes", torch.int32).cumsum(0).to(torch.int32)
    if what == "grouped_matmul":
        product = functools.partial(torch._grouped_mm, offs=ends)
        got = both(product, tensor("grad"), tensor("lhs"), tensor("rhs"))
    elif what == "gated_ffn":
        args = [tensor(name) for name in ("rows", "gate", "up", "down")]
        got = both(functools.partial(gated_ffn, ends=ends), tensor("grad"), *args)
    else:
        slot = tensor("slot", torch.long)
        function = lambda rows, weight: combine(rows, slot, weight)  # noqa: E731
        got = both(function, tensor("grad"), tensor("rows"), tensor("weight", torch.float32))
    errors = []
    for i, value in enumerate(got):
        want = data[f"want_{i}"]
        errors.append(float(np.linalg.norm(value.to(torch.float64).cpu().numpy() - want) / np.linalg.norm(want)))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
