"""What the step benchmark reads from a compiled program: which scope each operation counts for."""

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark_step
from experiments.configs import fine_grained_aux_free
from moejax import config as configs
from moejax import config_checks


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(train_step)/jvp(LM)/layers/moe/dispatch/gather", "dispatch"),
        ("jit(train_step)/transpose(jvp(LM))/layers/moe/experts/experts/dot_general", "experts"),
        ("jit(train_step)/jvp(LM)/layers/moe/router/router/plan/sort", "router"),
        ("jit(train_step)/jvp(LM)/head/loss/exp", "loss"),  # the innermost counts
        ("jit(train_step)/jvp(LM)/layers/ffn_norm/rsqrt", "other"),
    ],
)
def test_the_innermost_named_scope_counts(path, scope):
    assert benchmark_step.scope_of(path) == scope


def test_operations_of_a_compiled_program_have_scopes():
    def f(x):
        with jax.named_scope("attention"):
            y = x @ x
        with jax.named_scope("optimizer"):
            return y, jnp.sort(x, axis=0)

    x = jnp.ones((64, 64))
    found = benchmark_step.scopes_by_operation(jax.jit(f).lower(x).compile().as_text() or "")
    assert {"attention", "optimizer"} <= set(found.values())
    assert {scope for name, scope in found.items() if "dot" in name} == {"attention"}


def test_forced_balance_keeps_all_but_the_router():
    config = configs.settle(configs.from_config_dict(fine_grained_aux_free.get_config()))
    changed = benchmark_step.forced(config)
    before, after = config.model.moe, changed.model.moe
    assert before is not None
    assert after is not None
    assert after.router == "moejax.routing:round_robin"
    assert (after.num_experts, after.experts_per_token) == (before.num_experts, before.experts_per_token)
    config_checks.check(changed)  # raises where the router takes no such options
