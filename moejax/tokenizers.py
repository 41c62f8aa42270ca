"""Text to token ids and back: bytes, or any Hugging Face tokenizer.json.

Every tokenizer has one end-of-document token. It opens every document in the data and closes the last one, so a
model predicts a document's first token from it and predicts it at the end; `generate` starts a prompt with it.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tokenizers as hf

from moejax.errors import UserError

# The first of these in a tokenizer.json is its end-of-document token; with none of them, one is added at the end.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
_INVALID = re.compile("([\udc80-\udcff]+)")  # What bytes that are not UTF-8 become under surrogateescape.
_PIECE_CHARS = 1 << 20
_CONTEXT = 256  # tokens of a context that are looked at: more than a character's bytes


class Tokenizer(Protocol):
    """What data, evaluate and generate need of a tokenizer."""

    text: str | None
    """The content of its tokenizer.json, None for bytes: a checkpoint keeps it, so that a copy can generate."""
    vocab_size: int
    end_of_document: int
    byte_lengths: np.ndarray
    """(V,) int32: the UTF-8 bytes each token stands for; 0 for the end-of-document token."""
    fingerprint: str
    """Changes whenever the same text could give other tokens."""

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document, integer arrays (n,), without the end-of-document token. Thread-safe."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 (n,), without the end-of-document token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; the end-of-document token is left out, bytes that are no UTF-8 become U+FFFD."""


class ByteTokenizer:
    """Token i < 256 is the byte i; 256 is the end of a document. The vocabulary has 257 tokens."""

    text: str | None = None
    vocab_size = 257
    end_of_document = 256
    byte_lengths = np.array([1] * 256 + [0], np.int32)
    fingerprint = "bytes"

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(document, np.uint8) for document in documents]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json.

    Special tokens spelt out in the text are text, never control tokens. Bytes that are not UTF-8 become the
    tokenizer's own byte tokens (byte-level BPE, or byte fallback); a tokenizer that has none sees U+FFFD instead.
    A document longer than a million characters is tokenised in pieces cut after a line's end.
    """

    def __init__(self, path: str, text: str | None = None):
        """Reads `path`, or takes `text`, that file's content as a checkpoint kept it."""
        text = _read(path) if text is None else text
        self.text: str | None = text
        try:
            self._tokenizer = hf.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception for whatever is wrong in the file.
            raise UserError(f"data.tokenizer {path!r} is not a Hugging Face tokenizer.json "
                            f"({str(error).splitlines()[0]}); give 'bytes' or the path of one") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"data.tokenizer {path!r} has an empty vocabulary; give a trained tokenizer.json")
        self.end_name = next((name for name in _END_NAMES if name in vocab), None)
        self.end_of_document: int = max(vocab.values()) + 1 if self.end_name is None else vocab[self.end_name]
        self.vocab_size: int = max(*vocab.values(), self.end_of_document) + 1
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        parts = json.loads(text)
        byte_level = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in vocab.items():
            self.byte_lengths[i] = _byte_length(token, byte_level and token not in added)
        self.byte_lengths[self.end_of_document] = 0
        names = _byte_level_names() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        ids = [vocab.get(name) for name in names]
        self._byte_ids = None if None in ids else np.array(ids, np.int32)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def published(self) -> dict[str, str]:
        """The tokenizer as transformers reads it, by file: a text begins with the end of document before it, as
        documents have it in training."""
        assert self.text is not None
        end, whole = self.end_name, hf.Tokenizer.from_str(self.text)
        if end is not None:
            begins = [(end, self.end_of_document)]
            whole.post_processor = hf.processors.TemplateProcessing(single=f"{end} $A", special_tokens=begins)
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
        return {"tokenizer.json": whole.to_str(), "tokenizer_config.json": json.dumps(told)}

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        # Each document becomes a list of texts (pieces, to be encoded) and arrays (ids of bytes that are not UTF-8).
        parts = [self._parts(document) for document in documents]
        texts = [part for document in parts for part in document if isinstance(part, str)]
        encoded = self._encode_texts(texts)
        return [np.concatenate([next(encoded) if isinstance(part, str) else part for part in doc]) for doc in parts]

    def _encode_texts(self, texts: list[str]) -> Iterator[np.ndarray]:
        # A few pieces at a time: what `tokenizers` returns takes some 50 bytes for each byte of text.
        group: list[str] = []
        held = 0
        for i, text in enumerate(texts):
            group.append(text)
            held += len(text)
            if i + 1 == len(texts) or held >= 4 * _PIECE_CHARS:
                for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                    yield np.array(encoding.ids, np.int32)
                group, held = [], 0

    def _parts(self, document: bytes) -> list[str | np.ndarray]:
        text = document.decode("utf-8", "surrogateescape")
        if self._byte_ids is None:
            text = _INVALID.sub("\ufffd", text)
        parts: list[str | np.ndarray] = [np.zeros(0, np.int32)]
        for i, run in enumerate(_INVALID.split(text)):
            if i % 2 and self._byte_ids is not None:
                parts.append(self._byte_ids[np.frombuffer(run.encode("utf-8", "surrogateescape"), np.uint8)])
            else:
                parts += _pieces(run)
        return parts

    def encode(self, text: str) -> np.ndarray:
        return self.encode_documents([text.encode("utf-8", "surrogateescape")])[0].astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if i != self.end_of_document]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def decode_after(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """Text of `ids` where they follow `context`. Alone they would be a text of their own, of which decoders in the way
    of SentencePiece drop the first space."""
    context = list(context)[-_CONTEXT:]
    before, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"data.tokenizer {path!r}: cannot read it ({reason}); give 'bytes' or the path of a "
                        "Hugging Face tokenizer.json (experiments/train_tokenizer.py makes one)") from None


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = start + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces


@functools.cache
def _byte_level_names() -> list[str]:
    """The character that stands for each byte in byte-level BPE (Radford et al. 2019): printable bytes stand for
    themselves, the others take the code points from 256 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _byte_length(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # One character a byte.
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("▁", " ").removeprefix("##").encode("utf-8"))


def load(name: str, text: str | None = None) -> Tokenizer:
    """"bytes" or the path of a tokenizer.json, or that file's `text`, if given. UserError if it is neither."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(os.path.expanduser(name), text)


def train_bpe(documents: Iterable[bytes], vocab_size: int, path: str, progress: bool = True) -> FileTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and writes it to `path`.

    vocab_size counts the 256 bytes and <|endoftext|>, so it is at least 257. No text is unknown to it. Bytes that
    are not UTF-8 are left out of the training. Returns the tokenizer as read back from the file.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and <|endoftext|> make 257; give more")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=_byte_level_names(),
        show_progress=progress,
    )
    path = os.path.expanduser(path)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        tokenizer.train_from_iterator((document.decode("utf-8", "ignore") for document in documents), trainer)
        with open(path, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str(pretty=True))
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {path} ({error.strerror}); give a path that can be") from None
    return FileTokenizer(path)
