"""Expert choice (Zhou 2022): each of 16 experts takes its best tokens of a sequence, one per token on average.

An expert picks among all tokens of the sequence, so later tokens reach earlier ones: the loss, held-out too, is not
that of a causal model. MaxVio is 0 by construction.

python experiments/train.py --config=experiments/configs/expert_choice.py --workdir=runs/expert_choice
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:expert_choice",
        num_experts=16,
        experts_per_token=1,
        expert_width=base.share_of(model, 1),
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
