"""The research LM: a pre-norm decoder whose FFNs are dense or sparse, scanned over layers or layer by layer.

Layers: `first_dense_layers` dense ones, then periods of `moe_every` blocks of which the last is sparse.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import layers, loss, sharding
from moejax.attention import Attention
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.moe import Mode, MoE


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). Returns x (B, L, D) and the losses of its MoE layer, if any."""

    config: ModelConfig
    sparse: bool
    mode: Mode
    cache_length: int = 0

    @nn.compact
    def __call__(self, x, tokens, positions, segment_ids):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        norm = functools.partial(layers.RMSNorm, config.norm_eps)
        with jax.named_scope("attention"):
            x = x + Attention(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim or config.width // config.num_heads,
                rope_theta=config.rope_theta,
                qk_norm=config.qk_norm,
                norm_eps=config.norm_eps,
                init_scale=config.init_scale,
                dtype=dtype,
                implementation=config.attention_implementation,
                name="attention",
            )(norm(name="attention_norm")(x), positions, segment_ids, self.cache_length)
        h = norm(name="ffn_norm")(x)
        if self.sparse:
            assert config.moe is not None
            moe = MoE(config.moe, config.moe.expert_width or config.ffn_width, self.mode, config.init_scale, name="moe")
            there = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
            y, losses = moe(h, tokens, there)
        else:
            y, losses = layers.GatedFFN(config.ffn_width, dtype, config.init_scale, name="ffn")(h), {}
        return sharding.constrain(x + y, "batch", "length", "activation"), losses


class Period(nn.Module):
    """`moe_every` blocks of which the last is sparse."""

    config: ModelConfig
    mode: Mode
    cache_length: int = 0

    @nn.compact
    def __call__(self, x, tokens, positions, segment_ids):
        every = self.config.moe_every
        losses: dict[str, jax.Array] = {}
        for i in range(every):
            block = Block(self.config, i == every - 1, self.mode, self.cache_length, name=f"block_{i}")
            x, losses = block(x, tokens, positions, segment_ids)
        return x, losses


class LM(nn.Module):
    """Decoder language model: tokens (B, L) int -> float32 logits (B, L, V).

    positions (B, L) default to 0 … L − 1; segment_ids (B, L), 0 where padded, or None: one segment, and no mask for
    attention, which on a GPU then takes half the time. With `return_losses=True` also the unweighted losses of the MoE
    layers, each the mean over layers: {} for a dense model. `mode` "train" uses noise (rng `routing`) and the training
    capacity, "evaluate" is deterministic, "generate" never drops. `cache_length` M > 0 reads and writes keys and values
    in the collection `cache`. `logits_at` (B,) int asks for the logits (B, 1, V) of one place of each row alone;
    `targets` (B, L) int and `mask` (B, L) bool, in place of logits, for Σ −log p(target) over unmasked targets, f32,
    with no more logits at a time than `loss` allows. Layers are stacked in what `init` makes; `apply` takes them so, in
    a loop, and as `arranged` gives them, one after another.
    """

    config: ModelConfig

    @property
    def param_dtype(self) -> str:
        """Of parameters in training; `init` makes layers in it and the rest in float32, and `apply` takes any."""
        return self.config.param_dtype

    @nn.compact
    def __call__(
        self,
        tokens,
        positions=None,
        segment_ids=None,
        return_losses=False,
        mode: Mode = "evaluate",
        cache_length=0,
        logits_at=None,
        targets=None,
        mask=None,
    ):
        config = self.config
        if config.vocab_size is None:
            raise UserError("model.vocab_size is None: give it, or take it from the tokenizer")
        dtype = jnp.dtype(config.dtype)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        embedding = layers.Embedding(config.vocab_size, config.width, dtype, name="embedding")
        x = embedding(tokens)
        inputs = (tokens, positions, segment_ids)
        losses: dict[str, jax.Array] = {}
        for name, count, sparse in stacks(config):
            block, kind = (Period, (config,)) if sparse and config.moe_every > 1 else (Block, (config, sparse))
            x, losses = self._stack(block, name, count)(*kind, mode, cache_length, name=name)(x, *inputs)
        x = layers.RMSNorm(config.norm_eps, name="final_norm")(x)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        if config.tie_embeddings:
            kernel = embedding.unembedding()
        else:
            init, shape = layers.fan_in_init(0, 1, config.init_scale), (config.width, config.vocab_size)
            kernel = layers.parameter(self, "unembedding", init, shape, ("embed", "vocab"))
        if targets is not None:
            out = loss.of_hidden(x, kernel, targets, mask)
        else:
            with jax.named_scope("head"):
                out = layers.linear(x, kernel, jnp.float32)
        if return_losses:
            return out, jax.tree.map(jnp.mean, losses)
        return out

    def _stack(self, block, name: str, length: int):
        """`block` repeated `length` times, rematerialised as the config asks: a scan, unrolled where the parameters of
        the stack `name` are arranged layer by layer."""
        policies = {"full": None, "dots": _keep_products}
        apart = layer_name(0) in self.variables.get("params", {}).get(name, {})
        if self.config.remat != "none":
            # A scan's body is compiled by itself: common subexpressions can't undo the rematerialisation.
            block = nn.remat(block, policy=policies[self.config.remat], prevent_cse=apart)
        if self.is_initializing():
            # All layers would be held as float32 at once.
            narrow = functools.partial(jax.tree.map, lambda p: p.astype(self.config.param_dtype))
            block = nn.map_variables(block, "params", trans_out_fn=narrow, init=True, mutable=True)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "router_state": 0, "intermediates": 0, "cache": 0},
            split_rngs={"params": True, "routing": True},
            in_axes=nn.broadcast,
            length=length,
            unroll=length if apart else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # Traced and lowered as one layer. A slice of what is stacked here is its piece, and so is a gradient's: in the
        # compiled program no stack is left.
        return nn.map_variables(stack, ("params", "router_state"), _together) if apart else stack

    def arranged(self, tree: dict[str, Any], take: Callable[[Any, int], Any] = lambda a, i: a[i]) -> dict[str, Any]:
        """A collection of `init`'s as a training step keeps it: as it is for a scan; else with `layer_0`, `layer_1`, …
        in place of each stack, a block or a period each.

        One array a layer: a gradient then needs no room before its layer's activations have gone, and no kernel cuts a
        layer's weights out of a stack. take(leaf, i) is layer i of a stacked leaf.
        """
        return tree if self.config.scan_layers else layer_by_layer(self.config, tree, take)

    def rearranged(self, tree: dict[str, Any]) -> dict[str, Any]:
        """What `arranged` gives, of a collection that is arranged the other way."""
        if not self.config.scan_layers:
            return self.arranged(tree)
        names = [name for name, _, _ in stacks(self.config) if name in tree]
        return tree | _together({name: tree[name] for name in names})


