"""Training tokens/s of a small qwen3_moe in transformers on the CPU: the peer of benchmark_cpu's `peer` section.

Standalone: runs in an interpreter of its own that has torch and transformers. Prints its sizes and versions as one
JSON object; then takes a step for each line that comes in, and answers each with {}.
"""

import json
import sys

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


parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"parameters": parameters, "torch": torch.__version__}), flush=True)
for _ in sys.stdin:
    step()
    print("{}", flush=True)
