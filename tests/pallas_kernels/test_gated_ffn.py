"""The gated feed-forward: plain products against float64, the Hopper kernels interpreted, lowered, and on a GPU."""

import functools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.combine import combine, spread
from pallas_kernels.gated_ffn import ACTIVATIONS, gated_ffn, mosaic_gpu
from pallas_kernels.grouped_matmul import SPARE, group_metadata, hopper, tilings
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.grouped_matmul.hopper import Tiling

# the interpreter multiplies poisoned rows in numpy, which says so
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow).* encountered in matmul:RuntimeWarning")


def operands(sizes, M, D, F, seed=0, dtype=jnp.bfloat16):
    """rows, gate, up, down, grad; NaN in the rows past the sum."""
    rng = np.random.default_rng(seed)
    E = len(sizes)
    rows, grad = rng.normal(size=(M, D)), rng.normal(size=(M, D))
    rows[sum(sizes) :], grad[sum(sizes) :] = np.nan, np.nan
    weights = (rng.normal(size=s) * s[1] ** -0.5 for s in ((E, D, F), (E, D, F), (E, F, D)))
    return tuple(jnp.asarray(a, dtype) for a in (rows, *weights, grad))


def exact(rows, gate, up, down, grad, sizes, activation, scale=None):
    """The value and the gradients of rows, gate, up, down and, if given, scale, in float64, by a loop over groups, with
    hand-written derivatives."""
    scales = np.ones(len(rows)) if scale is None else np.asarray(scale, np.float64)
    dscale = np.zeros(len(rows))
    rows, gate, up, down, grad = (np.asarray(a.astype(jnp.float32), np.float64) for a in (rows, gate, up, down, grad))
    out, drows, *dweights = (np.zeros_like(a) for a in (rows, rows, gate, up, down))
    ends = np.cumsum(sizes)
    for g, r in enumerate(map(slice, ends - sizes, ends)):
        a, b = rows[r] @ gate[g], rows[r] @ up[g]
        if activation == "silu":
            sigmoid = 1 / (1 + np.exp(-a))
            act, slope = a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))
        else:  # gelu, tanh form
            c = np.sqrt(2 / np.pi)
            tanh = np.tanh(c * (a + 0.044715 * a**3))
            act, slope = a * (1 + tanh) / 2, (1 + tanh) / 2 + a / 2 * (1 - tanh**2) * c * (1 + 3 * 0.044715 * a**2)
        by = scales[r][:, None]
        out[r] = by * act * b @ down[g]
        dscale[r] = np.sum(grad[r] @ down[g].T * act * b, axis=1)
        dh = by * (grad[r] @ down[g].T)
        da, db = dh * b * slope, dh * act
        drows[r] = da @ gate[g].T + db @ up[g].T
        dweights[0][g], dweights[1][g], dweights[2][g] = rows[r].T @ da, rows[r].T @ db, (by * act * b).T @ grad[r]
    return (out, drows, *dweights) if scale is None else (out, drows, *dweights, dscale)


@functools.partial(jax.jit, static_argnames=("activation", "implementation", "tail"))
def value_and_gradients(
    rows, gate, up, down, grad, sizes, activation="silu", implementation=None, scale=None, tail=True
):
    def block(rows, gate, up, down, *scale):
        metadata = group_metadata(sizes, grad.shape[0], tail=tail)
        options = {"activation": activation, "implementation": implementation, "metadata": metadata}
        return gated_ffn(rows, gate, up, down, sizes, scale=scale[0] if scale else None, **options)

    out, pull = jax.vjp(block, rows, gate, up, down, *(() if scale is None else (scale,)))
    return out, *pull(grad)


def assert_close(got, want, bound):
    for ours, theirs in zip(got, want, strict=True):
        ours = np.asarray(ours.astype(jnp.float32), np.float64)
        assert np.isfinite(ours).all()
        assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 24), min_size=3, max_size=3).map(sorted))
@example(cuts=[7, 7, 19])
def test_plain_products(activation, cuts):
    sizes = np.diff([0, *cuts]).astype(np.int32)
    args = operands(sizes, 24, 16, 8, dtype=jnp.float32)
    for scale in (None, jnp.linspace(-1.0, 2.0, 24)):
        got = value_and_gradients(*args, jnp.asarray(sizes), activation, "blocks", scale)
        assert_close(got, exact(*args, sizes, activation, scale), 1e-5)


def interpreted(function, capfd):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        result = jax.block_until_ready(function())
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    return result


