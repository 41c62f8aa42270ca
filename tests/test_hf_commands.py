"""Import, generate, export and verify as a user types them; one line for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from processes import Server

from moejax import safetensors

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "data" / "hf_tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("commands")) as server:
        yield server


@pytest.fixture(scope="module")
def imported(server):
    """A workdir of the tiny gpt-oss, whose source has a tokenizer of 128 words beside it."""
    source = shutil.copytree(TINY / "gpt_oss", server.folder / "source")
    words = {f"w{i}": i for i in range(127)} | {"<|endoftext|>": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    ended = server.run("import_hf.py", f"--source={source}", f"--workdir={server.folder / 'run'}")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("gpt_oss: 27,760 parameters from 37 tensors") and "peak memory" in ended.out
    return server.folder / "run"


def test_an_imported_model_generates_with_the_tokenizer_beside_it(server, imported):
    options = ("--prompt=w5 w9 w11", "--max_new_tokens=4")
    first, again = (server.run("generate.py", f"--workdir={imported}", *options) for _ in range(2))
    assert first.code == 0, first.err
    assert first.out == again.out and first.out.startswith("w5 w9 w11")
    assert len(first.out.removeprefix("w5 w9 w11").replace("w", " w").split()) == 4


def test_export_gives_the_source_back(server, imported):
    target = server.folder / "exported"
    ended = server.run("export_hf.py", f"--workdir={imported}", f"--target={target}")
    assert ended.code == 0, ended.err
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert json.loads((target / name).read_text()) == json.loads((server.folder / "source" / name).read_text())
    before, after = safetensors.open_folder(server.folder / "source"), safetensors.open_folder(target)
    assert before.keys() == after.keys()
    assert all(before[name].read(name).tobytes() == after[name].read(name).tobytes() for name in before)
    ended = server.run("verify_hf.py", f"--source={target}")
    assert ended.code == 0 and "every tensor accounted for" in ended.out


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("import_hf.py", ("--source={source}", "--workdir={run}"), "has checkpoints already"),
        ("import_hf.py", ("--source={run}", "--workdir={run}2"), "holds no config.json"),
        ("export_hf.py", ("--workdir={run}", "--target={source}"), "exists"),
        ("export_hf.py", ("--workdir={run}2", "--target={run}3"), "there is no checkpoint"),
        ("verify_hf.py", ("--source={source}", "--peer_python=/no/python"), "can't be run"),
    ],
)
def test_mistakes_end_in_one_line(server, imported, script, options, words):
    filled = [option.format(source=server.folder / "source", run=imported) for option in options]
    ended = server.run(script, *filled)
    assert ended.code == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert words in line and "Traceback" not in ended.err
