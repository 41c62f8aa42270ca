"""Evaluates a run on its held-out text, or a run or an imported model on all of another text.

  python experiments/evaluate.py --workdir=runs/x --experts_per_token=2 --json
  python experiments/evaluate.py --workdir=runs/olmoe --source="text:books/*.txt" --sequence_length=1024

With --json the last line is one JSON object with step, loss (nats per target), bits_per_byte and max_violation.
--workdir may also be a copy that holds the checkpoint alone.
"""

import dataclasses
import json
import math
import sys
from typing import Any

import flax.linen as nn
import jax
from absl import flags

from experiments import cli
from moejax import checkpoint, data, hf_checkpoint, models, published, sharding, train
from moejax import config as configs
from moejax.errors import UserError
from moejax.evaluate import evaluate
from moejax.models.lm import LM
from moejax.train_step import as_kept, param_shardings

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or a copy of its checkpoint.", required=True)
EXPERTS = flags.DEFINE_integer("experts_per_token", None, "Experts per token, if another number than in training.")
BATCHES = flags.DEFINE_integer("batches", None, "Evaluate this many batches; the whole of that text by default.", 1)
SOURCE = flags.DEFINE_string("source", None, "Another text, evaluated whole: as data.source. An import needs one.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json for an imported model; else the one beside it.")
LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens of a window, if not those of the run.", 1)
BATCH = flags.DEFINE_integer("batch_size", None, "Windows of a batch, if not those of the run.", 1)
JSON = flags.DEFINE_bool("json", False, "End with one JSON object.")


def main() -> None:
    (imported if published.description(WORKDIR.value) else trained)()


def trained() -> None:
    """The research LM, on the text that it was trained on unless --source names another."""
    found = checkpoint.restore(WORKDIR.value)
    if found is None:
        raise UserError(f"--workdir={WORKDIR.value}: there is no checkpoint; train first with experiments/train.py")
    config = configs.with_experts_per_token(configs.from_config_dict(found.config), EXPERTS.value)
    trained_on = config.data.source
    config = dataclasses.replace(config, data=data_config(config.data))
    corpus = text(config.data, trained_on)
    if found.data.get("tokenizer", corpus.tokenizer.text) != corpus.tokenizer.text:
        raise UserError(f"{config.data.tokenizer} is not the tokenizer of --workdir={WORKDIR.value}: restore the file, "
                        "or leave --tokenizer out")  # fmt: skip
    same = corpus.content_hash == found.data["content_hash"]
    if not same and SOURCE.value is None:
        print("warning: the text is not the one that the run was trained on: what is held out of it may have been seen",
              file=sys.stderr)  # fmt: skip
    if same and config.data.source != trained_on:
        print("warning: the run was trained on this text; leave --source out to evaluate what was held out of it",
              file=sys.stderr)  # fmt: skip
    report(LM(config.model), found.trees, found.step, corpus, config)


def imported() -> None:
    """A published family: an import, on --source, or a run that went on from one, on that run's text."""
    stored = hf_checkpoint.Stored(WORKDIR.value, models.FAMILIES)
    config = configs.from_config_dict(stored.run or {})
    own, trained_on = data_config(config.data), config.data.source if stored.run else None
    if stored.run is None:
        dtype: Any = stored.dtype("params/embedding").name
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        tokenizer = published.tokenizer_beside(WORKDIR.value)
        if SOURCE.value is None:
            raise UserError(f"--workdir={WORKDIR.value} was imported: give --source, the text to evaluate on")
        if tokenizer is None and TOKENIZER.value is None:
            raise UserError(f"--workdir={WORKDIR.value}: no tokenizer.json came with the checkpoint; "
                            "give --tokenizer=FILE")  # fmt: skip
        own = dataclasses.replace(own, tokenizer=TOKENIZER.value or str(tokenizer))
    config = dataclasses.replace(config, data=own)
    corpus = text(config.data, trained_on)
    model = published.model(published.description(WORKDIR.value) or {}, config, corpus.vocab_size, EXPERTS.value)
    _, variables = stored.load(on_host=True)
    report(model, variables, stored.step, corpus, config)


def data_config(config: data.DataConfig) -> data.DataConfig:
    """With what the flags change."""
    given: dict[str, Any] = {
        "source": SOURCE.value, "tokenizer": TOKENIZER.value, "sequence_length": LENGTH.value,
        "batch_size": BATCH.value,
    }  # fmt: skip
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def text(config: data.DataConfig, trained_on: str | None) -> data.Corpus:
    """What is held out of the source that was trained on, or all of another."""
    return data.prepare(config) if config.source == trained_on else data.prepare_whole(config)


def report(model: nn.Module, trees: dict[str, Any], step: int, corpus: data.Corpus, config: configs.Config) -> None:
    """Evaluates on the mesh at hand and prints."""
    if not corpus.heldout_windows:
        raise UserError(f"data.source={config.data.source}: no text is held out; give another text as --source")
    mesh, trees = mesh_at_hand(config), as_kept(model, trees)
    result = evaluate(
        model,
        jax.device_put(trees["params"], param_shardings(model, mesh)),
        jax.device_put(trees.get("router_state", {}), sharding.replicated(mesh)),
        data.eval_batches(corpus, config.data, BATCHES.value),
        mesh,
    )
    print(f"{WORKDIR.value}, step {step}, on {corpus.description}")
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            print(f"  {name:20} {value:.4f}" if isinstance(value, float) else f"  {name:20} {value}")
    if JSON.value:
        print(json.dumps({"step": step} | result))


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
