"""Trains a language model, or continues the run that --workdir holds.

  python experiments/train.py --config=experiments/configs/fine_grained.py --workdir=runs/x --config.train.steps=200

The same command again continues where the run stopped; a changed config stops and lists what changed (more steps,
another mesh and other logging intervals are no change). Every field is explained in moejax/config.py.
Several processes, started by Slurm, on a TPU pod, by MPI or one by one, take --distributed: docs/scaling.md.
--config.train.init_from=runs/olmoe, a workdir of experiments/import_hf.py, trains that model: docs/models.md.
"""

from absl import flags

from experiments import cli
from moejax import config as configs
from moejax import distributed, train
from moejax.errors import UserError

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics, config.", required=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes of this run; each gets this command.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else tells it.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which process this is, from 0, where nothing else tells it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, where nothing else tells it.")


def main() -> None:
    if DISTRIBUTED.value:
        distributed.initialize(COORDINATOR.value, PROCESS.value, PROCESSES.value)
    elif any(flag.value is not None for flag in (COORDINATOR, PROCESS, PROCESSES)):
        raise UserError("--coordinator, --process_id and --num_processes go with --distributed: add it")
    train.run(configs.from_config_dict(CONFIG.value), WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
