"""Arms × seeds: every run resumable, a finished one never trained or evaluated again, and the figures over seeds.

    WORKDIR/ARM/seed_S/    one run, as `train.run` leaves it, and result.json once it is finished

FLOPs of training are 3 × the active forward FLOPs × tokens; the routers' are left out and listed apart. Losses are
those of the held-out text, in nats per token.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from moejax import accounting, config_checks, data, environment, host_memory, metrics, tokenizers, train
from moejax.accounting import Account
from moejax.config import Ablation, Config
from moejax.errors import UserError

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One (arm, seed) as far as it has come. result: what `run_one` returned, None until it is finished.

    steps, losses: the held-out losses so far, the result's last.
    """

    seed: int
    folder: Path
    result: dict[str, Any] | None
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm with its runs, one for each seed of the ablation. config: with the tokenizer's vocabulary filled in."""

    name: str
    config: Config
    account: Account
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that have a result."""
        return tuple(run for run in self.runs if run.result is not None)

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of a step, without the router's."""
        tokens = self.config.data.batch_size * self.config.data.sequence_length
        return 3 * self.account.active_flops_per_token * tokens


def check(ablation: Ablation) -> dict[str, tuple[Config, Account]]:
    """The arms' configs with their vocabularies, and their accounts; reads no text.

    Raises:
      UserError: arms of one class that differ in active FLOPs per token by over 2%; names or seeds that can't be
        told apart.
    """
    for name in ablation.arms:
        if Path(name).name != name or name.startswith("."):
            raise UserError(f"arm {name!r} names a folder: give a name without slashes that starts with no dot")
    if any(config.data.eval_fraction == 0 for config in ablation.arms.values()):
        raise UserError("config.data.eval_fraction=0 holds out no text to compare arms on; give a share above 0")
    if len(set(ablation.seeds)) < len(ablation.seeds):
        raise UserError(f"config.seeds={ablation.seeds} has a seed twice; give different ones")
    for seed in ablation.seeds:
        config_checks.check_seed(seed, "config.seeds")
    arms = {
        name: train.with_vocabulary(config, tokenizers.load(config.data.tokenizer).vocab_size)
        for name, config in ablation.arms.items()
    }
    accounts = accounting.equal_flops_check(arms, ablation.classes)
    return {name: (arms[name], accounts[name]) for name in arms}


def run(ablation: Ablation, workdir: str | os.PathLike[str], *, progress: bool = True) -> list[Arm]:
    """Trains what is missing, seed after seed, all arms of a seed before the next; then `collect`.

    May be killed anywhere and called again.

    Raises:
      UserError: as `check` and `run_one`, with the arm named.
    """
    arms = check(ablation)
    todo = [(name, seed) for seed in ablation.seeds for name in arms]
    for i, (name, seed) in enumerate(todo):
        if progress and jax.process_index() == 0:
            tqdm.tqdm.write(f"[{i + 1}/{len(todo)}] {name}, seed {seed}", file=sys.stderr)
        config = dataclasses.replace(arms[name][0], seed=seed)
        try:
            run_one(config, folder_of(workdir, name, seed), progress=progress)
        except UserError as error:
            raise UserError(f"arm {name!r}, seed {seed}: {error}") from error
        clean_up()
    return collect(ablation, workdir)


def clean_up() -> None:
    """After a run, before the next in this process: each compiles its own step, and what is kept of them adds up."""
    jax.clear_caches()
    host_memory.give_freed_memory_back()


def folder_of(workdir: str | os.PathLike[str], arm: str, seed: int) -> Path:
    """Where this run lives."""
    return Path(workdir) / arm / f"seed_{seed}"


