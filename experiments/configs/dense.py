"""The dense arm: one SwiGLU FFN per block.

python experiments/train.py --config=experiments/configs/dense.py --workdir=runs/dense
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    return base.get_config()
