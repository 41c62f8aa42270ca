"""Timing as every benchmark here does it: rounds in which each thing runs in turn, and the median."""

import random
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
    settle: float = 0.0,
) -> dict[Any, tuple[float, float, float]]:
    """name -> (median, least, most) microseconds of one call, after two untimed ones.

    Rounds are interleaved, so that a slow minute of the machine hits all alike, each in an order of its own, the same
    in every run. `launches` calls are timed together, of all or by name. What runs in another process has its turn in
    each round too: `elsewhere` gives its own microseconds of one call. settle: seconds of untimed calls before each
    turn, since a chip at its power limit takes its clocks from what ran before.
    """
    elsewhere = elsewhere or {}
    times: dict[Any, list[float]] = {name: [] for name in (*runs, *elsewhere)}
    for run in runs.values():
        for _ in range(2):  # one at a time: a training step donates what it returned before
            jax.block_until_ready(run())
    shuffled = random.Random(0)
    for _ in range(repeats):
        for name in shuffled.sample(list(times), len(times)):
            if name in elsewhere:
                times[name].append(elsewhere[name]())
                continue
            together = launches if isinstance(launches, int) else launches[name]
            before = time.perf_counter()
            while time.perf_counter() - before < settle:
                _call(runs[name], together)
            times[name].append(_call(runs[name], together))
    return {name: (statistics.median(values), min(values), max(values)) for name, values in times.items()}


def _call(run: Callable[[], object], launches: int) -> float:
    """Microseconds of one of so many calls."""
    start = time.perf_counter()
    for _ in range(launches):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / launches * 1e6
