"""Trains a language model, or continues the run that --workdir holds.

  python experiments/train.py --config=experiments/configs/fine_grained.py --workdir=runs/x --config.train.steps=200

The same command again continues where the run stopped; a changed config stops and lists what changed (more steps,
another mesh and other logging intervals are no change). Every field is explained in moejax/config.py.
--config.train.init_from=runs/olmoe, a workdir of experiments/import_hf.py, trains that model: docs/models.md.
"""

from absl import flags

from experiments import cli
from moejax import config as configs
from moejax import train

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics, config.", required=True)


def main() -> None:
    train.run(configs.from_config_dict(CONFIG.value), WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
