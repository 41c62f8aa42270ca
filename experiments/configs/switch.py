"""Switch (Fedus 2021): top-1 of 16, capacity 1.25 in training and 2 at evaluation, balance loss 0.01, jitter 0.01.

python experiments/train.py --config=experiments/configs/switch.py --workdir=runs/switch
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:switch",
        num_experts=16,
        experts_per_token=1,
        expert_width=base.share_of(model, 1),
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balance_weight=0.01,
        input_jitter=0.01,
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