def stacks(config: ModelConfig) -> list[tuple[str, int, bool]]:
    """(name, length, whether sparse) of the stacks that `init` makes, in their order."""
    dense, periods = layer_plan(config)
    found = [("dense_layers" if periods else "layers", dense, False), ("layers", periods, True)]
    return [stack for stack in found if stack[1]]


def layer_name(i: int) -> str:
    return f"layer_{i}"


def layer_by_layer(config: ModelConfig, tree: dict[str, Any], take: Callable[[Any, int], Any]) -> dict[str, Any]:
    """`LM.arranged` for layers one by one."""
    found = dict(tree)
    for name, count, _ in stacks(config):
        if name in tree:
            found[name] = {
                layer_name(i): jax.tree.map(lambda leaf, i=i: take(leaf, i), tree[name]) for i in range(count)
            }
    return found


def _together(collections: dict[str, Any]) -> dict[str, Any]:
    """Collections of layers one by one, stacked."""

    def stacked(layers):
        if not layers:
            return layers
        return jax.tree.map(lambda *pieces: jnp.stack(pieces), *(layers[layer_name(i)] for i in range(len(layers))))

    return {name: stacked(layers) for name, layers in collections.items()}


def _keep_products(primitive, *inputs, **parameters) -> Any:
    """A `jax.checkpoint` policy: keep what products, attention, routing and experts give, compute the rest again."""
    policies = jax.checkpoint_policies
    if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, with the sums that its gradient needs
        return True
    either = policies.save_from_both_policies(
        policies.checkpoint_dots_with_no_batch_dims, policies.save_only_these_names("attention", "experts", "routing")
    )
    return either(primitive, *inputs, **parameters)


def layer_plan(config: ModelConfig) -> tuple[int, int]:
    """(dense layers at the start, periods of moe_every layers after them); UserError where they don't fit."""
    if config.moe is None:
        return config.num_layers, 0
    sparse = config.num_layers - config.first_dense_layers
    if sparse <= 0 or sparse % config.moe_every:
        raise UserError(
            f"model.num_layers={config.num_layers} less first_dense_layers={config.first_dense_layers} must be a "
            f"positive multiple of moe_every={config.moe_every}"
        )
    return config.first_dense_layers, sparse // config.moe_every
