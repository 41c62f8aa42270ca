"""Published families in the training loop: a run that starts from an import, and what its checkpoints say.

A run is of a family where `train.init_from` names a checkpoint of one. Its model is that checkpoint's; of config.model
there count `dtype`, `param_dtype`, `remat`, `attention_implementation` and, under `moe`, the weights of the losses
and `bias_update_rate`. Its own checkpoints name the family as an import's do, so `evaluate`, `generate` and `export`
read both alike, and hold the run's config under `run`.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moejax import checkpoint, models, schema
from moejax.config import Config
from moejax.errors import UserError


def description(directory: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """{"family", "model", "hf", "dtype", "tensors"} of a checkpoint; None: there is none, or it is a research LM's."""
    stored = None if directory is None else checkpoint.read_config(directory)
    if stored is None or stored.get("family") not in models.FAMILIES:
        return None
    return {name: stored[name] for name in ("family", "model", "hf", "dtype", "tensors") if name in stored}


def with_tokenizer(config: Config) -> Config:
    """The config with the tokenizer beside train.init_from where it names none but "bytes"."""
    beside = tokenizer_beside(config.train.init_from or "")
    if beside is None or config.data.tokenizer != "bytes":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(beside)))


def tokenizer_beside(workdir: str | os.PathLike[str]) -> Path | None:
    """The tokenizer.json that came with an import, if one did."""
    path = Path(workdir) / "tokenizer" / "tokenizer.json"
    return path if path.is_file() else None


def keep_beside(init_from: str | os.PathLike[str], workdir: str | os.PathLike[str], tokenizer: str | None) -> None:
    """Puts the tokenizer's files beside the new run, whose checkpoints generate and export with them: those that came
    with the import, with `tokenizer`, the text of the tokenizer.json that the run trains with, if it has one."""
    source, target = Path(init_from) / "tokenizer", Path(workdir) / "tokenizer"
    if target.exists():
        return
    if source.is_dir():
        shutil.copytree(source, target)
    if tokenizer is not None:
        target.mkdir(exist_ok=True)
        (target / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def model(
    described: dict[str, Any], config: Config, vocab_size: int, experts_per_token: int | None = None
) -> nn.Module:
    """The family's model, computing as config.model says; experts_per_token: another number than the checkpoint's.

    Raises:
      UserError: the tokenizer has more tokens than the model (vocab_size, the tokenizer's); experts out of range.
    """
    family = models.FAMILIES[described["family"]]
    own = schema.parse(family.config, described["model"])
    if own.vocab_size < vocab_size:
        raise UserError(f"the model has {own.vocab_size} tokens and data.tokenizer={config.data.tokenizer} has "
                        f"{vocab_size}: give the tokenizer.json of this model")  # fmt: skip
    if experts_per_token is not None:
        _, there = family.experts(own)
        if not 1 <= experts_per_token <= there:
            raise UserError(f"experts_per_token={experts_per_token}: give 1 to {there}")
        name = next(name for name in ("num_experts_per_tok", "moe_top_k") if hasattr(own, name))
        own = dataclasses.replace(own, **{name: experts_per_token})
    return family.model(
        own,
        dtype=jnp.dtype(config.model.dtype),
        implementation=config.model.attention_implementation,
        remat=config.model.remat != "none",
        param_dtype=jnp.dtype(config.model.param_dtype),
    )


def count(described: dict[str, Any]) -> models.Preset:
    """Its sizes."""
    family = models.FAMILIES[described["family"]]
    return models.count(described["family"], family, schema.parse(family.config, described["model"]))
