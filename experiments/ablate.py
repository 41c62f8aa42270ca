"""Trains every arm of an ablation with every seed, and reports them.

  python experiments/ablate.py --config=experiments/configs/ablations/switch_vs_fine_grained.py --workdir=runs/a

Kill it and call it again at will: every run continues, finished ones are kept. Arms whose active FLOPs per token
differ by more than 2% are refused, unless the config declares classes of compute. The report (report.json, report.md
and pictures of loss, expert load and MaxVio) is of what has been finished; --report_only writes it and trains nothing.
"""

from absl import flags

from experiments import cli
from moejax import ablation, report
from moejax import config as configs
from moejax.errors import UserError

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Runs go to WORKDIR/ARM/seed_S, the report beside them.", required=True)
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Report what is there.")


def main() -> None:
    plan = configs.ablation_from_config_dict(CONFIG.value)
    if not REPORT_ONLY.value:
        arms = ablation.run(plan, WORKDIR.value)
    else:
        arms = ablation.collect(plan, WORKDIR.value)
        if not any(run.steps for arm in arms for run in arm.runs):
            names = ", ".join(arm.name for arm in arms)
            raise UserError(
                f"--workdir={WORKDIR.value} holds no evaluated run of the arms {names}: "
                "give the folder of the ablation, or leave --report_only out to train"
            )
    report.write(arms, WORKDIR.value, plan.classes)
    print(report.plain_table(report.HEADER, report.rows(arms)))
    for line in report.conclusions(arms, plan.classes):
        print(line)
    print(f"report: {WORKDIR.value}/report.md")


if __name__ == "__main__":
    cli.run(main)
