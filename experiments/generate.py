"""Continues a prompt with a trained model, or with one that experiments/import_hf.py imported.

  python experiments/generate.py --workdir=runs/x --prompt="def " --max_new_tokens=64 --temperature=0.8 --seed=1

--workdir may also be a copy that holds the checkpoint alone. Nothing is dropped at any capacity factor here.
"""

import sys
from pathlib import Path

import jax
import tokenizers as hf
from absl import flags

from experiments import cli
from moejax import checkpoint, hf_checkpoint, hf_import, models, routing, tokenizers
from moejax import config as configs
from moejax.errors import UserError
from moejax.generate import generate
from moejax.models.lm import LM
from moejax.moe import abstract_decision

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or a copy of its checkpoint.", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty: the beginning of a document.")
NEW = flags.DEFINE_integer("max_new_tokens", 64, "Stop after this many tokens, or at the end of the document.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that hold this share of the probability.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json for an imported model; else the one beside it.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def main() -> None:
    if (checkpoint.read_config(WORKDIR.value) or {}).get("family"):
        imported()
    else:
        trained()


def imported() -> None:
    """A published family: its own tokenizer, whose template may begin a prompt with a special token."""
    stored = hf_checkpoint.Stored(WORKDIR.value, models.FAMILIES)
    path = TOKENIZER.value or stored.beside().get("tokenizer.json")
    if path is None:
        raise UserError(f"--workdir={WORKDIR.value}: no tokenizer.json came with the checkpoint; give --tokenizer=FILE")
    tokenizer = tokenizers.load(str(path))
    prompt = hf.Tokenizer.from_str(tokenizer.text or "").encode(PROMPT.value).ids or [tokenizer.end_of_document]
    model, variables = stored.load()
    stream = Stream(tokenizer, PROMPT.value)
    generate(
        model,
        variables,
        [prompt],
        NEW.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        eos_id=hf_import.eos_ids(Path(WORKDIR.value) / "tokenizer") or tokenizer.end_of_document,
        on_token=lambda tokens: stream(int(tokens[0])),
    )
    stream.close()


def trained() -> None:
    """The research LM."""
    found = checkpoint.restore(WORKDIR.value)
    if found is None:
        raise UserError(f"--workdir={WORKDIR.value}: there is no checkpoint; train first with experiments/train.py")
    config = configs.from_config_dict(found.config)
    tokenizer = tokenizers.load(config.data.tokenizer, found.data["tokenizer"])
    if config.model.moe is not None and isinstance(abstract_decision(config.model.moe), routing.ExpertChoice):
        print(
            "expert choice looks at the whole sequence: here each token takes its top "
            f"{config.model.moe.experts_per_token} experts by score instead",
            file=sys.stderr,
        )
    stream = Stream(tokenizer, PROMPT.value)
    generate(
        LM(config.model),
        jax.device_put(found.trees),  # once, not with every token
        [[tokenizer.end_of_document, *tokenizer.encode(PROMPT.value)]],
        NEW.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        eos_id=tokenizer.end_of_document,
        on_token=lambda tokens: stream(int(tokens[0])),
    )
    stream.close()


class Stream:
    """Prints the prompt, then tokens as text as they come, holding back bytes that don't yet make a character."""

    def __init__(self, tokenizer, prompt: str):
        self.tokenizer, self.prompt, self.shown = tokenizer, prompt, ""
        self.tokens: list[int] = []

    def __call__(self, token: int) -> None:
        if self.prompt:  # only now: by then every complaint about the options is out
            print(self.prompt, end="", flush=True)
            self.prompt = ""
        if token != self.tokenizer.end_of_document:
            self.tokens.append(token)
            self._show(self.tokenizer.decode(self.tokens).rstrip("\N{REPLACEMENT CHARACTER}"))

    def close(self) -> None:
        self._show(self.tokenizer.decode(self.tokens))
        print()

    def _show(self, text: str) -> None:
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


if __name__ == "__main__":
    cli.run(main)
