"""The training loop: a run that is stopped, killed, moved or damaged ends where the undisturbed one does."""

import dataclasses
import functools
import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from moejax import beginning, checkpoint, data, metrics, optimizer, sharding, tokenizers, train, train_step
from moejax.config import Config, MeshConfig
from moejax.errors import UserError
from moejax.models.lm import LM

STEPS = 10
# Logged at 3, 6, 9 and 10, saved at 4, 8 and 10: no checkpoint but the last falls on a line.
EVERY = {"log_every": 3, "checkpoint_every": 4, "eval_every": 5, "eval_batches": 2}
JSONL = ("metrics.jsonl", "evaluations.jsonl", "expert_load.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text/*.txt, its cache, and the runs that tests share."""
    folder = tmp_path_factory.mktemp("runs")
    small.write_text(folder / "text")
    return folder


def config(place, name="dense", mesh=None, train=None, **fields) -> Config:
    train = {"steps": STEPS, **EVERY, **(train or {})}
    base = small.config(small.ROUTERS[name], model={"vocab_size": None}, train=train)
    source = data.DataConfig(
        source=f"text:{place}/text/*.txt", cache_dir=str(place / "cache"), sequence_length=16, batch_size=8
    )
    optimizer = dataclasses.replace(base.optimizer, decay_steps=None)
    return dataclasses.replace(base, data=source, optimizer=optimizer, mesh=mesh or MeshConfig(data=1), **fields)


def go(config, workdir, stop_at=None):
    return train.run(config, workdir, stop_at=stop_at, progress=False)


def lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def without_speed(workdir):
    """Every line of the run's jsonl files, but for how fast it was."""
    return {
        name: [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(workdir, name)]
        for name in JSONL
        if (workdir / name).exists()
    }


def trees(workdir):
    """All arrays of a run's newest checkpoint, by path, and its step."""
    manifest = json.loads((newest(workdir) / checkpoint.MANIFEST).read_text())
    found = {}
    for name in beginning.TREES:
        if (newest(workdir) / name).is_dir():
            leaves = jax.tree_util.tree_leaves_with_path(checkpoint._read_numpy(newest(workdir) / name))
            found |= {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return manifest["step"], found


def newest(workdir):
    return max((e for e in (workdir / "checkpoints").iterdir() if e.name.isdecimal()), key=lambda e: int(e.name))


def assert_same_run(found, wanted):
    """Bit for bit: parameters, optimizer state, router state, loads, and every line."""
    assert without_speed(found) == without_speed(wanted)
    (step, arrays), (other, reference) = trees(found), trees(wanted)
    assert step == other
    assert arrays.keys() == reference.keys()
    for name, value in reference.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


@functools.lru_cache
def undisturbed(place, name):
    workdir = place / f"{name}-undisturbed"
    result = go(config(place, name), workdir)
    assert result["step"] == STEPS and result["tokens_per_second"] > 0
    return workdir


@functools.lru_cache
def interrupted(place, name):
    """A run stopped after step 5: between lines, between checkpoints, and just after an evaluation."""
    workdir = place / f"{name}-interrupted"
    assert go(config(place, name), workdir, stop_at=5)["step"] == 5
    return workdir


def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.mark.parametrize("name", ["dense", "aux_free"])
def test_interrupted_and_resumed_is_the_undisturbed_run(place, tmp_path, name):
    workdir = copy(interrupted(place, name), tmp_path)
    assert newest(workdir).name == "5"
    assert [line["step"] for line in lines(workdir)] == [3]
    result = go(config(place, name), workdir)
    assert_same_run(workdir, undisturbed(place, name))
    assert [line["step"] for line in lines(workdir)] == [3, 6, 9, 10]
    assert [line["step"] for line in lines(workdir, "evaluations.jsonl")] == [5, 10]
    assert result["loss"] == lines(workdir, "evaluations.jsonl")[-1]["loss"]
    _, arrays = trees(workdir)
    if name == "aux_free":
        biases = next(value for path, value in arrays.items() if path.startswith("router_state"))
        assert 0 < np.abs(biases).max() <= STEPS * 0.01 + 1e-6  # the rule moved them, by 0.01 a step
        # The load since the last line came through the checkpoint at 5: two layers, 3 steps · 8 · 16 tokens · top 2.
        loads = {line["step"]: np.array(line["load"]) for line in lines(workdir, "expert_load.jsonl")}
        np.testing.assert_array_equal(loads[6].sum(axis=1), [3 * 8 * 16 * 2] * 2)


@pytest.mark.parametrize("name", ["dense", "aux_free"])
def test_lines_have_every_field_once_and_learn(place, name):
    found = lines(undisturbed(place, name))
    sparse = {"load_balance_loss", "router_z_loss", "max_violation", "max_violation_per_layer", "dead_experts",
              "dropped_fraction", "routing_entropy"}  # fmt: skip
    for line in found:
        assert tuple(line) == metrics.FIELDS
        missing = (sparse if name == "dense" else set()) | {"mtp_loss", "overflow_fraction"}  # it has neither
        assert {field for field, value in line.items() if value is None} == missing
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[0]["learning_rate"] > found[-1]["learning_rate"] > 0
    if name == "aux_free":
        assert len(found[-1]["max_violation_per_layer"]) == 2


@pytest.mark.slow  # two more compilations
def test_a_run_goes_on_on_another_mesh(place, tmp_path):
    name, mesh = "aux_free", {"data": 2, "fsdp": 2}
    workdir = copy(interrupted(place, name), tmp_path)
    go(config(place, name, mesh=MeshConfig(**mesh)), workdir)
    for found, wanted in zip(lines(workdir), lines(undisturbed(place, name)), strict=True):
        np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-3)
    (_, arrays), (_, reference) = trees(workdir), trees(undisturbed(place, name))
    assert arrays.keys() == reference.keys()


def test_a_longer_run_continues_the_schedule_and_does_not_bend_it(place, tmp_path):
    workdir = copy(undisturbed(place, "dense"), tmp_path)
    longer = config(place, train={"steps": 12})
    go(longer, workdir)
    stored = metrics.read_config(workdir)
    assert (stored.train.steps, stored.optimizer.decay_steps) == (12, STEPS)
    # The same as if 12 steps over a horizon of 10 had been asked for at once, but for the line that ended the first.
    at_once = dataclasses.replace(longer, optimizer=dataclasses.replace(longer.optimizer, decay_steps=STEPS))
    go(at_once, tmp_path / "at_once")
    step, arrays = trees(workdir)
    _, reference = trees(tmp_path / "at_once")
    assert step == 12
    for path, value in reference.items():
        np.testing.assert_array_equal(arrays[path], value, err_msg=path)
    found = {line["step"]: line for line in without_speed(workdir)["metrics.jsonl"]}
    wanted = {line["step"]: line for line in without_speed(tmp_path / "at_once")["metrics.jsonl"]}
    assert sorted(found) == [3, 6, 9, 10, 12] and sorted(wanted) == [3, 6, 9, 12]
    assert all(found[step] == wanted[step] for step in wanted)


def test_a_finished_run_is_evaluated_again_and_left_alone(place, tmp_path):
    workdir = copy(undisturbed(place, "dense"), tmp_path)
    before = without_speed(workdir)
    result = go(config(place), workdir)
    assert (result["step"], result["tokens_per_second"]) == (STEPS, None)
    assert result["loss"] == lines(workdir, "evaluations.jsonl")[-1]["loss"]
    assert without_speed(workdir) == before


def test_init_from_starts_a_new_run_from_anothers_parameters(place, tmp_path):
    source = undisturbed(place, "dense")
    new = config(place, train={"init_from": str(source), "log_every": 1})
    go(new, tmp_path / "new", stop_at=1)
    first = lines(tmp_path / "new")[0]
    assert first["step"] == 1  # its own steps, schedule and data, from the beginning
    # The first batch is that of the first run, now seen by the trained parameters.
    untrained = config(place, train={"log_every": 1})
    go(untrained, tmp_path / "untrained", stop_at=1)
    assert first["loss"] < lines(tmp_path / "untrained")[0]["loss"] - 0.1
    assert first["learning_rate"] == lines(tmp_path / "untrained")[0]["learning_rate"]
    with pytest.raises(UserError, match=r"train\.init_from=.*nowhere: there is no checkpoint"):
        go(config(place, train={"init_from": str(tmp_path / "nowhere")}), tmp_path / "other")


@pytest.mark.parametrize(("old", "new"), [("top_k", "aux_free"), ("aux_free", "top_k"), ("aux_free", "aux_free")])
def test_init_from_with_and_without_selection_biases(tmp_path, old, new, caplog):
    """The router moves on from a loss to the bias rule, or back; biases that aren't there begin at 0."""
    mesh = sharding.make_mesh({"data": 1})

    def begin(name):
        moe = dataclasses.replace(small.ROUTERS["aux_free"], router=small.ROUTERS[name].router, bias_update_rate=0.0)
        settings = small.config(moe)
        model, tx = LM(settings.model), optimizer.make(settings.optimizer)
        return jax.eval_shape(functools.partial(train_step.init, model, tx), jax.random.key(0)), model, tx

    before, *_ = begin(old)
    before = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), before)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(7, {name: getattr(before, name) for name in beginning.TREES}, data={}, config={})
    shapes, model, tx = begin(new)
    found = beginning.start_from(shapes, str(tmp_path), model, tx, mesh)
    jax.tree.map(np.testing.assert_array_equal, found.params, before.params)
    biases = jax.tree.leaves(found.router_state)
    assert len(biases) == (new == "aux_free")
    for bias in biases:
        np.testing.assert_array_equal(bias, np.full(bias.shape, old == "aux_free", np.float32))
    assert int(found.step) == 0 and all(not np.any(moment) for moment in jax.tree.leaves(found.opt_state))
    said = [record.message for record in caplog.records]
    assert ("has no selection biases; here they begin at 0" in "".join(said)) == ((old, new) == ("top_k", "aux_free"))


