"""Training an imported model further: only what counts there is set, its sizes are the import's.

python experiments/train.py --config=experiments/configs/continued.py --config.train.init_from=runs/olmoe \
    --config.data.source="text:books/*.txt" --workdir=runs/olmoe_books
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    # The rate moves the biases of models that select with one (DeepSeek-V3); its router here is only what allows it.
    config.model.moe = base.moe(
        router="moejax.routing:sigmoid_top_k",
        load_balance_weight=0.001,
        bias_update_rate=0.001,
        mtp_weight=0.1,
    )
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.optimizer.update(learning_rate=1e-5, schedule="constant", weight_decay=0.0)
    config.train.init_from = "runs/imported"  # yours, by --config.train.init_from
    return config
