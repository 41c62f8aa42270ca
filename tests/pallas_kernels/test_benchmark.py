"""The named shapes, the benchmark's arithmetic and the command lines of benchmark and traffic."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, block_ops, shapes, traffic
from pallas_kernels.timing import rounds


def test_products_by_hand():
    # 16384 tokens · 8 of 64 experts; up to gate and up at once
    assert shapes.TRAINING["olmoe-1b-7b"].product("up") == (131072, 64, 2048, 2048)
    assert shapes.TRAINING["olmoe-1b-7b"].product("down") == (131072, 64, 1024, 2048)
    # 32 of 256 experts are local, so an eighth of 16384 · 8 rows
    assert shapes.TRAINING["deepseek-v3-ep8"].product("up") == (16384, 32, 7168, 4096)
    # 64 tokens on each of eight devices
    assert shapes.DECODE["deepseek-v3-ep8-decode-64"].product("down") == (512, 32, 2048, 7168)


@pytest.mark.parametrize("kind", shapes.SIZES)
@pytest.mark.parametrize("M, E", [(16384, 32), (64, 128), (16, 8), (2, 8), (0, 8), (7, 1)])
def test_sizes_sum_to_the_rows(kind, M, E):
    sizes = shapes.group_sizes(kind, M, E)
    assert sizes.shape == (E,)
    assert sizes.dtype == np.int32
    assert (sizes >= 0).all()
    assert sizes.sum() == M
    assert (sizes == shapes.group_sizes(kind, M, E)).all()


@pytest.mark.parametrize("M, E", [(1000, 8), (16384, 384), (100, 48), (64, 128), (2, 8)])
def test_sizes_are_what_their_kind_says(M, E):
    """Few rows included: none is left over for one group to take."""
    sizes = {kind: shapes.group_sizes(kind, M, E) for kind in shapes.SIZES}
    assert np.ptp(sizes["uniform"]) <= 1
    assert list(np.sort(sizes["one_hot"])) == [0] * (E - 1) + [M]
    empty = np.arange(E) % 4 == 1
    assert not sizes["quarter_empty"][empty].any()
    assert np.ptp(sizes["quarter_empty"][~empty]) <= 1
    ranked = 1 / np.arange(1, E + 1) ** 1.2
    assert (np.abs(np.sort(sizes["zipf"])[::-1] - M * ranked / ranked.sum()) < 1).all()
    share = M * np.random.default_rng(0).dirichlet(np.full(E, 4.0))
    # few rows are drawn: five standard deviations and the one row that has no half
    near = 1 if M >= 8 * E else 1 + 5 * np.sqrt(share)
    assert (np.abs(sizes["dirichlet"] - share) < near).all()


def test_sizes_have_their_shape():
    assert set(shapes.group_sizes("uniform", 64, 8)) == {8}
    assert np.count_nonzero(shapes.group_sizes("one_hot", 64, 8)) == 1
    assert list(np.flatnonzero(shapes.group_sizes("quarter_empty", 64, 8) == 0)) == [1, 5]
    # 55 = 6 · 9 + 1, whose one goes to the first group; three rows go to the first three
    assert list(shapes.group_sizes("quarter_empty", 55, 8)) == [10, 0, 9, 9, 9, 0, 9, 9]
    assert list(shapes.group_sizes("uniform", 3, 8)) == [1, 1, 1, 0, 0, 0, 0, 0]
    # Zipf(1.2) over 8: the largest has 1 / Σ i^-1.2 = 1 / 2.333 of the rows
    assert shapes.group_sizes("zipf", 1000, 8).max() == pytest.approx(1000 / 2.333, abs=1)


def test_cases_by_name():
    training = benchmark.cases(["forward"], ["training"], "uniform")
    assert len(training) == 2 * len(shapes.TRAINING)
    one = benchmark.cases(["drhs"], ["switch-base"], "uniform")
    assert [case["name"] for case in one] == ["switch-base/up", "switch-base/down"]
    assert one[0]["sizes"] == [256] * 128


def test_real_share_by_hand():
    # 600 rows of 2 groups, tiles of 192 and 128: 300 rows in five 64s, and from row 296 on 304 rows in as many
    assert benchmark.real_share([300, 300]) == pytest.approx(600 / 640)
    # fewer than 192 rows a group: tiles of 128
    assert benchmark.real_share([300, 0]) == pytest.approx(300 / 384)


def test_report_by_hand():
    # 2 experts, one has all 192 rows: two tiles of 128, 0.75 real; 2 · 192 · 64 · 32 = 786432 operations in 1 µs;
    # bytes 2 · (192 · (64 + 32) + 1 · 64 · 32) = 40960
    case = {"name": "x", "ops": ["forward"], "product": (192, 2, 64, 32), "sizes": [192, 0], "launches": 1}
    times = {("dense", "jax"): (0.5, 0.4, 0.6), ("forward", "blocks"): (1.0, 1.0, 1.0), ("both", "blocks"): (6.0,) * 3}
    result = benchmark.report(case, times, 81.92)
    assert result["real_rows"] == 0.75
    ours = result["rates"][1]
    assert ours["tflops"] == pytest.approx(0.786432)
    assert ours["gbs"] == pytest.approx(40.96)
    assert ours["of_dense"] == 0.5
    assert ours["of_copy"] == pytest.approx(0.5)
    # three products in 6 µs, each of the dense one's 0.5
    assert result["rates"][2]["of_dense"] == pytest.approx(0.25)


@pytest.mark.parametrize("ops", [["forward"], ["gated_ffn"]])
def test_the_dense_product_reads_one_matrix(ops):
    """However many experts have rows: 2 · (192 · (64 + 96) + 64 · 96) = 73728 bytes; a block's gate, up and down, each
    64 × 32, are the one matrix of 96 columns."""
    case = {"name": "x", "ops": ops, "product": (192, 2, 64, 96), "tokens": (96, 2), "sizes": [100, 92], "launches": 1}
    result = benchmark.report(case, {("dense", "jax"): (1.0,) * 3, (ops[0], "blocks"): (1.0,) * 3}, 1.0)
    dense, ours = result["rates"]
    assert dense["gbs"] == pytest.approx(73.728)
    assert dense["tflops"] == ours["tflops"] == pytest.approx(2 * 192 * 64 * 96 / 1e6)
    # two experts' weights; a block has rows of 64 columns in and out
    assert ours["gbs"] * 1e3 == pytest.approx(2 * (192 * (160 if ops == ["forward"] else 128) + 2 * 64 * 96))


def test_a_peer_of_this_process_is_timed_beside_ours(monkeypatch):
    monkeypatch.setattr(benchmark.jax_products, "present", lambda: {"theirs": jax.lax.ragged_dot})
    case = {"name": "x", "ops": ["forward", "both"], "product": (8, 2, 8, 8), "sizes": [5, 3]}
    case |= {"launches": 2, "again": 1}
    times = benchmark.bench(case, {op: ["blocks", "xla", "theirs"] for op in case["ops"]})
    assert set(times) == {("dense", "jax"), *((op, i) for op in case["ops"] for i in ("blocks", "xla", "theirs"))}
    with pytest.raises(NotImplementedError, match="theirs needs a GPU"):
        benchmark.timed("forward", case, ["theirs"])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert benchmark.timed("forward", case, [])[1:] == ["xla", "theirs"]
    assert benchmark.timed("forward", case, ["theirs"]) == ["theirs"]


@pytest.mark.parametrize(
    "ops, product, again", [(benchmark.OPS, (64, 2, 16, 16), 2), (block_ops.OPS, (16, 2, 8, 24), 1)]
)
def test_bench_runs_every_op(ops, product, again):
    M = product[0]
    case = {"name": "x", "ops": list(ops), "product": product, "sizes": [M - 6, 6], "launches": 1, "again": again}
    ((case, implementations),) = benchmark.plan([case | {"tokens": (16, 2)}], [])
    times = benchmark.bench(case, implementations)
    names = {op: "xla" if op in block_ops.MOVING else "blocks" for op in ops}  # what runs on a CPU
    assert set(times) == {("dense", "jax"), *names.items()}
    assert all(0 < least <= us <= most for us, least, most in times.values())


def test_a_block_of_each_shape_by_hand():
    (case,) = benchmark.cases(["combine", "gated_ffn"], ["deepseek-v3-ep8"], "uniform")
    # an eighth of 16384 · 8 choices; gate, up and down are as one product of 3 · 2048 columns
    assert (case["name"], case["product"], case["tokens"]) == (
        "deepseek-v3-ep8/block",
        (16384, 32, 7168, 6144),
        (16384, 8),
    )
    up, down, block = benchmark.cases(["forward", "spread"], ["olmoe-1b-7b-decode-8"], "uniform")
    assert [c["ops"] for c in (up, down, block)] == [["forward"], ["forward"], ["spread"]]
    assert [c["again"] for c in (up, down, block)] == [8, 8, 1]


def test_slots_are_sorted_by_group():
    """6 of 8 choices are here: 4 and 2 of two groups, whose rows are in the order of tokens; the others say 6."""
    slot = block_ops.slots({"product": (6, 2, 8, 24), "tokens": (4, 2), "sizes": [4, 2]})
    assert sorted(slot.ravel()) == [0, 1, 2, 3, 4, 5, 6, 6]
    here = [int(row) for row in slot.ravel() if row < 6]
    assert [row for row in here if row < 4] == [0, 1, 2, 3]
    assert [row for row in here if row >= 4] == [4, 5]


def test_work_by_hand():
    # 6 rows, one of two groups has them all, D = 8, F = 4 (12 columns), 4 tokens
    case = {"product": (6, 2, 8, 12), "tokens": (4, 2), "sizes": [6, 0]}
    rows, tokens, weights = 2 * 6 * 8, 2 * 4 * 8, 2 * 8 * 12
    assert block_ops.work("gated_ffn", case) == (2 * 6 * 8 * 12, 2 * rows + weights)
    assert block_ops.work("gated_ffn_both", case) == (3 * 2 * 6 * 8 * 12, 4 * rows + 2 * weights)
    assert block_ops.work("combine", case) == block_ops.work("spread", case) == (0, rows + tokens)
    # rows, tokens; then rows and the gradient of tokens, and the gradient of rows
    assert block_ops.work("combine_both", case) == (0, 3 * rows + 2 * tokens)


def last_line(module, monkeypatch, capsys, *flags) -> str:
    """Of what the command line says before it ends."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    with pytest.raises(SystemExit):
        module.main()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--op=forward,dhls"], "--op: no op 'dhls'; there are all, forward, dlhs, drhs, both, gated_ffn,"),
        (["--shape=olmoe-1b-7b,olmo"], "--shape: no shape 'olmo'; there are training, decode, mixtral-8x7b,"),
        (["--implementation=xla,nonsense"], "no implementation 'nonsense'; there are reference, blocks, xla, mosaic"),
        (["--implementation=nonsense"], "mosaic_tpu, theirs"),
        (["--op=drhs", "--implementation=mosaic_gpu"], "drhs of mixtral-8x7b/up: grouped_matmul: mosaic_gpu can't"),
        (["--op=gated_ffn_both", "--implementation=mosaic_gpu"], "it needs a Hopper GPU; implementation='blocks'"),
        (["--op=spread", "--implementation=mosaic_gpu"], "it needs a Hopper GPU; implementation='xla'"),
        (["--op=forward,combine", "--implementation=blocks"], "combine of mixtral-8x7b/block: combine: unknown impl"),
        (["--op=gated_ffn", "--implementation=theirs"], "unknown implementation 'theirs'; there are reference,"),
        (["--implementation=theirs"], "forward of mixtral-8x7b/up: theirs needs a GPU"),
        (["--json=/no/folder/x.json"], "--json: /no/folder/x.json can't be written: No such file or directory"),
    ],
)
def test_what_cannot_be_timed_is_said_at_once(flags, line, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "copy_rate", lambda: pytest.fail("the timing has begun"))
    monkeypatch.setattr(benchmark.jax_products, "present", lambda: {"theirs": jax.lax.ragged_dot})
    assert line in last_line(benchmark, monkeypatch, capsys, *flags)


