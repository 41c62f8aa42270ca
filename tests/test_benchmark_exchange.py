"""What experiments/benchmark_exchange.py counts; its times need GPUs."""

import numpy as np
import pytest

from experiments import exchanged_rows
from moejax.errors import UserError


def test_bytes_of_the_busiest_device():
    """Of three rows of device 0 three go to device 1, of device 1's one goes to device 0: 3 rows · 4 columns · 2 B. Of
    three devices that all send to device 2 it gets 2 · 2 rows of others, and its own two stay: 4 · 4 · 2 B."""
    assert exchanged_rows.busiest(np.array([[1, 1, 1], [0, 1, 1]]), 4) == 24
    assert exchanged_rows.busiest(np.full((3, 2), 2), 4) == 32


def test_every_row_has_a_destination():
    to = exchanged_rows.destinations(4, 1000)
    assert to.shape == (4, 1000) and to.dtype == np.int32
    counts = np.stack([np.bincount(row, minlength=4) for row in to])
    assert counts.shape == (4, 4) and (counts > 0).all()
    assert len(np.unique(counts)) > 8  # unequal shares


def test_a_shape_that_is_none_is_one_line():
    assert exchanged_rows.shape_of("16,128") == (16, 128)
    for text in ("16", "a,b", "1,2,3"):
        with pytest.raises(UserError, match=f"--shape={text}: need two numbers, T,D"):
            exchanged_rows.shape_of(text)
