"""Trains a byte-level BPE on a source and writes a tokenizer.json.

  python experiments/train_tokenizer.py --source=python-stdlib --vocab_size=4096 --output=runs/bpe4096.json

Then train on it with --config.data.tokenizer=runs/bpe4096.json. The documents that training would hold out (by
--eval_fraction) are left out here too; of a mixture, every document is read once, whatever the weights.
"""

import sys
from collections.abc import Iterator

import tqdm
from absl import flags

from experiments import cli
from moejax import data_cache, sources, tokenizers
from moejax.errors import UserError

_SOURCE = flags.DEFINE_string("source", "python-stdlib", "What to train on: a data.source, as in moejax/sources.py.")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 4096, "Tokens, the 256 bytes and <|endoftext|> among them.", upper_bound=2**31 - 1
)
_OUTPUT = flags.DEFINE_string("output", "tokenizer.json", "The file to write.")
_EVAL_FRACTION = flags.DEFINE_float("eval_fraction", 0.02, "data.eval_fraction of the runs that will use it.")


def training_documents(source: str, eval_fraction: float) -> Iterator[bytes]:
    """Every document of the source that is not held out. UserError if there is none."""
    mixture = [(part, sources.manifest(part)) for _, part in sources.parse_mixture(source)]
    size = sum(file.size for _, files in mixture for file in files)
    found = False
    with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {source}") as bar:
        for part, files in mixture:
            for documents, share in sources.read(part, files):
                for document in documents:
                    if not data_cache.is_held_out(data_cache.digest(document), eval_fraction):
                        found = True
                        yield document
                bar.update(share)
    if not found:
        raise UserError(f"--source={source}: every document is empty or held out; give more text or --eval_fraction=0")


def main() -> None:
    documents = training_documents(_SOURCE.value, _EVAL_FRACTION.value)
    tokenizer = tokenizers.train_bpe(documents, _VOCAB_SIZE.value, _OUTPUT.value)
    if tokenizer.vocab_size < _VOCAB_SIZE.value:
        print(
            f"warning: --vocab_size={_VOCAB_SIZE.value} was not reached: this text has no more pairs to merge after "
            f"{tokenizer.vocab_size} tokens; give more text for a larger vocabulary",
            file=sys.stderr,
        )
    print(f"{_OUTPUT.value}: {tokenizer.vocab_size} tokens; use it with --config.data.tokenizer={_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
