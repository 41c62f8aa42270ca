"""Evaluates a run on its held-out text.

  python experiments/evaluate.py --workdir=runs/x --experts_per_token=2 --json

With --json the last line is one JSON object with step, loss (nats per target), bits_per_byte and max_violation.
--workdir may also be a copy that holds the checkpoint alone.
"""

import dataclasses
import json

from absl import flags

from experiments import cli
from moejax import checkpoint, data, sharding
from moejax import config as configs
from moejax.errors import UserError
from moejax.evaluate import evaluate
from moejax.models.lm import LM

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or a copy of its checkpoint.", required=True)
EXPERTS = flags.DEFINE_integer("experts_per_token", None, "Experts per token, if another number than in training.")
BATCHES = flags.DEFINE_integer("batches", None, "Evaluate this many batches; all held-out text by default.")
JSON = flags.DEFINE_bool("json", False, "End with one JSON object.")


def main() -> None:
    found = checkpoint.restore(WORKDIR.value)
    if found is None:
        raise UserError(f"--workdir={WORKDIR.value}: there is no checkpoint; train first with experiments/train.py")
    config = configs.with_experts_per_token(configs.from_config_dict(found.config), EXPERTS.value)
    corpus = data.prepare(config.data)
    result = evaluate(
        LM(config.model),
        found.trees["params"],
        found.trees.get("router_state", {}),
        data.eval_batches(corpus, config.data, BATCHES.value),
        sharding.make_mesh(dataclasses.asdict(config.mesh)),
    )
    print(f"{WORKDIR.value}, step {found.step}, on {corpus.description}")
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            print(f"  {name:20} {value:.4f}" if isinstance(value, float) else f"  {name:20} {value}")
    if JSON.value:
        print(json.dumps({"step": found.step} | result))


if __name__ == "__main__":
    cli.run(main)
