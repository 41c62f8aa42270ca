"""The collectives of a compiled program, read out of its optimised HLO."""

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def collectives(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, shape of the result) -> (how many, their bytes) in an optimised HLO; an asynchronous pair counts once."""
    found: dict[tuple[str, str], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    pattern = rf"= (\(?[^=]*?\)?) ({'|'.join(KINDS)})(-start)?\("
    for shapes, name, start in re.findall(pattern, text):
        parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        # An all-gather's or permute's start returns (operands, results, …): the last array of data is a result.
        parts = [part for part in parts if part[0] in BYTES and part != ("u32", "")] or parts[:1]
        parts = parts[len(parts) // 2 :] if start and name in ("all-gather", "collective-permute") else parts
        size = sum(BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)
        shape = " ".join(f"{kind}[{dims}]" for kind, dims in parts[:2]) + (" …" if len(parts) > 2 else "")
        count, total = found[name, shape]
        found[name, shape] = (count + 1, total + size)
    return dict(found)
