"""The training loop: reads top to bottom."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax import (
    accounting,
    beginning,
    checkpoint,
    config_checks,
    data,
    distributed,
    environment,
    evaluate,
    exchanged,
    interrupts,
    memory,
    metrics,
    models,
    optimizer,
    published,
    routing_stats,
    schema,
    sharding,
)  # fmt: skip
from moejax import config as configs
from moejax.config import Config
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.moe import abstract_decision
from moejax.routing import Routing
from moejax.train_step import TrainState, compiled_step, state_shardings, to_devices

_log = logging.getLogger(__name__)
DEAD_LINES = 3  # an expert without a token for this many logged lines is worth a warning; a line counts its own steps


def run(config: Config, workdir: str | Path, *, stop_at: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Trains until config.train.steps, continuing what `workdir` holds. Returns the last evaluation and metrics.

    `stop_at` ends this call early, after that step and its checkpoint; a later call continues bit for bit, and the
    files of the run are as if it had never stopped. The result holds step, tokens_per_second (at the last line), and,
    where the run is at its end and text is held out, loss, bits_per_byte, max_violation and the rest of `evaluate`.

    Raises UserError: the workdir is another config's (the fields are named), the text changed since, the batch does
    not divide over the mesh, or the loss is no longer finite (the last good checkpoint stays).
    """
    began, workdir = time.perf_counter(), Path(workdir)
    config, corpus, mesh, family = prepared(config, workdir, progress)
    with beginning.alone(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _run(config, workdir, corpus, mesh, family, stop_at=stop_at, progress=progress, began=began)


def _run(
    config: Config,
    workdir: Path,
    corpus: data.Corpus,
    mesh: Mesh,
    family: dict | None,
    *,
    stop_at: int | None,
    progress: bool,
    began: float,
) -> dict[str, Any]:
    """`run`, of what `prepared` gave, in a folder that is its own; began: when, by time.perf_counter."""
    model: nn.Module = LM(config.model) if family is None else published.model(family, config, corpus.vocab_size)
    tx = optimizer.make(config.optimizer)
    with implementations_named(config):
        shardings = state_shardings(model, tx, mesh)
    state = beginning.begin(workdir, config, model, tx, mesh, shardings, corpus)
    start, end = int(state.step), min(config.train.steps, stop_at or config.train.steps)

    sizes = None if family is None else published.count(family)
    writer = _writer(config, workdir, mesh, sizes, progress)
    if family is not None and jax.process_index() == 0:
        published.keep_beside(config.train.init_from or "", workdir, corpus.tokenizer.text)
    saver = checkpoint.Checkpointer(workdir, keep=config.train.keep_checkpoints, start=start)
    interrupt = interrupts.Interrupts(tell=progress)
    with jax.set_mesh(mesh), writer, saver, interrupt:
        again = start == 0 and writer.has_lines()
        writer.cut_after(start)
        writer.say(f"data: {corpus.description}")
        writer.say(f"model: {describe(sizes, config)}; mesh {dict(mesh.shape)}")
        for told in _continuing(start, end, again, writer.other_code, workdir):
            writer.say(told)
        placement = sharding.batch_sharding(mesh)
        batches = data.train_iterator(corpus, config.data, config.seed, start, *sharding.reading(mesh))
        evaluation = functools.partial(_evaluate, model, corpus, config, mesh)
        held_out = corpus.heldout_windows > 0
        if not held_out:
            writer.say("data.eval_fraction is 0: no text is held out, so nothing is evaluated")
        step_fn, last, ended = None, None, {}
        clock, since = time.perf_counter(), start
        dead = DeadExperts(writer, start)
        for step in range(start + 1, end + 1):
            batch = to_devices(next(batches), placement)
            if step_fn is None:
                step_fn = _fitting(compiled_step(model, tx, config, shardings), state, batch, config, mesh, shardings)
                writer.say(f"compiled in {time.perf_counter() - clock:.1f} s")
                clock = time.perf_counter()
            writer.profile(step)
            state, current = step_fn(state, batch)
            # One step behind, so that the device is never kept waiting for the host.
            check_finite(step - 1, last, saver)
            last = current
            if step == start + 2:
                writer.say(f"the first step was done {time.perf_counter() - began:.1f} s after the beginning")
            # Not where stop_at ends this call: a run that doesn't stop there has no such line.
            if is_due(step, config.train.log_every) or step == config.train.steps:
                check_finite(step, current, saver)
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                tokens = (step - since) * config.data.batch_size * config.data.sequence_length
                line = to_line(step, current, tokens / seconds)
                ended = {"tokens_per_second": line["tokens_per_second"]}
                writer.line(line, dead(step, current))
                state = reset_load(state)
                since = step
            evaluate_now = held_out and (step == config.train.steps or is_due(step, config.train.eval_every))
            stopping = interrupt.at(step)
            save_now = stopping or step == end or is_due(step, config.train.checkpoint_every)
            if evaluate_now or save_now:
                check_finite(step, current, saver)  # which waits for the step: it is not part of the pause
                check_state(state, saver)
                pause = time.perf_counter()
                if evaluate_now:  # before the checkpoint: a run that is killed in between evaluates this step again
                    ended |= evaluation(state)
                    writer.evaluation(step, ended)
                if save_now:
                    save(saver, state, config, corpus, family)
                if stopping:
                    if saver.saved(step):  # otherwise a warning has said so
                        writer.say(f"{interrupt.name}: step {step} is saved; the same command continues from there")
                    interrupt.end()
                clock += time.perf_counter() - pause
        if start < end and not saver.saved(end):
            raise UserError(f"step {end} is not saved; {saver.newest}: free the disk, and the same command continues")
        if start >= end:  # nothing left to do: say where the finished run stands
            ended = (evaluation(state) if held_out else {}) | {"tokens_per_second": None}
    return ended | {"step": int(state.step)}


def _writer(config: Config, workdir: Path, mesh: Mesh, sizes, progress: bool) -> metrics.Writer:
    """Of the run's metrics; sizes: of a published model, whose FLOPs are known by them."""
    return metrics.Writer(
        workdir,
        config,
        total_steps=config.train.steps,
        devices=mesh.devices.size,
        progress=progress,
        flops_per_token=None if sizes is None else 6 * sizes.active_without_embedding,
    )


def _continuing(start: int, end: int, again: bool, other_code: bool, workdir: Path) -> Iterator[str]:
    """What is said of the run's beginning where it is not its first."""
    if start:
        yield f"continuing from the checkpoint of step {start}" if start < end else (
            f"already at step {start} of {end}: nothing left to train"
        )
    if 0 < start < end and other_code:
        yield (
            "moejax, pallas_kernels or the router's file has changed since this run's last start: what follows is by "
            "the new code"
        )
    if again:
        yield f"there is no checkpoint in {workdir}: the run begins again at step 1"


def prepared(config: Config, workdir: Path, progress: bool) -> tuple[Config, data.Corpus, Mesh, dict | None]:
    """The config with what text, tokenizer and workdir settle in it, the text, the mesh, and the description of the
    published model that the run starts from, or None. UserError for what can't be trained, or not by all processes
    alike."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder, or the name of one to be made")
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    stored = metrics.read_config(workdir)
    config = configs.settle(config, stored)
    if config.model.moe is not None:
        config_checks.check_choices(config.model.moe)
    family = published.description(config.train.init_from)
    if family is not None:
        config = published.with_tokenizer(config)
    corpus = data.prepare(config.data, progress=progress)
    config = with_vocabulary(config, corpus.vocab_size)
    check_resumable(stored, config, workdir)
    check_batch(config, mesh)
    if family is None:  # published families exchange in the platform's own way, in one chunk
        check_exchange(config, mesh)
    if jax.process_count() > 1:
        distributed.check_alike(facts(config, workdir, corpus))
        distributed.check_shared(workdir)
    return config, corpus, mesh, family


def _fitting(step, state: TrainState, batch, config: Config, mesh: Mesh, shardings) -> jax.stages.Compiled:
    """`step` compiled; UserError where it does not fit the devices' memory."""
    program = compiled(functools.partial(step.lower, state, batch), config)
    gradients = memory.of_state(state.params, shardings.params)
    memory.check_step(program, gradients, memory.limit(), config, sharding.batch_shards(mesh))
    return program


def compiled(lower: Callable[[], jax.stages.Lowered], config: Config) -> jax.stages.Compiled:
    """What `lower` gives; UserError where a named implementation does not run here, or the compiler finds no room."""
    with implementations_named(config):
        try:
            return lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise (memory.too_large(error, config) or error) from None


@contextlib.contextmanager
def implementations_named(config: Config) -> Iterator[None]:
    """A named implementation runs or raises; where the config names one that raises, a UserError has its words."""
    moe = config.model.moe
    named = {
        "model.attention_implementation": config.model.attention_implementation,
        "model.moe.implementation": None if moe is None else moe.implementation,
    }
    try:
        yield
    except (NotImplementedError, RuntimeError, ValueError) as error:
        given = ", ".join(f"{field}={value!r}" for field, value in named.items() if value)
        if not given or isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"with {given} this model does not run here: {reason}; None takes what does") from error


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done at this one."""
    return every > 0 and step % every == 0


def _evaluate(model, corpus, config: Config, mesh, state: TrainState) -> dict[str, Any]:
    batches = data.eval_batches(corpus, config.data, config.train.eval_batches, *sharding.reading(mesh))
    return evaluate.evaluate(model, state.params, state.router_state, batches, mesh)


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The config with the tokenizer's vocabulary where it names none; UserError where its own is too small."""
    if config.model.vocab_size is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    if config.model.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size} and the tokenizer has {vocab_size} tokens: "
                        f"give at least {vocab_size}, or None")  # fmt: skip
    return config


