"""Fine-grained experts balanced by the bias rule alone (Wang 2024, DeepSeek-V3): sigmoid scores, no balance loss.

python experiments/train.py --config=experiments/configs/fine_grained_aux_free.py --workdir=runs/fine_grained_aux_free
"""

from ml_collections import ConfigDict

from experiments.configs import base


def moe(model: ConfigDict) -> ConfigDict:
    return base.moe(
        router="moejax.routing:sigmoid_top_k",
        num_experts=63,
        experts_per_token=3,
        shared_experts=1,
        expert_width=base.share_of(model, 4),
        bias_update_rate=0.01,  # ten times the published rate: these runs are hundreds of steps, not many thousands
    )


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.moe = moe(config.model)
    return config
