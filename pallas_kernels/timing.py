"""Timing as every benchmark here does it: rounds in which each thing runs in turn, and the median."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def rounds(
    runs: Mapping[Any, Callable[[], object]],
    repeats: int = 5,
    launches: int | Mapping[Any, int] = 1,
    elsewhere: Mapping[Any, Callable[[], float]] | None = None,
) -> dict[Any, tuple[float, float, float]]:
    """name -> (median, least, most) microseconds of one call, after two untimed ones.

    Rounds are interleaved, so that a slow minute of the machine hits all alike; `launches` calls are timed together, of
    all or by name.
    What runs in another process has its turn in each round too: `elsewhere` gives its own microseconds of one call.
    Each turn then begins with an untimed call, since a GPU may take its time to change from one process to another.
    """
    elsewhere = elsewhere or {}
    times: dict[Any, list[float]] = {name: [] for name in (*runs, *elsewhere)}
    for run in runs.values():
        for _ in range(2):  # one at a time: a training step donates what it returned before
            jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            if elsewhere:
                jax.block_until_ready(run())
            together = launches if isinstance(launches, int) else launches[name]
            start = time.perf_counter()
            for _ in range(together):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / together * 1e6)
        for name, microseconds in elsewhere.items():
            times[name].append(microseconds())
    return {name: (statistics.median(values), min(values), max(values)) for name, values in times.items()}
