"""The sparse FFN as a Flax module: router kernel, expert weights, shared experts, selection bias.

A thin skin: the decision is `decide`, rows move and are computed in `expert_parallel.mixture`, losses are
`balance`'s and statistics `routing_stats`'. Returns (y, losses) and sows one dict of tallies, `routing`.
"""

import dataclasses
import functools
import inspect
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moejax import balance, expert_parallel, layers, routing, routing_stats
from moejax.config import MoEConfig

Mode = Literal["train", "evaluate", "generate"]


def router_inputs(router) -> set[str]:
    """The optional inputs that a router takes: of tokens, mask, bias, key, noise_logits (all but the last by **)."""
    parameters = inspect.signature(router).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {"tokens", "mask", "bias", "key"} | (parameters.keys() & {"noise_logits"})
    return set(parameters.keys() & {"tokens", "mask", "bias", "key", "noise_logits"})


def reads_logits(router) -> bool:
    """Whether the router has a kernel: not where its first parameter is called `_logits`, for it reads their shape."""
    return next(iter(inspect.signature(router).parameters)) != "_logits"


@functools.lru_cache(maxsize=256)
def abstract_decision(config: MoEConfig, tokens: int = 16) -> routing.Routing | routing.ExpertChoice:
    """The decision in a group of so many tokens as shapes and dtypes alone: traced, nothing runs.

    So any router tells what it returns, a user's own too. Raises what the router raises on these shapes and options.
    """

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((1, tokens, *shape), dtype)

    def trace(logits, noise_logits, ids, mask, bias):
        return decide(config, logits, noise_logits=noise_logits, tokens=ids, mask=mask, bias=bias)

    experts = config.num_experts
    logits, bias = array(jnp.float32, experts), jax.ShapeDtypeStruct((experts,), jnp.float32)
    return jax.eval_shape(trace, logits, logits, array(jnp.int32), array(jnp.bool_), bias)


def sample_decision(config: MoEConfig, tokens: int = 256) -> routing.Routing | routing.ExpertChoice:
    """The decision of one group of so many tokens, all of them real, by normally distributed logits and no bias; no
    capacity, which would hide some of its choices."""
    experts, config = config.num_experts, dataclasses.replace(config, capacity_factor=None)
    first, second = (jax.random.normal(jax.random.key(i), (1, tokens, experts)) for i in range(2))
    ids, mask = jnp.arange(tokens, dtype=jnp.int32)[None], jnp.ones((1, tokens), bool)
    sampled = jax.jit(functools.partial(decide, config))
    return sampled(first, noise_logits=second, tokens=ids, mask=mask, bias=jnp.zeros((experts,)))


def decide(config: MoEConfig, logits, *, tokens, mask, bias=None, key=None, noise_logits=None, mode: Mode = "train"):
    """The router's decision in every routing group, capacity included.

    logits (N, T/N, E) f32 in N groups; tokens, mask (N, T/N); bias (E,); noise_logits as logits. Returns a Routing or
    ExpertChoice with a leading axis N. In mode "generate" nothing is dropped, and expert choice, which would look at
    other tokens, becomes each token's top K by score.
    """
    router = routing.resolve(config.router)
    wanted = router_inputs(router)
    groups, length, num_experts = logits.shape
    mapped = {"tokens": tokens, "mask": mask, "noise_logits": noise_logits}
    mapped["key"] = None if key is None else jax.random.split(key, groups)
    mapped = {name: value for name, value in mapped.items() if name in wanted}
    fixed = {"bias": bias} if "bias" in wanted else {}
    factor = config.capacity_factor
    if mode == "evaluate" and config.eval_capacity_factor is not None:
        factor = config.eval_capacity_factor

    def one_group(logits, mask, inputs):
        per_token = config.experts_per_token
        decision = router(logits, experts_per_token=per_token, **inputs, **fixed, **config.router_options)
        if isinstance(decision, routing.ExpertChoice):
            if mode != "generate":
                return decision
            # Gates as in training: the scores themselves.
            decision = routing.top_k(logits, experts_per_token=per_token, mask=mask, renormalize=False)
        elif factor is not None and mode != "generate":
            decision = routing.with_capacity(decision, routing.capacity(factor, length, per_token, num_experts))
        return decision

    return jax.vmap(one_group)(logits, mask, mapped)


