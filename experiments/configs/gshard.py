"""GShard (Lepikhin 2020): top-2 of 32 experts of half the width, capacity 2, balance loss 0.01.

python experiments/train.py --config=experiments/configs/gshard.py --workdir=runs/gshard
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:gshard",
        num_experts=32,
        experts_per_token=2,
        expert_width=base.share_of(model, 2),
        capacity_factor=2.0,
        load_balance_weight=0.01,
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
