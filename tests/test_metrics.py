"""The files of a run: each step once, whole lines alone, JSON that every reader takes."""

import dataclasses
import json
import math
import os
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from moejax import accounting, checkpoint, environment, metrics, tensorboard
from moejax.config import Config, ModelConfig, MoEConfig, to_dict
from moejax.errors import UserError

CONFIG = Config(model=ModelConfig(num_layers=1, width=8, num_heads=2, num_kv_heads=1, ffn_width=16, vocab_size=32))


def values(step: int, **changes):
    return {**dict.fromkeys(metrics.FIELDS), "step": step, "loss": 1.0 / step, "tokens_per_second": 1000.0, **changes}


def write(directory, *steps: int, after: int = 0, **options):
    with metrics.Writer(directory, CONFIG, total_steps=100, **{"progress": False, **options}) as writer:
        writer.cut_after(after)
        for step in steps:
            writer.line(values(step), np.array([[step, 0]]))
            writer.evaluation(step, {"loss": 2.0, "max_violation": None})


def steps_in(directory, name):
    return [line["step"] for line in metrics.read_lines(directory / name)]


def test_a_resume_writes_each_step_once(tmp_path):
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 30, 40, after=20)
    for name in metrics.FILES:
        assert steps_in(tmp_path, name) == [10, 20, 30, 40]
    assert len((tmp_path / "environment.jsonl").read_text().splitlines()) == 2
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(first) == list(metrics.FIELDS)
    load, *_ = metrics.read_lines(tmp_path / metrics.LOADS)
    assert load == {"step": 10, "load": [[10, 0]]}


def test_a_start_by_other_code_is_noticed(tmp_path, monkeypatch):
    noticed = []
    for code in ("a", "a", "b", "b"):
        monkeypatch.setattr(environment, "code_hash", lambda router, code=code: code)
        with metrics.Writer(tmp_path, CONFIG, total_steps=100, progress=False) as writer:
            noticed.append(writer.other_code)
    assert noticed == [False, False, True, False]


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 60), keep=st.integers(0, 4))
def test_a_kill_at_any_byte_leaves_whole_lines_after_the_cut(tmp_path_factory, cut, keep):
    directory = tmp_path_factory.mktemp("run")
    path = directory / metrics.METRICS
    text = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3))
    path.write_text(text[: len(text) - cut])
    whole = text[: len(text) - cut].count("\n")
    with metrics.Writer(directory, CONFIG, total_steps=100, progress=False) as writer:
        writer.cut_after(keep)
    assert steps_in(directory, metrics.METRICS) == list(range(1, min(keep, whole) + 1))
    assert path.read_text() == "" or path.read_text().endswith("\n")


def test_numbers_of_every_kind_become_json_and_nan_becomes_null():
    got = metrics.plain({
        "a": math.nan, "b": np.float32(0.5), "c": jnp.array([1.0, np.inf]), "d": 3, "e": None, "f": [math.inf, 1]
    })  # fmt: skip
    assert got == {"a": None, "b": 0.5, "c": [1.0, None], "d": 3, "e": None, "f": [None, 1]}
    json.dumps(got, allow_nan=False)


def test_the_config_comes_back_from_the_run_or_from_its_checkpoint_alone(tmp_path):
    assert metrics.read_config(tmp_path / "new") is None
    sparse = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=MoEConfig(num_experts=4)))
    with metrics.Writer(tmp_path / "run", sparse, total_steps=1, progress=False):
        pass
    assert metrics.read_config(tmp_path / "run") == sparse
    with checkpoint.Checkpointer(tmp_path / "copy") as saver:
        saver.save(1, {"params": {"x": jnp.ones(2)}}, data={}, config=to_dict(sparse))
    assert metrics.read_config(tmp_path / "copy") == sparse
    assert metrics.read_config(tmp_path / "copy" / "checkpoints" / "1") == sparse
    (tmp_path / "run" / "config.json").write_text('{"model"')
    with pytest.raises(UserError, match=r"config\.json is not whole"):
        metrics.read_config(tmp_path / "run")


def test_the_progress_names_loss_rate_mfu_and_maxvio(tmp_path, monkeypatch):
    # A chip of 8 (test) devices, each 1e9 FLOP/s: MFU = 1000 tokens/s · FLOPs per token / 8e9
    monkeypatch.setattr(environment, "peak_flops", lambda kind: 1e9)
    flops = accounting.account(CONFIG.model, CONFIG.data.sequence_length).train_flops_per_token
    with metrics.Writer(tmp_path, CONFIG, total_steps=100, devices=8, progress=False) as writer:
        text = writer.summary(values(4, max_violation=0.125, overflow_fraction=0.0))
        overflowing = writer.summary(values(4, max_violation=0.125, overflow_fraction=0.0312))
    assert text == f"loss 0.2500, 1,000 tokens/s, MFU {1000 * flops / 8e9:.1%}, MaxVio 0.12"
    assert overflowing == text + ", 3.12% of choices overflow in the exchange"


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    write(tmp_path, 1, 2, 3, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step") and "tokens/s" in line]
    # The first alone: the others follow too soon. 99 steps of 32 · 256 tokens at 1000 a second: 811 s.
    assert lines == ["step 1/100  loss 1.0000, 1,000 tokens/s, 13:31 left"]
    write(tmp_path, 4, progress=False)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    write(tmp_path, 50, 100, progress=True)
    bar = capsys.readouterr().err.splitlines()[-1]
    assert "100/100" in bar and "loss 0.0100" in bar


def test_tensorboard_and_environment_are_written(tmp_path):
    write(tmp_path, 10)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    record = json.loads((tmp_path / "environment.jsonl").read_text())
    assert record["packages"]["jax"] and record["devices"]["count"] == 8


def scalars(path):
    """(step, name, value) of an event file: records of a length, its checksum, an event and its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_holds_what_was_given_and_hides_what_came_after_a_checkpoint(tmp_path):
    board = tensorboard.Board(tmp_path, first=3)
    board.add(3, {"loss": 1.5, "none": None, "per_layer": [1.0]})
    (path,) = tmp_path.iterdir()
    assert scalars(path) == [(3, "loss", 1.5)]  # at once, not when it is closed
    board.close()
    assert event_pb2.SessionLog(status=event_pb2.SessionLog.START).SerializeToString() in path.read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, monkeypatch, caplog):
    board = tensorboard.Board(tmp_path, first=1)
    board._file._writer.close()
    monkeypatch.setattr(board._file, "_writer", open("/dev/full", "wb"))  # noqa: SIM115
    for step in (1, 2, 3):
        board.add(step, {"loss": 1.0})
    board.close()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: no more scalars for TensorBoard (No space left on device); the run goes on"
    ]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", 65e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("TPU7x", 1153.5e12), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks_by_device_kind(kind, peak):
    assert environment.peak_flops(kind) == peak


def test_profile_traces_the_chosen_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(metrics.jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(metrics.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, profile_steps=(2, 3)))
    with metrics.Writer(tmp_path, config, total_steps=5, progress=False) as writer:
        for step in range(1, 6):
            writer.profile(step)
            calls.append(step)
    assert calls == [1, "start", 2, 3, "stop", 4, 5]


def test_durations():
    assert [metrics.duration(s) for s in (5, 65.4, 3723)] == ["0:05", "1:05", "1:02:03"]
