"""Attention against arithmetic by hand and a slow float64 oracle; the implementations against each other."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import attention


def inputs(B=2, L=12, H=4, H_kv=2, hd=8):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, L, heads, hd)).astype(np.float32) for heads in (H, H_kv, H_kv))


def oracle(q, k, v, segment_ids=None, window=None, sinks=None, softcap=None):
    """One output at a time, in float64."""
    B, L, H, hd = q.shape
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(B, L, H):
        head = h // (H // k.shape[2])  # neighbouring queries share a key-value head
        seen = [
            j
            for j in range(i + 1)
            if (window is None or j > i - window) and (segment_ids is None or segment_ids[b, j] == segment_ids[b, i])
        ]
        scores = np.array([np.dot(q[b, i, h].astype(np.float64), k[b, j, head]) / np.sqrt(hd) for j in seen])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        mass = np.exp(scores)
        total = mass.sum() + (0 if sinks is None else np.exp(float(sinks[h])))
        out[b, i, h] = sum(m / total * v[b, j, head] for m, j in zip(mass, seen, strict=True))
    return out


SEGMENTS = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 12], 1, axis=0).astype(np.int32)
SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segment_ids": SEGMENTS},
        {"window": 3},
        {"window": 1},
        {"segment_ids": SEGMENTS, "window": 4},
        {"sinks": SINKS},
        {"softcap": 0.5},
        {"segment_ids": SEGMENTS, "window": 4, "sinks": SINKS, "softcap": 2.0},
    ],
    ids=lambda options: "+".join(options) or "causal",
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_implementations_match_the_slow_oracle(options, kv_heads):
    q, k, v = inputs(H_kv=kv_heads)
    wanted = oracle(q, k, v, **options)
    implementations = ["plain"] if {"sinks", "softcap"} & set(options) else ["plain", "blocks", "xla"]
    for implementation in [*implementations, None]:
        found = attention.attend(q, k, v, **options, implementation=implementation)
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=str(implementation))


def test_sinks_and_softcap_by_hand_on_two_by_two():
    # One head of two dimensions, queries of length √2 so that scores are q·k/√2 = 0 or 1.
    q = jnp.array([[[[0.0, 0.0]], [[2**0.5, 0.0]]]])
    k = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    v = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    # First place: sees itself alone. Second: scores 1 and 0, weights e / (e + 1) and 1 / (e + 1).
    e = np.e
    np.testing.assert_allclose(attention.attend(q, k, v)[0, :, 0], [[1, 0], [e / (e + 1), 1 / (e + 1)]], rtol=1e-6)
    # A sink of logit 0 takes e⁰ = 1 of the mass: first 1 / (1 + 1), second e / (e + 1 + 1) and 1 / (e + 1 + 1).
    found = attention.attend(q, k, v, sinks=jnp.zeros(1))[0, :, 0]
    np.testing.assert_allclose(found, [[0.5, 0], [e / (e + 2), 1 / (e + 2)]], rtol=1e-6)
    # A cap of 1/2 turns the score 1 into tanh(2) / 2.
    capped = np.exp(np.tanh(2) / 2)
    found = attention.attend(q, k, v, softcap=0.5)[0, :, 0]
    np.testing.assert_allclose(found, [[1, 0], [capped / (capped + 1), 1 / (capped + 1)]], rtol=1e-6)


@pytest.mark.parametrize("length", [64, 67, 131])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_query_blocks_of_any_length_match_plain(length, window):
    # 64 and 67 are two blocks (67 unequal ones), 131 four; a window of 40 ends inside the block before.
    q, k, v = inputs(L=length)
    segment_ids = np.sort(np.random.default_rng(2).integers(1, 4, (2, length)), axis=1)
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def run(implementation):
        def loss(*arrays):
            out = attention.attend(*arrays, segment_ids, window, implementation=implementation)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = run("blocks")
    (_, wanted), wanted_grads = run("plain")
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_never_hold_all_the_scores():
    # B 2, H 4, L 128: the scores would be 4·128·128 a row; four blocks of 32 queries make 32·128 at most.
    q, k, v = inputs(L=128)
    step = jax.jit(jax.grad(lambda *a: jnp.sum(attention.attend(*a, implementation="blocks") ** 2), (0, 1, 2)))
    text = step.lower(q, k, v).compile().as_text()
    assert "32,128]" in text
    assert "128,128]" not in text


def test_gradients_agree():
    q, k, v = inputs()
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(implementation, *arrays):
        return jnp.sum(attention.attend(*arrays, SEGMENTS, 4, implementation=implementation) * weight)

    def gradients(implementation):
        return jax.jit(jax.grad(lambda *arrays: loss(implementation, *arrays), (0, 1, 2)))(q, k, v)

    plain = gradients("plain")
    for implementation in ("blocks", "xla"):
        for a, b in zip(plain, gradients(implementation), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=implementation)


def test_huge_scores_stay_finite():
    q, k, v = inputs(B=1, L=4)
    for options in ({"implementation": "plain"}, {"implementation": "blocks"}, {"sinks": SINKS * 1e4}):
        found = attention.attend(q * 1e4, k * 1e4, v, **options)
        assert np.all(np.isfinite(found))


@pytest.mark.parametrize("window", [None, 3])
def test_cached_attention_is_the_row_of_the_whole(window):
    q, k, v = inputs()
    whole = attention.attend(q, k, v, window=window, implementation="plain")
    # A cache longer than what is written; slots past the position hold rubbish that must not be read.
    places = np.broadcast_to(np.arange(k.shape[1], dtype=np.int32), k.shape[:2])
    empty = jnp.full((k.shape[0], k.shape[2], 2 * k.shape[1], k.shape[3]), 1e3, k.dtype)
    cache = [attention.write_slots(empty, a, places) for a in (k, v)]
    positions = np.array([[4], [11]], np.int32)  # the two rows are at different places
    rows = np.arange(2)[:, None]
    mask = attention.slot_mask(positions, empty.shape[2], window)
    found = attention.attend_slots(q[rows, positions], *cache, mask)
    np.testing.assert_allclose(found, np.asarray(whole)[rows, positions], atol=1e-6)


def test_bfloat16_stays_bfloat16_and_near():
    q, k, v = inputs()
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    wanted = attention.attend(q, k, v, implementation="plain")
    for implementation in ("plain", "blocks", "xla"):
        found = attention.attend(*half, implementation=implementation)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05)


def test_a_named_implementation_runs_or_raises():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="'flash': one of plain, blocks, xla, cudnn, splash"):
        attention.attend(q, k, v, implementation="flash")
    with pytest.raises(NotImplementedError, match="'xla' takes no sinks or softcap; use 'plain'"):
        attention.attend(q, k, v, sinks=SINKS, implementation="xla")
    with pytest.raises(NotImplementedError, match="use 'plain'"):
        attention.attend(q, k, v, softcap=1.0, implementation="cudnn")


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "length", "wanted"),
    [
        ("9.0", jnp.bfloat16, 64, 8, "cudnn"),
        ("7.5", jnp.bfloat16, 64, 8, "xla"),  # a T4
        ("9.0", jnp.float32, 64, 8, "xla"),
        ("9.0", jnp.float16, 192, 8, "xla"),
        ("9.0", jnp.bfloat16, 12, 8, "xla"),
        ("9.0", jnp.bfloat16, 64, 7, "xla"),
    ],
)
def test_on_a_gpu_cudnn_is_picked_for_what_it_takes(capability, dtype, width, length, wanted, monkeypatch):
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    q = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
    assert attention._pick(q, q, None, None) == wanted
    assert attention._pick(q, q, SINKS, None) == "plain"


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_cudnn_in_half_precision_is_picked_and_near_float32(segments, kv_heads):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(B=2, L=256, H=4, H_kv=kv_heads, hd=64))
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 1]], 64, axis=1), jnp.int32) if segments else None
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def run(implementation):
        def total(*args):
            out = attention.attend(*args, ids, implementation=implementation)
            return jnp.vdot(out.astype(jnp.float32), weights), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    picked = run(None).lower(q, k, v)
    assert "cudnn" in picked.compile().as_text()
    (_, out), gradients = picked.compile()(q, k, v)
    (_, want), wanted = run("plain")(*(x.astype(jnp.float32) for x in (q, k, v)))
    for ours, theirs in zip((out, *gradients), (want, *wanted), strict=True):
        ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
