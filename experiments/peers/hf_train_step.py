"""A training step of an OLMoE in transformers, bfloat16 throughout, AdamW: the peer of benchmark_step.py.

Standalone: runs in an interpreter of its own that has torch and transformers. Takes the sizes as JSON, prints one JSON
object: seconds of the median step, bytes allocated at most, and torch's and transformers' versions.
"""

import json
import statistics
import sys
import time

import torch
import transformers

sizes = json.loads(sys.argv[1])
gpu = torch.cuda.is_available()
device = "cuda" if gpu else "cpu"
torch.manual_seed(0)
config = transformers.OlmoeConfig(**sizes["config"])
torch.set_default_dtype(torch.bfloat16)
with torch.device(device):
    model = transformers.OlmoeForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
torch.set_default_dtype(torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=gpu)
tokens = torch.randint(0, config.vocab_size, (sizes["batch"], sizes["length"]), device=device)
forward = torch.compile(model) if gpu else model


def step() -> None:
    forward(input_ids=tokens, labels=tokens, output_router_logits=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if gpu:
        torch.cuda.synchronize()


def seconds() -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


for _ in range(3):
    step()
result = {
    "seconds": statistics.median(seconds() for _ in range(sizes["repeats"])),
    "bytes": torch.cuda.max_memory_allocated() if gpu else None,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
print(json.dumps(result))
