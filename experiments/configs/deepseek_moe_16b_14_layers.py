"""Fourteen of the 28 layers of a model of DeepSeekMoE-16B's sizes (Dai et al. 2024), which with their training state
fit one GPU of 140 GB: the first is dense, the others have 64 experts of 1408 top-6 and two shared ones.

  python experiments/benchmark_step.py --config=experiments/configs/deepseek_moe_16b_14_layers.py

For timing a step; text and tokenizer are stand-ins.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        num_layers=14, first_dense_layers=1, width=2048, num_heads=16, num_kv_heads=16, ffn_width=10944,
        vocab_size=102400, dtype="bfloat16", param_dtype="bfloat16", remat="dots", scan_layers=False,
    )  # fmt: skip
    config.model.moe = base.moe(
        router="moejax.routing:top_k",
        router_options={"renormalize": False},
        num_experts=64,
        experts_per_token=6,
        shared_experts=2,
        expert_width=1408,
        load_balance_weight=0.001,
    )
    config.data.update(sequence_length=4096, batch_size=4)
    return config