def test_all_means_every_op(monkeypatch):
    planned = []
    monkeypatch.setattr(benchmark, "run", lambda cases, *_: planned.extend(cases))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--op=all", "--shape=switch-base"])
    benchmark.main()
    assert [case["ops"] for case, _ in planned] == [list(benchmark.OPS)] * 2 + [list(block_ops.OPS)]
    assert all(list(implementations) == case["ops"] for case, implementations in planned)


def test_what_is_measured_before_an_end_is_kept(monkeypatch, capsys, tmp_path):
    def bench(case, implementations, peer, repeats):
        assert repeats == 3
        if case["name"].endswith("/down"):
            raise benchmark.PeerError("torch's process stopped: killed")
        return {("dense", "jax"): (1.0,) * 3, ("forward", "blocks"): (2.0,) * 3}

    monkeypatch.setattr(benchmark, "bench", bench)
    monkeypatch.setattr(benchmark, "copy_rate", lambda: 1.0)
    file = tmp_path / "times.json"
    flags = ["--shape=switch-base", "--op=forward", f"--json={file}", "--rounds=3"]
    assert last_line(benchmark, monkeypatch, capsys, *flags) == "error: torch's process stopped: killed"
    (result,) = json.loads(file.read_text())
    assert (result["name"], [rate["us"] for rate in result["rates"]]) == ("switch-base/up", [1.0, 2.0])


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    file = tmp_path / "times.json"
    assert benchmark.writable(str(file)) == file
    assert not file.exists()
    file.write_text("[]")
    assert benchmark.writable(str(file)).read_text() == "[]"


