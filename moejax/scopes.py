"""Where a compiled program's time goes, by the named scopes of its operations."""

import collections
import glob
import re
import tempfile
from collections.abc import Callable

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
