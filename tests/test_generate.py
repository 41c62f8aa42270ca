"""Sampling: by hand, and the cache against the whole sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from moejax import generate
from moejax.errors import UserError
from moejax.models.lm import LM

PROMPTS = [[5, 9, 2, 33, 7], [1, 60], [8, 8, 4]]
NEW = 6


@functools.lru_cache
def generated(name):
    return generate.generate(*model_of(name), PROMPTS, NEW)


def model_of(name):
    """The small model; of switch one with room for a quarter of the tokens, so that capacity would be felt."""
    model, variables = small.initialised(name)
    if name == "switch":
        moe = dataclasses.replace(model.config.moe, capacity_factor=0.25)
        model = LM(dataclasses.replace(model.config, moe=moe))
    return model, variables


# expert_choice: each token takes its top K by score, with that score as its gate, as in training.
WHOLE = {
    "dense": {},
    "switch": {"capacity_factor": None},
    "aux_free": {},
    "expert_choice": {"router": "moejax.routing:top_k", "router_options": {"renormalize": False}},
}


@pytest.mark.parametrize("name", WHOLE)
def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence_without_capacity(name):
    """The cached decode of prompts of different lengths, against one uncached pass in mode "evaluate"."""
    model, variables = model_of(name)
    if model.config.moe is not None:
        moe = dataclasses.replace(model.config.moe, **WHOLE[name])
        model = LM(dataclasses.replace(model.config, moe=moe))
    new = generated(name)
    tokens = np.zeros((len(PROMPTS), 5 + NEW), np.int32)
    for row, prompt, found in zip(tokens, PROMPTS, new, strict=True):
        assert len(found) == NEW
        row[: len(prompt) + NEW] = prompt + found
    likeliest = np.argmax(jax.jit(model.apply)(variables, tokens), axis=-1)
    for row, prompt, found in zip(likeliest, PROMPTS, new, strict=True):
        assert list(row[len(prompt) - 1 : len(prompt) - 1 + NEW]) == found


def test_a_prompt_in_a_batch_is_continued_as_alone():
    assert generate.generate(*model_of("aux_free"), PROMPTS[1:2], NEW) == [generated("aux_free")[1]]


def test_strides_make_the_same_tokens_as_an_open_loop(monkeypatch):
    """A GPU's way, run here: more tokens than were asked for, and past the end of a row, are made and left out."""
    open_loop = generated("switch")
    monkeypatch.setattr(generate, "_stride", lambda streams: 4)
    model, variables = model_of("switch")
    assert generate.generate(model, variables, PROMPTS, NEW) == open_loop
    ended = generate.generate(model, variables, PROMPTS, NEW, eos_id=open_loop[0][2])
    assert ended[0] == open_loop[0][: open_loop[0].index(open_loop[0][2]) + 1]


def test_sampling_is_a_function_of_the_seed():
    hot = {"temperature": 5.0}
    first, again, other = (generate.generate(*model_of("dense"), PROMPTS, NEW, seed=s, **hot) for s in (0, 0, 1))
    assert first == again != other
    assert first != generated("dense")


def test_ends_after_the_end_of_a_document_and_streams():
    alone = generated("dense")
    eos = alone[0][2]
    seen = []
    stopped = generate.generate(*model_of("dense"), PROMPTS, NEW, eos_id=eos, on_token=lambda t: seen.append(t.copy()))
    for found, free in zip(stopped, alone, strict=True):
        end = free.index(eos) + 1 if eos in free else NEW
        assert found == free[:end]  # the end itself is there, nothing after it
    steps = max(len(found) for found in stopped)
    assert len(seen) == steps
    np.testing.assert_array_equal(np.stack(seen)[: len(stopped[0]), 0], stopped[0])


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([], {}),
        ([[1], []], {}),
        ([[1]], {"max_new_tokens": 0}),
        ([[1]], {"temperature": -1.0}),
        ([[1]], {"temperature": float("nan")}),
        ([[1]], {"top_p": 0.0}),
        ([[1]], {"top_p": 1.5}),
    ],
)
def test_what_cannot_be_meant_is_refused(prompts, options):
    with pytest.raises(UserError, match="at least"):
        generate.generate(*model_of("dense"), prompts, **{"max_new_tokens": 1} | options)


@pytest.mark.parametrize("prompts", [[1, 2], ["abc"], [[1.5]], [[[1]]]])
def test_prompts_that_are_no_lists_of_ids_are_refused(prompts):
    with pytest.raises(UserError, match=r"a prompt is .*; give at least one list of token ids"):
        generate.generate(*model_of("dense"), prompts, 1)


def test_prompts_may_be_arrays():
    rows = np.array([[5, 9, 2], [1, 60, 7]], np.int32)
    wanted = generate.generate(*model_of("dense"), rows.tolist(), 2)
    assert generate.generate(*model_of("dense"), rows, 2) == wanted
    assert generate.generate(*model_of("dense"), [jnp.asarray(row) for row in rows], 2) == wanted


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_refused(token):
    model, variables = model_of("dense")
    with pytest.raises(UserError, match=f"token {token}: give ids between 0 and {model.config.vocab_size - 1}"):
        generate.generate(model, variables, [[1], [2, token]], 1)


# ---- sample, by hand: probabilities 0.5, 0.3, 0.15, 0.05

LOGITS = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))


def counts(temperature, top_p, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    draw = jax.jit(jax.vmap(lambda key: generate.sample(LOGITS, key, temperature, top_p)[0]))
    return np.bincount(np.asarray(draw(keys)), minlength=4) / draws


def test_temperature_zero_takes_the_likeliest():
    token = generate.sample(LOGITS, jax.random.key(0), 0.0, 1.0)
    assert token.dtype == jnp.int32 and list(token) == [1]


@pytest.mark.parametrize(
    ("temperature", "top_p", "wanted"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        # p ** 2 = 0.0225, 0.25, 0.0025, 0.09, their sum 0.365
        (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        (1.0, 0.4, [0, 1, 0, 0]),  # the likeliest reaches it alone
        (1.0, 0.79, [0, 0.5 / 0.8, 0, 0.3 / 0.8]),  # 0.5 + 0.3 is the first sum to reach it
        (1.0, 0.81, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (1.0, 1e-6, [0, 1, 0, 0]),  # always at least one
    ],
)
def test_sample_by_hand(temperature, top_p, wanted):
    found = counts(temperature, top_p)
    # four standard deviations of 4000 draws: 4 · √(¼ / 4000) = 0.032
    np.testing.assert_allclose(found, wanted, atol=0.032)
    assert np.all(found[np.array(wanted) == 0] == 0)
