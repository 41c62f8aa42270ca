"""The named shapes that benchmarks and tests share, and the ways rows fall on experts."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """T tokens, each for K of E experts of D × F; `local`: how many of the experts are on this device (default all)."""

    T: int
    E: int
    K: int
    D: int
    F: int
    local: int = 0

    @property
    def experts(self) -> int:
        return self.local or self.E

    @property
    def rows(self) -> int:
        return self.T * self.K * self.experts // self.E

    def product(self, op: str) -> tuple[int, int, int, int]:
        """(M, E, K, N) of the product `up`, gate and up at once, or `down`."""
        return self.rows, self.experts, *((self.D, 2 * self.F) if op == "up" else (self.F, self.D))


TRAINING = {
    "mixtral-8x7b": Shape(8192, 8, 2, 4096, 14336),
    "olmoe-1b-7b": Shape(16384, 64, 8, 2048, 1024),
    "deepseekmoe-16b": Shape(16384, 64, 6, 2048, 1408),
    "qwen3-30b-a3b": Shape(16384, 128, 8, 2048, 768),
    "deepseek-v3-ep8": Shape(16384, 256, 8, 7168, 2048, local=32),
    "kimi-k2-ep8": Shape(16384, 384, 8, 7168, 2048, local=48),
    "switch-base": Shape(32768, 128, 1, 768, 3072),
}
DECODE = {
    f"{name}-decode-{T}": dataclasses.replace(TRAINING[name], T=T)
    for name in ("mixtral-8x7b", "olmoe-1b-7b", "deepseekmoe-16b", "qwen3-30b-a3b")
    for T in (1, 8, 64, 256)
} | {
    f"{name}-decode-{T}": dataclasses.replace(TRAINING[name], T=8 * T)  # T on each of eight devices
    for name in ("deepseek-v3-ep8", "kimi-k2-ep8")
    for T in (1, 8, 64, 256)
}

NAMED = TRAINING | DECODE
_GROUPS = {"training": TRAINING, "decode": DECODE}
NAMES = (*_GROUPS, *NAMED)  # what `named` takes


def named(names: Iterable[str]) -> dict[str, Shape]:
    """Those of NAMED that `names` hold, "training" and "decode" for all of their kind."""
    wanted = {each for name in names for each in _GROUPS.get(name, (name,))}
    return {name: shape for name, shape in NAMED.items() if name in wanted}


def listed(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: names of `known`, with commas between; an unknown one is an error of one line."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(known)}")
        return names

    return parse


SIZES = ("uniform", "dirichlet", "zipf", "one_hot", "quarter_empty")


def group_sizes(kind: str, M: int, E: int, seed: int = 0) -> np.ndarray:
    """Sizes (E,) i32 that sum to M: equal, Dirichlet(4), Zipf(1.2) in random order, all in one, every fourth empty.

    Each is within one row of its share. Few rows (M < 8 E) of Dirichlet(4) are drawn instead: independent tokens.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "uniform": lambda: np.ones(E),
        "dirichlet": lambda: rng.dirichlet(np.full(E, 4.0)),
        "zipf": lambda: rng.permutation(1 / np.arange(1, E + 1) ** 1.2),
        "one_hot": lambda: np.eye(E)[E // 2],
        "quarter_empty": lambda: (np.arange(E) % 4 != 1).astype(float),
    }[kind]()
    if M < 8 * E and kind == "dirichlet":
        return rng.multinomial(M, weights / weights.sum()).astype(np.int32)
    shares = M * weights / weights.sum()
    sizes = np.floor(shares).astype(np.int32)
    # fewer rows are left than there are shares with a fraction: none falls on an empty group
    largest = np.argsort(sizes - shares, kind="stable")[: M - sizes.sum()]
    sizes[largest] += 1
    return sizes
