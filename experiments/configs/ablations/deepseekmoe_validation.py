"""The validation experiment of DeepSeekMoE (Dai 2024, Table 1) scaled down: five arms, two classes of compute.

  python experiments/ablate.py --config=experiments/configs/ablations/deepseekmoe_validation.py --workdir=runs/d

Dense, Hash and Switch use one FFN's width per token; GShard's top-2 of 16 and DeepSeekMoE's 1 shared + top-7 of 63
quarters use two. All sparse arms hold 16 FFNs' parameters, drop nothing and are balanced with weight 0.01. The paper
trains 9 layers of width 1280 on 100B tokens at a learning rate of 1.08e-3, warmed up over 8% of the steps and
multiplied by 0.316 at 80% and 90% of them.
"""

from ml_collections import ConfigDict

from experiments.configs import base, fine_grained, gshard, hash, switch


def get_config() -> ConfigDict:
    config = base.get_config()
    config.optimizer.update(learning_rate=1.08e-3, schedule="steps", warmup_steps=16)
    config.train.eval_every = 20  # compute to the dense arm's loss is interpolated between these
    config.seeds = (0, 1, 2)
    arms = {"hash": hash.moe, "switch": switch.moe, "gshard": gshard.moe, "deepseekmoe": fine_grained.moe}
    config.arms = ConfigDict({"dense": {"model": {"moe": None}}})
    for name, moe in arms.items():
        config.arms[name] = ConfigDict({"model": {"moe": moe(config.model)}})
        config.arms[name].model.moe.update(capacity_factor=None, eval_capacity_factor=None, input_jitter=0.0)
    config.arms.gshard.model.moe.num_experts = 16
    config.arms.gshard.model.moe.expert_width = base.share_of(config.model, 1)
    config.arms.deepseekmoe.model.moe.experts_per_token = 7
    config.arms.deepseekmoe.model.moe.router_options = {"renormalize": False}  # eq. 9-11: the gate is the softmax score
    config.classes = {"one FFN per token": ("dense", "hash", "switch"), "two per token": ("gshard", "deepseekmoe")}
    return config