@pytest.mark.parametrize("scanned", [True, False])
def test_init_from_a_run_whose_layers_are_kept_the_other_way(tmp_path, scanned, caplog):
    """Stacked ones from one by one, and the other way round, onto a mesh that splits them."""
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 4})
    settings = [
        small.config(small.ROUTERS["aux_free"], model={"scan_layers": way, "num_layers": 3, "first_dense_layers": 1})
        for way in (not scanned, scanned)
    ]
    models, tx = [LM(each.model) for each in settings], optimizer.make(settings[0].optimizer)
    before = train_step.create(models[0], tx, mesh, 0)

    def start(model):
        shapes = jax.eval_shape(functools.partial(train_step.init, model, tx), jax.random.key(0))
        return beginning.start_from(shapes, str(tmp_path), model, tx, mesh)

    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(7, {name: getattr(before, name) for name in beginning.TREES}, data={}, config={})
    found = start(models[1])
    same = train_step.create(models[1], tx, mesh, 0)
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.router_state), (same.params, same.router_state))
    for leaf, wanted in zip(jax.tree.leaves(found.params), jax.tree.leaves(same.params), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    if not scanned:
        return  # what follows is the same either way
    other = dataclasses.replace(models[1].config, width=16)
    with pytest.raises(UserError, match="is of another model"):
        start(LM(other))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(place, tmp_path, caplog):
    workdir = copy(undisturbed(place, "dense"), tmp_path)
    files = [file for file in (newest(workdir) / "params").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, logger="moejax"):
        go(config(place), workdir)
    (record,) = caplog.records
    assert "checkpoints/10 is damaged" in record.message and record.message.endswith("went back to step 8")
    assert_same_run(workdir, undisturbed(place, "dense"))


def full_disk(step):
    """os.fsync on a disk that has no room for the checkpoint of `step`."""
    fsync = os.fsync

    def full(descriptor):
        if f"/{step}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return fsync(descriptor)

    return full


def test_a_full_disk_while_saving_costs_that_checkpoint_alone(place, tmp_path, caplog, monkeypatch):
    """The disk is full while the manifest of step 4 is written, the last moment before the checkpoint would count."""
    monkeypatch.setattr(os, "fsync", full_disk(4))
    with caplog.at_level(logging.WARNING, logger="moejax"):
        result = go(config(place), tmp_path / "run")
    (record,) = caplog.records
    assert record.message.startswith("checkpoint of step 4 was not written (no space left on the disk)")
    assert result["step"] == STEPS
    assert_same_run(tmp_path / "run", undisturbed(place, "dense"))


def test_a_full_disk_at_the_end_is_an_error_and_the_next_call_makes_it_up(place, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk(10))
        with pytest.raises(UserError, match="step 10 is not saved; the checkpoint of step 8 is kept: free"):
            go(config(place), tmp_path / "run")
    assert "checkpoint of step 10 was not written" in caplog.text
    go(config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(place, "dense"))


def test_a_full_disk_under_the_metrics_stops_the_run_in_one_line(place, tmp_path, monkeypatch):
    append = metrics._append

    def full(path, values):
        if path.name == "metrics.jsonl" and values["step"] == 9:
            path = tmp_path / "run" / "full"
            path.symlink_to("/dev/full")
        append(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_append", full)
        with pytest.raises(UserError, match=r"full can't be written \(No space left on device\): free its disk"):
            go(config(place), tmp_path / "run")
    assert newest(tmp_path / "run").name == "8"
    go(config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(place, "dense"))


def test_a_workdir_that_cannot_be_written_and_one_whose_config_cannot_be_read(place, tmp_path, capsys):
    with pytest.raises(UserError, match=r"/proc/none can't be written"):
        go(config(place), "/proc/none")
    workdir = copy(interrupted(place, "dense"), tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    train.run(config(place, train={"steps": 1}), workdir)
    assert "there is no checkpoint in" in capsys.readouterr().err
    (workdir / "config.json").write_text('{"modle": {}}')
    with pytest.raises(UserError, match=r"config\.json: config\.modle does not exist; the nearest is config\.model"):
        go(config(place), workdir)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(place, tmp_path):
    wild = config(place, train={"checkpoint_every": 1, "log_every": 1})
    wild = dataclasses.replace(wild, optimizer=dataclasses.replace(wild.optimizer, learning_rate=1e30))
    with pytest.raises(UserError, match=r"step \d+: the loss is .*, the gradient norm (nan|inf): stopped") as error:
        go(wild, tmp_path / "run")
    assert "\n" not in str(error.value)
    step = int(str(error.value).split()[1].rstrip(":"))
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, step))
    assert all(np.isfinite(line["loss"]) for line in logged)
    saved, arrays = trees(tmp_path / "run")
    assert saved == step - 1
    assert all(np.all(np.isfinite(value)) for value in arrays.values())


@pytest.mark.parametrize("name", ["total_loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_each_kind_of_infinity_is_seen(place, tmp_path, name, value):
    with checkpoint.Checkpointer(tmp_path) as saver, pytest.raises(UserError, match=r"step 7: .*stopped"):
        train.check_finite(7, {"total_loss": 1.0, "grad_norm": 1.0} | {name: value}, saver)


def test_an_update_that_is_not_finite_is_never_saved(place, tmp_path, monkeypatch):
    """The loss of step 3 is finite, and so is its gradient: what it leaves is not."""

    def poison(state):
        if int(state.step) < 3:
            return state
        return dataclasses.replace(state, params=jax.tree.map(lambda a: a * jnp.float32(np.nan), state.params))

    monkeypatch.setattr(train, "reset_load", poison)
    with pytest.raises(UserError, match=r"step 3: its update left parameters .* not finite: stopped") as error:
        go(config(place, train={"checkpoint_every": 1, "log_every": 1, "eval_every": 1}), tmp_path / "run")
    assert "\n" not in str(error.value)
    saved, arrays = trees(tmp_path / "run")
    assert saved == 2
    assert all(np.all(np.isfinite(value)) for value in arrays.values())
    assert [line["step"] for line in lines(tmp_path / "run", "evaluations.jsonl")] == [1, 2]


@pytest.mark.parametrize("tree", ["params", "router_state", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_each_kind_of_state_is_checked(tmp_path, tree, value):
    good = {"params": {"w": jnp.ones(3)}, "router_state": {"b": jnp.ones(3)}, "opt_state": (jnp.ones(3), jnp.int32(1))}
    state = train.TrainState(step=jnp.int32(7), load=None, **good)
    with checkpoint.Checkpointer(tmp_path) as saver:
        train.check_state(state, saver)
        bad = jax.tree.map(lambda a: a.at[0].set(value) if a.ndim else a, good[tree])
        with pytest.raises(UserError, match="step 7: its update"):
            train.check_state(dataclasses.replace(state, **{tree: bad}), saver)


@pytest.mark.parametrize(
    ("number", "name", "raised"),
    [(signal.SIGINT, "Ctrl-C", KeyboardInterrupt), (signal.SIGTERM, "SIGTERM", SystemExit)],
)
def test_a_signal_ends_the_run_after_the_step_and_a_save(place, tmp_path, monkeypatch, caplog, number, name, raised):
    before = signal.getsignal(number)
    calls = []

    def fetch(*arguments):
        calls.append(1)
        if len(calls) == 5:  # step 5 of the run: between lines and between checkpoints
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process at once
        return to_devices(*arguments)

    to_devices = train.to_devices
    monkeypatch.setattr(train, "to_devices", fetch)
    with pytest.raises(raised) as ended, caplog.at_level(logging.INFO, logger="moejax"):
        go(config(place), tmp_path / "run")
    assert signal.getsignal(number) == before
    assert number == signal.SIGINT or ended.value.code == 143
    assert f"{name}: step 5 is saved; the same command continues from there" in caplog.messages
    assert trees(tmp_path / "run")[0] == 5
    monkeypatch.undo()
    go(config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(place, "dense"))


def test_another_config_is_refused_with_what_changed(place, tmp_path):
    workdir = copy(interrupted(place, "dense"), tmp_path)
    other = config(place, train={"accumulation_steps": 2}, seed=3)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, width=64))
    with pytest.raises(UserError) as error:
        go(other, workdir)
    for change in ("model.width: 32 -> 64", "seed: 0 -> 3", "train.accumulation_steps: 1 -> 2"):
        assert change in str(error.value)
    assert "\n" not in str(error.value)
    assert lines(workdir) == lines(interrupted(place, "dense")), "the refused run touched the workdir"


def test_changed_text_is_refused(place, tmp_path):
    workdir = copy(interrupted(place, "dense"), tmp_path)
    shutil.copytree(place / "text", tmp_path / "text")
    stored = json.loads((workdir / "config.json").read_text())
    stored["data"]["source"] = f"text:{tmp_path}/text/*.txt"
    (workdir / "config.json").write_text(json.dumps(stored))
    with (tmp_path / "text" / "000.txt").open("a") as file:
        file.write("more\n")
    changed = config(place)
    changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, source=f"text:{tmp_path}/text/*.txt"))
    with pytest.raises(UserError, match="the text has changed since step 5"):
        go(changed, workdir)


def test_a_changed_tokenizer_file_is_refused(place, tmp_path, monkeypatch):
    workdir = copy(interrupted(place, "dense"), tmp_path)
    monkeypatch.setattr(tokenizers.ByteTokenizer, "text", "{}")  # as if this one were a file's, and not the run's
    with pytest.raises(UserError, match="the tokenizer's file has changed since step 5"):
        go(config(place), workdir)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"null", b'"x"', b'{"model": '])
