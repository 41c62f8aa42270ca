"""Prefill and decode tokens/s of an OLMoE in transformers: the peer of benchmark_decode.py.

Standalone: runs in an interpreter of its own that has torch and transformers. Prints one JSON object a line, one for
each batch and each of its ways: on a CPU its expert implementations, on a GPU also a static cache, which `generate`
compiles for. A way that fails is named on stderr and left out.
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
device = "cuda" if sizes["gpu"] else "cpu"
config = transformers.OlmoeConfig(**sizes["config"], eos_token_id=None, pad_token_id=0)


def seconds(model, prompts, new_tokens: int, options: dict) -> float:
    start = time.perf_counter()
    model.generate(
        prompts, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(prompts), **options
    )
    if sizes["gpu"]:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ways(batch: int) -> list[tuple[str, dict]]:
    """(expert implementation, options of generate)."""
    if not sizes["gpu"]:
        return [("eager", {}), ("grouped_mm", {})]
    static = {"cache_implementation": "static"}
    return (
        [("grouped_mm", static), ("batched_mm", static)] if batch == 1 else [("grouped_mm", {}), ("grouped_mm", static)]
    )


with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, sizes["dtype"]), attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
for turn in range(2):  # the first way of every batch, then the second: a run that is cut short has each
    for batch in sizes["batches"]:
        prompts = torch.randint(1, config.vocab_size, (batch, sizes["prompt"]), device=device)
        experts, options = ways(batch)[turn]
        try:
            model.set_experts_implementation(experts)
            torch.compiler.reset()
            for count in (1, sizes["new"]) if sizes["gpu"] else (2,):
                seconds(model, prompts, count, options)
            pairs = [
                (seconds(model, prompts, 1, options), seconds(model, prompts, sizes["new"], options))
                for _ in range(sizes["repeats"])
            ]
        except Exception as error:  # a way that this version has not
            print(f"{experts} {options}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        found = {
            "way": experts + (", static cache, compiled" if options else ""),
            "batch": batch,
            "prefill": statistics.median(first for first, _ in pairs),
            "decode": statistics.median(whole - first for first, whole in pairs),
            "transformers": transformers.__version__,
        }
        print(json.dumps(found), flush=True)
