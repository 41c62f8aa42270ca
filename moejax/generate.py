"""Sampling from a model with a key-value cache. Nothing is ever dropped here: mode "generate"."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

CACHE_STEP = 128  # caches grow in steps of this many positions, so that few lengths are compiled


def sample(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Next tokens (B,) i32 from float32 logits (B, V).

    temperature 0 takes the largest. top_p < 1 keeps the smallest set of tokens whose probability reaches top_p
    (nucleus sampling, Holtzman 2020), always at least the likeliest.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "temperature", "top_p"), donate_argnames="cache")
def _advance(model, variables, cache, tokens, positions, lengths, key, *, cache_length, temperature, top_p):
    """One pass over tokens (B, L): the next token of each row, after its last of `lengths` (B,), and the cache."""
    real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    logits, updated = model.apply(
        variables | cache,
        tokens,
        positions,
        real.astype(jnp.int32),
        mode="generate",
        cache_length=cache_length,
        logits_at=lengths - 1,  # the vocabulary is as wide as a layer: not for every token of a prompt
        mutable=["cache"],
    )
    return sample(logits[:, 0], key, temperature, top_p), {"cache": updated["cache"]}


def generate(
    model,
    variables: dict,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """The new token ids of each prompt, at most `max_new_tokens`, ending after `eos_id` (or any of several) if given.

    `prompts` are lists of token ids, of any lengths but not empty. `on_token` is called with each step's tokens (B,),
    for streaming. Raises UserError for an empty prompt or options out of range.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UserError("an empty prompt was given; give at least one token to continue from")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: need at least 1 new token, "
            "temperature ≥ 0 and 0 < top_p ≤ 1"
        )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache_length = -(-(tokens.shape[1] + max_new_tokens) // CACHE_STEP) * CACHE_STEP
    variables = jax.device_put(variables)  # once, not with every token; arrays that are on a device stay there
    advance = functools.partial(
        _advance, model, variables, cache_length=cache_length, temperature=float(temperature), top_p=float(top_p)
    )
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    key = jax.random.key(seed)
    new, cache = advance({}, tokens, positions, lengths, jax.random.fold_in(key, 0))
    results: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), bool)
    ones = np.ones_like(lengths)
    ends = {eos_id} if isinstance(eos_id, int | np.integer) else set(eos_id or ())
    for step in range(max_new_tokens):
        following = None
        if step < max_new_tokens - 1:  # begun before this step's tokens are waited for, so that the device never idles
            positions = (lengths + step)[:, None]
            following, cache = advance(cache, new[:, None], positions, ones, jax.random.fold_in(key, step + 1))
        fetched = np.asarray(new)
        if on_token is not None:
            on_token(fetched)
        for row, token in enumerate(fetched):
            if not finished[row]:
                results[row].append(int(token))
                finished[row] = int(token) in ends
        if following is None or finished.all():
            break
        new = following
    return results
