"""What benchmark_exchange.py counts and reads, without its flags."""

import numpy as np

from moejax.errors import UserError


def destinations(S: int, T: int) -> np.ndarray:
    """(S, T) i32: the device that each row goes to."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(S, T, p=rng.dirichlet(np.full(S, 8.0))) for _ in range(S)]).astype(np.int32)


def busiest(to: np.ndarray, D: int) -> int:
    """Bytes: the most that a device sends or receives off the chip."""
    S = to.shape[0]
    counts = np.stack([np.bincount(row, minlength=S) for row in to])
    np.fill_diagonal(counts, 0)
    return int(max(counts.sum(0).max(), counts.sum(1).max())) * D * 2


def shape_of(text: str) -> tuple[int, int]:
    try:
        T, D = (int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--shape={text}: need two numbers, T,D, as in --shape=16384,7168") from None
    return T, D
