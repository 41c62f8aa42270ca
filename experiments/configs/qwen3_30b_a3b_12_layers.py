"""Twelve of the 48 layers of a model of Qwen3-30B-A3B's sizes (Qwen team 2025), which with their training state fit
one GPU of 140 GB: 128 experts of 768 top-8, 32 heads over 4 of keys and values, a vocabulary of 151,936.

  python experiments/benchmark_step.py --config=experiments/configs/qwen3_30b_a3b_12_layers.py

For timing a step; text and tokenizer are stand-ins.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        num_layers=12, width=2048, num_heads=32, num_kv_heads=4, head_dim=128, vocab_size=151936, rope_theta=1e6,
        qk_norm=True, dtype="bfloat16", param_dtype="bfloat16", remat="dots", scan_layers=False,
    )  # fmt: skip
    config.model.moe = base.moe(
        router="moejax.routing:top_k",
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
        load_balance_weight=0.001,
    )
    config.data.update(sequence_length=4096, batch_size=4)
    return config
