"""Checkpoints: round trips, other meshes, damage, full disks and kills."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import checkpoint
from moejax.errors import UserError

CONFIG, DATA = {"model": {"width": 8}}, {"position": 3}


def state(value: float) -> dict:
    params = {"layers": {"up": jnp.full((4, 64, 32), value)}, "scale": jnp.arange(8.0) + value}
    return {
        "params": params,
        "router_state": {"layers": {"bias": jnp.full((4, 16), -value)}},
        "opt_state": optax.adamw(1e-3).init(params),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def write(directory, *steps: int, keep: int = 3) -> None:
    with checkpoint.Checkpointer(directory, keep) as saver:
        for step in steps:
            saver.save(step, state(step), data=DATA, config=CONFIG)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One run's checkpoints at steps 1 to 4, of which three are kept; tests copy it."""
    directory = tmp_path_factory.mktemp("run")
    write(directory, 1, 2, 3, 4)
    return directory


def test_round_trip_keeps_the_newest_and_every_kind_of_state(written):
    assert sorted(entry.name for entry in (written / "checkpoints").iterdir()) == ["2", "3", "4"]
    found = checkpoint.restore(written, abstract(state(0)))
    assert (found.step, found.data, found.config) == (4, DATA, CONFIG)
    assert_equal(found.trees, state(4))
    assert checkpoint.read_config(written) == CONFIG


def test_parameters_alone_from_a_copy_of_one_checkpoint(written, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written / "checkpoints" / "3", copy)
    shutil.rmtree(copy / "opt_state")
    with pytest.raises(UserError, match=r"opt_state/.* is missing"):  # what the manifest lists must be there …
        checkpoint.restore(copy, {"params": abstract(state(0)["params"])})
    shutil.copytree(written / "checkpoints" / "3" / "opt_state", copy / "opt_state")
    for directory in (copy, written / "checkpoints" / "3", written / "checkpoints"):
        found = checkpoint.restore(directory, {"params": abstract(state(0)["params"])})
        assert list(found.trees) == ["params"]
        assert_equal(found.trees["params"], state(found.step)["params"])


def test_without_targets_arrays_come_back_as_numpy(written):
    found = checkpoint.restore(written)
    assert sorted(found.trees) == ["params", "router_state"]
    assert isinstance(found.trees["params"]["scale"], np.ndarray)
    assert_equal(found.trees["params"], state(4)["params"])


def test_buffers_may_be_donated_once_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    value = jnp.arange(1 << 20, dtype=jnp.float32)
    wanted = np.array(value)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, {"params": {"x": value}}, data=DATA, config=CONFIG)
        overwrite(value).block_until_ready()
    np.testing.assert_array_equal(checkpoint.restore(tmp_path).trees["params"]["x"], wanted)


def test_empty_trees_bare_arrays_and_no_checkpoint(tmp_path):
    assert checkpoint.restore(tmp_path) is None
    assert checkpoint.read_config(tmp_path) is None
    with checkpoint.Checkpointer(tmp_path) as saver:
        trees = {"params": {"x": jnp.ones(2)}, "router_state": {}, "load": jnp.arange(3), "nothing": None}
        saver.save(7, trees, data=DATA, config=CONFIG)
    found = checkpoint.restore(tmp_path, abstract(trees))
    assert_equal(found.trees, trees)


def data_files(path):
    return sorted((p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "manifest deleted", "manifest truncated"])
def test_damage_goes_back_to_the_newest_whole_one_in_one_line(written, tmp_path, damage, caplog):
    shutil.copytree(written, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "4"
    victim = newest / checkpoint.MANIFEST if damage.startswith("manifest") else data_files(newest)[0]
    if damage.endswith("deleted"):
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.restore(tmp_path / "run", abstract(state(0)))
    assert found.step == 3
    assert_equal(found.trees, state(3))
    (record,) = caplog.records
    assert "checkpoints/4 is damaged" in record.message and record.message.endswith("went back to step 3")
    assert "\n" not in record.message
    assert checkpoint.read_config(tmp_path / "run") == CONFIG


def test_a_run_that_went_back_puts_the_damaged_one_aside_and_counts_whole_ones_alone(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    data_files(tmp_path / "run" / "checkpoints" / "4")[0].unlink()
    write(tmp_path / "run", 4, keep=1)
    assert sorted(e.name for e in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "4.damaged"]
    assert_equal(checkpoint.restore(tmp_path / "run", abstract(state(0))).trees, state(4))


def rot(path):
    """Every byte of the arrays' files turns over and the sizes stay: tensorstore notices, the manifest cannot."""
    for file in data_files(path):
        file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))


