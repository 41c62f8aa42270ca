"""Compares a Hugging Face checkpoint in moejax with transformers, layer by layer, and names the first that differs.

  python experiments/verify_hf.py --source=DIR --peer_python=PATH
  python experiments/verify_hf.py --source=DIR --peer_python=PATH --new_tokens=20

PATH is a Python interpreter that has torch and transformers; it runs as a process of its own. Both sides compute in
float32. A layer differs where max |difference| is above --tolerance times the layer's standard deviation. With
--new_tokens greedy continuations, of one sequence and of half of the other in one batch, are compared too.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.peer_process import Peer
from moejax import models
from moejax.errors import UserError
from moejax.models.parts import Block

SOURCE = flags.DEFINE_string("source", None, "The folder of a Hugging Face checkpoint.", required=True)
PEER = flags.DEFINE_string("peer_python", None, "An interpreter that has torch and transformers.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens of each of the two random sequences.")
TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Of a layer's standard deviation.")
NEW = flags.DEFINE_integer("new_tokens", 0, "Greedy tokens to compare too; transformers makes each without a cache.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of the tokens.")


def main() -> None:
    model, variables = models.load_hf(SOURCE.value)
    if PEER.value is None:
        print("loaded, every tensor accounted for; give --peer_python=PATH (torch and transformers) to compare logits")
        return
    tokens = np.random.default_rng(SEED.value).integers(0, model.config.vocab_size, (2, LENGTH.value), dtype=np.int64)
    prompts = [tokens[0].tolist(), tokens[1, : (LENGTH.value + 1) // 2].tolist()]
    with tempfile.TemporaryDirectory() as folder:
        theirs = peer(PEER.value, Path(folder), tokens)
        continued = greedy(PEER.value, Path(folder), prompts) if NEW.value else []
    ours = states(model, variables, tokens.astype(np.int32))
    worst = [(name, difference(ours[name], theirs[name])) for name in ours]
    for name, gap in worst:
        print(f"{name}: max |difference| / std = {gap:.2e}")
    wrong = [name for name, gap in worst if not gap <= TOLERANCE.value]
    print(f"the first that differs is {wrong[0]}" if wrong else f"the same within {TOLERANCE.value:g} of the std")
    new = models.generate(model, variables, prompts, max_new_tokens=NEW.value) if NEW.value else []
    for prompt, mine, other in zip(prompts if NEW.value else [], new, continued, strict=True):
        equal = next((i for i, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), NEW.value)
        print(f"greedy after {len(prompt)} tokens: {equal} of {NEW.value} the same")
    sys.exit(1 if wrong or new != continued else 0)


def peer(python: str, folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' states by name, computed in its own process; UserError where it was transformers that failed."""
    np.save(folder / "ids.npy", tokens)
    with Peer(python, "hf_logits.py", SOURCE.value, str(folder / "ids.npy"), str(folder)) as process:
        for told in process:  # it answers in files, but for a refusal
            raise refused(told)
    told = json.loads((folder / "peer.json").read_text())
    print(f"transformers {told['transformers']}, torch {told['torch']}")
    names = [*(f"layer_{i}" for i in range(told["layers"])), "logits"]
    return {name: np.load(folder / f"{name}.npy") for name in names}


def greedy(python: str, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' continuations, computed in its own process."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    with Peer(python, "hf_greedy.py", SOURCE.value, str(folder / "prompts.json"), str(NEW.value)) as process:
        told = process.answer()
    if "new" not in told:
        raise refused(told)
    return told["new"]


def refused(told: dict[str, str]) -> UserError:
    return UserError(f"transformers {told['transformers']} refuses {SOURCE.value}, which moejax loads: "
                     f"{told['refused']}; nothing was compared")  # fmt: skip


def states(model, variables, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Our layers' outputs and logits by name."""

    @jax.jit
    def run(variables, tokens):
        logits, seen = model.apply(
            variables, tokens, mutable=["intermediates"], capture_intermediates=lambda m, _: isinstance(m, Block)
        )
        names = [f"layer_{i}" for i in range(model.config.num_hidden_layers)]
        return {name: seen["intermediates"][name]["__call__"][0][0] for name in names} | {"logits": logits}

    found = run(variables, tokens)
    return {name: np.asarray(found[name]) for name in sorted(found, key=lambda n: (n == "logits", len(n), n))}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs)) / np.std(theirs))


if __name__ == "__main__":
    cli.run(main, picks=False)
