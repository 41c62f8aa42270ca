"""Sampling from a model with a key-value cache. Nothing is ever dropped here: mode "generate"."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.errors import UserError

CACHE_STEP = 128  # caches grow in steps of this many positions, so that few lengths are compiled
_PIECE = 64  # logits, of which the largest is taken first
AHEAD = 32  # tokens that the device makes before it is asked for them: the host then costs it nothing
STRIDE = 8  # the same on a GPU, whose loop is of this length: of an open one it asks the host before each token


def sample(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Next tokens (B,) i32 from float32 logits (B, V).

    temperature 0 takes the largest. top_p < 1 keeps the smallest set of tokens whose probability reaches top_p
    (nucleus sampling, Holtzman 2020), always at least the likeliest.
    """
    if temperature == 0:
        return _argmax(logits)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` of logits (B, V), the first of equals, in two stages: over all at once takes five times as long."""
    B, V = logits.shape
    rows = jnp.pad(logits, ((0, 0), (0, -V % _PIECE)), constant_values=-jnp.inf).reshape(B, -1, _PIECE)
    best = jnp.argmax(jnp.max(rows, axis=-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(rows, best[:, None, None], axis=1)[:, 0], axis=-1)
    return (best * _PIECE + within).astype(jnp.int32)


def _apply(model, variables, cache, tokens, positions, real, logits_at, cache_length):
    """float32 logits (B, V) at one place of each row of tokens (B, L), and the cache with all of them in it."""
    logits, updated = model.apply(
        variables | cache,
        tokens,
        positions,
        real.astype(jnp.int32),
        mode="generate",
        cache_length=cache_length,
        logits_at=logits_at,  # the vocabulary is as wide as a layer: not for every token of a prompt
        mutable=["cache"],
    )
    return logits[:, 0], {"cache": updated["cache"]}


_STATIC = ("model", "cache_length", "temperature", "top_p")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(model, variables, tokens, lengths, key, ends, *, cache_length, temperature, top_p):
    """The first new token (B,) after the prompts in tokens (B, L), and the state that `_decode` goes on from."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(place, tokens.shape)
    logits, cache = _apply(model, variables, {}, tokens, positions, place < lengths[:, None], lengths - 1, cache_length)
    token = sample(logits, jax.random.fold_in(key, 0), temperature, top_p)
    finished = jnp.any(token[:, None] == ends[None, :], axis=1)
    return token[:, None], (jnp.int32(1), cache, token, lengths, finished)


def _decode(model, variables, state, key, ends, count, *, stride, cache_length, temperature, top_p):
    """`count` more tokens (B, AHEAD), fewer where all rows have ended, and the state after them.

    With `stride` so many (B, stride), whatever has ended. state: the number of the next step, the cache, the last token
    (B,), its position (B,), and whether it or one before it ended its row (B,). The loop is the device's own: between
    two tokens it waits for no one.
    """

    def advance(state):
        step, cache, token, position, finished = state
        places = position[:, None]
        logits, cache = _apply(
            model, variables, cache, token[:, None], places, places >= 0, jnp.zeros_like(position), cache_length
        )
        token = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        finished |= jnp.any(token[:, None] == ends[None, :], axis=1)
        return (step + 1, cache, token, position + 1, finished), token

    if stride:
        state, new = lax.scan(lambda state, _: advance(state), state, length=stride)
        return new.T, state

    def unfinished(carry):
        made, (*_, finished), _ = carry
        return (made < count) & ~jnp.all(finished)

    def one_more(carry):
        made, state, new = carry
        state, token = advance(state)
        return made + 1, state, lax.dynamic_update_index_in_dim(new, token, made, axis=1)

    new = jnp.zeros((state[2].shape[0], AHEAD), jnp.int32)
    _, state, new = lax.while_loop(unfinished, one_more, (jnp.int32(0), state, new))
    return new, state


def _stride(streams: bool) -> int:
    """How many tokens `_decode` makes at a time whatever ends meanwhile; 0 where it stops as soon as it can."""
    return STRIDE if jax.default_backend() == "gpu" and not streams else 0


@functools.cache
def _compiled_decode(on_gpu: bool):
    """`_decode` under jit. On a GPU kernels that don't need each other run side by side: the same tokens, sooner."""
    options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if on_gpu else None
    statics = (*_STATIC, "stride")
    return jax.jit(_decode, static_argnames=statics, donate_argnames="state", compiler_options=options)


def _ids(prompt: Sequence[int]) -> list[int]:
    array = np.asarray(prompt)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"a prompt is {str(prompt)[:40]!r}; give at least one list of token ids, [[1, 5, 9], [1, 7]]")
    return array.tolist()


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

    `prompts` are lists (or arrays) of token ids, of any lengths but not empty. `on_token` is called with each step's
    tokens (B,), for streaming. Raises UserError for what is no list of lists of ids, an empty prompt, an id that the
    model has not, or options out of range.
    """
    prompts = [_ids(prompt) for prompt in prompts]
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UserError("an empty prompt was given; give at least one token to continue from")
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:  # NaN is neither
        raise UserError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: need at least 1 new token, "
            "temperature ≥ 0 and 0 < top_p ≤ 1"
        )
    wrong = [token for prompt in prompts for token in prompt if not 0 <= token < model.config.vocab_size]
    if wrong:  # a table gives such a token NaN, and no error
        raise UserError(f"a prompt holds token {wrong[0]}: give ids between 0 and {model.config.vocab_size - 1}")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    options = {
        "cache_length": -(-(tokens.shape[1] + max_new_tokens) // CACHE_STEP) * CACHE_STEP,
        "temperature": float(temperature),
        "top_p": float(top_p),
    }
    variables = jax.device_put(variables)  # once; arrays that are on a device stay there
    stops = {eos_id} if isinstance(eos_id, int | np.integer) else set(eos_id or ())
    key, ends = jax.random.key(seed), jnp.asarray(sorted(stops), jnp.int32)
    new, state = _prefill(model, variables, tokens, lengths, key, ends, **options)
    results: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), bool)
    there, left = 1, max_new_tokens - 1
    stride, decode = _stride(on_token is not None), _compiled_decode(jax.default_backend() == "gpu")
    while True:
        following, count = None, min(left, 1 if on_token else stride or AHEAD)
        if count:  # begun before the tokens that are there are waited for, so that the device never idles
            following, state = decode(model, variables, state, key, ends, np.int32(count), stride=stride, **options)
        for tokens in np.asarray(new)[:, :there].T:
            if finished.all():
                break
            if on_token is not None:
                on_token(tokens)
            for row in np.flatnonzero(~finished):
                results[row].append(int(tokens[row]))
                finished[row] = tokens[row] in stops
        if following is None or finished.all():
            return results
        new, there, left = following, count, left - count