@pytest.mark.parametrize("again", [4, 5])
def test_what_rots_and_keeps_its_size_is_gone_past_and_replaced(written, tmp_path, again, caplog):
    shutil.copytree(written, tmp_path / "run")
    rot(tmp_path / "run" / "checkpoints" / "4")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.restore(tmp_path / "run", abstract(state(0)))
    assert found.step == 3
    (record,) = caplog.records
    assert "checkpoints/4 is damaged" in record.message and "\n" not in record.message
    with checkpoint.Checkpointer(tmp_path / "run", keep=2, start=found.step) as saver:
        saver.save(again, state(again), data=DATA, config=CONFIG)
    # whether the run saves at that step again or not, the rotten one is no checkpoint any more, nor one of the two kept
    kept = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted(["3", "4.damaged", str(again)])
    assert_equal(checkpoint.restore(tmp_path / "run", abstract(state(0))).trees, state(again))


def test_reads_that_end_after_one_failed_are_not_told_and_all_else_is(monkeypatch):
    told, closed = [], asyncio.new_event_loop()
    closed.close()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    checkpoint._say_nothing_of_late_reads.__wrapped__()

    class Ends:
        def __init__(self, end):
            self.end = end

        def __del__(self):
            self.end()

    def fail():
        raise RuntimeError("Event loop is closed")  # by another way

    Ends(lambda: closed.call_soon_threadsafe(print))
    assert told == []
    Ends(fail)
    Ends(lambda: closed.call_soon_threadsafe(print, 1, 2, 3, nothing=4))
    assert told[0] == "Event loop is closed" and "nothing" in told[1]


def test_rotten_metadata_is_damage_and_no_traceback(written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "run")
    metadata = tmp_path / "run" / "checkpoints" / "4" / "params" / "_METADATA"
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.restore(tmp_path / "run", abstract(state(0))).step == 3
    assert "checkpoints/4 is damaged" in caplog.records[0].message


