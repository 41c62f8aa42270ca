"""The demo on tiny models: one arm stopped and resumed, a report with a sample, a second call that does nothing."""

import fabricated
import pytest

from experiments import demo
from moejax import ablation, metrics, train
from moejax.config import MoEConfig

AUX_FREE = MoEConfig(
    router="moejax.routing:sigmoid_top_k", num_experts=7, experts_per_token=3, shared_experts=1, expert_width=8,
    bias_update_rate=0.01,
)  # fmt: skip


def test_the_arms_are_of_equal_compute_and_one_seed():
    plan = demo.plan(12)
    assert sorted(plan.arms) == ["dense", demo.STOPPED, "switch"] and plan.seeds == (0,)
    accounts = [account for _, account in ablation.check(plan).values()]
    assert len({account.active_flops_per_token for account in accounts}) == 1
    assert accounts[1].expert_params == accounts[2].expert_params


@pytest.mark.slow  # trains two tiny models, one of them in two parts
def test_demo_stops_resumes_reports_and_is_done(tmp_path, monkeypatch, capsys):
    plan = fabricated.plan(tmp_path, seeds=(0,), dense=None, fine_grained_aux_free=AUX_FREE)
    train_run, calls = train.run, []

    def spy(config, folder, **options):
        began = list(metrics.read_lines(folder / metrics.METRICS)) if (folder / metrics.METRICS).is_file() else []
        calls.append((folder.parent.name, len(began), options.get("stop_at")))
        return train_run(config, folder, progress=False, stop_at=options.get("stop_at"))

    monkeypatch.setattr(train, "run", spy)
    demo.demo(plan, tmp_path / "demo")
    half = demo.STOPPED
    assert calls == [("dense", 0, None), (half, 0, 2), (half, 2, None)]
    lines = metrics.read_lines(ablation.folder_of(tmp_path / "demo", half, 0) / metrics.METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    first = capsys.readouterr()
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "## A continuation by" in report and "One seed ranks nothing" in report
    for shown in (*demo.COLUMNS, "One seed ranks nothing", f"continues {demo.PROMPT!r}", "peak memory"):
        assert shown in first.out
    assert f"{half} was stopped at step 2" in first.err

    demo.demo(plan, tmp_path / "demo")
    second = capsys.readouterr()
    assert len(calls) == 3 and "is done" in second.err
    table = [line for line in first.out.splitlines() if line.startswith(("arm", "dense ", half + " "))]
    assert [line for line in second.out.splitlines() if line in table] == table[-3:]


def test_a_stop_is_not_repeated(tmp_path, monkeypatch):
    plan = fabricated.plan(tmp_path, seeds=(0,), fine_grained_aux_free=AUX_FREE)
    calls = []
    monkeypatch.setattr(train, "run", lambda config, folder, **options: calls.append(options["stop_at"]))
    fabricated.write_run(tmp_path, demo.STOPPED, 0, {1: 3.0}, finished=False)
    (arm,) = ablation.collect(plan, tmp_path)
    demo.stop_half_way(arm, arm.runs[0].folder)
    assert calls == [2]
    fabricated.write_run(tmp_path / "further", demo.STOPPED, 0, {1: 3.0, 3: 2.0}, finished=False)
    (arm,) = ablation.collect(plan, tmp_path / "further")
    demo.stop_half_way(arm, arm.runs[0].folder)
    assert calls == [2]