def run_one(config: Config, folder: Path, *, progress: bool = True) -> dict[str, Any]:
    """The result of a run that is finished, or is now: what `train.run` returns, and how it came about.

    The keys on top of `evaluate`'s: step, seed, tokens_per_second (median of the logged lines), train_dropped_fraction
    (mean of the second half of the logged lines, None for a dense model), data (description), content_hash,
    eval_batches, cores, environment (environment.record()).

    Raises:
      UserError: as `train.run`; the run in `folder` went beyond train.steps.
    """
    corpus = data.prepare(config.data, progress=progress)
    result = read_result(config, folder)
    if result is not None and result["content_hash"] == corpus.content_hash:
        train.check_resumable(metrics.read_config(folder), config, folder)
        return result
    ended = train.run(config, folder, progress=progress)  # where the text has changed, this raises
    if ended["step"] != config.train.steps:
        raise UserError(f"{folder} is at step {ended['step']}, beyond train.steps={config.train.steps}: "
                        f"give at least train.steps={ended['step']}, or another --workdir")  # fmt: skip
    lines = list(metrics.read_lines(folder / metrics.METRICS))
    dropped = [line["dropped_fraction"] for line in lines[len(lines) // 2 :]]
    result = metrics.plain(
        ended
        | {
            "seed": config.seed,
            "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
            "train_dropped_fraction": None if None in dropped else float(np.mean(dropped)),
            "data": corpus.description,
            "content_hash": corpus.content_hash,
            "eval_batches": config.train.eval_batches,
            "cores": os.cpu_count(),
            "environment": environment.record(None if config.model.moe is None else config.model.moe.router),
        }
    )
    if jax.process_index() == 0:
        metrics.write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def read_result(config: Config, folder: Path) -> dict[str, Any] | None:
    """The result in `folder` if it is of as many steps and evaluation batches as the config asks for."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # JSON's and UTF-8's errors are ValueErrors
        return None
    now = (config.train.steps, config.train.eval_batches)
    return result if (result["step"], result["eval_batches"]) == now else None


def collect(ablation: Ablation, workdir: str | os.PathLike[str]) -> list[Arm]:
    """What stands in `workdir`, finished or not, in the config's order. Trains nothing.

    Raises UserError as `check`, and where a run that stands there is another config's.
    """
    return [
        Arm(name, config, account, tuple(_read(config, folder_of(workdir, name, s), s) for s in ablation.seeds))
        for name, (config, account) in check(ablation).items()
    ]


def _read(config: Config, folder: Path, seed: int) -> Run:
    train.check_resumable(metrics.read_config(folder), dataclasses.replace(config, seed=seed), folder)
    result = read_result(config, folder)
    path = folder / metrics.EVALUATIONS
    losses = {line["step"]: line["loss"] for line in metrics.read_lines(path)} if path.is_file() else {}
    if result is not None:
        losses[result["step"]] = result["loss"]
    steps = tuple(sorted(losses))
    return Run(seed, folder, result, steps, tuple(losses[step] for step in steps))


def dense_arm(arms: Sequence[Arm]) -> Arm | None:
    """The first arm without experts."""
    return next((arm for arm in arms if arm.config.model.moe is None), None)


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation of a sample (ddof = 1); None where there are too few values."""
    mean = float(np.mean(values)) if values else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def final_loss(arm: Arm) -> tuple[float | None, float | None]:
    """Mean and std over the finished seeds of the final held-out loss."""
    return mean_and_std([run.result["loss"] for run in arm.finished if run.result])


def curve(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """(steps (N,), losses (N,)): the held-out loss, mean over finished seeds, where all of them were evaluated."""
    runs = [dict(zip(run.steps, run.losses, strict=True)) for run in arm.finished]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return np.array(steps), np.array([np.mean([losses[step] for losses in runs]) for step in steps])


def flops_to_loss(flops: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The FLOPs at which the curve first comes down to `target`: linear between its points, None if it never does.

    A curve that begins at or below the target gives its first point's FLOPs: an upper bound.
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(flops[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return float(flops[i - 1] + share * (flops[i] - flops[i - 1]))
    return None


def flops_to_dense_loss(arm: Arm, dense: Arm | None) -> float | None:
    """Training FLOPs at which `arm` reaches the dense arm's final loss; for the dense arm all of its own."""
    target = None if dense is None else final_loss(dense)[0]
    if target is None:
        return None
    if arm is dense:
        return arm.flops_per_step * arm.config.train.steps
    steps, losses = curve(arm)
    return flops_to_loss((steps * arm.flops_per_step).tolist(), losses.tolist(), target)


def to_json(arms: Sequence[Arm]) -> dict[str, Any]:
    """report.json: per arm its finished seeds, and figures over them."""
    dense = dense_arm(arms)
    names = ("seed", "loss", "bits_per_byte", "tokens_per_second", "max_violation")
    report = {}
    for arm in arms:
        mean, std = final_loss(arm)
        report[arm.name] = {
            "seeds": [{name: run.result[name] for name in names} for run in arm.finished if run.result],
            "mean": mean,
            "std": std,
            "active_flops_per_token": arm.account.active_flops_per_token,
            "total_params": arm.account.total_params,
            "active_params": arm.account.active_params,
            "flops_to_dense_loss": flops_to_dense_loss(arm, dense),
        }
    return {"arms": report}
