"""A model through its cache, against its logits of the whole, and on from there."""

import functools

import jax
import numpy as np


class Cached:
    """Prompts of `lengths` tokens of tokens (B, L), the shorter ones padded, in the cache of a model.

    state: (cache, float32 logits (B, V) of the next token, how many tokens each row has). `prefilled` (B, L, V): the
    prompts' logits.
    """

    def __init__(self, model, variables, tokens: np.ndarray, lengths: tuple[int, ...], cache_length: int):
        self.variables, self.tokens = variables, tokens.astype(np.int32)
        self._step = jax.jit(
            functools.partial(model.apply, mode="generate", cache_length=cache_length, mutable=["cache"])
        )
        counts = np.array(lengths)
        place = np.broadcast_to(np.arange(counts.max(), dtype=np.int32), (len(counts), counts.max()))
        real = (place < counts[:, None]).astype(np.int32)
        prefilled, cache = self._step(variables, self.tokens[:, : counts.max()] * real, place, real)
        self.prefilled = np.asarray(prefilled)
        last = np.take_along_axis(self.prefilled, (counts - 1)[:, None, None], axis=1)[:, 0]
        self.state = cache, last, counts

    def advance(self, state, token: np.ndarray):
        """The state after one more token (B,) of each row."""
        cache, _, counts = state
        at = counts[:, None].astype(np.int32)
        logits, cache = self._step(self.variables | cache, token[:, None].astype(np.int32), at, np.ones_like(at))
        return cache, np.asarray(logits[:, 0]), counts + 1

    def check(self, full: np.ndarray, tolerance: float):
        """Compares every position with full (B, L, V), the logits of the whole; the state after the tokens."""
        _, _, counts = self.state
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance * np.std(full))
        for row, count in enumerate(counts):
            close(self.prefilled[row, :count], full[row, :count])
        state = self.state
        for offset in range(self.tokens.shape[1] - counts.max()):
            at = counts + offset
            state = self.advance(state, np.take_along_axis(self.tokens, at[:, None], axis=1)[:, 0])
            close(state[1], np.take_along_axis(full, at[:, None, None], axis=1)[:, 0])
        return state

    def greedy(self, state, count: int) -> list[list[int]]:
        """The likeliest tokens of each row from a state on."""
        found = []
        for _ in range(count):
            found.append(np.argmax(state[1], axis=-1))
            state = self.advance(state, found[-1])
        return np.stack(found, axis=1).tolist()
