"""Hash layers (Roller 2021): the token id picks 1 of 16 experts; nothing to balance, nothing learned.

python experiments/train.py --config=experiments/configs/hash.py --workdir=runs/hash
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:hash",
        num_experts=16,
        experts_per_token=1,
        expert_width=base.share_of(model, 1),
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
