"""Continues prompts with a trained model, or with one that experiments/import_hf.py imported.

  python experiments/generate.py --workdir=runs/x --prompt="def " --max_new_tokens=64 --temperature=0.8 --seed=1
  python experiments/generate.py --workdir=runs/x --prompt="def " --prompt="class Tree"
  python experiments/generate.py --workdir=runs/x --prompt_file=prompts.txt

Several prompts run as one batch and are printed in their order: the first as it comes, each further one when those
before it have ended. --workdir may also be a copy that holds the checkpoint alone. Nothing is dropped at any capacity
factor.
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
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue, any number of times; none: a document's beginning.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Further prompts, one a line.")
NEW = flags.DEFINE_integer("max_new_tokens", 64, "Stop after this many tokens, or at the end of the document.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that hold this share of the probability.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json for an imported model; else the one beside it.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", 0, 2**63 - 1)


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
    encoder = hf.Tokenizer.from_str(tokenizer.text or "")
    texts = prompts()
    encoded = [encoder.encode(text).ids or [tokenizer.end_of_document] for text in texts]
    model, variables = stored.load()
    largest = max(max(ids) for ids in encoded)
    if largest >= model.config.vocab_size:
        raise UserError(f"tokenizer {path} gives token {largest} and the model has {model.config.vocab_size} tokens: "
                        "give the tokenizer.json of this model")  # fmt: skip
    ends = hf_import.eos_ids(Path(WORKDIR.value) / "tokenizer", stored.raw) or tokenizer.end_of_document
    run(model, variables, tokenizer, texts, encoded, ends)


def trained() -> None:
    """The research LM."""
    found = checkpoint.restore(WORKDIR.value)
    if found is None:
        first = "import it" if list(Path(WORKDIR.value).glob("*.safetensors")) else "train"
        script = {"import it": "import_hf.py", "train": "train.py"}[first]
        raise UserError(f"--workdir={WORKDIR.value}: there is no checkpoint; {first} first with experiments/{script}")
    config = configs.from_config_dict(found.config)
    if TOKENIZER.value is not None:
        raise UserError(f"--tokenizer={TOKENIZER.value} is for an imported model: this run has its own; leave it out")
    tokenizer = tokenizers.load(config.data.tokenizer, found.data["tokenizer"])
    if config.model.moe is not None and isinstance(abstract_decision(config.model.moe), routing.ExpertChoice):
        print(
            "expert choice looks at the whole sequence: here each token takes its top "
            f"{config.model.moe.experts_per_token} experts by score instead",
            file=sys.stderr,
        )
    texts = prompts()
    encoded = [[tokenizer.end_of_document, *tokenizer.encode(text)] for text in texts]
    run(LM(config.model), jax.device_put(found.trees), tokenizer, texts, encoded, tokenizer.end_of_document)


def prompts() -> list[str]:
    """The texts of --prompt, then those of --prompt_file; one empty text where there are none."""
    texts = list(PROMPT.value)
    if PROMPT_FILE.value:
        try:
            texts += Path(PROMPT_FILE.value).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--prompt_file={PROMPT_FILE.value} can't be read as text, one prompt a line") from error
    return texts or [""]


def run(model, variables, tokenizer, texts: list[str], encoded: list[list[int]], ends: int | list[int]) -> None:
    """Generates, and prints the first prompt that has not ended as its tokens come."""
    stops = {ends} if isinstance(ends, int) else set(ends)
    streams = [Stream(tokenizer, text, ids, stops) for text, ids in zip(texts, encoded, strict=True)]
    waiting = list(streams)

    def on_token(tokens) -> None:
        for stream, token in zip(streams, tokens, strict=True):
            stream.add(int(token))
        while waiting:
            waiting[0].show()
            if not waiting[0].ended:
                return
            waiting.pop(0).close()

    generate(
        model,
        variables,
        encoded,
        NEW.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        eos_id=ends,
        on_token=on_token,
    )
    for stream in waiting:
        stream.close()


class Stream:
    """One prompt (text, ids) and what follows it, printed as text, bytes held back that don't yet make a character."""

    def __init__(self, tokenizer, prompt: str, ids: list[int], stops: set[int]):
        self.tokenizer, self.ids, self.stops, self.shown = tokenizer, ids, stops, ""
        self.prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a shell gives any bytes
        self.tokens: list[int] = []
        self.ended = False

    def add(self, token: int) -> None:
        if not self.ended and token != self.tokenizer.end_of_document:
            self.tokens.append(token)
        self.ended |= token in self.stops

    def show(self) -> None:
        self._print(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def close(self) -> None:
        self._print(self._text())
        print()

    def _text(self) -> str:
        return tokenizers.decode_after(self.tokenizer, self.ids, self.tokens)

    def _print(self, text: str) -> None:
        if self.prompt:  # only now: by then every complaint about the options is out
            print(self.prompt, end="", flush=True)
            self.prompt = ""
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


if __name__ == "__main__":
    cli.run(main)
