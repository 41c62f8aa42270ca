"""Import, generate, export and verify as a user types them; one line for each mistake."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from processes import ROOT, Server

from moejax import safetensors

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "data" / "hf_tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("commands")) as server:
        yield server


def typed(path):
    """A path as most users type it: relative to the folder that the command runs in."""
    return os.path.relpath(path, ROOT)


@pytest.fixture(scope="module")
def imported(server):
    """A workdir of the tiny gpt-oss, whose source has a tokenizer of 128 words in SentencePiece's way beside it."""
    source = shutil.copytree(TINY / "gpt_oss", server.folder / "source")
    words = {f"▁w{i}": i for i in range(127)} | {"<|endoftext|>": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="▁w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(source / "tokenizer.json"))
    ended = server.run("import_hf.py", f"--source={typed(source)}", f"--workdir={typed(server.folder / 'run')}")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("gpt_oss: 27,760 parameters from 37 tensors") and "peak memory" in ended.out
    return server.folder / "run"


def test_an_imported_model_generates_with_the_tokenizer_beside_it(server, imported):
    options = ("--prompt=w5 w9 w11", "--max_new_tokens=4")
    first = server.run("generate.py", f"--workdir={typed(imported)}", *options)
    assert first.code == 0, first.err
    assert re.fullmatch(r"w5 w9 w11( w\d+){4}\n", first.out), first.out
    more = server.folder / "prompts.txt"
    more.write_text("w7\n")
    both = server.run("generate.py", f"--workdir={imported}", *options, f"--prompt_file={more}")
    assert both.code == 0, both.err
    assert both.out.startswith(first.out) and both.out.removeprefix(first.out).startswith("w7")
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"far": 128, "<|endoftext|>": 0}, unk_token="far"))
    other.save(str(server.folder / "other.json"))
    foreign = server.run("generate.py", f"--workdir={imported}", *options, f"--tokenizer={server.folder}/other.json")
    assert foreign.code == 2 and "gives token 128 and the model has 128 tokens" in foreign.err, foreign.err
    none = server.run("generate.py", f"--workdir={imported}", f"--prompt_file={more}.none")
    assert none.code and "can't be read as text, one prompt a line" in none.err


def test_export_gives_the_source_back(server, imported):
    target = server.folder / "exported"
    ended = server.run("export_hf.py", f"--workdir={typed(imported)}", f"--target={typed(target)}")
    assert ended.code == 0, ended.err
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert json.loads((target / name).read_text()) == json.loads((server.folder / "source" / name).read_text())
    before, after = safetensors.open_folder(server.folder / "source"), safetensors.open_folder(target)
    assert before.keys() == after.keys()
    assert all(before[name].read(name).tobytes() == after[name].read(name).tobytes() for name in before)
    ended = server.run("verify_hf.py", f"--source={target}")
    assert ended.code == 0 and "every tensor accounted for" in ended.out


PEER = """#!{python}
# Stands in for the interpreter with transformers: the states of the checkpoint in {whole}, as the peer's script gives.
import json, sys
import numpy as np
from moejax import models
from moejax.models.parts import Block

ids, out = sys.argv[-2:]
model, variables = models.load_hf("{whole}")
if "hf_greedy.py" in sys.argv[-4]:
    new = models.generate(model, variables, json.load(open(ids)), int(out))
    print(json.dumps({{"transformers": "none", "new": new}}))
    sys.exit()
capture = lambda module, _: isinstance(module, Block)
logits, seen = model.apply(variables, np.load(ids).astype(np.int32), capture_intermediates=capture)
layers = model.config.num_hidden_layers
for i in range(layers):
    np.save(f"{{out}}/layer_{{i}}.npy", seen["intermediates"][f"layer_{{i}}"]["__call__"][0][0])
np.save(f"{{out}}/logits.npy", logits)
json.dump({{"transformers": "none", "torch": "none", "layers": layers}}, open(f"{{out}}/peer.json", "w"))
"""