def check_resumable(stored: Config | None, config: Config, workdir: Path) -> None:
    """UserError that lists the fields in which `config` is another experiment than the one in `workdir`."""
    changed = [] if stored is None else configs.diff(stored, config)
    if changed:
        raise UserError(f"{workdir} holds a run of another config; changed: {'; '.join(changed)}. "
                        "Give another --workdir, or train.init_from to start from its parameters")  # fmt: skip


def check_batch(config: Config, mesh) -> None:
    """UserError unless the batch splits evenly over devices and microbatches."""
    shards = sharding.batch_shards(mesh)
    parts = shards * config.train.accumulation_steps
    if config.data.batch_size % parts:
        raise UserError(
            f"data.batch_size={config.data.batch_size} must be a multiple of {parts}: {shards} batch shards of "
            f"the mesh × {config.train.accumulation_steps} microbatches"
        )


def check_exchange(config: Config, mesh) -> None:
    """UserError where a device's part of a microbatch of the research LM can't be exchanged as the config asks."""
    model, moe = config.model, config.model.moe
    if moe is None or mesh.shape["expert"] == 1 or moe.dispatch == "dense":
        return  # nothing is exchanged
    decision = abstract_decision(moe)
    if isinstance(decision, Routing) or moe.group == "sequence":
        rows = config.data.batch_size // sharding.batch_shards(mesh) // config.train.accumulation_steps
        x = jax.ShapeDtypeStruct((rows, config.data.sequence_length, model.width), jnp.dtype(model.dtype))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # its platform counts, which may not be this machine's
            exchanged.check(moe, mesh.shape["expert"], x, decision)


