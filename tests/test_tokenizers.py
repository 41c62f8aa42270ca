"""Tokenizers: every byte survives, byte lengths add up, bad files are refused in one line."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings

from moejax import tokenizers
from moejax.errors import UserError

TEXT = [b"def add(a, b):\n    return a + b\n" * 20, "élan, naïve, 中文 😀\n".encode() * 20]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "folder" / "bpe.json"  # The folder is made.
    return tokenizers.train_bpe(TEXT, 280, str(path), progress=False)


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory):
    """Unigram with metaspace, lower-casing, byte fallback and </s>: nothing about it is byte-level."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁de", -3.0), ("f", -3.0), ("é", -3.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = hf.normalizers.Lowercase()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Sequence([hf.decoders.ByteFallback(), hf.decoders.Metaspace()])
    path = tmp_path_factory.mktemp("tokenizer") / "unigram.json"
    tokenizer.save(str(path))
    return tokenizers.load(str(path))


def test_bytes():
    tokenizer = tokenizers.load("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode("é!"), [0xC3, 0xA9, 33])
    assert tokenizer.decode([0xC3, 0xA9, 256, 33]) == "é!"
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.byte_lengths[:256].tolist() == [1] * 256
    assert tokenizer.byte_lengths[256] == 0


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))))
def test_byte_level_bpe_keeps_every_byte(bpe, document):
    for tokenizer in (bpe, tokenizers.ByteTokenizer()):
        (ids,) = tokenizer.encode_documents([document])
        assert tokenizer.byte_lengths[ids].sum() == len(document)
        assert tokenizer.decode(ids) == document.decode("utf-8", "replace")


def llama_like(sentencepiece_like):
    """The same pieces, decoded as Llama's tokenizer.json says it: spaces first, the first one stripped last."""
    tokenizer = hf.Tokenizer.from_str(sentencepiece_like.text)
    spaces, strip = hf.decoders.Replace("▁", " "), hf.decoders.Strip(" ", 1, 0)
    tokenizer.decoder = hf.decoders.Sequence([spaces, hf.decoders.ByteFallback(), hf.decoders.Fuse(), strip])
    return tokenizers.FileTokenizer("llama", tokenizer.to_str())


@pytest.mark.parametrize("decoder", [lambda t: t, llama_like])
def test_what_follows_a_prompt_keeps_its_first_space(sentencepiece_like, decoder):
    tokenizer = decoder(sentencepiece_like)
    prompt, new = tokenizer.encode("de f"), tokenizer.encode("de")
    assert tokenizer.decode(new) == "de"
    assert tokenizers.decode_after(tokenizer, prompt, new) == " de"
    assert tokenizers.decode_after(tokenizer, [], new) == "de"
    assert tokenizers.decode_after(tokenizer, prompt, []) == ""
    # bytes of a character that the prompt ends with, and of one that isn't whole yet
    ids = tokenizer.encode("中文")[-6:]
    assert tokenizers.decode_after(tokenizer, ids[:3], ids[3:]) == "文"
    assert tokenizers.decode_after(tokenizer, [*prompt, *ids[:3]], ids[3:5]).rstrip("\ufffd") == ""
    assert tokenizers.decode_after(tokenizers.ByteTokenizer(), [65], [32, 66]) == " B"


def test_as_published_a_text_begins_with_the_end_of_the_document_before(bpe):
    files = bpe.published()
    ids = hf.Tokenizer.from_str(files["tokenizer.json"]).encode("some text").ids
    assert ids == [bpe.end_of_document, *bpe.encode("some text")]
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"


def test_bpe_merges_and_batches_as_one_by_one(bpe):
    assert bpe.vocab_size == 280
    assert bpe.byte_lengths.max() > 1
    assert len(bpe.encode(TEXT[0].decode())) < 0.6 * len(TEXT[0])
    documents = [TEXT[0], b"\xff\xfe", b"", TEXT[1] + b"\xc3"]
    for together, document in zip(bpe.encode_documents(documents), documents, strict=True):
        np.testing.assert_array_equal(together, bpe.encode_documents([document])[0])


def test_special_tokens_in_the_text_are_text(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_document not in ids
    assert bpe.decode([*ids, bpe.end_of_document]) == "a<|endoftext|>b"
    assert bpe.byte_lengths[bpe.end_of_document] == 0


def test_long_documents_are_cut_after_lines(bpe, monkeypatch):
    # BPE never merges over a line's end followed by a letter, so cutting there changes nothing.
    whole = bpe.encode("ab cd\n" * 50)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 20)
    np.testing.assert_array_equal(bpe.encode("ab cd\n" * 50), whole)
    assert [len(piece) for piece in tokenizers._pieces("x" * 45)] == [20, 20, 5]


def test_byte_fallback_tokenizer(sentencepiece_like):
    tokenizer = sentencepiece_like
    assert tokenizer.end_of_document == 1  # </s>
    ids = tokenizer.encode("def")
    np.testing.assert_array_equal(tokenizer.byte_lengths[ids], [3, 1])  # "▁de" stands for " de"; "f".
    (ids,) = tokenizer.encode_documents([b"f\xfff"])
    assert 6 + 0xFF in ids  # The byte's own token; 6 pieces stand before <0x00>.


def test_end_of_document_is_added_where_the_file_has_none(tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    loaded = tokenizers.load(str(tmp_path / "words.json"))
    assert (loaded.end_of_document, loaded.vocab_size) == (3, 4)
    np.testing.assert_array_equal(loaded.encode("a b nonsense"), [0, 1, 2])
    (ids,) = loaded.encode_documents([b"a \xff"])  # No byte tokens: U+FFFD, which is unknown here.
    np.testing.assert_array_equal(ids, [0, 2])


def test_truncation_in_the_file_is_switched_off(bpe, tmp_path):
    parts = json.loads(bpe._tokenizer.to_str())
    parts["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "cut.json").write_text(json.dumps(parts))
    assert len(tokenizers.load(str(tmp_path / "cut.json")).encode("many words are here")) > 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read it"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"{}", "not a Hugging Face tokenizer.json"),
        (b"not json", "not a Hugging Face tokenizer.json"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.load(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_train_bpe_refuses(tmp_path):
    with pytest.raises(UserError, match="256 is too small"):
        tokenizers.train_bpe(TEXT, 256, str(tmp_path / "t.json"), progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        tokenizers.train_bpe(TEXT, 300, str(tmp_path / "file" / "t.json"), progress=False)
