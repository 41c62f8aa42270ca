"""DeepSeek-V3's sizes in the research LM, for experiments/compile_ahead.py: 671B parameters, 37B active.

  python experiments/compile_ahead.py --config=experiments/configs/deepseek_v3_sized.py --topology=v5p:8x8x4

61 layers of which 3 are dense, D 7168, 256 experts of 2048 top-8 and one shared. Attention is grouped-query with as
many parameters a layer as V3's latent attention. Text and tokenizer are stand-ins: only their shapes matter here.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.update(
        num_layers=61, first_dense_layers=3, width=7168, num_heads=96, num_kv_heads=6, head_dim=128, ffn_width=18432,
        vocab_size=129280, qk_norm=True, dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.model.moe = base.moe(
        router="moejax.routing:sigmoid_top_k",
        num_experts=256,
        experts_per_token=8,
        shared_experts=1,
        expert_width=2048,
        bias_update_rate=0.001,
        sequence_balance_weight=1e-4,
    )
    config.data.update(sequence_length=4096, batch_size=256)
    config.mesh.update(data=1, fsdp=-1, expert=8)
    return config
