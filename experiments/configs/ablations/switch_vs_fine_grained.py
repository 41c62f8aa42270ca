"""Few large experts against many small ones, at equal active FLOPs and equal total expert parameters.

  python experiments/ablate.py --config=experiments/configs/ablations/switch_vs_fine_grained.py --workdir=runs/a

Every arm uses one dense FFN's width per token and every sparse arm holds 16 FFNs' parameters: 16 experts of the whole
width, 32 of half, or 64 of a quarter (1 shared, 63 routed). An arm says only what it changes.
"""

from ml_collections import ConfigDict

from experiments.configs import base, fine_grained, fine_grained_aux_free, gshard, hash, switch


def get_config() -> ConfigDict:
    config = base.get_config()
    config.train.eval_every = 20  # compute to the dense arm's loss is interpolated between these
    config.seeds = (0, 1, 2)
    config.arms = ConfigDict({"dense": {"model": {"moe": None}}})
    for arm in (hash, switch, gshard, fine_grained, fine_grained_aux_free):
        config.arms[arm.__name__.rpartition(".")[2]] = ConfigDict({"model": {"moe": arm.moe(config.model)}})
    return config