# 70 | 0 | 51, then 7 rows of nobody: halves of a tile full, partly full and empty; F = 64: half of a tile's columns;
# 600 rows: tiles of 192 and of 128
@pytest.mark.parametrize(
    "sizes, M, F, keep, activation, scaled",
    [
        ((70, 0, 51), 128, 128, True, "silu", True),
        ((3, 5, 60), 70, 64, False, "gelu", False),
        ((0, 99, 0), 99, 64, False, "relu", True),
        ((70, 0, 510), 600, 64, True, "silu", True),
    ],
)
def test_hidden_interpreted(sizes, M, F, keep, activation, scaled, capfd):
    rows, gate, up, *_ = operands(sizes, M, 64, F)
    metadata = group_metadata(jnp.array(sizes, jnp.int32), M)
    tiles = Tiling(stages=5, pieces=4, blocks=2)
    scale = jnp.linspace(-1.0, 2.0, M) if scaled else None
    got = interpreted(lambda: mosaic_gpu.hidden(activation, rows, gate, up, metadata, keep, scale, tiles), capfd)
    group = np.repeat(np.arange(3), sizes)
    a, b = (np.zeros((M, F)) for _ in range(2))
    real = [np.asarray(w.astype(jnp.float32), np.float64) for w in (rows, gate, up)]
    for i, g in enumerate(group):
        a[i], b[i] = real[0][i] @ real[1][g], real[0][i] @ real[2][g]
    act = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}
    act["gelu"] = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    want = (act[activation](a) * b * (np.asarray(scale)[:, None] if scaled else 1), a, b)
    assert len(got) == (3 if keep else 1)
    assert_close(got, want[: len(got)], 3e-3)
    assert all((np.asarray(x[sum(sizes) :].astype(jnp.float32)) == 0).all() for x in got)


# the second in halves, the third with tiles of 192 and of 128 rows
@pytest.mark.parametrize(
    "sizes, M, D, blocks", [((70, 0, 51), 128, 128, 2), ((70, 10, 48), 128, 256, 4), ((70, 0, 510), 600, 128, 2)]
)
def test_dlhs_interpreted(sizes, M, D, blocks, capfd):
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=(M, 64)), jnp.bfloat16) for _ in range(2))
    _, gate, up, *_ = operands(sizes, M, D, 64)
    metadata = group_metadata(jnp.array(sizes, jnp.int32), M)
    tiles = Tiling(stages=4, pieces=4, blocks=blocks)
    got = interpreted(lambda: mosaic_gpu.dlhs((first, second), (gate, up), metadata, tiles), capfd)
    real = [np.asarray(w.astype(jnp.float32), np.float64) for w in (first, second, gate, up)]
    want = np.zeros((M, D))
    for i, g in enumerate(np.repeat(np.arange(3), sizes)):
        want[i] = real[0][i] @ real[2][g].T + real[1][i] @ real[3][g].T
    assert_close([got], [want], 3e-3)


@pytest.mark.slow
def test_the_block_interpreted(capfd, monkeypatch):
    """The value and all gradients, through the public function, without a scale; with one in the next test."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    monkeypatch.setattr(tilings, "pick", lambda op, *_: Tiling(stages=5, pieces=2, blocks=2))
    sizes = np.array([20, 0, 37], np.int32)
    args = operands(sizes, 64, 64, 64)
    got = interpreted(lambda: value_and_gradients.__wrapped__(*args, jnp.asarray(sizes), "silu", "mosaic_gpu"), capfd)
    assert_close(got, exact(*args, sizes, "silu"), 6e-3)


@pytest.mark.slow
def test_the_block_without_a_tail_interpreted(capfd, monkeypatch):
    """With a scale; nothing is said of the last 7 of 64 rows, which are nobody's."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    monkeypatch.setattr(mosaic_gpu, "_row_blocks", lambda metadata: 3)
    monkeypatch.setattr(tilings, "pick", lambda op, *_: Tiling(stages=5, pieces=2, blocks=2))
    sizes = np.array([20, 0, 37], np.int32)
    args, scale = operands(sizes, 64, 64, 128), jnp.linspace(0.1, 1.0, 64)
    of = *args, jnp.asarray(sizes), "silu", "mosaic_gpu", scale, False
    out, drows, *others, dscale = interpreted(lambda: value_and_gradients.__wrapped__(*of), capfd)
    got = out.at[57:].set(0), drows.at[57:].set(0), *others, dscale.at[57:].set(0)
    assert_close(got, exact(*args, sizes, "silu", scale), 6e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("F", "scaled"), [(128, True), (384, False)])
