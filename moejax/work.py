"""What experts do with the rows that a device has, by whichever way they came.

Letters: T tokens, D model width, R expert rows.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from moejax import dispatch, experts


@dataclasses.dataclass(frozen=True)
class Work:
    """What experts do with rows: arguments of `expert_parallel.mixture_and_overflow`, and of `group_metadata`."""

    implementation: str | None = None
    apply: Callable | None = None
    spare: int = 0
    tail: bool = True

    def experts(self, rows, weights, group_sizes, scale=None):
        """(R, D) sorted by expert -> (R, D)."""
        with jax.named_scope("experts"):
            if self.apply is not None:
                return self.apply(rows, weights, group_sizes)
            gate, up, down = (weights[name] for name in ("gate", "up", "down"))
            return experts.gated_ffn(
                rows, gate, up, down, group_sizes,
                scale=scale, implementation=self.implementation, spare=self.spare, tail=self.tail,
            )  # fmt: skip

    def gates_inside(self, rows, weights):
        """Whether experts' own kernel can apply the gates: its results needn't then be kept for the gates' gradient."""
        return self.apply is None and experts.takes_scale(rows, weights["gate"], self.implementation)


def sorted_mixture(tokens, decision, weights, num_experts, work, dtype):
    """Σ_k weight · expert(token) for tokens (T, D) and a flat decision over `weights`' experts; (T, D) in `dtype`."""
    with jax.named_scope("dispatch"):
        plan = dispatch.plan(decision, num_experts)
        rows = dispatch.gather(tokens, plan)
    if plan.slot is not None and work.gates_inside(rows, weights):
        rows = checkpoint_name(rows, "experts")  # kept in the room of the results that needn't be
        rows = work.experts(rows, weights, plan.group_sizes, plan.weight)
        plan = dataclasses.replace(plan, weight=None)
    else:
        rows = work.experts(rows, weights, plan.group_sizes)
    with jax.named_scope("combine"):
        return dispatch.combine(rows.astype(dtype), plan, tokens.shape[0])
