"""Three small language models of equal active FLOPs on the Python standard library's source, side by side.

  python experiments/demo.py            (`make demo`, five minutes on two cores)

Trains `dense`, `switch` (top-1 of 16 experts) and `fine_grained_aux_free` (1 shared + top-3 of 63 of a quarter of the
width, balanced by the bias rule), stops that one half-way and resumes it from its checkpoint, samples a continuation,
and writes runs/demo/report.md with figures. Called again, it continues or shows what is there.
"""

import resource
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from experiments.configs import base, fine_grained_aux_free, switch
from moejax import ablation, checkpoint, metrics, report, tokenizers, train
from moejax import config as configs
from moejax.ablation import Arm
from moejax.config import Ablation
from moejax.generate import generate
from moejax.models.lm import LM

STOPPED = "fine_grained_aux_free"  # the arm that is stopped half-way
PROMPT = "import os\nimport sys\n\n\nclass "
COLUMNS = ("arm", "loss", "bits per byte", "tokens/s", "parameters", "active", "MaxVio", "dropped: train")


def plan(steps: int) -> Ablation:
    """The three arms, with one seed."""
    config = base.get_config()
    config.data.batch_size = 8  # half the tokens and twice the steps learn more in the same time
    config.train.update(steps=steps, eval_every=max(steps // 6, 20), checkpoint_every=0)
    config.seeds = (0,)
    config.arms = ConfigDict({"dense": {"model": {"moe": None}}})
    for arm in (switch, fine_grained_aux_free):
        config.arms[arm.__name__.rpartition(".")[2]] = ConfigDict({"model": {"moe": arm.moe(config.model)}})
    return configs.ablation_from_config_dict(config)


def demo(arms: Ablation, workdir: Path) -> None:
    """All of it; what is done already is not done again."""
    started = time.monotonic()
    found = ablation.collect(arms, workdir)
    if all(arm.finished for arm in found) and (workdir / "report.md").is_file():
        say(f"{workdir} is done; delete it to begin anew")
        return show(found, workdir)
    for arm in found:
        folder = arm.runs[0].folder
        if arm.name == STOPPED and not arm.finished:
            stop_half_way(arm, folder)
        say(f"{arm.name}: {folder}")
        ablation.run_one(arm.config, folder)
        ablation.clean_up()
    found = ablation.collect(arms, workdir)
    say("sampling")
    report.write(found, workdir, title="Demo: dense, switch and fine-grained experts", extra=sample(found))
    show(found, workdir)
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{metrics.duration(time.monotonic() - started)} min, peak memory {peak / 1e9:.2f} GB")


def stop_half_way(arm: Arm, folder: Path) -> None:
    """Trains half of the steps, unless an earlier call got that far."""
    half = arm.config.train.steps // 2
    logged = folder / metrics.METRICS
    if logged.is_file() and any(line["step"] >= half for line in metrics.read_lines(logged)):
        return
    say(f"{arm.name}: {half} steps, and no more")
    train.run(arm.config, folder, stop_at=half)
    ablation.clean_up()
    say(f"{arm.name} was stopped at step {half}; now it is resumed from its checkpoint, as if nothing had happened")


def sample(arms: list[Arm]) -> str:
    """A section of the report: what the arm with the lowest loss makes of the prompt."""
    runs = [(run.result["loss"], arm, run) for arm in arms for run in arm.finished if run.result]
    _, arm, run = min(runs, key=lambda item: item[0])
    found = checkpoint.restore(run.folder)
    assert found is not None
    tokenizer = tokenizers.load(arm.config.data.tokenizer)
    prompt = [tokenizer.end_of_document, *tokenizer.encode(PROMPT)]
    (new,) = generate(
        LM(arm.config.model), found.trees, [prompt], 200, temperature=0.7, top_p=0.9, eos_id=tokenizer.end_of_document
    )
    text = (PROMPT + tokenizer.decode(new)).rstrip()  # which leaves out the end of the document
    print(f"\n{arm.name}, the arm with the lowest loss in this run, continues {PROMPT!r}:\n\n{text}\n")
    heading = f"## A continuation by `{arm.name}`, the arm with the lowest loss in this run"
    return f"{heading}\n\nTemperature 0.7, top-p 0.9, after {PROMPT!r}.\n\n````\n{text}\n````"


def show(arms: list[Arm], workdir: Path) -> None:
    """The table and its footnotes on stdout."""
    picked = [report.HEADER.index(name) for name in COLUMNS]
    print(report.plain_table(COLUMNS, [[row[i] for i in picked] for row in report.rows(arms)]))
    print(*report.provenance(arms)[1:], *report.conclusions(arms), sep="\n")
    print(f"report and figures: {workdir / 'report.md'}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    STEPS = flags.DEFINE_integer("steps", 240, "Steps of each arm.", lower_bound=2)
    WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the runs and the report go.")
    cli.run(lambda: demo(plan(STEPS.value), Path(WORKDIR.value)))
