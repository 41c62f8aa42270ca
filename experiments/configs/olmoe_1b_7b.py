"""A model of OLMoE-1B-7B's sizes (Muennighoff et al. 2024): 16 layers, 64 experts top-8, 6.9B parameters.

For one GPU of 140 GB, with data and a tokenizer of your own:

  python experiments/train.py --config=experiments/configs/olmoe_1b_7b.py --config.data.source="text:books/*.txt" \
      --config.data.tokenizer=tokenizer.json --workdir=runs/olmoe

As OLMoE but for the norm of queries and keys, which is each head's here, and theirs over the whole width: 61,440
parameters fewer. Parameters and moments are bfloat16, so that all fits one GPU; --config.model.param_dtype=float32
trains with float32 master weights, as one would where there is room (83 GB of state).

A step takes 68 GB by the compiler with its layers one by one and the results of products kept, and minutes to start,
once: the compiled program is kept for later runs, which start in 20 seconds. --config.model.scan_layers=True
--config.model.remat=full compiles faster, takes less memory and longer a step.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        num_layers=16, width=2048, num_heads=16, num_kv_heads=16, vocab_size=50304, norm_eps=1e-5,
        qk_norm=True, dtype="bfloat16", param_dtype="bfloat16", remat="dots", scan_layers=False,
    )  # fmt: skip
    config.model.moe = base.moe(
        router="moejax.routing:top_k",
        router_options={"renormalize": False},
        num_experts=64,
        experts_per_token=8,
        expert_width=1024,
        load_balance_weight=0.01,
        router_z_weight=0.001,
    )
    config.data.update(sequence_length=4096, batch_size=4)
    config.optimizer.update(learning_rate=4e-4, warmup_steps=2000, decay_steps=100_000)
    config.train.update(steps=100_000, eval_every=1000, checkpoint_every=1000)
    return config
