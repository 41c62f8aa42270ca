"""Writes a checkpoint of a published family in Hugging Face's format.

  python experiments/export_hf.py --workdir=runs/olmoe --target=DIR

DIR must not exist yet. Import and export give every tensor back bit for bit where the dtype is kept. A run of the
research LM exports as the Qwen3-MoE or Qwen2-MoE that it is a case of; where it is none, the reasons are named.
"""

import json

from absl import flags

from experiments import cli
from moejax import checkpoint, hf_checkpoint, hf_export, hf_research, models, tokenizers
from moejax import config as configs

WORKDIR = flags.DEFINE_string("workdir", None, "A run, or a folder that experiments/import_hf.py made.", required=True)
TARGET = flags.DEFINE_string("target", None, "The folder to be made.", required=True)


def main() -> None:
    config = checkpoint.read_config(WORKDIR.value)
    if config is not None and "family" not in config:
        research()
    else:
        published()


def research() -> None:
    """A run of the research LM, without its tokenizer where that is of bytes."""
    found = checkpoint.restore(WORKDIR.value)
    assert found is not None
    run = configs.from_config_dict(found.config)
    family, config, variables = hf_research.as_published(run.model, found.trees["params"])
    tokenizer = tokenizers.load(run.data.tokenizer, found.data.get("tokenizer"))
    end = tokenizer.end_of_document  # begins a document in training, as generate's prompts
    ends = {"bos_token_id": end, "eos_token_id": end}
    raw = family.write_config(config) | ends
    beside = {"generation_config.json": json.dumps(ends)}
    if isinstance(tokenizer, tokenizers.FileTokenizer):
        beside |= tokenizer.published()
    hf_export.export_variables(TARGET.value, family, config, variables, raw=raw, beside=beside)
    print(f"{family.architecture} in {TARGET.value}")


def published() -> None:
    """A published family."""
    stored = hf_checkpoint.Stored(WORKDIR.value, models.FAMILIES)
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    options = {"raw": stored.raw, "beside": stored.beside(), "repeated": stored.repeated}
    size = hf_export.export(TARGET.value, stored.family, stored.config, stored.read, dtypes, **options)
    print(f"{stored.family.architecture}: {size / 1e9:.2f} GB of tensors in {TARGET.value}")


if __name__ == "__main__":
    cli.run(main, picks=False)
