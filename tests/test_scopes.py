"""Which scope each operation of a compiled program counts for, and that shares of a profile add up."""

import jax
import jax.numpy as jnp
import pytest

from moejax import scopes


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(train_step)/jvp(LM)/layers/moe/dispatch/gather", "dispatch"),
        ("jit(train_step)/transpose(jvp(LM))/layers/moe/experts/experts/dot_general", "experts"),
        ("jit(train_step)/jvp(LM)/layers/moe/router/router/plan/sort", "router"),
        ("jit(train_step)/jvp(LM)/head/loss/exp", "loss"),  # the innermost counts
        ("jit(train_step)/jvp(LM)/layers/moe/shared/dot_general", "shared"),
        ("jit(train_step)/jvp(LM)/layers/ffn_norm/rsqrt", "other"),
    ],
)
def test_the_innermost_named_scope_counts(path, scope):
    assert scopes.scope_of(path) == scope


def test_operations_of_a_compiled_program_have_scopes():
    def f(x):
        with jax.named_scope("attention"):
            y = x @ x
        with jax.named_scope("optimizer"):
            return y, jnp.sort(x, axis=0)

    x = jnp.ones((64, 64))
    found = scopes.scopes_by_operation(jax.jit(f).lower(x).compile().as_text() or "")
    assert {"attention", "optimizer"} <= set(found.values())
    assert {scope for name, scope in found.items() if "dot" in name} == {"attention"}


def test_shares_of_a_profile_add_up():
    def f(x):
        with jax.named_scope("experts"):
            return x @ x

    x = jnp.ones((256, 256))
    compiled = jax.jit(f).lower(x).compile()
    found = scopes.shares(compiled, lambda: compiled(x))
    assert found["experts"] > 0.5
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([], [(0, 5)], (0, 0)),
        ([(0, 10)], [], (10, 0)),
        ([(0, 10)], [(10, 20)], (10, 0)),
        ([(5, 15), (0, 10)], [(12, 30)], (15, 3)),  # 0 to 15, of which 12 to 15
        ([(0, 4), (6, 8), (6, 8)], [(3, 7), (7, 9), (1, 2)], (6, 4)),  # in it 1 to 2, 3 to 4 and 6 to 8
        ([(2, 3)], [(0, 10), (1, 4)], (1, 1)),
    ],
)
def test_how_long_one_kind_of_kernel_ran_while_another_did(first, second, wanted):
    assert scopes.overlap(first, second) == wanted