def test_a_damaged_config_file_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not whole \(.*\); restore it or give another --workdir"):
        metrics.read_config(tmp_path)


@pytest.mark.parametrize("field", ["moe", "attention"])
def test_an_implementation_that_does_not_run_here_is_one_line(place, tmp_path, field):
    named = config(place, "aux_free")
    if field == "moe":  # needs bfloat16, and a GPU
        moe = dataclasses.replace(named.model.moe, implementation="mosaic_gpu")
        model = dataclasses.replace(named.model, moe=moe)
    else:
        model = dataclasses.replace(named.model, attention_implementation="cudnn")
    with pytest.raises(UserError, match=r"implementation='(mosaic_gpu|cudnn)' this model does not run here: ") as error:
        go(dataclasses.replace(named, model=model), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_split_is_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(UserError, match=r"data\.batch_size=8 must be a multiple of 16: 8 batch shards .* × 2"):
        go(config(place, mesh=MeshConfig(data=8), train={"accumulation_steps": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"exchange_chunks": 7}, r"exchange_chunks=7 does not divide the 2 rows of \d+ tokens"),
        ({"exchange": "all_to_all", "exchange_factor": 1e-4}, r"exchange_factor=0.0001 leaves \S+ rows for a pair"),
        ({"exchange": "ragged"}, "which cpu doesn't have"),
        ({"exchange": "remote"}, "'remote' can't move float32 rows of width 32 on cpu"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused_before_anything_is_written(place, tmp_path, moe, message):
    """A device of 4 has two rows of the batch. The mended command may have the same workdir."""
    tried = config(place, mesh=MeshConfig(data=1, expert=4))
    moe = dataclasses.replace(small.ROUTERS["top_k"], **moe)
    tried = dataclasses.replace(tried, model=dataclasses.replace(tried.model, moe=moe))
    with pytest.raises(UserError, match=message) as error:
        go(tried, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nothing_held_out_is_trained_and_not_evaluated(place, tmp_path):
    everything = config(place, train={"steps": 2})
    everything = dataclasses.replace(everything, data=dataclasses.replace(everything.data, eval_fraction=0.0))
    for _ in range(2):  # to its end, and once more
        result = go(everything, tmp_path / "run")
        assert result["step"] == 2 and "loss" not in result
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_a_run_that_ends_inside_an_evaluation_makes_it_up(place, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(train, "_evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go(config(place), workdir)
    go(config(place), workdir)
    assert_same_run(workdir, undisturbed(place, "dense"))


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    """The other one's lock is that of another open file; when it is let go the folder is free."""
    refused = pytest.raises(UserError, match="another process trains there; wait for it, or give another")
    with beginning.alone(tmp_path / "run"), refused, beginning.alone(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with beginning.alone(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
