"""Parameters, FLOPs and bytes of a model, from its config alone.

A matrix product of (1, n) with (n, m) counts 2·n·m FLOPs. Norms, softmax, rotary positions and gathers count nothing.
"""

import dataclasses
from collections.abc import Mapping

from moejax import dotted, routing
from moejax.config import Config, ModelConfig, MoEConfig
from moejax.errors import UserError
from moejax.models.lm import layer_plan
from moejax.moe import abstract_decision, reads_logits, router_inputs


@dataclasses.dataclass(frozen=True)
class Account:
    """Counts of one model; FLOPs are forward, per token, at one sequence length.

    total_params, active_params: all parameters, and those a token uses (its experts, shared experts, router and all
      that is dense; the mean, rounded, where experts choose tokens).
    embedding_params: the input table's part of both; 0 where it is tied, as it is then a matmul.
    expert_params: routed and shared experts, all layers; the dense FFNs' where there are none.
    active_flops_per_token: 2 × the matmul weights that a token uses + attention scores, without the router.
    router_flops_per_token: the router's products, listed apart.
    """

    total_params: int
    active_params: int
    embedding_params: int
    expert_params: int
    active_flops_per_token: float
    router_flops_per_token: float

    @property
    def train_flops_per_token(self) -> float:
        """Forward and backward: three times the forward products, the router's included."""
        return 3 * (self.active_flops_per_token + self.router_flops_per_token)


def account(model: ModelConfig, sequence_length: int) -> Account:
    """Counts for `model` (vocab_size given) on sequences of L tokens.

    Attention scores: a token at position i attends i + 1 keys, (L + 1) / 2 in the mean of a full causal sequence, with
    2·hd FLOPs for each query-key product and as many for the value: 2 · 2 · H · hd · (L + 1) / 2 per layer.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is None; take it from the tokenizer first")
    width, head_dim = model.width, model.head_dim or model.width // model.num_heads
    heads, layers = model.num_heads * head_dim, model.num_layers
    _, sparse = layer_plan(model)  # one sparse layer in each period
    dense = layers - sparse

    projections = layers * (2 * width * heads + 2 * width * model.num_kv_heads * head_dim)
    norms = layers * (2 * width + (2 * head_dim if model.qk_norm else 0)) + width
    table = model.vocab_size * width
    dense_ffn = dense * 3 * width * model.ffn_width
    all_experts = router = 0
    used_experts = 0.0
    if model.moe is not None:
        expert = 3 * width * (model.moe.expert_width or model.ffn_width)
        all_experts = sparse * (model.moe.num_experts + model.moe.shared_experts) * expert
        used_experts = sparse * (experts_used(model.moe, sequence_length) + model.moe.shared_experts) * expert
        router = sparse * router_kernels(model.moe) * width * model.moe.num_experts
    common = projections + norms + dense_ffn + router + table * (1 if model.tie_embeddings else 2)
    scores = layers * 2 * 2 * heads * (sequence_length + 1) / 2
    return Account(
        total_params=common + all_experts,
        active_params=common + round(used_experts),
        embedding_params=0 if model.tie_embeddings else table,
        expert_params=all_experts if sparse else dense_ffn,
        active_flops_per_token=2 * (projections + dense_ffn + used_experts + table) + scores,
        router_flops_per_token=2 * router,
    )


def experts_used(moe: MoEConfig, sequence_length: int) -> float:
    """Routed experts per token: K; where experts choose tokens, the mean over a sequence that they fill, E · C / L."""
    decision = abstract_decision(moe, sequence_length)
    if isinstance(decision, routing.ExpertChoice):
        num_experts, rows = decision.tokens.shape[-2:]
        return num_experts * rows / sequence_length
    return moe.experts_per_token


def router_kernels(moe: MoEConfig) -> int:
    """Matrices (D, E) in the router: none that reads no logits, two for one that learns the size of its noise too."""
    router = dotted.resolve(moe.router)
    return int(reads_logits(router)) + ("noise_logits" in router_inputs(router))


def describe(model: ModelConfig, sequence_length: int) -> str:
    """One line for the log."""
    counts = account(model, sequence_length)
    return (
        f"{counts.total_params:,} parameters, {counts.active_params:,} active "
        f"({counts.active_params - counts.embedding_params:,} without the input embedding), "
        f"{counts.active_flops_per_token / 1e6:,.2f} MFLOPs per token forward "
        f"(+ {counts.router_flops_per_token / 1e6:,.2f} router)"
    )


def equal_flops_check(
    arms: Mapping[str, Config], classes: Mapping[str, tuple[str, ...]] | None = None, tolerance: float = 0.02
) -> dict[str, Account]:
    """The arms' accounts, if inside each class active FLOPs per token differ by at most `tolerance` of the least.

    classes: class -> names of its arms; None: all arms form one. The routers' FLOPs are left out.

    Raises:
      UserError: arms of one class differ by more.
    """
    counts = {name: account(arm.model, arm.data.sequence_length) for name, arm in arms.items()}
    for label, names in (classes or {"all arms": tuple(arms)}).items():
        flops = {name: counts[name].active_flops_per_token for name in names}
        low, high = min(flops, key=flops.__getitem__), max(flops, key=flops.__getitem__)
        if flops[high] > (1 + tolerance) * flops[low]:
            raise UserError(
                f"arms differ in active FLOPs per token ({label}): {low} {flops[low]:.4g}, {high} {flops[high]:.4g}, "
                f"{flops[high] / flops[low] - 1:.1%} more where {tolerance:.0%} is allowed; make them equal, "
                "or declare config.classes"
            )
    return counts
