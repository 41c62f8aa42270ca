"""The expert block's benchmark: that it computes the block, and its arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_block
from pallas_kernels.timing import rounds


def test_rates_by_hand():
    # 6 · 10 tokens · 2 experts · 100 · 50 = 600000 operations; 2 µs forward; backward 9 - 3 = 6 µs for twice as many
    us = {"block forward": 2.0, "block training forward": 3.0, "block both": 9.0, "dense": 0.5}
    us |= {"products forward": 1.0, "products training forward": 2.0, "products both": 5.0}
    assert benchmark_block.rates((100, 50, 4, 2, 10), us) == pytest.approx(
        {
            "dense product": 1.2,
            "block forward": 0.3,
            "block training forward": 0.2,
            "block backward": 0.2,
            "products forward": 0.6,
            "products training forward": 0.3,
            "products backward": 0.4,
        }
    )
    # half a microsecond for the products; 10 tokens and 20 rows of 200 bytes, twice: 12 kB, half a one at 24 GB/s
    assert benchmark_block.by_dense_and_copy((100, 50, 4, 2, 10), 1.2, 24.0) == pytest.approx(0.6)


def test_cases_compute_the_block():
    runs = benchmark_block.cases(16, 8, 4, 2, 12)
    out = runs["block forward"]()
    assert out.shape == (12, 16)
    x, gate, up, down, plan, metadata = runs["block forward"].args
    # every token's row of each of its two experts, averaged: half of each
    rows = np.asarray(benchmark_block.products(x[plan.token], gate, up, down, plan, metadata), np.float32)
    want = np.zeros((12, 16), np.float32)
    np.add.at(want, np.asarray(plan.token), 0.5 * rows)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=0, atol=2e-2 * np.abs(want).max())
    trained, kept = runs["block training forward"]()
    np.testing.assert_array_equal(trained.astype(jnp.float32), out.astype(jnp.float32))
    # the rows, both pre-activations and the results; no copy of what was given
    assert kept and not {a.shape for a in kept} & {(4, 16, 8), (4, 8, 16), (12, 16)}
    again, *gradients = runs["block both"]()
    np.testing.assert_array_equal(again.astype(jnp.float32), out.astype(jnp.float32))
    assert [g.shape for g in gradients] == [(12, 16), (4, 16, 8), (4, 16, 8), (4, 8, 16)]
    assert all(jnp.isfinite(g.astype(jnp.float32)).all() for g in gradients)
    assert runs["dense"]().shape == (24, 24)  # of as many operations as all three products
    assert set(rounds(runs, repeats=1)) == set(runs)
