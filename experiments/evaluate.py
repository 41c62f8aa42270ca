"""Evaluates a run on its held-out text.

  python experiments/evaluate.py --workdir=runs/x --experts_per_token=2 --json

With --json the last line is one JSON object with step, loss (nats per target), bits_per_byte and max_violation.
--workdir may also be a copy that holds the checkpoint alone.
"""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from moejax import checkpoint, data, sharding, train
from moejax import config as configs
from moejax.errors import UserError
from moejax.evaluate import evaluate
from moejax.models.lm import LM
from moejax.train_step import PROBE

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or a copy of its checkpoint.", required=True)
EXPERTS = flags.DEFINE_integer("experts_per_token", None, "Experts per token, if another number than in training.")
BATCHES = flags.DEFINE_integer("batches", None, "Evaluate this many batches; all held-out text by default.", 1)
JSON = flags.DEFINE_bool("json", False, "End with one JSON object.")


def main() -> None:
    found = checkpoint.restore(WORKDIR.value)
    if found is None:
        raise UserError(f"--workdir={WORKDIR.value}: there is no checkpoint; train first with experiments/train.py")
    config = configs.with_experts_per_token(configs.from_config_dict(found.config), EXPERTS.value)
    corpus = data.prepare(config.data)
    if corpus.content_hash != found.data["content_hash"]:
        print("warning: the text is not the one that the run was trained on: what is held out of it may have been seen",
              file=sys.stderr)  # fmt: skip
    model, mesh = LM(config.model), mesh_at_hand(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(PROBE, jnp.int32))
    result = evaluate(
        model,
        jax.device_put(found.trees["params"], sharding.shardings(mesh, boxed["params"])),
        jax.device_put(found.trees.get("router_state", {}), sharding.replicated(mesh)),
        data.eval_batches(corpus, config.data, BATCHES.value),
        mesh,
    )
    print(f"{WORKDIR.value}, step {found.step}, on {corpus.description}")
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            print(f"  {name:20} {value:.4f}" if isinstance(value, float) else f"  {name:20} {value}")
    if JSON.value:
        print(json.dumps({"step": found.step} | result))


def mesh_at_hand(config: configs.Config) -> jax.sharding.Mesh:
    """The mesh of the run or, where other devices are there, as many data shards as they and the batch allow."""
    try:
        mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
        train.check_batch(config, mesh)
    except UserError:
        return sharding.make_mesh({"data": math.gcd(config.data.batch_size, jax.device_count())})
    return mesh


if __name__ == "__main__":
    cli.run(main)
