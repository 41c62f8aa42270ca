"""A training step on random tokens, compiled and ready to be timed: what the benchmarks share."""

import dataclasses
from typing import Any

import jax
import numpy as np

from moejax import memory, optimizer, sharding
from moejax.config import Config
from moejax.models.lm import LM
from moejax.train_step import compiled_step, create, state_shardings, to_devices


def random_batch(vocab_size: int, batch: int, length: int, documents: int = 1) -> dict[str, Any]:
    """Rows of random tokens, each of `documents` documents of equal length; one needs no mask, and so has none."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch, length + 1), dtype=np.int32)
    found = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
        "mask": np.ones((batch, length), bool),
        "target_bytes": batch * length,
    }
    if documents > 1:
        place = np.arange(length, dtype=np.int32) * documents
        found["segment_ids"] = np.broadcast_to(1 + place // length, (batch, length))
        found["positions"] = np.broadcast_to(place % length // documents, (batch, length))
    return found


class Step:
    """The compiled step of a new research LM on one `random_batch`; each call takes the next step."""

    def __init__(self, config: Config, batch: int, length: int, documents: int = 1):
        self.mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
        model, tx = LM(config.model), optimizer.make(config.optimizer)
        shardings = state_shardings(model, tx, self.mesh)
        assert config.model.vocab_size is not None
        with jax.set_mesh(self.mesh):
            rows = random_batch(config.model.vocab_size, batch, length, documents)
            self._batch = to_devices(rows, sharding.batch_sharding(self.mesh))
            self._state = create(model, tx, self.mesh, config.seed)
            self.compiled = compiled_step(model, tx, config, shardings).lower(self._state, self._batch).compile()
        gradients = memory.of_state(self._state.params, shardings.params)
        memory.check_step(self.compiled, gradients, memory.limit(), config, sharding.batch_shards(self.mesh))

    def __call__(self) -> object:
        self._state, metrics = self.compiled(self._state, self._batch)
        return self._state, metrics

    def bytes(self) -> int:
        """What the step needs on one device, by the compiler's account."""
        found = self.compiled.memory_analysis()
        assert found is not None
        sizes = found.argument_size_in_bytes + found.temp_size_in_bytes
        return sizes + found.output_size_in_bytes - found.alias_size_in_bytes
