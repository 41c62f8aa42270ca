"""What balancing does to fine-grained experts, and what it costs: none, an auxiliary loss, the bias rule.

  python experiments/ablate.py --config=experiments/configs/ablations/balance.py --workdir=runs/b

Every arm routes by sigmoid scores to 3 of 63 experts of a quarter width beside a shared one, drops nothing, and differs
in balancing alone: the load-balance loss at three weights (Switch, Fedus 2021), the bias rule at three rates (Wang
2024), or nothing, which shows what both are for.
"""

from ml_collections import ConfigDict

from experiments.configs import base, fine_grained_aux_free

WEIGHTS = {"aux_0001": 0.001, "aux_001": 0.01, "aux_01": 0.1}
RATES = {"bias_0001": 0.001, "bias_001": 0.01, "bias_01": 0.1}


def get_config() -> ConfigDict:
    config = base.get_config()
    config.seeds = (0, 1, 2)
    config.arms = ConfigDict()
    for name in ("none", *WEIGHTS, *RATES):
        moe = fine_grained_aux_free.moe(config.model)
        moe.update(load_balance_weight=WEIGHTS.get(name, 0.0), bias_update_rate=RATES.get(name, 0.0))
        config.arms[name] = ConfigDict({"model": {"moe": moe}})
    return config
