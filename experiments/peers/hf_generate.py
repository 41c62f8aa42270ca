"""Prefill and decode tokens/s of a small OLMoE in transformers on the CPU: the peer of benchmark_decode.py.

Standalone: runs in an interpreter of its own that has torch and transformers. Prints one JSON object a line, one for
each of its expert implementations.
"""

import json
import statistics
import sys
import time

import torch
import transformers

sizes = json.loads(sys.argv[1])
torch.set_num_threads(sizes["threads"])
torch.manual_seed(0)
config = transformers.OlmoeConfig(**sizes["config"], eos_token_id=None, pad_token_id=0)
prompts = torch.randint(1, config.vocab_size, (sizes["batch"], sizes["prompt"]))


def seconds(model, new_tokens: int) -> float:
    start = time.perf_counter()
    model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(prompts))
    return time.perf_counter() - start


for experts in ("eager", "grouped_mm"):
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    ).eval()
    seconds(model, 2)
    pairs = [(seconds(model, 1), seconds(model, 1 + sizes["new"])) for _ in range(sizes["repeats"])]
    found = {
        "experts": experts,
        "prefill": statistics.median(first for first, _ in pairs),
        "decode": statistics.median(whole - first for first, whole in pairs),
        "transformers": transformers.__version__,
    }
    print(json.dumps(found), flush=True)
