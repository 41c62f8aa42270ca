"""How the Hopper kernels divide shared memory: `tilings.json`, which `python -m pallas_kernels.tune --write` updates.

chip -> {op -> {bucket of shapes -> {"stages": …, "pieces": …, "measured": when and with what}}}. A short sum wants its
tile stored at once; a long weight gradient, whose first and last stages are masked, a longer ring.
"""

import functools
import json
from pathlib import Path

import jax

from pallas_kernels.grouped_matmul import schedule
from pallas_kernels.grouped_matmul.hopper import Tiling

FILE = Path(__file__).with_suffix(".json")
BUCKETS = {"forward": ("few rows", "short sums", "long sums", "many rows"), "drhs": ("short sums", "long sums")}
_MEASURED = "NVIDIA H200"  # whose tilings a chip takes that has none of its own
_SHORT = {"forward": 1024, "drhs": 512}  # terms


def bucket(op: str, rows: int, depth: int) -> str:
    """Of BUCKETS[op]. rows: of a row tile (`schedule.tile_rows`); depth: terms of a sum, K or a mean group's rows."""
    if op == "forward" and rows < schedule.ROWS:
        return "few rows"
    if op == "forward" and rows == schedule.TALL:
        return "many rows"
    return "short sums" if depth <= _SHORT[op] else "long sums"


def pick(op: str, rows: int, depth: int) -> Tiling:
    """The tiling of a product on this machine's chip; arguments as `bucket`'s."""
    return table(jax.devices()[0].device_kind)[op][bucket(op, rows, depth)]


@functools.cache
def table(chip: str) -> dict[str, dict[str, Tiling]]:
    """op -> bucket -> tiling."""
    known = json.loads(FILE.read_text())
    found = known.get(chip, known[_MEASURED])

    def tiling(entry):
        return Tiling(entry["stages"], entry["pieces"])

    return {op: {name: tiling(found[op][name]) for name in names} for op, names in BUCKETS.items()}


def write(chip: str, measured: str, kept: dict[str, dict[str, Tiling]]) -> None:
    """Puts op -> bucket -> tiling into the file, in place of what it says of those for this chip.

    A chip that has no entries yet gets the others from the measured one, and each says so.
    """
    known = json.loads(FILE.read_text())
    found = known.get(chip) or {
        op: {n: e | {"measured": f"of an {_MEASURED}, {e['measured']}"} for n, e in entries.items()}
        for op, entries in known[_MEASURED].items()
    }
    for op, tilings in kept.items():
        fields = {n: {"stages": t.stages, "pieces": t.pieces, "measured": measured} for n, t in tilings.items()}
        found = found | {op: found[op] | fields}
    FILE.write_text(json.dumps(known | {chip: found}, indent=2) + "\n")
    table.cache_clear()
