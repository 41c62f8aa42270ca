"""Turns a Hugging Face checkpoint into one of moejax's, streamed; every tensor is accounted for.

  python experiments/import_hf.py --source=DIR --workdir=runs/olmoe --dtype=bfloat16

DIR holds config.json and safetensors files. Float8 (DeepSeek-V3) and MXFP4 (gpt-oss) tensors come out as bfloat16
where no --dtype is given.
"""

import resource
import time

from absl import flags

from experiments import cli
from moejax import hf_checkpoint, models

SOURCE = flags.DEFINE_string("source", None, "The folder of a Hugging Face checkpoint.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "A new folder for the checkpoint.", required=True)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the parameters; none: as they are.")


def main() -> None:
    start = time.perf_counter()
    told = hf_checkpoint.convert(SOURCE.value, WORKDIR.value, models.FAMILIES, DTYPE.value)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{told['family']}: {told['parameters']:,} parameters from {told['tensors']:,} tensors "
        f"({told['left_out']:,} without parameters left out), {told['bytes'] / 1e9:.2f} GB in "
        f"{time.perf_counter() - start:.0f} s, peak memory {peak / 1e9:.2f} GB: {WORKDIR.value}"
    )


if __name__ == "__main__":
    cli.run(main, picks=False)
