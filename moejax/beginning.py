"""Where a training run begins: at its newest checkpoint, or anew, with another run's parameters if it asks for them."""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moejax import checkpoint, data, errors, memory
from moejax.config import Config
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.train_step import TrainState, create, init, state_shardings

_log = logging.getLogger(__name__)
TREES = ("params", "router_state", "opt_state", "load")  # of a TrainState, in a checkpoint


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds the run's folder, which is made; UserError where another process trains there, whose checkpoints and lines
    would be mixed with ours. File systems that know no locks hold nobody off. A folder that stays empty goes again."""
    with errors.writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    folder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"--workdir={workdir}: another process trains there; wait for it, or give another") from None
    except OSError:
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            workdir.rmdir()
        os.close(folder)  # and so lets it go


def begin(workdir: Path, config: Config, model, tx, mesh, shardings: TrainState, corpus: data.Corpus) -> TrainState:
    """The state to go on from: of the newest whole checkpoint, else new, with parameters of train.init_from if given.

    UserError where a device can't hold it.
    """
    shapes = jax.eval_shape(functools.partial(init, model, tx), jax.random.key(0))
    memory.check_state(memory.of_state(shapes, shardings), memory.limit(), config)
    state = restore(workdir, shapes, shardings, corpus.content_hash, corpus.tokenizer.text)
    if state is not None:
        return state
    if config.train.init_from:
        return start_from(shapes, config.train.init_from, model, tx, mesh)
    return create(model, tx, mesh, config.seed)


def restore(
    workdir: Path, shapes: TrainState, shardings: TrainState, content_hash: str, tokenizer: str | None = None
) -> TrainState | None:
    """The state of the newest whole checkpoint, on the mesh of `shardings`; None where there is none.

    tokenizer: the text of its file, None for bytes. UserError where the text or the tokenizer is another than then.
    """
    targets = {name: _like(getattr(shapes, name), getattr(shardings, name)) for name in TREES}
    found = checkpoint.restore(workdir, targets)
    if found is None:
        return None
    before = found.data["content_hash"]
    if before != content_hash:
        raise UserError(
            f"{workdir}: the text has changed since step {found.step} (content {before[:12]}, now {content_hash[:12]}):"
            " restore the files, or give another --workdir"
        )
    if found.data.get("tokenizer", tokenizer) != tokenizer:
        raise UserError(
            f"{workdir}: the tokenizer's file has changed since step {found.step}, and its ids mean other text now: "
            "restore the file, or give another --workdir"
        )
    step = jax.device_put(jnp.asarray(found.step, jnp.int32), shardings.step)
    return TrainState(step=step, **{name: found.trees[name] for name in TREES})


def _like(shapes, shardings):
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def start_from(shapes: TrainState, directory: str, model, tx, mesh) -> TrainState:
    """A new run's state with the parameters of the run in `directory`, and its selection biases if it has any.

    shapes: of the state, which is never made with other parameters. That run's layers may be stacked where this one's
    are not, or the other way round. A run without biases (balanced by a loss) can start one with: they begin at 0.
    """
    places = state_shardings(model, tx, mesh)
    try:
        trees = _kept_of(directory, shapes, places)
    except UserError:
        trees = _of_the_other_form(directory, model, tx, mesh, places) if isinstance(model, LM) else {}
        if not trees:
            raise
    if jax.tree.leaves(shapes.router_state) and "router_state" not in trees:
        _log.warning("train.init_from=%s: that run has no selection biases; here they begin at 0", directory)

    def rest(params):
        zeros = functools.partial(jax.tree.map, lambda s: jnp.zeros(s.shape, s.dtype))
        return {
            "step": zeros(shapes.step),
            "router_state": zeros(shapes.router_state),
            "opt_state": tx.init(params),
            "load": zeros(shapes.load),
        }

    there = {name: getattr(places, name) for name in ("step", "router_state", "opt_state", "load")}
    return TrainState(**(jax.jit(rest, out_shardings=there)(trees["params"]) | trees))


def _of_the_other_form(directory: str, model: LM, tx, mesh, places: TrainState) -> dict[str, Any]:
    """`_kept_of` a run whose layers are kept the other way, turned into this one; {} where that doesn't fit either."""
    other = model.clone(config=dataclasses.replace(model.config, scan_layers=not model.config.scan_layers))
    shapes = jax.eval_shape(functools.partial(init, other, tx), jax.random.key(0))
    try:
        trees = _kept_of(directory, shapes, state_shardings(other, tx, mesh))
    except UserError:
        return {}
    there = {name: getattr(places, name) for name in trees}
    turn = jax.jit(lambda trees: {k: model.rearranged(tree) for k, tree in trees.items()}, out_shardings=there)
    return turn(trees)


def _kept_of(directory: str, shapes: TrainState, shardings: TrainState) -> dict[str, Any]:
    """params of the run in `directory`, and router_state if it has one, in the form of `shapes`."""

    def like(name):
        return {name: _like(getattr(shapes, name), getattr(shardings, name))}

    found = checkpoint.restore(directory, like("params"))
    if found is None:
        raise UserError(f"train.init_from={directory}: there is no checkpoint")
    if not (found.path / "router_state").is_dir():
        return found.trees
    biases = checkpoint.restore(found.path, like("router_state"))
    assert biases is not None
    return found.trees | biases.trees
