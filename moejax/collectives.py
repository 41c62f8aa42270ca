"""The collectives of a compiled program, read out of its optimised HLO: how often each runs, and its bytes."""

import collections
import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COLLECTIVE = re.compile(rf"= (\(?[^=]*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")


def collectives(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, shape of the result) -> (how many, their bytes) of one run of an optimised HLO.

    What stands in a loop's body counts once for each turn of the loop, of one inside another their product; of several
    branches each counts. An asynchronous pair counts once.
    """
    found: dict[tuple[str, str], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for lines, times in _runs(text):
        for shapes, name, start in _COLLECTIVE.findall("\n".join(lines)):
            shape, size = _result(shapes, name, bool(start))
            count, total = found[name, shape]
            found[name, shape] = (count + times, total + times * size)
    return dict(found)


def _result(shapes: str, name: str, start: bool) -> tuple[str, int]:
    """The shape that a collective gives, of the first two arrays where it gives several, and the bytes of all."""
    parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    # An all-gather's or permute's start returns (operands, results, …): the last array of data is a result.
    parts = [part for part in parts if part[0] in BYTES and part != ("u32", "")] or parts[:1]
    parts = parts[len(parts) // 2 :] if start and name in ("all-gather", "collective-permute") else parts
    size = sum(BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)
    return " ".join(f"{kind}[{dims}]" for kind, dims in parts[:2]) + (" …" if len(parts) > 2 else ""), size


def _runs(text: str) -> Iterable[tuple[list[str], int]]:
    """The lines of each computation and how often it runs; lines outside of any run once."""
    bodies, entry = _computations(text)
    times = collections.Counter({entry: 1})
    # The text names a computation before those that call it: callers first, then.
    for name in reversed(bodies):
        for line in bodies[name]:
            turns = _turns(line, bodies)
            for called in _called(line):
                times[called] += times[name] * turns
    return [(lines, times[name]) for name, lines in bodies.items() if times[name]]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation in the text's order, and the entry's name: "" where the text is lines alone."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
        bodies.setdefault(name, []).append(line)
    return bodies, entry


def _called(line: str) -> list[str]:
    names = [name.strip().lstrip("%") for group in _BRANCHES.findall(line) for name in group.split(",")]
    return _CALLED.findall(line) + names


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a `while` runs its body: as XLA knows, or by the only number that its condition holds; else 1."""
    condition = re.search(r"\bwhile\(.*\bcondition=%?([\w.\-]+)", line)
    if condition is None:
        return 1
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    numbers = {int(n) for n in _CONSTANT.findall("\n".join(bodies.get(condition[1], ())))}
    return numbers.pop() if len(numbers) == 1 else 1
