"""Batches of text whose order is a function of (seed, step) alone.

B batch, L length (`sequence_length`), V vocabulary.

A source's documents stand in one stream, each opened by the end-of-document token (`data_cache`), and the stream is
cut into windows of L targets. In a window every document has its own segment id and its own positions from 0, so
attention never crosses a document. A document's first token is predicted from the end-of-document token that opens
it, and its last token predicts the end-of-document token; every token of every document is a target exactly once an
epoch, nothing is dropped, and only the padding behind a stream's end is masked.

Batch `step` holds the windows step·B … step·B + B − 1 of an endless sequence: epoch after epoch, each a permutation
of all windows seeded by (seed, epoch). A process reads its own consecutive rows of each batch, so 1, 2 or 4
processes read the same batches in the same order, and a run resumes at any step by naming it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from moejax import data_cache, sources, tokenizers
from moejax.errors import UserError

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it. `moejax.sources` lists the forms of `source`; mixtures are one string.

    tokenizer: "bytes" or the path of a Hugging Face tokenizer.json.
    batch_size: B over all processes.
    eval_fraction: the share of the documents that is held out, chosen by document hash; 0 holds out nothing.
    cache_dir: where tokenised text is kept; None: $MOEJAX_CACHE, or ~/.cache/moejax.
    """

    source: str = "python-stdlib"
    tokenizer: str = "bytes"
    sequence_length: int = 256
    batch_size: int = 32
    eval_fraction: float = 0.02
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised text, memory-mapped; made by `prepare`.

    train, heldout: one stream for each source of the mixture.
    content_hash: SHA-256 (hex) of the text, whatever its paths and tokenizer.
    description: one line for reports: sources, interpreter version for python-stdlib, sizes, content hash.
    bytes_per_token: UTF-8 bytes per target, end-of-document targets included.
    """

    config: DataConfig
    tokenizer: tokenizers.Tokenizer
    weights: tuple[float, ...]
    train: tuple[data_cache.Stream, ...]
    heldout: tuple[data_cache.Stream, ...]
    content_hash: str
    description: str
    bytes_per_token: float

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_windows(self) -> int:
        """Windows in one pass over every training stream."""
        return sum(stream.num_windows(self.config.sequence_length) for stream in self.train)

    @property
    def heldout_windows(self) -> int:
        return sum(stream.num_windows(self.config.sequence_length) for stream in self.heldout)

    def batch(self, step: int, seed: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's rows of training batch `step`: the definition of the order.

        Arrays (B / process_count, L): tokens, targets, positions, segment_ids int32 (1-based; 0 is padding), mask bool
        (True where the target counts); and target_bytes: int, the UTF-8 bytes of the rows' unmasked targets.
        """
        rows = _rows(self.config, process_index, process_count)
        first = step * self.config.batch_size
        return _pack([self._window(first + row, seed) for row in rows], self.config.sequence_length, self.tokenizer)

    def _window(self, index: int, seed: int) -> tuple[data_cache.Stream, int]:
        """The window at this place of the endless training sequence."""
        source, index = _mixture(self.weights)[index] if len(self.weights) > 1 else (0, index)
        stream = self.train[source]
        num_windows = stream.num_windows(self.config.sequence_length)
        epoch, index = divmod(index, num_windows)
        # grain's own MapDataset.shuffle seeds epoch e with seed + e: seed 1 would begin with seed 0's second epoch.
        return stream, _permute(index, num_windows, (seed, source, epoch))


