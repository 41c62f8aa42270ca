"""Ablations of tiny models, and run folders as a finished or stopped run would leave them, without any training."""

import json

from data_helpers import write_folder

from moejax import ablation, metrics
from moejax.config import Ablation, Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

SWITCH = MoEConfig(router="moejax.routing:switch", num_experts=4, experts_per_token=1, capacity_factor=1.0)
TOKENS = 8 * 16  # of one step


def plan(folder, seeds=(0, 1), steps=4, **arms) -> Ablation:
    """Arms of one size that differ in their FFN: dense and switch, or what `arms` says (name -> MoEConfig or None)."""
    write_folder(folder / "text")
    data = DataConfig(f"text:{folder}/text/*.txt", sequence_length=16, batch_size=8, cache_dir=str(folder / "cache"))

    def config(moe: MoEConfig | None) -> Config:
        return Config(
            model=ModelConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, ffn_width=32, moe=moe),
            data=data,
            optimizer=OptimizerConfig(warmup_steps=1),
            train=TrainConfig(steps=steps, log_every=1, eval_every=2, eval_batches=2),
            mesh=MeshConfig(data=1),
        )

    arms = arms or {"dense": None, "switch": SWITCH}
    return Ablation({name: config(moe) for name, moe in arms.items()}, tuple(seeds), None)


def environment() -> dict:
    return {
        "time": "2025-01-02T03:04:05+0000", "command": [], "python": "3.13.0", "platform": "Linux-test",
        "packages": {"jax": "0.11.2", "flax": "0.12.12"}, "git_commit": "abc",
        "devices": {"kind": "cpu", "count": 1, "processes": 1},
    }  # fmt: skip


def write_run(workdir, arm: str, seed: int, losses: dict[int, float], finished=True, sparse=False, **result) -> None:
    """A run with these held-out losses by step; the last is the final one if it is finished."""
    folder = ablation.folder_of(workdir, arm, seed)
    folder.mkdir(parents=True)
    evaluations = [{"step": step, "loss": loss} for step, loss in losses.items()]
    (folder / metrics.EVALUATIONS).write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    violation = 0.5 if sparse else None
    lines = [{"step": step, "loss": loss + 0.1, "max_violation": violation} for step, loss in losses.items()]
    (folder / metrics.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sparse:
        loads = [{"step": step, "load": [[4, 0, 2, 2], [2, 2, 2, 2]]} for step in losses]
        (folder / metrics.LOADS).write_text("".join(json.dumps(line) + "\n" for line in loads))
    if finished:
        step, loss = list(losses.items())[-1]
        values = {
            "step": step, "seed": seed, "loss": loss, "bits_per_byte": 1.5 * loss, "tokens_per_second": 1000.0,
            "max_violation": 0.25 if sparse else None, "dropped_fraction": 0.01 if sparse else None,
            "train_dropped_fraction": 0.05 if sparse else None, "content_hash": "12ab", "eval_batches": 2, "cores": 2,
            "data": "python-stdlib of CPython 3.13.0 (content 12ab)", "environment": environment(),
        }  # fmt: skip
        (folder / ablation.RESULT).write_text(json.dumps(values | result))