def facts(config: Config, workdir: Path, corpus: data.Corpus) -> dict[str, Any]:
    """What has to be the same in every process of a run; paths may be spelt as each host has them."""
    own = ("config.data.source", "config.data.cache_dir", "config.data.tokenizer", "config.train.init_from")
    fields = {f"config.{path}": value for path, value in schema.leaves(configs.to_dict(config))}
    return {
        **{path: value for path, value in fields.items() if path not in own},
        **{f"the version of {name}": environment.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "the code (a hash of it)": environment.code_hash(None if config.model.moe is None else config.model.moe.router),
        "the parameters at train.init_from (a hash)": checkpoint.fingerprint(config.train.init_from),
        "the text's content hash": corpus.content_hash,
        "the tokenizer's": corpus.tokenizer.fingerprint,
        "the checkpoints in --workdir, which must be shared": checkpoint.steps(workdir),
    }


def describe(sizes: models.Preset | None, config: Config) -> str:
    """The model in one line; of a published family also what is taken from config.model, and what is not."""
    if sizes is None:
        return accounting.describe(config.model, config.data.sequence_length)
    return (
        f"{sizes.family} of {config.train.init_from}, {sizes.total:,} parameters, {sizes.active:,} active; of "
        "config.model count only dtype, param_dtype, remat, attention_implementation and, of moe, loss weights and "
        "bias_update_rate"
    )


def save(
    saver: checkpoint.Checkpointer,
    state: TrainState,
    config: Config,
    corpus: data.Corpus,
    family: dict[str, Any] | None = None,
) -> None:
    """Begins to save: parameters, router state, optimizer state, loads, the position in the data and its tokenizer."""
    step = int(state.step)
    trees = {name: getattr(state, name) for name in beginning.TREES}
    data_state = {"step": step, "content_hash": corpus.content_hash, "tokenizer": corpus.tokenizer.text}
    stored = configs.to_dict(config)
    saver.save(step, trees, data=data_state, config=stored if family is None else family | {"run": stored})


def check_finite(step: int, values: dict[str, jax.Array] | None, saver: checkpoint.Checkpointer) -> None:
    """UserError if the step's loss or gradient is NaN or infinite. Waits for that step."""
    if values is None or (math.isfinite(values["total_loss"]) and math.isfinite(values["grad_norm"])):
        return
    saver.wait()
    raise UserError(
        f"step {step}: the loss is {float(values['total_loss'])}, the gradient norm {float(values['grad_norm'])}: "
        f"stopped; {saver.newest}. Lower optimizer.learning_rate or clip_norm, or raise warmup_steps"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def check_state(state: TrainState, saver: checkpoint.Checkpointer) -> None:
    """UserError if an update left a NaN or an infinity in the state, where the step's loss can't show it yet.

    One pass over the state: asked before a checkpoint or an evaluation, not after every step.
    """
    if _all_finite((state.params, state.router_state, state.opt_state)):
        return
    saver.wait()
    raise UserError(
        f"step {int(state.step)}: its update left parameters or optimizer state that are not finite: stopped; "
        f"{saver.newest}. Lower optimizer.learning_rate or clip_norm, or raise warmup_steps"
    )


def reset_load(state: TrainState) -> TrainState:
    """The loads start anew after a logged line."""
    return state if state.load is None else dataclasses.replace(state, load=jnp.zeros_like(state.load))


def to_line(step: int, values: dict[str, jax.Array], tokens_per_second: float) -> dict[str, Any]:
    """A line of metrics.jsonl from a step's metrics: plain numbers, None where a dense model has no such thing."""
    values = {name: np.asarray(value).tolist() for name, value in values.items() if value is not None}
    load = values.pop("load", None)
    dead = None if load is None else int(np.sum(routing_stats.dead_experts(load)))
    return {"step": step} | {name: values.get(name) for name in metrics.FIELDS} | {
        "tokens_per_second": tokens_per_second, "dead_experts": dead, "step": step
    }  # fmt: skip


class DeadExperts:
    """Warns when experts had no token for DEAD_LINES logged lines together; then counts anew."""

    def __init__(self, writer: metrics.Writer, start: int):
        self.writer, self.lines, self.since = writer, 0, start
        self.load: np.ndarray | None = None

    def __call__(self, step: int, values: dict[str, jax.Array]) -> np.ndarray | None:
        """Takes a logged step's metrics; returns its loads (MoE layers, E), None for a dense model."""
        if "load" not in values:
            return None
        load = np.asarray(values["load"])
        self.load = load if self.load is None else self.load + load
        self.lines += 1
        if self.lines == DEAD_LINES:
            warning = routing_stats.dead_line(self.load, step - self.since)
            if warning:
                self.writer.say(f"step {step}: {warning}")
            self.load, self.lines, self.since = None, 0, step
        return load
