"""Ablations: who is refused, what is trained and what is not trained again, and the figures over seeds by hand."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fabricated import SWITCH, TOKENS, plan, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import ablation, data, metrics, report, train
from moejax.config import MoEConfig, OptimizerConfig
from moejax.errors import UserError


def test_compute_to_a_loss_by_hand():
    # From 2.0 at 20 to 1.5 at 30; 1.8 is 0.2 / 0.5 of the way down: 20 + 0.4 · 10.
    assert ablation.flops_to_loss([10, 20, 30], [3.0, 2.0, 1.5], 1.8) == pytest.approx(24.0)
    assert ablation.flops_to_loss([10, 20, 30], [3.0, 2.0, 1.5], 1.4) is None
    assert ablation.flops_to_loss([10, 20, 30], [3.0, 2.0, 1.5], 3.5) == 10  # an upper bound
    assert ablation.flops_to_loss([10, 20, 30], [3.0, 2.0, 1.5], 1.5) == 30
    # The first time counts: 3.0 -> 1.0 passes 2.0 half-way, whatever comes after.
    assert ablation.flops_to_loss([10, 20, 30, 40], [3.0, 1.0, 2.5, 0.5], 2.0) == pytest.approx(15.0)
    assert ablation.flops_to_loss([], [], 2.0) is None


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.5, 5.0), min_size=2, max_size=8), st.floats(0.5, 5.0))
def test_compute_to_a_loss_lies_on_the_curve(losses, target):
    flops = [10.0 * (i + 1) for i in range(len(losses))]
    reached = ablation.flops_to_loss(flops, losses, target)
    if min(losses) > target:
        assert reached is None
    elif losses[0] > target:
        assert np.interp(reached, flops, losses) == pytest.approx(target, abs=1e-6)
        assert all(loss > target for place, loss in zip(flops, losses, strict=True) if place < reached)


def test_mean_and_std_of_a_sample():
    assert ablation.mean_and_std([]) == (None, None)
    assert ablation.mean_and_std([2.5]) == (2.5, None)
    # Mean 2; deviations −1, 0, 1; (1 + 0 + 1) / (3 − 1) = 1.
    assert ablation.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_unequal_compute_is_refused_unless_classes_are_declared(tmp_path):
    two = MoEConfig(num_experts=4, experts_per_token=2)
    unequal = plan(tmp_path, dense=None, two=two)
    counts = [ablation.accounting.account(config.model, 16) for config, _ in _checked(unequal)]
    with pytest.raises(UserError, match="arms differ in active FLOPs per token") as error:
        ablation.run(unequal, tmp_path / "runs", progress=False)
    for name, count in zip(("dense", "two"), counts, strict=True):
        assert f"{name} {count.active_flops_per_token:.4g}" in str(error.value)
    assert not (tmp_path / "runs").exists()
    declared = dataclasses.replace(unequal, classes={"one": ("dense",), "more": ("two",)})
    assert list(ablation.check(declared)) == ["dense", "two"]
    # The router's products are no part of the rule: 64 of them against none.
    assert ablation.check(plan(tmp_path, dense=None, many=dataclasses.replace(SWITCH, num_experts=64)))


def _checked(unequal):
    return ablation.check(dataclasses.replace(unequal, classes={"a": ("dense",), "b": ("two",)})).values()


def test_names_and_seeds_that_clash_are_refused(tmp_path):
    with pytest.raises(UserError, match="arm 'a/b' names a folder"):
        ablation.check(plan(tmp_path, **{"a/b": None}))
    with pytest.raises(UserError, match="has a seed twice"):
        ablation.check(plan(tmp_path, seeds=(1, 1)))


def test_report_json_by_hand(tmp_path):
    two_seeds = plan(tmp_path)
    write_run(tmp_path, "dense", 0, {2: 3.0, 4: 2.0})
    write_run(tmp_path, "dense", 1, {2: 3.2, 4: 2.4})
    write_run(tmp_path, "switch", 0, {2: 2.6, 4: 1.8}, sparse=True)
    write_run(tmp_path, "switch", 1, {2: 2.8, 4: 1.8}, sparse=True)
    arms = ablation.collect(two_seeds, tmp_path)
    figures = ablation.to_json(arms)["arms"]
    assert list(figures) == ["dense", "switch"]
    fields = {"seeds", "mean", "std", "active_flops_per_token", "total_params", "active_params", "flops_to_dense_loss"}
    assert set(figures["dense"]) == set(figures["switch"]) == fields
    assert figures["switch"]["seeds"][1] == {
        "seed": 1, "loss": 1.8, "bits_per_byte": 1.5 * 1.8, "tokens_per_second": 1000.0, "max_violation": 0.25
    }  # fmt: skip
    # Dense: 2.0 and 2.4, mean 2.2, deviations ∓0.2: √(0.08 / 1) = 0.28284.
    assert figures["dense"]["mean"] == pytest.approx(2.2)
    assert figures["dense"]["std"] == pytest.approx(0.2828427)
    assert figures["switch"]["std"] == 0
    per_step = 3 * figures["dense"]["active_flops_per_token"] * TOKENS
    assert figures["dense"]["flops_to_dense_loss"] == pytest.approx(4 * per_step)
    # Switch's mean curve: 2.7 at step 2, 1.8 at step 4; 2.2 is 5/9 of the way: step 2 + 10/9.
    assert figures["switch"]["flops_to_dense_loss"] == pytest.approx((2 + 10 / 9) * per_step)
    assert figures["switch"]["total_params"] > figures["switch"]["active_params"] > figures["dense"]["active_params"]


def test_what_is_unfinished_or_of_other_steps_is_left_out(tmp_path):
    ablated = plan(tmp_path)
    write_run(tmp_path, "dense", 0, {2: 3.0, 4: 2.0})
    write_run(tmp_path, "switch", 0, {2: 2.6}, finished=False, sparse=True)
    write_run(tmp_path, "switch", 1, {2: 1.0}, sparse=True)  # finished when train.steps was 2
    figures = ablation.to_json(ablation.collect(ablated, tmp_path))["arms"]
    assert [seed["seed"] for seed in figures["dense"]["seeds"]] == [0]
    assert figures["dense"]["mean"] == 2.0 and figures["dense"]["std"] is None
    assert figures["switch"]["seeds"] == [] and figures["switch"]["mean"] is None
    assert figures["switch"]["flops_to_dense_loss"] is None
    # Other evaluation batches are another measurement too.
    write_run(tmp_path, "dense", 1, {4: 2.0}, eval_batches=3)
    assert len(ablation.collect(ablated, tmp_path)[0].finished) == 1


@pytest.mark.parametrize("place", [".", "switch", "switch/seed_0"])
def test_a_file_where_a_folder_should_be_is_an_unfinished_run(tmp_path, place):
    path = tmp_path / "runs" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    (arm,) = ablation.collect(plan(tmp_path, seeds=(0,), switch=SWITCH), tmp_path / "runs")
    assert not arm.finished
    with pytest.raises(UserError, match=r"arm 'switch', seed 0: .*switch/seed_0 .*(is a file|Not a directory)"):
        ablation.run(plan(tmp_path, seeds=(0,), switch=SWITCH), tmp_path / "runs", progress=False)


def test_a_result_that_is_no_text_is_no_result(tmp_path):
    write_run(tmp_path, "dense", 0, {2: 3.0, 4: 2.0})
    (ablation.folder_of(tmp_path, "dense", 0) / ablation.RESULT).write_bytes(b"\xff\xfe")
    assert not ablation.collect(plan(tmp_path, seeds=(0,), dense=None), tmp_path)[0].finished


def test_without_a_dense_arm_there_is_no_compute_to_its_loss(tmp_path):
    write_run(tmp_path, "switch", 0, {2: 2.6, 4: 1.8}, sparse=True)
    figures = ablation.to_json(ablation.collect(plan(tmp_path, seeds=(0,), switch=SWITCH), tmp_path))["arms"]
    assert figures["switch"]["flops_to_dense_loss"] is None


class FakeTraining:
    """Stands in for train.run: notes its calls, and is killed at one of them."""

    def __init__(self, kill_at=None):
        self.calls, self.kill_at = [], kill_at

    def __call__(self, config, folder, *, progress=True):
        self.calls.append((Path(folder).parent.name, config.seed))
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        Path(folder).mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": i + 1, "tokens_per_second": rate, "dropped_fraction": config.model.moe and 0.1 * i}
            for i, rate in enumerate((5.0, 100.0, 102.0, 104.0))
        ]
        (Path(folder) / metrics.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"step": 4, "loss": 2.0 + config.seed, "bits_per_byte": 3.0, "max_violation": None}


def test_a_killed_ablation_goes_on_where_it_was(tmp_path, monkeypatch):
    ablated = plan(tmp_path)
    killed = FakeTraining(kill_at=3)
    monkeypatch.setattr(train, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(ablated, tmp_path, progress=False)
    assert killed.calls == [("dense", 0), ("switch", 0), ("dense", 1)]  # all arms of a seed before the next
    assert [len(arm.finished) for arm in ablation.collect(ablated, tmp_path)] == [1, 1]

    again = FakeTraining()
    monkeypatch.setattr(train, "run", again)
    arms = ablation.run(ablated, tmp_path, progress=False)
    assert again.calls == [("dense", 1), ("switch", 1)]
    assert [[run.result["loss"] for run in arm.finished] for arm in arms] == [[2.0, 3.0], [2.0, 3.0]]
    result = arms[1].runs[0].result
    assert result["tokens_per_second"] == 101.0  # median of 5, 100, 102, 104
    assert result["train_dropped_fraction"] == pytest.approx(0.25)  # (0.2 + 0.3) / 2
    assert arms[0].runs[0].result["train_dropped_fraction"] is None

    ablation.run(ablated, tmp_path, progress=False)
    assert len(again.calls) == 2
    longer = dataclasses.replace(
        ablated, arms={n: dataclasses.replace(c, train=dataclasses.replace(c.train, steps=3))
                       for n, c in ablated.arms.items()})  # fmt: skip
    with pytest.raises(UserError, match=r"arm 'dense', seed 0: .* is at step 4, beyond train.steps=3"):
        ablation.run(longer, tmp_path, progress=False)


def test_a_finished_run_of_another_config_is_refused(tmp_path):
    ablated = plan(tmp_path, seeds=(0,), dense=None)
    config = ablated.arms["dense"]
    content = data.prepare(config.data, progress=False).content_hash
    write_run(tmp_path, "dense", 0, {2: 3.0, 4: 2.0}, content_hash=content)
    folder = ablation.folder_of(tmp_path, "dense", 0)
    other = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1.0))
    stored = train.with_vocabulary(other, 257)
    (folder / "config.json").write_text(json.dumps(metrics.to_dict(stored)))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 1.0 -> 0.001"):
        ablation.run(ablated, tmp_path, progress=False)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 1.0 -> 0.001"):
        ablation.collect(ablated, tmp_path)  # nor is it shown as if it were this one's


@pytest.mark.slow  # four runs of a tiny model, compiled one by one
def test_a_real_ablation_stopped_and_continued(tmp_path, monkeypatch):
    ablated = plan(tmp_path)
    train_run, calls = train.run, []

    def killed_in_the_third(config, folder, **options):
        calls.append(folder)
        if len(calls) == 3:
            train_run(config, folder, stop_at=2, **options)
            raise KeyboardInterrupt
        return train_run(config, folder, **options)

    monkeypatch.setattr(train, "run", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(ablated, tmp_path / "a", progress=False)
    report.write(ablation.collect(ablated, tmp_path / "a"), tmp_path / "a")
    assert "Partial: 2 of 4 runs are finished" in (tmp_path / "a" / "report.md").read_text()

    arms = ablation.run(ablated, tmp_path / "a", progress=False)
    report.write(arms, tmp_path / "a")
    assert len(calls) == 5
    figures = json.loads((tmp_path / "a" / "report.json").read_text())["arms"]
    for arm in figures.values():
        assert len(arm["seeds"]) == 2 and arm["std"] > 0
        assert all(np.isfinite(seed["loss"]) and seed["tokens_per_second"] > 0 for seed in arm["seeds"])
    assert figures["switch"]["seeds"][0]["max_violation"] >= 0
    assert [run.steps for arm in arms for run in arm.runs] == [(2, 4)] * 4


@pytest.mark.slow  # starts an interpreter with jax
def test_the_command_refuses_and_reports(tmp_path):
    config = tmp_path / "unequal.py"
    config.write_text(
        "from experiments.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.seeds = (0,)\n"
        "    config.arms = {'dense': {}, 'wide': {'model': {'ffn_width': 1024}}}\n"
        "    return config\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "experiments" / "ablate.py"), f"--workdir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [*command, f"--config={config}"], capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: arms differ in active FLOPs per token (all arms): dense ")
    assert "wide" in done.stderr and "Traceback" not in done.stderr
    config.write_text(config.read_text().replace("1024", "512"))
    empty = [*command, f"--config={config}", "--report_only"]
    done = subprocess.run(empty, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "holds no evaluated run of the arms dense, wide" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