def prepare(config: DataConfig, progress: bool = True) -> Corpus:
    """Opens the config's text, tokenising it into the cache first where that hasn't been done.

    UserError, in one line, for whatever is wrong with the source, the tokenizer or the numbers.
    """
    for name, least in (("sequence_length", 1), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise UserError(f"data.{name} is {getattr(config, name)}; give at least {least}")
    if not 0 <= config.eval_fraction < 1:
        raise UserError(f"data.eval_fraction is {config.eval_fraction}; give a share from 0 up to, not including, 1")
    mixture = sources.parse_mixture(config.source)
    tokenizer = tokenizers.load(config.tokenizer)
    folder = config.cache_dir or data_cache.default_folder()
    entries = [
        data_cache.open_or_build(source, tokenizer, config.eval_fraction, folder, progress) for _, source in mixture
    ]
    for (_, source), entry in zip(mixture, entries, strict=True):
        if entry.train.num_targets < config.sequence_length:
            kind = "training tokens" if config.eval_fraction else "tokens"
            raise UserError(
                f"data.source {source} has {entry.train.num_targets} {kind}, fewer than one window of "
                f"data.sequence_length={config.sequence_length}; give more text or a shorter sequence_length"
            )
    total = sum(weight for weight, _ in mixture)
    weights = tuple(weight / total for weight, _ in mixture)
    digests = [entry.digest for entry in entries]
    targets = sum(entry.train.num_targets + entry.heldout.num_targets for entry in entries)
    return Corpus(
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        train=tuple(entry.train for entry in entries),
        heldout=tuple(entry.heldout for entry in entries),
        content_hash=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        description="; ".join(
            (f"{weight:.3g} × " if len(weights) > 1 else "") + _describe(source, entry, config)
            for weight, (_, source), entry in zip(weights, mixture, entries, strict=True)
        ),
        bytes_per_token=sum(entry.num_bytes for entry in entries) / targets,
    )


def prepare_whole(config: DataConfig) -> Corpus:
    """A text to evaluate on and not to train on: all of it is held out. UserError as `prepare`."""
    corpus = prepare(dataclasses.replace(config, eval_fraction=0.0))
    return dataclasses.replace(corpus, heldout=corpus.train)


def _describe(source: sources.Source, entry: data_cache.Entry, config: DataConfig) -> str:
    if entry.tails_held_out:
        held = f"the last {config.eval_fraction:.3g} of each document held out"
    elif config.eval_fraction:
        held = f"{len(entry.train.starts)} training and {len(entry.heldout.starts)} held-out documents"
    else:
        held = f"{len(entry.train.starts)} documents"
    return (
        f"{sources.describe(source)} ({entry.num_files} files, {entry.num_bytes / 1e6:.2f} MB, "
        f"content {entry.digest[:12]}, {config.tokenizer} tokens, {held})"
    )


def train_iterator(
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Yields corpus.batch(step, …) for step = start_step, start_step + 1, … without end, read ahead by threads.

    B and L are the given config's. Process index and count default to jax's.
    """
    corpus = dataclasses.replace(corpus, config=config)
    process_index, process_count = _process(process_index, process_count)
    _rows(config, process_index, process_count)  # A mistake shows here, not in a thread.

    def batch(i: int) -> Batch:
        return corpus.batch(start_step + i, seed, process_index, process_count)

    return _read_ahead(batch, _ENDLESS)


def eval_batches(
    corpus: Corpus,
    config: DataConfig,
    max_batches: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Yields the held-out windows of every source once, in batches as `Corpus.batch` gives them.

    The order is one fixed permutation, so the first `max_batches` are a fair sample and always the same one. The
    last batch is filled up with rows of padding (mask False everywhere); nothing is dropped.
    """
    process_index, process_count = _process(process_index, process_count)
    rows = _rows(config, process_index, process_count)
    L = config.sequence_length
    windows = [(stream, window) for stream in corpus.heldout for window in range(stream.num_windows(L))]
    if not windows:
        raise UserError("data.eval_fraction is 0: nothing is held out to evaluate on; give a share above 0")
    num_batches = -(-len(windows) // config.batch_size)

    def batch(i: int) -> Batch:
        places = [i * config.batch_size + row for row in rows]
        picks = [windows[_permute(place, len(windows), (0,))] if place < len(windows) else None for place in places]
        return _pack(picks, L, corpus.tokenizer)

    return _read_ahead(batch, num_batches if max_batches is None else min(max_batches, num_batches))


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    return jax.process_index() if index is None else index, jax.process_count() if count is None else count


def _rows(config: DataConfig, process_index: int, process_count: int) -> range:
    """This process's rows of a batch."""
    share, rest = divmod(config.batch_size, process_count)
    if rest:
        raise UserError(f"data.batch_size={config.batch_size} is not divisible by {process_count} processes; "
                        f"give a multiple of {process_count}")
    return range(process_index * share, (process_index + 1) * share)


def _permute(index: int, length: int, seed: tuple[int, ...]) -> int:
    """Where `index` stands in a permutation of range(length), computed without materialising it."""
    return grain.experimental.index_shuffle(index, max_index=length - 1, seed=_mix_seed(seed), rounds=4)


@functools.lru_cache(maxsize=4096)
def _mix_seed(seed: tuple[int, ...]) -> int:
    if min(seed) < 0:
        raise UserError(f"seed is {min(seed)}; give 0 or above")
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class _Numbers:
    """A grain data source of (source, i) for i = 0, 1, …."""

    def __init__(self, source: int):
        self.source = source

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> tuple[int, int]:
        return self.source, int(i)


_ENDLESS = 1 << 50


@functools.lru_cache(maxsize=16)
def _mixture(weights: tuple[float, ...]) -> grain.MapDataset[tuple[int, int]]:
    """Item i is (source, number of earlier items of that source): the sources interleaved evenly by weight.

    grain rounds the weights to whole numbers, the smallest at least 100: shares are true to 1%.
    """
    numbers = [grain.MapDataset.source(_Numbers(source)) for source in range(len(weights))]
    return grain.MapDataset.mix(numbers, weights)


def _pack(
    picks: Sequence[tuple[data_cache.Stream, int] | None], L: int, tokenizer: tokenizers.Tokenizer
) -> Batch:
    """One row for each (stream, window); a row of padding for None."""
    span = np.full((len(picks), L + 1), tokenizer.end_of_document, np.int32)
    opens = np.zeros((len(picks), L), bool)  # True where a document begins.
    lengths = np.zeros((len(picks), 1), np.int32)
    extra_bytes = 0
    for row, pick in enumerate(picks):
        if pick is None:
            continue
        stream, window = pick
        start, stop = window * L, min((window + 1) * L, stream.num_targets)
        span[row, : stop - start + 1] = stream.tokens[start : stop + 1]
        low, high = np.searchsorted(stream.starts, (start, stop))
        opens[row, stream.starts[low:high] - start] = True
        extra_bytes += int(stream.extra_bytes[low:high].sum())
        lengths[row] = stop - start
    opens[:, 0] = True
    places = np.arange(L, dtype=np.int32)[None, :]
    mask = places < lengths
    segments = np.cumsum(opens, axis=1, dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(opens, places, np.int32(0)), axis=1)
    targets = np.ascontiguousarray(span[:, 1:])
    return {
        "tokens": np.ascontiguousarray(span[:, :-1]),
        "targets": targets,
        "positions": np.where(mask, positions, np.int32(0)),
        "segment_ids": np.where(mask, segments, np.int32(0)),
        "mask": mask,
        "target_bytes": int(tokenizer.byte_lengths[targets[mask]].sum()) + extra_bytes,
    }


class _Batches:
    """A grain data source of batches, each computed from its index alone."""

    def __init__(self, batch: Callable[[int], Batch], length: int):
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Batch:
        return self.batch(int(i))


def _read_ahead(batch: Callable[[int], Batch], length: int) -> Iterator[Batch]:
    """batch(0), batch(1), …, computed ahead by grain's threads (processes would need parsed absl flags)."""
    source = grain.MapDataset.source(_Batches(batch, length))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
