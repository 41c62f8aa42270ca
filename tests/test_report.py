"""Reports: paired differences by hand, what one seed may say, partial ablations, tables and figures."""

import errno
import re

import numpy as np
import pytest
from fabricated import SWITCH, environment, plan, write_run

from moejax import ablation, figures, report
from moejax.errors import UserError


def arms_with(tmp_path, dense, switch, seeds=None):
    """Arms whose finished runs end with these losses, by seed; None is a run that has not begun."""
    for name, losses in (("dense", dense), ("switch", switch)):
        for seed, loss in enumerate(losses):
            if loss is not None:
                write_run(tmp_path, name, seed, {2: loss + 1, 4: loss}, sparse=name == "switch")
    count = max(len(dense), len(switch))
    return ablation.collect(plan(tmp_path, seeds=range(count)), tmp_path)


def test_paired_differences_by_hand(tmp_path):
    dense, switch = arms_with(tmp_path, (2.0, 2.5, 3.0), (1.9, 2.39, 2.88))
    pair = report.paired(switch, dense)
    # −0.10, −0.11, −0.12: mean −0.11, std √((0.01² + 0 + 0.01²) / 2) = 0.01; t(0.975, 2) = 4.30265,
    # half an interval 4.30265 · 0.01 / √3 = 0.024842. The losses themselves spread by 0.5: pairing takes that out.
    np.testing.assert_allclose(pair.differences, (-0.10, -0.11, -0.12), atol=1e-12)
    np.testing.assert_allclose((pair.mean, pair.std), (-0.11, 0.01), atol=1e-12)
    np.testing.assert_allclose((pair.low, pair.high), (-0.134842, -0.085158), atol=1e-6)
    assert pair.verdict == "switch lower"
    assert report.paired(dense, switch).verdict == "switch lower"


def test_two_seeds_that_agree_loosely_tell_nothing(tmp_path):
    dense, switch = arms_with(tmp_path, (2.0, 2.0), (1.9, 1.7))
    # −0.1 and −0.3: mean −0.2, std 0.141421; t(0.975, 1) = 12.7062, half 12.7062 · 0.141421 / √2 = 1.27062.
    pair = report.paired(switch, dense)
    np.testing.assert_allclose((pair.low, pair.high), (-1.47062, 1.07062), atol=1e-5)
    assert pair.verdict == "not told apart"
    assert any("No pair of arms is told apart" in line for line in report.conclusions((dense, switch)))


def test_only_common_seeds_are_paired(tmp_path):
    dense, switch = arms_with(tmp_path, (2.0, None, 3.0), (1.5, 1.6, None))
    assert report.paired(dense, switch).differences == (0.5,)
    assert report.paired(dense, switch).verdict == "one seed can't tell"


def test_one_seed_ranks_nothing(tmp_path):
    arms = arms_with(tmp_path, (2.0,), (1.0,))
    said = " ".join(report.conclusions(arms))
    assert "One seed ranks nothing" in said
    text = report.markdown(arms)
    assert "lower loss" not in text and "Paired differences" not in text


def test_many_seeds_are_told(tmp_path):
    arms = arms_with(tmp_path, (2.0, 2.5, 3.0), (1.9, 2.39, 2.88))
    text = report.markdown(arms)
    # dense − switch, as the config orders them
    assert "switch has the lower loss of dense and switch: dense − switch = +0.1100 nats" in text
    assert "95% interval +0.0852 to +0.1348 over 3 paired seeds" in text
    assert "One seed" not in text and "Partial" not in text
    assert "| dense | 3/3 | 2.5000 ± 0.5000 |" in text
    assert "## Paired differences" in text
    for told in ("content 12ab", "CPython 3.13.0", "jax 0.11.2", "commit: abc", "2 host cores"):
        assert told in text
    assert "4 steps of 8 × 16 bytes tokens" in text


def test_seeds_of_an_arm_by_different_code_are_told(tmp_path):
    for seed, code in enumerate("ab"):
        before = {"code": "a"} if seed else {}  # a run of before there was a hash
        write_run(tmp_path, "dense", seed, {4: 2.0}, environment=environment() | before)
        write_run(tmp_path, "switch", seed, {4: 1.9}, sparse=True, environment=environment() | {"code": code})
    text = report.markdown(ablation.collect(plan(tmp_path), tmp_path))
    assert "**switch: its seeds were trained by different code**" in text and "**dense: its seeds" not in text


def test_classes_are_not_compared(tmp_path):
    arms = arms_with(tmp_path, (2.0, 2.5), (1.9, 2.4))
    classes = {"one": ("dense",), "other": ("switch",)}
    assert report.comparisons(arms, classes) == []
    text = report.markdown(arms, classes)
    assert "class 'one': dense" in text and "they are not compared" in text and "dense − switch" not in text
    assert "One seed" not in text


