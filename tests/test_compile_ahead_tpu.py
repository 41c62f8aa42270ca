"""A training step compiled ahead for four TPU chips that aren't here, kernels and all: `make test-tpu`."""

import re
from dataclasses import asdict

import pytest

from experiments.configs import fine_grained_aux_free
from moejax import config as configs
from moejax import sharding, train
from moejax.collectives import collectives

pytestmark = pytest.mark.tpu

E, D, F, HEADS = 8, 256, 768, 2  # half of F is a multiple of 128, as the kernels ask


def step_text(mesh_sizes: dict[str, int], **moe) -> str:
    """The optimised HLO of the step of a small LM, two layers scanned, on a v5p:2x2x1."""
    from experiments import compile_ahead  # defines flags of its own

    given = fine_grained_aux_free.get_config()
    given.model.update(
        num_layers=2, width=D, num_heads=HEADS, num_kv_heads=HEADS, head_dim=128, dtype="bfloat16", vocab_size=512,
        ffn_width=512,
    )  # fmt: skip
    given.model.moe.update(num_experts=E, expert_width=F, **moe)
    given.data.update(sequence_length=256, batch_size=8)
    given.mesh.update({"data": 1} | mesh_sizes)
    config = configs.settle(configs.from_config_dict(given))
    mesh = sharding.make_mesh(asdict(config.mesh), compile_ahead.described("v5p:2x2x1"))
    train.check_exchange(config, mesh)  # asks the mesh's platform, not this machine's
    text = compile_ahead.compile_step(config, mesh).as_text()
    assert text is not None
    return text


def kernels(text: str) -> set[str]:
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return {
        name
        for line in calls
        for name in re.findall(r"splash_mha_\w+?(?=_no_residuals|\b)|grouped_matmul(?:_drhs)?\b", line)
    }


def shapes(text: str, *kinds: str) -> set[str]:
    return {shape for kind, shape in collectives(text) if kind in kinds}


def whole_experts(found: set[str]) -> set[str]:
    return {shape for shape in found if re.search(rf"\b{E},(\d+,)*({D},{F}|{F},{D})\]", shape)}


def test_rows_go_ragged_and_experts_stay():
    """On 2 × 2 chips (fsdp, expert): all kernels; ragged exchanges, by None; of the experts' weights each chip gathers
    its half alone, and the sum of their gradients leaves each its part."""
    text = step_text({"fsdp": 2, "expert": 2})
    assert {"grouped_matmul", "grouped_matmul_drhs"} < kernels(text)
    assert any(name.startswith("splash") for name in kernels(text))
    found = {kind: count for (kind, _), (count, _) in collectives(text).items()}
    assert found["ragged-all-to-all"] > 0
    gathered = shapes(text, "all-gather", "all-reduce")
    assert not whole_experts(gathered), gathered
    assert any(re.search(rf"\b{E // 2},{D},{F}\]", shape) for shape in shapes(text, "all-gather"))


def test_tensor_parallel_experts_and_heads_in_equal_pieces():
    """On 2 × 2 chips (expert, tensor): each has half of the heads and half of each of its experts' hidden width."""
    text = step_text({"expert": 2, "tensor": 2}, exchange="all_to_all")
    assert {"grouped_matmul", "grouped_matmul_drhs"} < kernels(text)
    assert any(name.startswith("splash") for name in kernels(text))
    assert shapes(text, "all-to-all")
    moved = shapes(text, "all-gather", "all-reduce", "all-to-all")
    assert not [shape for shape in moved if f"{D},{F // 2}]" in shape or f"{D},{F}]" in shape], moved
