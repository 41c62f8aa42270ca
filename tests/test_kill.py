"""kill -9 at arbitrary moments, also inside a checkpoint's writing: the run ends where it would have, bit for bit."""

import contextlib
import json
import signal
import time

import numpy as np
import pytest
import small
from processes import Server
from test_train import assert_same_run

KILLS = 5


@pytest.mark.slow
def test_a_run_killed_five_times_is_the_undisturbed_run(tmp_path):
    small.write_text(tmp_path / "text")
    command = [
        "train.py", "--config=experiments/configs/fine_grained_aux_free.py",
        f"--config.data.source=text:{tmp_path}/text/*.txt", "--config.model.moe.num_experts=8",
        "--config.model.num_layers=1", "--config.model.width=32", "--config.model.ffn_width=32",
        "--config.data.sequence_length=16", "--config.data.batch_size=8", "--config.train.steps=150",
        "--config.train.log_every=3", "--config.train.checkpoint_every=5", "--config.train.eval_every=60",
        "--config.train.eval_batches=2",
    ]  # fmt: skip
    random = np.random.default_rng(0)
    killed, half_written, reached = tmp_path / "killed", 0, []
    with Server(tmp_path) as server:
        ended = server.run(*command, f"--workdir={tmp_path / 'undisturbed'}")
        assert ended.code == 0, ended.err
        for kill in range(KILLS):
            before, left = newest(killed), half(killed)
            pid = server.start(*command, f"--workdir={killed}")
            if kill % 2:  # as a checkpoint is being written, often the first since the last kill
                wait_for(lambda left=left: half(killed) - left)
            else:  # anywhere after the next whole checkpoint: before a line, after one, while saving or evaluating
                wait_for(lambda before=before: newest(killed) > before)
                time.sleep(random.uniform(0, 0.3))
            server.kill(pid, signal.SIGKILL)
            assert server.end().code == -signal.SIGKILL, "it was done before it was killed: give it more steps"
            half_written += bool(half(killed))
            reached.append(newest(killed))
        ended = server.run(*command, f"--workdir={killed}")
        assert ended.code == 0, ended.err
    assert half_written, "no kill fell into the writing of a checkpoint"
    assert reached == sorted(reached) and 0 < reached[-1] < 150
    assert_same_run(killed, tmp_path / "undisturbed")
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(3, 151, 3))


def checkpoints(workdir):
    folder = workdir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def half(workdir) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when the run was killed."""
    found = set()
    for entry in checkpoints(workdir):
        with contextlib.suppress(FileNotFoundError):
            if ".orbax-checkpoint-tmp" in entry.name:
                found.add((entry.name, entry.stat().st_ino))
    return found


def newest(workdir) -> int:
    return max([0, *(int(entry.name) for entry in checkpoints(workdir) if entry.name.isdecimal())])


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)
