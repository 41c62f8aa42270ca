"""Writes a checkpoint of a published family in Hugging Face's format.

  python experiments/export_hf.py --workdir=runs/olmoe --target=DIR

DIR must not exist yet. Import and export give every tensor back bit for bit where the dtype is kept. A run of the
research LM exports as the Qwen3-MoE or Qwen2-MoE that it is a case of; where it is none, the reasons are named.
"""

import json

import tokenizers as hf
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
    beside = {"generation_config.json": json.dumps(ends)} | tokenizer_files(tokenizer)
    hf_export.export_variables(TARGET.value, family, config, variables, raw=raw, beside=beside)
    print(f"{family.architecture} in {TARGET.value}")


def tokenizer_files(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """A tokenizer as transformers reads it, by file; none where it is of bytes.

    Its template puts the end of document before a text, as documents had it in training and as generate has it.
    """
    if not isinstance(tokenizer, tokenizers.FileTokenizer) or tokenizer.text is None:
        return {}
    end, whole = tokenizer.end_name, hf.Tokenizer.from_str(tokenizer.text)
    if end is not None:
        begins = [(end, tokenizer.end_of_document)]
        whole.post_processor = hf.processors.TemplateProcessing(single=f"{end} $A", special_tokens=begins)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    return {"tokenizer.json": whole.to_str(), "tokenizer_config.json": json.dumps(told)}


def published() -> None:
    """A published family."""
    stored = hf_checkpoint.Stored(WORKDIR.value, models.FAMILIES)
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    options = {"raw": stored.raw, "beside": stored.beside(), "repeated": stored.repeated}
    size = hf_export.export(TARGET.value, stored.family, stored.config, stored.read, dtypes, **options)
    print(f"{stored.family.architecture}: {size / 1e9:.2f} GB of tensors in {TARGET.value}")


if __name__ == "__main__":
    cli.run(main, picks=False)