def test_a_partial_ablation_is_reported(tmp_path):
    write_run(tmp_path, "switch", 0, {2: 3.0}, finished=False, sparse=True)
    arms = ablation.collect(plan(tmp_path), tmp_path)
    report.write(arms, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Partial: 0 of 4 runs are finished" in text
    assert "| switch | 0/2 | – | – |" in text


def test_the_report_is_written_with_its_figures(tmp_path):
    report.write(arms_with(tmp_path, (2.0, 2.5), (1.9, 2.4)), tmp_path, extra="## More")
    text = (tmp_path / "report.md").read_text()
    assert "## More" in text
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\.png\)", text)) == 2
    assert (tmp_path / "report.json").is_file()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    arms = arms_with(tmp_path, (2.0,), (1.9,))

    def full(figure, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures.Figure, "savefig", full)
    with pytest.raises(UserError, match=r"loss\.png can't be written \(No space left on device\): free its disk"):
        report.write(arms, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file can't be written"):
        report.write(arms, tmp_path / "file")


def test_rows_fit_their_header_and_dense_has_no_routing(tmp_path):
    arms = arms_with(tmp_path, (2.0,), (1.9,))
    dense, switch = (dict(zip(report.HEADER, row, strict=True)) for row in report.rows(arms))
    assert (dense["MaxVio"], dense["dropped: train"], dense["dropped: held-out"]) == ("–", "–", "–")
    assert (switch["MaxVio"], switch["dropped: train"], switch["dropped: held-out"]) == ("0.25", "5.0%", "1.0%")
    assert dense["router MFLOPs"] == "0.000"
    assert switch["router MFLOPs"] == f"{2 * 2 * 32 * 4 / 1e6:.3f}"  # 2 layers · 2 FLOPs · (32, 4)
    # 4 steps · 128 tokens · 3 · FLOPs
    flops = arms[0].account.active_flops_per_token
    assert float(dense["training FLOPs"]) == pytest.approx(4 * 128 * 3 * flops, rel=1e-3)


def test_plain_tables_are_aligned():
    text = report.plain_table(("arm", "loss"), [["a", "2.0"], ["longer", "10.25"]])
    assert text.splitlines() == ["arm      loss", "------  -----", "a         2.0", "longer  10.25"]


def test_loads_are_in_even_shares(tmp_path):
    write_run(tmp_path, "switch", 0, {2: 3.0, 4: 2.0}, sparse=True)
    folder = ablation.folder_of(tmp_path, "switch", 0)
    steps, load = figures.read_loads(folder)
    # 4, 0, 2, 2 of 8 choices over 4 experts: an even share is 2.
    assert steps.tolist() == [2, 4] and load.shape == (2, 2, 4)
    np.testing.assert_allclose(load[0], [[2, 0, 1, 1], [1, 1, 1, 1]])
    assert figures.expert_load({"none": tmp_path}) is None
    panels = figures.expert_load({"switch": folder}).axes
    assert [axes.get_title() for axes in panels if axes.get_title()] == ["switch, layer 0", "switch, layer 1"]


def test_violation_is_drawn_over_steps_and_against_the_loss(tmp_path):
    for name, loss in (("even", 2.0), ("free", 1.5)):
        for seed in (0, 1):
            write_run(tmp_path, name, seed, {2: 3.0, 4: loss + seed}, sparse=True)
    arms = ablation.collect(plan(tmp_path, even=SWITCH, free=SWITCH), tmp_path)
    over_steps, against = figures.violation_and_loss(arms).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in over_steps.get_lines()}
    assert drawn == {"even": [[2.0, 0.5], [4.0, 0.5]], "free": [[2.0, 0.5], [4.0, 0.5]]}
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in against.collections}
    assert points == {"even": [[0.25, 2.0], [0.25, 3.0]], "free": [[0.25, 1.5], [0.25, 2.5]]}
    assert figures.violation_and_loss(arms[:1]) is None


def test_the_loss_figure_has_a_line_per_arm_and_the_dense_loss(tmp_path):
    arms = arms_with(tmp_path, (2.0, 2.5), (1.9, 2.4))
    (axes,) = figures.loss_against_flops(arms).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "dense (2/2 seeds)", "switch (2/2 seeds)"
    ]  # fmt: skip
    lines = {line.get_label(): line for line in axes.get_lines()}
    means = lines["switch (2/2 seeds)"]
    np.testing.assert_allclose(means.get_ydata(), [3.15, 2.15])
    np.testing.assert_allclose(means.get_xdata(), np.array([2, 4]) * arms[1].flops_per_step)
    assert any(np.allclose(line.get_ydata(), 2.25) for line in axes.get_lines() if len(line.get_ydata()) == 2)


def test_coactivation_leaves_out_the_diagonal():
    image = figures.coactivation(np.array([[1.0, 0.25], [0.5, 1.0]])).axes[0].images[0].get_array()
    assert np.ma.getmaskarray(image).tolist() == [[True, False], [False, True]]


def test_unused_seeds_of_sparse_arms_alone(tmp_path):
    only = ablation.collect(plan(tmp_path, seeds=(0,), switch=SWITCH), tmp_path)
    assert figures.first_finished(only) == {"switch": ablation.folder_of(tmp_path, "switch", 0)}
