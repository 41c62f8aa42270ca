"""A training step on random tokens, compiled and ready to be timed, and the routings that it is timed with: what the
benchmarks share."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from moejax import memory, optimizer, sharding, train
from moejax.config import Config
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.train_step import (
    LOSS_WEIGHTS,
    TrainState,
    compiled_step,
    create,
    init,
    state_shardings,
    to_devices,
)

_FORCED = "moejax.routing:round_robin"


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


def forced(config: Config) -> Config:
    """The config with `routing.round_robin` in place of its router."""
    assert config.model.moe is not None
    moe = dataclasses.replace(config.model.moe, router=_FORCED, router_options={}, bias_update_rate=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def without_losses(config: Config) -> Config:
    """The config without router losses and without the bias rule; statistics stay."""
    assert config.model.moe is not None
    off: dict[str, Any] = {weight: 0.0 for weight in LOSS_WEIGHTS.values() if weight != "mtp_weight"}
    moe = dataclasses.replace(config.model.moe, bias_update_rate=0.0, **off)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def cases(config: Config, names: list[str]) -> dict[str, Config]:
    """The configs that are timed, by name; "real" is last. names: those wanted, all if empty. UserError for others."""
    moe = config.model.moe
    if moe is not None and moe.router == _FORCED:  # then none is real
        found = {"forced": config}
    else:
        found = {"real": config}
        if moe is not None:
            found = {"forced": forced(config), "no losses": without_losses(config)} | found
        found = {name: case for name, case in found.items() if name == "real" or case != config}
    unknown = set(names) - set(found)
    if unknown:
        there = ", ".join(found) + " of this config"
        raise UserError(f"--routing={','.join(names)}: {sorted(unknown)[0]!r} is not among {there}")
    return {name: case for name, case in found.items() if name in (names or found)}


class Step:
    """The compiled step of a new research LM on one `random_batch`; each call takes the next step.

    The first call makes the state, so that steps can be compiled side by side; `stop` lets it go.
    """

    def __init__(self, config: Config, batch: int, length: int, documents: int = 1):
        self.mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
        train.check_batch(config, self.mesh)
        train.check_exchange(config, self.mesh)
        self._model, self._tx, self._seed = LM(config.model), optimizer.make(config.optimizer), config.seed
        shardings = state_shardings(self._model, self._tx, self.mesh)
        assert config.model.vocab_size is not None
        shapes = jax.eval_shape(functools.partial(init, self._model, self._tx), jax.random.key(0))
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
        with jax.set_mesh(self.mesh):
            rows = random_batch(config.model.vocab_size, batch, length, documents)
            self._batch = to_devices(rows, sharding.batch_sharding(self.mesh))
            step = compiled_step(self._model, self._tx, config, shardings)
            self.compiled = train.compiled(lambda: step.lower(state, self._batch), config)
        gradients = memory.of_state(state.params, shardings.params)
        memory.check_step(self.compiled, gradients, memory.limit(), config, sharding.batch_shards(self.mesh))
        self._state: TrainState | None = None

    def __call__(self) -> object:
        state = self._state or create(self._model, self._tx, self.mesh, self._seed)
        self._state, metrics = self.compiled(state, self._batch)
        return self._state, metrics

    def stop(self) -> None:
        self._state = None

    def bytes(self) -> int:
        """What the step needs on one device, by the compiler's account."""
        found = self.compiled.memory_analysis()
        assert found is not None
        sizes = found.argument_size_in_bytes + found.temp_size_in_bytes
        return sizes + found.output_size_in_bytes - found.alias_size_in_bytes
