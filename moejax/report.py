"""The report of an ablation: report.json, report.md and figures, from whatever its runs have written so far.

One seed ranks nothing: a difference between two arms is told only where at least two seeds, paired, support it.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from moejax import figures, metrics
from moejax.ablation import Arm, dense_arm, flops_to_dense_loss, mean_and_std, to_json
from moejax.config import MoEConfig
from moejax.errors import writing

Classes = Mapping[str, Sequence[str]] | None
LOSS_FIGURE, LOAD_FIGURE, VIOLATION_FIGURE = "loss.png", "expert_load.png", "max_violation.png"
HEADER = (
    "arm", "seeds", "loss", "bits per byte", "tokens/s", "parameters", "active", "MFLOPs/token", "router MFLOPs",
    "MaxVio", "dropped: train", "dropped: held-out", "training FLOPs", "FLOPs to dense loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Paired:
    """The difference in final loss, first − second, over the seeds that both have finished.

    low, high: Student's 95% interval of its mean. mean, std, low and high are None where there are too few seeds.
    """

    first: str
    second: str
    differences: tuple[float, ...]
    mean: float | None
    std: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.low is None or self.high is None:
            return "one seed can't tell" if self.differences else "not finished"
        if self.low <= 0 <= self.high:
            return "not told apart"
        return f"{self.first} lower" if self.high < 0 else f"{self.second} lower"


def paired(first: Arm, second: Arm) -> Paired:
    """Equal seeds share the order of the data; what differs between seeds alone cancels in their difference."""
    ours = {run.seed: run.result["loss"] for run in first.finished if run.result}
    theirs = {run.seed: run.result["loss"] for run in second.finished if run.result}
    differences = tuple(ours[seed] - theirs[seed] for seed in ours if seed in theirs)
    mean, std = mean_and_std(differences)
    if mean is None or std is None:
        return Paired(first.name, second.name, differences, mean, std, None, None)
    count = len(differences)
    half = float(stats.t.ppf(0.975, count - 1)) * std / count**0.5
    return Paired(first.name, second.name, differences, mean, std, mean - half, mean + half)


def comparisons(arms: Sequence[Arm], classes: Classes = None) -> list[Paired]:
    """Every pair of arms of one class of compute."""
    by_name = {arm.name: arm for arm in arms}
    groups = [tuple(by_name)] if classes is None else list(classes.values())
    return [paired(by_name[a], by_name[b]) for names in groups for a, b in itertools.combinations(names, 2)]


def rows(arms: Sequence[Arm]) -> list[list[str]]:
    """A row per arm under HEADER. Figures are means over finished seeds, "± std" where there are several."""
    dense = dense_arm(arms)
    table = []
    for arm in arms:
        results = [run.result for run in arm.finished if run.result]

        def over_seeds(name: str, form: str, results=results) -> str:
            return _spread([r[name] for r in results if r[name] is not None], form)

        account, reached = arm.account, flops_to_dense_loss(arm, dense)
        table.append(
            [
                arm.name,
                f"{len(results)}/{len(arm.runs)}",
                _spread([r["loss"] for r in results], ".4f"),
                over_seeds("bits_per_byte", ".4f"),
                over_seeds("tokens_per_second", ",.0f"),
                f"{account.total_params:,}",
                f"{account.active_params:,}",
                f"{account.active_flops_per_token / 1e6:.3f}",
                f"{account.router_flops_per_token / 1e6:.3f}",
                over_seeds("max_violation", ".2f"),
                over_seeds("train_dropped_fraction", ".1%"),
                over_seeds("dropped_fraction", ".1%"),
                f"{arm.flops_per_step * arm.config.train.steps:.3e}",
                "–" if reached is None else f"{reached:.3e}",
            ]
        )
    return table


def _spread(values: Sequence[float], form: str) -> str:
    mean, std = mean_and_std(values)
    if mean is None:
        return "–"
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:{form}}"


def plain_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]])

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, table)])


def markdown_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """A table for Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *table]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def conclusions(arms: Sequence[Arm], classes: Classes = None) -> list[str]:
    """What the runs can and can't say, a sentence each."""
    done = sum(len(arm.finished) for arm in arms)
    total = sum(len(arm.runs) for arm in arms)
    said = []
    if done < total:
        said.append(f"Partial: {done} of {total} runs are finished; the figures are of those alone.")
    pairs = comparisons(arms, classes)
    judged = [pair for pair in pairs if pair.low is not None]
    if pairs and not judged:
        said.append(
            "One seed ranks nothing: a difference in loss between arms can't be told from the difference that another "
            "seed would make, so no arm is called better."
        )
    for pair in judged:
        if pair.verdict != "not told apart":
            said.append(
                f"{pair.verdict.removesuffix(' lower')} has the lower loss of {pair.first} and {pair.second}: "
                f"{pair.first} − {pair.second} = {_signed(pair.mean)} nats, 95% interval "
                f"{_signed(pair.low)} to {_signed(pair.high)} over {len(pair.differences)} paired seeds."
            )
    if judged and all(pair.verdict == "not told apart" for pair in judged):
        said.append("No pair of arms is told apart: every 95% interval of a paired difference holds 0.")
    if len(judged) > 1:
        said.append(
            f"The {len(judged)} intervals are not corrected for their number: about one in twenty misses the true "
            "difference by chance."
        )
    if classes is not None:
        said.append("Arms of different classes use different compute per token; they are not compared with each other.")
    said.append(
        "Said of this size, text, length of training and these settings alone: no arm was tuned by itself, and order "
        "may change with scale. Tokens/s are of this code on this machine. FLOPs leave out the routers', listed apart."
    )
    return said


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def markdown(arms: Sequence[Arm], classes: Classes = None, title: str = "Ablation", extra: str = "") -> str:
    """report.md. `extra` is a section of the caller's own, put before the settings."""
    pairs = comparisons(arms, classes)
    pair_rows = [
        [
            f"{pair.first} − {pair.second}",
            ", ".join(map(_signed, pair.differences)) or "–",
            _signed(pair.mean),
            "–" if pair.std is None else f"{pair.std:.4f}",
            "–" if pair.low is None else f"{_signed(pair.low)} to {_signed(pair.high)}",
            pair.verdict,
        ]
        for pair in pairs
    ]
    sections = [f"# {title}", "\n".join(f"- {line}" for line in provenance(arms)), markdown_table(HEADER, rows(arms))]
    sections.append(
        "Loss: held-out, nats per token, at the end; mean ± standard deviation over finished seeds. FLOPs: forward, "
        "per token. MaxVio: (largest load − mean load) / mean load on the held-out text, mean over layers. Dropped: "
        "assignments lost to capacity, in the second half of training and on the held-out text. Training FLOPs: 3 × "
        "forward × tokens, without the router's; to dense loss: where the held-out curve first comes down to the dense "
        "arm's final loss."
    )
    if classes is not None:
        sections.append("\n".join(f"- class {label!r}: {', '.join(names)}" for label, names in classes.items()))
    said = "\n".join(f"- {line}" for line in conclusions(arms, classes))
    sections.append(f"## What this can and can't say\n\n{said}")
    if any(len(pair.differences) > 1 for pair in pairs):
        header = ("final loss", "by seed", "mean", "std", "95% interval", "")
        sections.append("## Paired differences\n\n" + markdown_table(header, pair_rows))
    sections.append(f"## Figures\n\n![Held-out loss against training FLOPs]({LOSS_FIGURE})")
    if any(arm.config.model.moe is not None for arm in arms):
        sections.append(f"![Expert load by layer over training]({LOAD_FIGURE})")
    if sum(arm.config.model.moe is not None for arm in arms) > 1:
        sections.append(f"![MaxVio over training, and the loss against it]({VIOLATION_FIGURE})")
    if extra:
        sections.append(extra)
    sections.append("## Settings\n\n" + "\n".join(f"- {line}" for line in settings(arms)))
    return "\n\n".join(sections) + "\n"


