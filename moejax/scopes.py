"""Where a compiled program's time goes, by the named scopes of its operations."""

import collections
import glob
import math
import re
import tempfile
from collections.abc import Callable, Iterable

import jax

# The innermost one of an operation's path counts. ffn, shared (experts) and embedding are there as modules' names.
SCOPES = (
    "attention", "router", "dispatch", "exchange", "experts", "combine", "head", "loss", "optimizer", "statistics",
    "ffn", "shared", "embedding",
)  # fmt: skip


def scope_of(path: str) -> str:
    """The named scope that an operation's path (its op_name in the HLO) counts for: the last of SCOPES in it."""
    names = [name for name in re.split(r"[/()]", path) if name in SCOPES]
    return names[-1] if names else "other"


def scopes_by_operation(program: str) -> dict[str, str]:
    """Name of each operation of a compiled program's text -> its scope."""
    found = {}
    for line in program.splitlines():
        name, path = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line), re.search(r'op_name="([^"]*)"', line)
        if name:
            found[name[1]] = scope_of(path[1]) if path else "other"
    return found


def operations(folder: str) -> list[tuple[str, float]]:
    """(operation, nanoseconds) of every execution in the profile under `folder`, on devices or XLA's CPU threads."""
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    found = []
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            if not device and "tf_XLA" not in line.name:
                continue
            for event in line.events:
                name = dict(event.stats).get("hlo_op") if device else event.name
                if isinstance(name, str):
                    found.append((name, event.duration_ns))
    return found


def kernels(folder: str) -> dict[str, list[tuple[str, float, float]]]:
    """GPU -> (kernel, start, end) of all that it ran in the profile under `folder`, in nanoseconds."""
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    found: dict[str, list[tuple[str, float, float]]] = {}
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        lines = [line for line in plane.lines if line.name.startswith("Stream")]  # others repeat what these hold
        if plane.name.startswith("/device:GPU"):
            events = [event for line in lines for event in line.events]
            found[plane.name] = [(event.name, event.start_ns, event.start_ns + event.duration_ns) for event in events]
    return found


Intervals = Iterable[tuple[float, float]]


def overlap(first: Intervals, second: Intervals) -> tuple[float, float]:
    """(length of the union of `first`, length of its part in the union of `second`), of intervals (start, end)."""
    first, second = list(first), list(second)
    whole = _length(first)
    return whole, whole + _length(second) - _length(first + second)


def _length(spans: Intervals) -> float:
    """Of their union."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def shares(compiled: jax.stages.Compiled, run: Callable[[], object]) -> dict[str, float]:
    """Scope -> its share of the time of all operations in a profile of two runs of `compiled`; largest first."""
    scopes = scopes_by_operation(compiled.as_text() or "")
    totals: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(2):
                jax.block_until_ready(run())
        for name, nanoseconds in operations(folder):
            if name in scopes and not name.startswith(("while", "call", "conditional")):  # those hold others
                totals[scopes[name]] += nanoseconds
    whole = sum(totals.values())
    largest_first = sorted(totals.items(), key=lambda item: -item[1])
    return {scope: time / whole for scope, time in largest_first}
