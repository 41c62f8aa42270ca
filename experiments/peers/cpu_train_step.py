"""Training tokens/s of a small qwen3_moe in transformers on the CPU: the peer of benchmark_cpu's `peer` section.

Standalone: runs in an interpreter of its own that has torch and transformers. Prints one JSON object a line.
"""

import json
import statistics
import sys
import time

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sizes = json.loads(sys.argv[1])
torch.set_num_threads(sizes["threads"])
torch.manual_seed(0)
config = CONFIG_MAPPING["qwen3_moe"](
    vocab_size=sizes["vocab_size"],
    hidden_size=sizes["width"],
    num_hidden_layers=sizes["num_layers"],
    num_attention_heads=sizes["num_heads"],
    num_key_value_heads=sizes["num_kv_heads"],
    head_dim=sizes["head_dim"],
    moe_intermediate_size=sizes["expert_width"],
    intermediate_size=sizes["ffn_width"],
    num_experts=sizes["num_experts"],
    num_experts_per_tok=sizes["experts_per_token"],
    norm_topk_prob=True,
    max_position_embeddings=2 * sizes["length"],
    tie_word_embeddings=True,
)
model = AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.randint(0, sizes["vocab_size"], (sizes["batch"], sizes["length"]))


def step() -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


for _ in range(2):
    step()
seconds = []
for _ in range(sizes["repeats"]):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"seconds": statistics.median(seconds), "parameters": parameters, "torch": torch.__version__}))