def test_traffic_takes_shapes(monkeypatch, capsys):
    assert "no shape 'olmo'; there are training," in last_line(traffic, monkeypatch, capsys, "--shape=olmo")
    monkeypatch.setattr(traffic, "grouped_matmul_bytes", lambda *_: pytest.fail("the computation has begun"))
    monkeypatch.setattr(sys, "argv", ["traffic", "--help"])
    with pytest.raises(SystemExit):
        traffic.main()
    assert "--shape" in capsys.readouterr().out
    monkeypatch.setattr(traffic, "grouped_matmul_bytes", lambda op, M, K, N, sizes, vmem: 100 * M)
    monkeypatch.setattr(traffic, "least_bytes", lambda op, sizes, M, K, N: 80 * M)
    monkeypatch.setattr(sys, "argv", ["traffic", "--shape=switch-base,olmoe-1b-7b-decode-8"])
    traffic.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2 * 3  # sizes of VMEM, shapes, up and down, products
    assert lines[0] == "64 MiB switch-base up forward: " + " ".join(["1.250"] * len(shapes.SIZES))


PEER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print("a note of some library")
    print(json.dumps({} if "case" in asked else {"us": 2.0 * asked["launches"]}), flush=True)
"""


def test_a_peer_takes_its_turns_and_is_reported_where_it_stops(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(benchmark, "_PEER", tmp_path / "peer.py")
    case = {"name": "x", "ops": ["forward"], "product": (8, 1, 8, 8), "sizes": [8], "launches": 3, "again": 1}
    with benchmark.Torch(sys.executable) as peer:
        times = benchmark.bench(case, {"forward": ["blocks"]}, peer)
    assert set(times) == {("dense", "jax"), ("forward", "blocks"), ("dense", "torch"), ("forward", "torch")}
    assert times["forward", "torch"] == times["dense", "torch"] == (6.0, 6.0, 6.0)
    (tmp_path / "peer.py").write_text("import sys; sys.exit('no such module')")
    with benchmark.Torch(sys.executable) as peer, pytest.raises(benchmark.PeerError, match="stopped: no such module"):
        peer.products(case)


def test_an_interpreter_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "copy_rate", lambda: pytest.fail("the timing has begun"))
    line = last_line(benchmark, monkeypatch, capsys, "--shape=switch-base", "--op=forward", "--peer_python=/no/python")
    assert line.startswith("error: --peer_python=/no/python can't be run: No such file")


def test_a_step_that_donates_its_state_can_be_timed():
    """As training steps do: what one call returned is deleted by the next."""
    step = jax.jit(lambda state: state + 1, donate_argnums=0)
    state = jnp.zeros(4)

    def run():
        nonlocal state
        state = step(state)
        return state

    assert set(rounds({"step": run}, repeats=3)) == {"step"}
    np.testing.assert_array_equal(state, [5.0] * 4)  # two untimed calls and three timed ones
