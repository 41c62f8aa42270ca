"""Fine-grained experts (DeepSeekMoE, Dai 2024): 1 shared + top-3 of 63 of a quarter width, dropless, balanced.

python experiments/train.py --config=experiments/configs/fine_grained.py --workdir=runs/fine_grained
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:top_k",
        num_experts=63,
        experts_per_token=3,
        shared_experts=1,
        expert_width=base.share_of(model, 4),
        load_balance_weight=0.01,
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
