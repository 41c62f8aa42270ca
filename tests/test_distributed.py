"""Several processes of one run on this machine: what they refuse, what ends them, and that they train as one does."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import small
from processes import ROOT
from test_train import trees

from moejax import checkpoint, distributed, environment
from moejax.distributed import Life
from moejax.errors import UserError

# A process, with a shorter patience than 30 s for another's silence.
PROCESS = """
import runpy, sys
from moejax import distributed
distributed.BEAT_SECONDS, distributed.SILENCE_SECONDS, distributed.SHARED_SECONDS = 0.3, 3.0, 0.5
sys.argv[0] = "experiments/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DEVICES = 4  # of all processes together


class Run:
    """The processes of one run: `start` them, look at them, `end` them all."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        small.write_text(folder / "text")

    def start(self, count, name, *more, one=()):
        """`count` processes over DEVICES devices that train the config `name`; `one`: flags of the last one alone."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
            "MOEJAX_CACHE": str(self.folder / "cache"), "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        flags = [
            f"--workdir={self.folder / 'run'}", f"--config=experiments/configs/{name}.py",
            f"--config.data.source=text:{self.folder}/text/*.txt", "--config.data.eval_fraction=0",
            "--config.model.num_layers=1", "--config.model.width=32", "--config.model.ffn_width=32",
            "--config.data.sequence_length=16", "--config.data.batch_size=8", "--config.optimizer.decay_steps=1000",
            "--config.train.log_every=1", "--config.train.checkpoint_every=4", *more,
        ]  # fmt: skip
        self.processes = []
        for i in range(count):
            several = ["--distributed", f"--coordinator=localhost:{port}", f"--process_id={i}"]
            several = [*several, f"--num_processes={count}"] if count > 1 else []
            own = [*several, *(one if i == count - 1 else ())]
            with open(self.folder / f"err{i}", "wb") as file:
                command = [sys.executable, "-c", PROCESS, *flags, *own]
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))

    def end(self, seconds=120):
        """Waits for all: [(status, what it said)]."""
        try:
            codes = [process.wait(seconds) for process in self.processes]
        finally:
            self.kill()
        return [(code, (self.folder / f"err{i}").read_text()) for i, code in enumerate(codes)]

    def kill(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
                process.wait()

    def lines(self):
        with open(self.folder / "run" / "metrics.jsonl") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def wait_for_step(self, step, seconds=120):
        deadline = time.monotonic() + seconds
        while not (self.folder / "run" / "checkpoints" / str(step)).is_dir():
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.end(1)
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.kill()


DENSE = ("dense", "--config.mesh.fsdp=2")
SPARSE = ("fine_grained_aux_free", "--config.model.moe.num_experts=8", "--config.mesh.expert=2")
LONG = "--config.train.steps=5000"


def assert_as_one_process(run, steps, config):
    """The run's lines and state equal those of one process that never stopped, but for the order of sums."""
    found, (_, arrays) = run.lines(), trees(run.folder / "run")
    shutil.rmtree(run.folder / "run")
    run.start(1, *config, f"--config.train.steps={steps}")
    assert run.end()[0][0] == 0
    wanted, (_, reference) = run.lines(), trees(run.folder / "run")
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in found], [line[name] for line in wanted], rtol=2e-5)
    assert len({line["loss"] for line in wanted}) == steps  # no two batches are alike
    for name, value in reference.items():
        if name.startswith("router_state"):  # moved by signs of whole numbers
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        elif name.startswith("params"):
            np.testing.assert_allclose(arrays[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_one_of_them_killed_and_one_goes_on(run):
    run.start(2, *DENSE, LONG)
    run.wait_for_step(4)
    run.processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (code, said), (status, _) = run.end()
    assert (code, status) == (1, -signal.SIGKILL)
    assert time.monotonic() - killed < 10  # silence of 3 s here: of 30 s, it would be 37
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert f"process 1 ({socket.gethostname()}) gave no sign of life" in line
    last = run.lines()[-1]["step"] + 2
    run.start(1, *DENSE, f"--config.train.steps={last}")
    ((code, said),) = run.end()
    assert code == 0, said
    assert "continuing from the checkpoint of step" in said
    assert_as_one_process(run, last, DENSE)


@pytest.mark.long  # four interpreters on two cores: almost a minute
def test_four_processes_stop_together_at_a_signal_and_one_goes_on(run):
    """Experts lie across processes, two by two; a restart on one compiles what the reference compiles."""
    run.start(4, *SPARSE, LONG)
    run.wait_for_step(4)
    run.processes[2].send_signal(signal.SIGTERM)
    ended = run.end()
    assert [code for code, _ in ended] == [143] * 4, ended
    assert "error" not in "".join(said for _, said in ended)
    stopped = run.lines()[-1]["step"]
    assert f"SIGTERM: step {stopped} is saved" in ended[0][1]
    assert all("step" not in said for _, said in ended[1:])  # only process 0 tells
    run.start(1, *SPARSE, f"--config.train.steps={stopped + 3}")
    ended = run.end()
    assert ended[0][0] == 0, ended
    assert f"continuing from the checkpoint of step {stopped}" in ended[0][1]
    assert_as_one_process(run, stopped + 3, SPARSE)


@pytest.mark.long
def test_four_processes_one_of_them_killed_and_two_go_on(run):
    """Experts lie across processes, rows go between them in chunks; the others name the one that was killed."""
    config = (*SPARSE, "--config.model.moe.exchange=all_to_all", "--config.model.moe.exchange_chunks=2")
    run.start(4, *config, LONG)
    run.wait_for_step(4)
    run.processes[2].send_signal(signal.SIGKILL)
    ended = run.end()
    assert [code for code, _ in ended] == [1, 1, -signal.SIGKILL, 1], ended
    for _, said in (ended[0], ended[1], ended[3]):
        (line,) = [line for line in said.splitlines() if line.startswith("error:")]
        assert "process 2" in line
    last = run.lines()[-1]["step"] + 2
    run.start(2, *config, f"--config.train.steps={last}")
    ended = run.end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert "continuing from the checkpoint of step" in ended[0][1]
    assert_as_one_process(run, last, config)


MEET = """
import sys, time
from moejax import distributed
distributed.initialize(sys.argv[1], int(sys.argv[2]), 2)
print("met", flush=True)
time.sleep(100)
"""


def test_process_0_dies_and_the_other_names_it(tmp_path):
    """jax ends the other in the same moment, by abort: the line comes from the witness beside it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with open(tmp_path / "said", "wb") as said, contextlib.ExitStack() as ended:
        processes = []
        for i in range(2):
            command = [sys.executable, "-c", MEET, coordinator, str(i)]
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said)
            processes.append(ended.enter_context(run))
            ended.callback(run.kill)
        assert [process.stdout.readline() for process in processes] == [b"met\n"] * 2
        processes[0].kill()
        assert processes[1].wait(60) != 0
        line = f"error: process 0 ({coordinator}), which the others meet at, can't be reached: it died or lost its"
        deadline = time.monotonic() + 20
        while line not in (tmp_path / "said").read_text():
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)


def test_processes_with_different_configs_stop_before_the_first_step(run):
    run.start(2, *DENSE, LONG, one=["--config.optimizer.learning_rate=0.5"])
    for code, said in run.end():
        assert code == 2 or (code == 1 and "ended" in said)
        assert "process 1 differs from process 0 in config.optimizer.learning_rate (0.5, and 0.00" in said
        assert "Traceback" not in said
    assert not (run.folder / "run").exists()


def test_processes_whose_workdir_is_not_shared_stop_before_the_first_step(run):
    run.start(2, *DENSE, LONG, one=[f"--workdir={run.folder / 'own'}"])
    for code, said in run.end():
        assert code == 2 or (code == 1 and "ended" in said)
        assert "process 1 differs from process 0 in a file of process 0 in --workdir, which must be on a disk" in said
        assert "Traceback" not in said


def test_the_one_that_died_is_named_before_jax_ends_the_others_and_within_a_minute():
    """jax may take a process for dead after half of its patience, if that beat half of it before it died."""
    named = distributed.SILENCE_SECONDS + 2 * distributed.BEAT_SECONDS
    assert named < distributed.JAX_SECONDS / 2 and named + 2 * distributed.BEAT_SECONDS < 60


def test_other_code_and_other_parameters_have_other_hashes(tmp_path, monkeypatch):
    (tmp_path / "own_router.py").write_text("def route(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = environment.code_hash("own_router:route")
    assert first == environment.code_hash("own_router:route") != environment.code_hash(None)
    assert first == environment.code_hash(f"{tmp_path}/own_router.py:route")
    monkeypatch.setitem(sys.modules, "a_notebook", types.ModuleType("a_notebook"))  # no file, no spec
    assert len(environment.code_hash("a_notebook:route")) == 12
    (tmp_path / "own_router.py").write_text("def route(): return 1\n")
    assert first != environment.code_hash("own_router:route")
    for name, value in (("a", 1.0), ("c", 2.0)):
        with checkpoint.Checkpointer(tmp_path / name) as saver:
            saver.save(3, {"params": {"w": np.full((4, 4), value, np.float32)}}, data={}, config={})
    prints = [checkpoint.fingerprint(tmp_path / name) for name in ("a", "c")]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert checkpoint.fingerprint(tmp_path / "copy") == prints[0] != prints[1]
    assert checkpoint.fingerprint(tmp_path / "nothing") is None


def test_the_first_difference_is_named_with_both_values():
    assert distributed.difference({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) == ""
    assert distributed.difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b (3, and 2 in process 0)"
    assert distributed.difference({"a": 1}, {"b": 1}) == "a (None, and 1 in process 0)"


def test_who_ended_is_told_from_signs_of_life():
    seen: dict[int, tuple[int, float]] = {}
    both = {1: Life("left", beat=4), 2: Life("right", beat=7)}
    assert distributed.verdict(both, seen, now=100.0) is None
    both[1] = Life("left", beat=5)
    assert distributed.verdict(both, seen, now=129.0) is None
    assert distributed.verdict(both, seen, now=130.0) is None  # 2 is silent for 30 s: not longer than that
    line = distributed.verdict(both, seen, now=131.0)
    assert line is not None and line.startswith(
        "process 2 (right) gave no sign of life for 31 s: it died or lost its network"
    )
    both[2] = Life("right", beat=7, ended="")  # done: silence is no news
    assert distributed.verdict(both, seen, now=150.0) is None
    both[2] = Life("right", beat=8, ended="the disk is full")
    assert distributed.verdict(both, seen, now=151.0) == "process 2 (right) ended: the disk is full"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--process_id and --num_processes not given; give --coordinator=HOST:PORT"),
        ({"coordinator": "a", "process_id": 0, "num_processes": 1}, "--coordinator=a: give HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, "--process_id=2: it must lie in 0 … 1"),
        ({}, "neither Slurm, Cloud TPU, GKE nor MPI started this process"),
    ],
)
def test_what_cannot_be_meant_is_one_line(given, message, monkeypatch):
    # These tests have asked for devices already, of which jax would complain first.
    monkeypatch.setattr(jax.distributed, "initialize", jax._src.distributed.global_state.initialize)
    with pytest.raises(UserError) as error:
        distributed.initialize(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_process_is_alike_and_leaves_as_ever():
    distributed.check_alike({"a": 1})
    distributed.finish()
    distributed.leave(2, "why")
