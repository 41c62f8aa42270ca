"""Figures of runs, as matplotlib Figures that need no display: `figure.savefig(path)`, or a notebook shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from moejax import metrics
from moejax.ablation import Arm, Run, curve, dense_arm, final_loss

# Okabe & Ito 2008: told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")


def loss_against_flops(arms: Sequence[Arm]) -> Figure:
    """Held-out loss over training FLOPs: a line per arm (mean of its finished seeds), thin ones for its seeds.

    The dotted line is the dense arm's final loss.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, arm in enumerate(arms):
        colour = COLOURS[i % len(COLOURS)]
        for run in arm.runs:
            axes.plot(np.array(run.steps) * arm.flops_per_step, run.losses, color=colour, alpha=0.4, linewidth=0.7)
        steps, losses = curve(arm)
        label = f"{arm.name} ({len(arm.finished)}/{len(arm.runs)} seeds)"
        axes.plot(steps * arm.flops_per_step, losses, color=colour, marker="o", markersize=3, label=label)
    dense = dense_arm(arms)
    target = None if dense is None else final_loss(dense)[0]
    if target is not None:
        axes.axhline(target, color="black", linestyle=":", linewidth=0.8)
    axes.set_xlabel("training FLOPs (3 × active forward FLOPs × tokens, without the router)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def violation_and_loss(arms: Sequence[Arm]) -> Figure | None:
    """Two panels over the sparse arms: MaxVio over training steps (mean of the seeds' logged lines), and the final
    held-out loss against the final MaxVio, a point per finished seed. None for fewer than two sparse arms."""
    sparse = {i: arm for i, arm in enumerate(arms) if arm.config.model.moe is not None}
    if len(sparse) < 2:
        return None
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    over_steps, against = figure.subplots(1, 2)
    for i, arm in sparse.items():
        colour = COLOURS[i % len(COLOURS)]  # an arm's is the same in the loss figure
        over_steps.plot(*_mean_violation(arm), label=arm.name, color=colour)
        results = [run.result for run in arm.finished if run.result]
        ends = [(result["max_violation"], result["loss"]) for result in results]
        against.scatter(*zip(*ends, strict=True) if ends else ((), ()), color=colour, label=arm.name, s=20)
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("MaxVio in training, mean over layers")
    against.set_xlabel("MaxVio on the held-out text")
    against.set_ylabel("held-out loss (nats per token)")
    over_steps.legend(frameon=False, fontsize=8)
    for axes in (over_steps, against):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mean_violation(arm: Arm) -> tuple[list[int], list[float]]:
    """(steps, mean over runs) of the logged MaxVio, at the steps that all runs with any have logged."""
    logged = []
    for run in arm.runs:
        path = run.folder / metrics.METRICS
        if path.is_file():
            logged.append({line["step"]: line["max_violation"] for line in metrics.read_lines(path)})
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    return steps, [float(np.mean([run[step] for run in logged])) for step in steps]


def loss_curves(runs: Mapping[str, Path]) -> Figure:
    """Training loss over steps (from metrics.jsonl), a line per run folder."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, folder) in enumerate(runs.items()):
        lines = list(metrics.read_lines(folder / metrics.METRICS))
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def read_loads(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps (N,), loads (N, MoE layers, E)) of a run: each expert's share of the choices since the line before,
    times E, so that 1 is an even share. None where there are none (a dense model)."""
    path = folder / metrics.LOADS
    lines = list(metrics.read_lines(path)) if path.is_file() else []
    if not lines:
        return None
    load = np.array([line["load"] for line in lines], np.float64)
    share = load / np.maximum(load.sum(axis=-1, keepdims=True), 1)
    return np.array([line["step"] for line in lines]), share * load.shape[-1]


def expert_load(runs: Mapping[str, Path]) -> Figure | None:
    """Load of every expert over training, a row of panels per run folder, a panel per MoE layer; None if all are dense.

    The colour is the expert's share of the choices before capacity, in even shares: white is even, red more, blue less.
    """
    loads = {name: found for name, folder in runs.items() if (found := read_loads(folder)) is not None}
    if not loads:
        return None
    columns = max(load.shape[1] for _, load in loads.values())
    figure = Figure(figsize=(1.5 + 2.2 * columns, 0.8 + 2.2 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), columns, squeeze=False)
    norm = mpl.colors.TwoSlopeNorm(1.0, 0.0, 3.0)
    for row, (name, (steps, load)) in zip(panels, loads.items(), strict=True):
        for layer, axes in enumerate(row):
            if layer >= load.shape[1]:
                axes.set_visible(False)
                continue
            image = axes.imshow(
                load[:, layer].T, aspect="auto", origin="lower", cmap="RdBu_r", norm=norm, interpolation="nearest",
                extent=(0, steps[-1], -0.5, load.shape[2] - 0.5),
            )  # fmt: skip
            axes.set_title(f"{name}, layer {layer}", fontsize=8)
            axes.tick_params(labelsize=7)
        row[0].set_ylabel("expert")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.colorbar(image, ax=panels, label="load / even share", shrink=0.7, extend="max")
    return figure


def coactivation(shares: np.ndarray, title: str = "") -> Figure:
    """shares (E, E): of the tokens that chose expert i, the share that chose j too (`routing_stats.summarise`)."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    off_diagonal = np.where(np.eye(len(shares), dtype=bool), np.nan, shares)
    image = axes.imshow(off_diagonal, cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(title=title, xlabel="also chose expert j", ylabel="tokens of expert i")
    figure.colorbar(image, ax=axes)
    return figure


def first_finished(arms: Sequence[Arm]) -> dict[str, Path]:
    """Arm name -> folder of its first finished run, where there is one; else of its first."""

    def first(arm: Arm) -> Run:
        return (arm.finished or arm.runs)[0]

    return {arm.name: first(arm).folder for arm in arms}