def test_damaged_ones_do_not_count_as_kept(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    for step in (2, 4):
        data_files(tmp_path / "run" / "checkpoints" / str(step))[0].unlink()
    with checkpoint.Checkpointer(tmp_path / "run", keep=2) as saver:
        saver.save(5, state(5), data=DATA, config=CONFIG)
    kept = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["3", "4", "5"]  # 3 and 5 are whole; 2, older than both, is gone


def test_a_step_that_is_known_to_be_whole_is_not_written_again(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    manifest = tmp_path / "run" / "checkpoints" / "4" / checkpoint.MANIFEST
    before = manifest.stat().st_mtime_ns
    with checkpoint.Checkpointer(tmp_path / "run", start=4) as saver:
        saver.save(4, state(4), data=DATA, config=CONFIG)
        saver.save(5, state(5), data=DATA, config=CONFIG)
        saver.save(5, state(0), data=DATA, config=CONFIG)
    assert manifest.stat().st_mtime_ns == before
    assert_equal(checkpoint.restore(tmp_path / "run", abstract(state(0))).trees, state(5))


def test_a_tree_that_was_never_saved_is_named(written):
    with pytest.raises(UserError, match="holds no load, which this config needs; it holds opt_state, params, router_"):
        checkpoint.restore(written, abstract(state(0)) | {"load": jax.ShapeDtypeStruct((2,), jnp.int32)})


def test_all_damaged_is_one_clear_line(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    for step in (2, 3, 4):
        data_files(tmp_path / "run" / "checkpoints" / str(step))[0].unlink()
    with pytest.raises(UserError, match="no whole checkpoint in") as error:
        checkpoint.restore(tmp_path / "run", abstract(state(0)))
    assert "\n" not in str(error.value)
    for step in (2, 3, 4):
        (tmp_path / "run" / "checkpoints" / str(step) / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.read_config(tmp_path / "run")


def test_another_models_checkpoint_names_the_parameter(written):
    target = {"params": {"layers": {"up": jax.ShapeDtypeStruct((4, 64, 33), jnp.float32)}, "scale": np.ones(8)}}
    with pytest.raises(UserError, match=r"layers/up is \(4, 64, 32\) there, \(4, 64, 33\) in this config"):
        checkpoint.restore(written, target)


def test_asyncios_tracebacks_of_failed_writes_are_left_out_and_others_kept(caplog):
    logger = logging.getLogger("asyncio")
    logger.error("Task exception was never retrieved\nfuture: <Task exception=ValueError('Error writing in OCDBT')>")
    logger.error("Future exception was never retrieved\nfuture: <Future exception=OSError(28, 'No space left')>")
    logger.error("Task exception was never retrieved\nfuture: <Task exception=ValueError('of someone else')>")
    (record,) = caplog.records
    assert "someone else" in record.message


def test_a_failed_save_is_one_line_and_costs_nothing_older(tmp_path, caplog, monkeypatch):
    """The disk fills up as the manifest is written: the last moment before the checkpoint would count."""
    with caplog.at_level(logging.WARNING), checkpoint.Checkpointer(tmp_path, keep=1) as saver:
        saver.save(1, state(1), data=DATA, config=CONFIG)
        assert saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            saver.save(2, state(2), data=DATA, config=CONFIG)
            assert not saver.wait()
        (record,) = caplog.records
        assert record.message.startswith("checkpoint of step 2 was not written (no space left on the disk); ")
        assert "the newest is step 1" in record.message
        assert [entry.name for entry in saver.root.iterdir()] == ["1"]  # nothing half-written takes room
        saver.save(3, state(3), data=DATA, config=CONFIG)  # and the run goes on
        assert saver.wait()
    assert checkpoint.restore(tmp_path, abstract(state(0))).step == 3


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints can't be written .File exists.: .* name another folder"):
        checkpoint.Checkpointer(tmp_path)


# Saves steps 1, 2, … of a state that is full of its step, until it is killed or has done `count` of them.
SAVES_FOREVER = """
import logging, resource, signal, sys
import jax.numpy as jnp
from moejax import checkpoint
directory, first, count, limit = sys.argv[1], *map(int, sys.argv[2:])
logging.basicConfig(format="%(message)s")
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with checkpoint.Checkpointer(directory, keep=2) as saver:
    for step in range(first, first + count):
        if limit and step == first + 1:
            saver.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        params = {str(i): jnp.full((1 << 16,), float(step)) + jnp.arange(1 << 16) for i in range(8)}
        saver.save(step, {"params": params}, data={"position": step}, config={"x": 1})
        print(step, flush=True)
"""


def start(*arguments, **kwargs):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SAVES_FOREVER, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def check_whole(directory, step: int) -> None:
    found = checkpoint.restore(directory)
    assert (found.step, found.data) == (step, {"position": step})
    for value in found.trees["params"].values():
        np.testing.assert_array_equal(value, np.arange(1 << 16, dtype=np.float32) + step)


@pytest.mark.parametrize("limit", [100_000, 10])
def test_a_full_disk_in_the_arrays_keeps_the_older_checkpoint(tmp_path, limit):
    """A file-size limit stands for the full disk: the write of the arrays fails in the background, and with the lower
    limit that of orbax's own files too."""
    process = start(tmp_path, 1, 2, limit, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == ["1", "2"]
    (line,) = [line for line in err.splitlines() if "checkpoint of step 2 was not written" in line]
    assert "the newest is step 1" in line
    check_whole(tmp_path, 1)


@pytest.mark.slow
def test_kill_9_inside_a_save_leaves_nothing_that_looks_whole(tmp_path):
    random = np.random.default_rng(0)
    first = 1
    for _ in range(8):
        process = start(tmp_path, first, 1000, 0, stdout=subprocess.PIPE)
        done = [int(process.stdout.readline()) for _ in range(3)][-1]
        time.sleep(random.uniform(0, 0.15))  # a save takes about 0.1 s: the kill lands anywhere in it
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        steps = [int(e.name) for e in (tmp_path / "checkpoints").iterdir() if e.name.isdecimal()]
        for step in steps:  # not one of them, newest or not, is half
            path = tmp_path / "checkpoints" / str(step)
            assert json.loads((path / checkpoint.MANIFEST).read_text())["step"] == step
            check_whole(path, step)
        assert max(steps) >= done - 1  # `done` was begun after the one before it had been finished
        first = max(steps) + 1