def provenance(arms: Sequence[Arm]) -> list[str]:
    """Date, text (with its content hash, and the interpreter that it is of) machine and commit of the finished runs."""
    results = [run.result for arm in arms for run in arm.finished if run.result]
    lines = [f"written {time.strftime('%Y-%m-%d %H:%M %z')}"]
    lines += _distinct(f"data: {result['data']}" for result in results)
    lines += _distinct(_machine(result) for result in results)
    commits = _distinct(result["environment"]["git_commit"] or "unknown" for result in results)
    lines += [f"commit: {', '.join(commits)}"] if commits else []
    for arm in arms:
        codes = _distinct(run.result["environment"].get("code") for run in arm.finished if run.result)
        codes = [code for code in codes if code]  # runs of before there was a hash
        if len(codes) > 1:
            lines.append(f"**{arm.name}: its seeds were trained by different code** (a run's environment.jsonl has its "
                         "hash): give another --workdir to train them alike")  # fmt: skip
    return lines


def _machine(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    devices, packages = environment["devices"], environment["packages"]
    return (
        f"machine: {devices['count']} × {devices['kind']}, {result['cores']} host cores, {environment['platform']}, "
        f"Python {environment['python']}, jax {packages['jax']}, flax {packages['flax']}"
    )


def settings(arms: Sequence[Arm]) -> list[str]:
    """A line for what the arms share, and one for each arm; all of it is in every run's config.json."""
    lines = _distinct(
        f"{arm.config.train.steps} steps of {arm.config.data.batch_size} × {arm.config.data.sequence_length} "
        f"{arm.config.data.tokenizer} tokens; {arm.config.model.num_layers} layers of width {arm.config.model.width}, "
        f"{arm.config.model.num_heads} heads, FFN {arm.config.model.ffn_width}; {arm.config.optimizer.name}, learning "
        f"rate {arm.config.optimizer.learning_rate:g}, {arm.config.optimizer.schedule}; seeds "
        f"{', '.join(str(run.seed) for run in arm.runs)}"
        for arm in arms
    )
    lines += [f"{arm.name}: {_describe(arm.config.model.moe)}; `{arm.name}/seed_*/config.json`" for arm in arms]
    return lines


def _describe(moe: MoEConfig | None) -> str:
    if moe is None:
        return "every FFN dense"
    default = dataclasses.asdict(MoEConfig())
    changed = {name: value for name, value in dataclasses.asdict(moe).items() if value != default[name]}
    return ", ".join(f"{name} {value}" for name, value in ({"router": moe.router} | changed).items())


def _distinct(lines: Any) -> list[str]:
    return list(dict.fromkeys(lines))


def write(
    arms: Sequence[Arm],
    workdir: str | os.PathLike[str],
    classes: Classes = None,
    title: str = "Ablation",
    extra: str = "",
) -> None:
    """Writes report.json, report.md, loss.png and, for sparse arms, expert_load.png into `workdir`; for two or more of
    them max_violation.png. UserError where one can't be written."""
    workdir = Path(workdir)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_whole(workdir / "report.json", json.dumps(to_json(arms), indent=1) + "\n")
    drawn = {
        LOSS_FIGURE: figures.loss_against_flops(arms),
        LOAD_FIGURE: figures.expert_load(figures.first_finished(arms)),
        VIOLATION_FIGURE: figures.violation_and_loss(arms),
    }
    for name, figure in drawn.items():
        if figure is not None:
            with writing(workdir / name):
                figure.savefig(workdir / name, dpi=120)
    metrics.write_whole(workdir / "report.md", markdown(arms, classes, title, extra))