def test_activation_gradients_interpreted(activation, F, scaled, capfd, monkeypatch):
    """What the plain pass gives, over three blocks of one or two rows each, and NaN past them."""
    monkeypatch.setattr(mosaic_gpu, "_row_blocks", lambda metadata: 3)
    rng = np.random.default_rng(0)
    a, b, grad = (jnp.asarray(rng.normal(size=(8, F)), jnp.bfloat16).at[5:].set(jnp.nan) for _ in range(3))
    scale = jnp.linspace(-1.0, 2.0, 8) if scaled else None
    metadata = group_metadata(jnp.array([4, 0, 1], jnp.int32), 8, tail=False)
    got = interpreted(lambda: mosaic_gpu.gradients(activation, a, b, grad, metadata, scale), capfd)

    def plain(a, b, scale):
        return ACTIVATIONS[activation](a) * b * scale[:, None]

    real = [x[:5].astype(jnp.float32) for x in (a, b, grad)]
    hidden, pull = jax.vjp(plain, *real[:2], scale[:5] if scaled else jnp.ones(5))
    assert len(got) == 3 + scaled
    assert_close([x[:5] for x in got], [np.asarray(x, np.float64) for x in (hidden, *pull(real[2]))[: len(got)]], 4e-3)


def test_the_hopper_kernels_lower():
    """Outside shard_map, where one warp loads; the products' own kernels are lowered by test_mosaic_gpu."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    @jax.jit
    def both(rows, gate, up, sizes, scale):
        metadata = group_metadata(sizes, 1000, tail=False)
        hidden, a, b = mosaic_gpu.hidden("silu", rows, gate, up, metadata, keep=True, scale=scale)
        _, *grads, _ = mosaic_gpu.gradients("silu", a, b, hidden, metadata, scale)
        return mosaic_gpu.dlhs(grads, (gate, up), metadata)

    traced = both.trace(
        bf16((1000, 256)), bf16((4, 256, 128)), bf16((4, 256, 128)), jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((1000,), jnp.float32),
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"gated_ffn_{name}" in text for name in ("hidden", "gradients", "dlhs"))


@pytest.mark.parametrize("spare", [0, SPARE])
def test_forward_and_backward_leave_multiprocessors_to_spare(spare, monkeypatch):
    """Every product of a layer has 132 blocks, or as many fewer."""
    assert mosaic_gpu._row_blocks(group_metadata(jnp.zeros(4, jnp.int32), 8, spare)) == 16 * (132 - spare)
    monkeypatch.setattr(products, "_hopper", lambda: True)
    blocks, launch = {}, hopper.launch

    def noted(name, body, t, *args, **options):
        blocks[name] = t.blocks
        return launch(name, body, t, *args, **options)

    monkeypatch.setattr(hopper, "launch", noted)

    def block(rows, gate, up, down, sizes):
        metadata = group_metadata(sizes, 1000, spare)
        return gated_ffn(rows, gate, up, down, sizes, metadata=metadata, implementation="mosaic_gpu").sum()

    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = bf16((4, 256, 192)), bf16((4, 256, 192)), bf16((4, 192, 256))
    jax.eval_shape(jax.grad(block, argnums=(0, 1, 2, 3)), bf16((1000, 256)), *weights, jnp.zeros(4, jnp.int32))
    assert blocks == dict.fromkeys(
        ("gated_ffn_hidden", "gated_ffn_dlhs", "grouped_matmul", "grouped_matmul_drhs"), 132 - spare
    )


def test_moved_rows_lower_inside_shard_map(monkeypatch):
    """Rows out and back, over a mesh of two: the kernels' types know of no mesh. The block's own between them lower in
    test_exchange."""
    monkeypatch.setattr(products, "_hopper", lambda: True)

    def value_and_gradients(x, slot, weight, grad):
        out, pull = jax.vjp(lambda x, weight: combine(spread(x, slot, 256), slot, weight), x, weight)
        return out, *pull(grad)

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("x")
    sharded = jax.shard_map(value_and_gradients, mesh=mesh, in_specs=split, out_specs=split)
    x, weight = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jax.ShapeDtypeStruct((512,), jnp.float32)
    traced = jax.jit(sharded).trace(x, jax.ShapeDtypeStruct((256, 2), jnp.int32), weight, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(name in text for name in ("spread_rows", "combine_rows", "combine_rows_gradients"))


def test_no_rows():
    rows, gate, up, down, _ = operands((0, 0), 0, 64, 64)
    out, pull = jax.vjp(lambda *args: gated_ffn(*args, jnp.zeros(2, jnp.int32)), rows, gate, up, down)
    assert out.shape == (0, 64)
    assert all(not np.any(np.asarray(gradient)) for gradient in pull(out))


def test_bad_input():
    rows, gate, up, down, _ = operands((4,), 4, 64, 64)
    sizes = jnp.array([4], jnp.int32)
    with pytest.raises(ValueError, match="unknown activation 'swish'; there are silu, gelu, relu"):
        gated_ffn(rows, gate, up, down, sizes, activation="swish")
    with pytest.raises(ValueError, match=r"must be \(M, D\).*got \(4, 64\), \(1, 64, 64\), \(1, 64, 32\)"):
        gated_ffn(rows, gate, up[..., :32], down, sizes)
    with pytest.raises(ValueError, match="one dtype; got bfloat16, bfloat16, bfloat16, float32"):
        gated_ffn(rows, gate, up, down.astype(jnp.float32), sizes)
    with pytest.raises(ValueError, match="group_sizes must be int32; got float32"):
        gated_ffn(rows, gate, up, down, jnp.array([4.0]))
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        gated_ffn(rows, gate, up, down, sizes, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(
    "M, E, D, F, tail",
    [
        (1000, 12, 192, 320, True),
        (2048, 4, 1024, 704, True),
        (6, 8, 256, 128, True),
        (1000, 12, 192, 384, False),
        (3001, 12, 192, 384, False),
    ],
)
def test_on_a_gpu(M, E, D, F, tail, activation):
    """Against float64, against the plain products' error, and bit-equal in three runs."""
    for draw in range(8):
        rng = np.random.default_rng(draw)
        sizes = rng.multinomial(M - draw % 2 * (M // 5), rng.dirichlet(np.full(E, 0.4))).astype(np.int32)
        args = operands(sizes, M, D, F, draw)
        scale = jnp.asarray(rng.uniform(0.1, 1.0, M), jnp.float32) if draw % 4 > 1 else None

        def run(sizes=sizes, args=args, scale=scale):
            found = value_and_gradients(*args, jnp.asarray(sizes), activation, "mosaic_gpu", scale, tail=tail)
            return found if tail else [a.at[sum(sizes) :].set(0) if len(a) == M else a for a in found]

        got, want = run(), exact(*args, sizes, activation, scale)
        assert_close(got, want, 6e-3)
        plain = value_and_gradients(*args, jnp.asarray(sizes), activation, "blocks", scale)
        for ours, theirs, right in zip(got, plain, want, strict=True):
            ours, theirs = (
                np.linalg.norm(np.asarray(x.astype(jnp.float32), np.float64) - right) for x in (ours, theirs)
            )
            assert ours <= 1.1 * theirs
        for _ in range(2):
            assert all((a == b).all() for a, b in zip(got, run(), strict=True))


PEER = os.environ.get("PEER_PYTHON")


@pytest.mark.gpu
@pytest.mark.skipif(not PEER, reason="needs PEER_PYTHON, an environment's python that has torch")
def test_error_beside_torch(tmp_path):
    """Against float64: the value's and each gradient's error is at most 1.5 times torch's."""
    sizes = np.array([700, 0, 1000, 348], np.int32)
    names = ("rows", "gate", "up", "down", "grad")
    args = operands(sizes, 2048, 512, 384)
    want = exact(*args, sizes, "silu")
    given = {name: np.asarray(a.astype(jnp.float32)) for name, a in zip(names, args, strict=True)}
    theirs = peer_errors("gated_ffn", tmp_path / "case.npz", given | {"sizes": sizes}, want)
    got = value_and_gradients(*args, jnp.asarray(sizes), "silu", None)
    for ours, right, bound in zip(got, want, theirs, strict=True):
        ours = np.asarray(ours.astype(jnp.float32), np.float64)
        assert np.linalg.norm(ours - right) <= 1.5 * bound * np.linalg.norm(right)


def peer_errors(what, file, given, want):
    np.savez(file, **given, **{f"want_{i}": right for i, right in enumerate(want)})
    script = Path(mosaic_gpu.__file__).parents[1] / "peers" / "torch_errors.py"
    done = subprocess.run([PEER, script, what, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)