class MoE(nn.Module):
    """Router and experts: x (B, L, D), token ids (B, L), mask (B, L) bool -> (y (B, L, D), unweighted losses).

    `hidden` is F. Parameters: router (D, E) unless the router reads no logits, gate and up (E, D, F), down (E, F, D),
    shared/…, and noise (D, E) for a router that takes `noise_logits`; `router_state/bias` (E,) for one that takes
    `bias`.
    """

    config: MoEConfig
    hidden: int
    mode: Mode = "evaluate"
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x, tokens, mask):
        config = self.config
        with jax.named_scope("router"):
            logits, decision = self._route(x, tokens, mask)
        weights = self._experts(x.shape[-1], x.dtype)
        overflow = None
        if config.dispatch == "dense":
            y = expert_parallel.dense_mixture(x, decision, weights)
        else:
            y, overflow = expert_parallel.mixture_and_overflow(
                x,
                decision,
                weights,
                num_experts=config.num_experts,
                implementation=config.implementation,
                way=config.exchange,
                factor=None if self.mode == "generate" else config.exchange_factor,
                chunks=1 if self.mode == "generate" else config.exchange_chunks,
            )
        if config.shared_experts:
            y += layers.GatedFFN(config.shared_experts * self.hidden, x.dtype, self.init_scale, name="shared")(x)
        return y, self._losses(logits, decision, mask, overflow)

    def _route(self, x, tokens, mask):
        """float32 logits (B, L, E) and the decision, its leading axis the routing group."""
        config = self.config
        router = routing.resolve(config.router)
        wanted = router_inputs(router)
        key = self.make_rng("routing") if self.mode == "train" else None
        inputs = x
        if config.input_jitter and key is not None:
            key, jitter = jax.random.split(key)
            low, high = 1 - config.input_jitter, 1 + config.input_jitter
            inputs = x.astype(jnp.float32) * jax.random.uniform(jitter, inputs.shape, jnp.float32, low, high)

        def score(name, init):
            shape, axes = (x.shape[-1], config.num_experts), ("embed", "router_experts")
            kernel = layers.parameter(self, name, init, shape, axes)
            return checkpoint_name(layers.scores(inputs, kernel), "routing")

        if reads_logits(router):
            logits = score("router", layers.fan_in_init(0, 1, self.init_scale))
        else:
            logits = jnp.zeros((*x.shape[:2], config.num_experts), jnp.float32)
        noise_logits = score("noise", nn.initializers.zeros) if "noise_logits" in wanted else None
        bias = None
        if "bias" in wanted:
            state = self.variable("router_state", "bias", jnp.zeros, (config.num_experts,), jnp.float32)
            bias = lax.stop_gradient(state.value)

        def grouped(a):
            return a if a is None or config.group == "sequence" else a.reshape(1, -1, *a.shape[2:])

        decision = decide(
            config,
            grouped(logits),
            tokens=grouped(tokens),
            mask=grouped(mask),
            bias=bias,
            key=key,
            noise_logits=grouped(noise_logits),
            mode=self.mode,
        )
        if isinstance(decision, routing.Routing):  # capacity is settled: back to one row per sequence
            decision = jax.tree.map(lambda a: a.reshape(*x.shape[:2], *a.shape[2:]), decision)
        return logits, jax.tree.map(lambda a: checkpoint_name(a, "routing"), decision)

    def _experts(self, width, dtype):
        num_experts, hidden = self.config.num_experts, self.hidden
        init = layers.fan_in_init(1, 2, self.init_scale, experts=(0,))
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        gate = layers.parameter(self, "gate", init, (num_experts, width, hidden), into)
        up = layers.parameter(self, "up", init, (num_experts, width, hidden), into)
        down = layers.parameter(self, "down", init, (num_experts, hidden, width), out)
        return {"gate": gate.astype(dtype), "up": up.astype(dtype), "down": down.astype(dtype)}

    def _losses(self, logits, decision, mask, overflow):
        """Unweighted losses over the global batch; sows the tallies.

        Expert choice is balanced by construction: its load-balance loss is 1 where every expert finds its C tokens.
        """
        config = self.config
        groups = mask if config.group == "sequence" or isinstance(decision, routing.Routing) else mask.reshape(1, -1)
        tallies = routing_stats.tallies(lax.stop_gradient(decision), groups, overflow)
        self.sow("intermediates", "routing", tallies, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        scores = decision.scores.reshape(logits.shape)
        losses = {"load_balance_loss": balance.load_balance_loss(scores, tallies["selected"], mask)}
        if reads_logits(routing.resolve(config.router)):
            losses["router_z_loss"] = balance.router_z_loss(logits, mask)
        if isinstance(decision, routing.Routing):
            chosen = routing.chosen(decision, mask)
            losses["sequence_balance_loss"] = balance.sequence_balance_loss(scores, decision.experts, chosen, mask)
        if config.importance_weight:
            losses["importance_loss"] = balance.importance_loss(scores, mask)
        if config.load_weight and self.mode == "train":
            noise = getattr(decision, "noise", None)
            losses["load_loss"] = balance.load_loss(logits, noise, config.experts_per_token, mask)
        return losses
