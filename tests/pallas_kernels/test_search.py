"""count_below against numpy's searchsorted."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.search import count_below


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-5, 5), min_size=13, max_size=13), st.integers(1, 13))
def test_count_below(numbers, n):
    ordered = np.sort(np.array(numbers[:n], np.int32))
    values = np.arange(-7, 8, dtype=np.int32)
    got = jax.jit(count_below)(jnp.asarray(ordered), jnp.asarray(values))
    np.testing.assert_array_equal(got, np.searchsorted(ordered, values, side="left"))
