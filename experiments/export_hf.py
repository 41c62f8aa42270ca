"""Writes a checkpoint of a published family in Hugging Face's format: transformers, vLLM and SGLang read it.

  python experiments/export_hf.py --workdir=runs/olmoe --target=DIR

DIR must not exist yet. Import and export give every tensor back bit for bit where the dtype is kept.
"""

from absl import flags

from experiments import cli
from moejax import hf_checkpoint, hf_export, models

WORKDIR = flags.DEFINE_string("workdir", None, "A folder that experiments/import_hf.py made.", required=True)
TARGET = flags.DEFINE_string("target", None, "The folder to be made.", required=True)


def main() -> None:
    stored = hf_checkpoint.Stored(WORKDIR.value, models.FAMILIES)
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    size = hf_export.export(
        TARGET.value, stored.family, stored.config, stored.read, dtypes, raw=stored.raw, beside=stored.beside()
    )
    print(f"{stored.family.architecture}: {size / 1e9:.2f} GB of tensors in {TARGET.value}")


if __name__ == "__main__":
    cli.run(main)
