"""What a GPU does for one or two tokens, run here: selection by rank and the mixture without sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import dispatch, expert_parallel, few_tokens, generate, routing, routing_select

E, D, F, K = 8, 16, 12, 3


def scores(seed, ties):
    found = np.random.default_rng(seed).standard_normal((4, 2, E)).astype(np.float32)
    found = np.round(found) if ties else found
    found[0, 0, :5] = -np.inf
    found[1, 1] = [0.0, -0.0] * 4  # equal, whatever their bits
    return jnp.asarray(found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, K, E])
def test_selection_by_rank_is_that_in_rounds(k, ties):
    for mine, rounds in zip(
        routing_select._by_rank(scores(k, ties), k), routing_select._select(scores(k, ties), k), strict=True
    ):
        np.testing.assert_array_equal(mine, rounds)


def test_selection_by_rank_gives_distinct_indices_for_nan():
    rows = scores(0, True).at[0, 1].set(jnp.nan).at[2, 0, 3].set(jnp.nan)
    for row in np.asarray(routing_select._by_rank(rows, E)[1]).reshape(-1, E):
        assert sorted(row) == list(range(E))


def test_the_mixture_is_the_dense_one_and_leaves_out_what_is_not_kept():
    rng = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    weights = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x, logits = (jnp.asarray(rng.standard_normal((2, 1, n)), jnp.float32) for n in (D, E))
    mask = jnp.array([[True], [False]])  # the second token is padding
    decision = jax.vmap(lambda logits, mask: routing.top_k(logits, experts_per_token=K, mask=mask))(logits, mask)
    wanted = expert_parallel.dense_mixture(x, decision, weights)
    found = few_tokens.mixture(x[:, 0], dispatch.flatten(decision, 2), weights)
    np.testing.assert_allclose(found, wanted[:, 0], rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert not np.any(found[1]) and np.any(found[0])


def test_it_is_chosen_on_a_gpu_for_few_choices_alone(monkeypatch):
    decision = routing.top_k(jnp.zeros((2, E)), experts_per_token=K, mask=jnp.ones(2, bool))
    more = routing.top_k(jnp.zeros((6, E)), experts_per_token=K, mask=jnp.ones(6, bool))  # 18 choices
    assert not few_tokens.suits(decision, None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert few_tokens.suits(decision, None)
    assert not few_tokens.suits(more, None) and not few_tokens.suits(decision, "reference")


def test_the_largest_logit_in_two_stages():
    logits = np.random.default_rng(0).integers(-9, 9, (5, 150)).astype(np.float32)  # no multiple of a piece, and ties
    logits[0] = -np.inf
    np.testing.assert_array_equal(generate._argmax(jnp.asarray(logits)), np.argmax(logits, axis=1))
