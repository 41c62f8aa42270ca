"""The TPU kernels through the TPU compiler, which needs no TPU: `make test-tpu`.

Compiled for the chip that each test names; what a program computes is tests/pallas_kernels/test_mosaic_tpu.py's.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.experts import gated_ffn
from pallas_kernels import shapes
from pallas_kernels.grouped_matmul import grouped_matmul, pick

pytestmark = pytest.mark.tpu

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def mesh_of(chip: str, devices: int) -> Mesh:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # ask no metadata server what machine this is
    found = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    return Mesh(np.array(found[:devices]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def compile_for(chip, function, *args, devices=1, specs=None):
    """The optimised HLO of function on a mesh of the chip; args: (shape, dtype); specs: how they are split."""
    mesh = mesh_of(chip, devices)
    specs = specs or [PartitionSpec()] * len(args)
    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(args, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*structs).lower(lowering_platforms=("tpu",)).compile().as_text()


def kernels(text: str) -> list[str]:
    """The names of the Mosaic kernels that an HLO calls."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted(re.search(r"grouped_matmul(?:_drhs)?", line)[0] for line in calls)


def value_and_grads(lhs, rhs, sizes, grad, transpose_rhs=False, implementation="mosaic_tpu"):
    product = functools.partial(
        grouped_matmul, group_sizes=sizes, transpose_rhs=transpose_rhs, implementation=implementation
    )
    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(grad)


def product_args(M, E, K, N, dtype=jnp.bfloat16):
    return ((M, K), dtype), ((E, K, N), dtype), ((E,), jnp.int32), ((M, N), dtype)


# The largest products, which fill VMEM, on every chip; the others where VMEM is smallest.
CASES = [(chip, name) for chip in CHIPS for name in ("mixtral-8x7b", "deepseek-v3-ep8")] + [
    ("v5p", name) for name in ("deepseekmoe-16b", "kimi-k2-ep8", "switch-base", "mixtral-8x7b-decode-8")
]


@pytest.mark.parametrize("chip, name", CASES)
def test_named_shapes(chip, name):
    for part in ("up", "down"):
        shape = (shapes.TRAINING | shapes.DECODE)[name].product(part)
        text = compile_for(chip, value_and_grads, *product_args(*shape))
        assert kernels(text) == ["grouped_matmul", "grouped_matmul", "grouped_matmul_drhs"]
        assert not re.search(r"= (bf16|f32)\S+ (dot|convolution|transpose)\(", text)  # the weights are read as they lie


@pytest.mark.parametrize("chip", CHIPS)
def test_float32_and_turned_weights(chip):
    function = functools.partial(value_and_grads, transpose_rhs=True)
    f32 = jnp.float32
    args = ((300, 256), f32), ((4, 384, 256), f32), ((4,), jnp.int32), ((300, 384), f32)
    assert kernels(compile_for(chip, function, *args)) == ["grouped_matmul", "grouped_matmul", "grouped_matmul_drhs"]


@pytest.mark.parametrize("chip", CHIPS)
def test_experts_inside_shard_map(chip):
    """The gated block and its gradients, rows split over four devices: three products, six more going back."""

    def block(rows, gate, up, down, sizes):
        return gated_ffn(rows, gate, up, down, sizes[0], implementation="mosaic_tpu")

    split, whole = PartitionSpec("x"), PartitionSpec()
    specs = [split, whole, whole, whole, split]
    sharded = jax.shard_map(block, mesh=mesh_of(chip, 4).abstract_mesh, in_specs=tuple(specs), out_specs=split)

    def step(rows, gate, up, down, sizes, grad):
        out, pull = jax.vjp(lambda *args: sharded(*args, sizes), rows, gate, up, down)
        return out, *pull(grad)

    D, F, E, R = 256, 128, 4, 2048
    bf16, weights = jnp.bfloat16, ((E, D, F), jnp.bfloat16)
    args = ((R, D), bf16), weights, weights, ((E, F, D), bf16), ((4, E), jnp.int32), ((R, D), bf16)
    text = compile_for(chip, step, *args, devices=4, specs=[*specs, split])
    assert kernels(text) == ["grouped_matmul"] * 6 + ["grouped_matmul_drhs"] * 3
    assert "all-reduce" in text  # of the weights' gradients


def test_picked_on_a_tpu_where_it_fits():
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh_of("v5p", 1).abstract_mesh):
        assert pick(bf16((64, 256)), bf16((4, 256, 128))) == "mosaic_tpu"
        assert pick(bf16((64, 96)), bf16((4, 96, 128))) == "xla"
        with pytest.raises(NotImplementedError, match="multiples of 128; implementation='xla' would"):
            jax.eval_shape(
                functools.partial(grouped_matmul, implementation="mosaic_tpu"),
                bf16((64, 96)),
                bf16((4, 96, 128)),
                jax.ShapeDtypeStruct((4,), jnp.int32),
            )


def test_too_large_a_tile_does_not_compile():
    """The compiler does hold a kernel to the chip's VMEM: what compiles above fits."""
    from pallas_kernels.grouped_matmul import group_metadata, mosaic_tpu
    from pallas_kernels.grouped_matmul.tpu_blocks import Tiling

    def product(lhs, rhs, sizes):
        tiling = Tiling(256, 4096, 0)
        return mosaic_tpu.forward(lhs, rhs, sizes, group_metadata(sizes, 1024), False, jnp.bfloat16, tiling)

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for("v5p", product, *product_args(1024, 2, 7168, 4096)[:3])
