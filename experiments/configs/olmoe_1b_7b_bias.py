"""A model of OLMoE-1B-7B's sizes, balanced by selection biases (Wang et al. 2024) beside its router losses.

The router's scores are sigmoids, as in DeepSeek-V3; all else is `olmoe_1b_7b.py`.
"""

from ml_collections import ConfigDict

from experiments.configs import olmoe_1b_7b


def get_config() -> ConfigDict:
    config = olmoe_1b_7b.get_config()
    config.model.moe.router = "moejax.routing:sigmoid_top_k"
    config.model.moe.router_options = ConfigDict()
    config.model.moe.bias_update_rate = 0.001
    return config