def test_verify_names_the_first_layer_that_differs(server, tmp_path):
    whole, changed = TINY / "mixtral", shutil.copytree(TINY / "mixtral", tmp_path / "changed")
    tensors = {name: shard.read(name).copy() for name, shard in safetensors.open_folder(whole).items()}
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.1
    specs = {name: (safetensors.NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    safetensors.write(changed / safetensors.SINGLE, specs, tensors.values())
    peer = tmp_path / "python"
    peer.write_text(PEER.format(python=f"/usr/bin/env -S PYTHONPATH={ROOT} {sys.executable}", whole=whole))
    peer.chmod(0o755)
    options = (f"--peer_python={peer}", "--length=8")
    same = server.run("verify_hf.py", f"--source={whole}", *options, "--new_tokens=3")
    assert same.code == 0 and "the same within 0.0001" in same.out, same.err
    assert "greedy after 8 tokens: 3 of 3 the same\ngreedy after 4 tokens: 3 of 3 the same" in same.out
    plain = server.run("verify_hf.py", f"--source={whole}", *options)
    assert plain.code == 0 and "the same within" in plain.out and "greedy" not in plain.out, plain.err
    other = server.run("verify_hf.py", f"--source={changed}", *options)
    assert other.code == 1 and "the first that differs is layer_1" in other.out, other.err
    gaps = {line.split(":")[0]: float(line.split("= ")[1]) for line in other.out.splitlines() if " = " in line}
    assert gaps["layer_0"] < 1e-5 and gaps["layer_1"] > 1e-3 and gaps["logits"] > 1e-3


def test_verify_says_that_it_was_transformers_that_refused(server, tmp_path):
    peer = tmp_path / "python"
    peer.write_text('#!/bin/sh\necho \'{"refused": "KeyError: of theirs", "transformers": "5.0"}\'\n')
    peer.chmod(0o755)
    ended = server.run("verify_hf.py", f"--source={TINY / 'mixtral'}", f"--peer_python={peer}")
    assert ended.code == 2 and "Traceback" not in ended.err
    line = r"error: transformers 5\.0 refuses \S+/mixtral, which moejax loads: KeyError: of theirs; nothing was"
    assert re.search(line, ended.err), ended.err


def test_an_imported_model_is_evaluated_on_a_text_that_is_named(server, imported):
    folder = server.folder / "words"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i}.txt").write_text(" ".join(f"w{(i + j * j) % 127}" for j in range(60)))
    text = (f"--source=text:{folder}/*.txt", "--sequence_length=16", "--batch_size=8", "--json")
    ended = server.run("evaluate.py", f"--workdir={imported}", *text)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out.splitlines()[-1])
    assert 4 < told["loss"] < 7 and told["step"] == 0 and len(told["max_violation_per_layer"]) == 2
    fewer = server.run("evaluate.py", f"--workdir={imported}", *text, "--experts_per_token=1")
    assert json.loads(fewer.out.splitlines()[-1])["loss"] != told["loss"]


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("evaluate.py", ("--workdir={run}",), "give --source"),
        ("evaluate.py", ("--workdir={run}", "--source=python-stdlib", "--experts_per_token=99"), "give 1 to"),
        ("import_hf.py", ("--source={source}", "--workdir={run}"), "has checkpoints already"),
        ("import_hf.py", ("--source={run}", "--workdir={run}2"), "give what experiments/export_hf.py makes of it"),
        ("import_hf.py", ("--source={run}2", "--workdir={run}3"), "holds no config.json"),
        ("export_hf.py", ("--workdir={run}", "--target={source}"), "exists"),
        ("export_hf.py", ("--workdir={run}2", "--target={run}3"), "there is no checkpoint"),
        ("generate.py", ("--workdir={source}",), "import it first with experiments/import_hf.py"),
        ("verify_hf.py", ("--source={source}", "--peer_python=/no/python"), "can't be run"),
    ],
)
def test_mistakes_end_in_one_line(server, imported, script, options, words):
    filled = [option.format(source=server.folder / "source", run=imported) for option in options]
    ended = server.run(script, *filled)
    assert ended.code == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert words in line and "Traceback" not in ended.err
