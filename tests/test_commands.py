"""The commands, as a user types them: train, continue, evaluate, generate; and one line for each mistake."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
import tokenizers
from processes import ROOT, Server

from moejax import models

pytestmark = pytest.mark.slow

SMALL = [
    "--config.model.num_layers=1", "--config.model.width=32", "--config.model.ffn_width=32",
    "--config.data.sequence_length=16", "--config.data.batch_size=8", "--config.train.steps=6",
    "--config.train.log_every=2", "--config.train.checkpoint_every=4", "--config.train.eval_batches=2",
    "--config.optimizer.warmup_steps=1", "--config.model.remat=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("commands")) as server:
        small.write_text(server.folder / "text")
        yield server


def command(server, name="fine_grained_aux_free", *more):
    source = f"--config.data.source=text:{server.folder}/text/*.txt"
    moe = [] if name == "dense" else ["--config.model.moe.num_experts=8"]
    return [f"--config=experiments/configs/{name}.py", *SMALL, *moe, source, *more]


@pytest.fixture(scope="module")
def trained(server):
    workdir = server.folder / "run"
    ended = server.run("train.py", *command(server), f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err and "warning" not in ended.err
    assert "step 6: held-out loss" in ended.err
    said = ended.err.splitlines()
    for line in ("attention: blocks on cpu", "grouped_matmul: blocks on cpu", "combine: xla on cpu"):
        assert line in said
    assert re.search(r"^the first step was done \d+\.\d s after the beginning$", ended.err, re.MULTILINE)
    return workdir


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_same_command_again_continues(server, trained, tmp_path):
    assert steps(trained) == [2, 4, 6]
    workdir = shutil.copytree(trained, tmp_path / "run")
    ended = server.run("train.py", *command(server), "--config.train.steps=8", f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert steps(workdir) == [2, 4, 6, 8]
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["decay_steps"] == 6


@pytest.mark.long
def test_a_run_exports_as_a_published_family_with_its_tokenizer(server, tmp_path):
    bpe, run, out = tmp_path / "bpe.json", tmp_path / "run", tmp_path / "out"
    ended = server.run(
        "train_tokenizer.py", f"--source=text:{server.folder}/text/*.txt", "--vocab_size=300", f"--output={bpe}"
    )
    assert ended.code == 0, ended.err
    narrow = ("--config.model.moe.expert_width=8", f"--config.data.tokenizer={bpe}", f"--workdir={run}")
    ended = server.run("train.py", *command(server, "fine_grained"), *narrow)
    assert ended.code == 0, ended.err
    ended = server.run("export_hf.py", f"--workdir={run}", f"--target={out}")
    assert ended.code == 0 and "Qwen2MoeForCausalLM" in ended.out, ended.err
    config, told = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    end = json.loads(bpe.read_text())["added_tokens"][0]
    assert config["eos_token_id"] == end["id"] and told["eos_token"] == end["content"] == "<|endoftext|>"
    encode = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode
    plain = tokenizers.Tokenizer.from_file(str(bpe)).encode("some text").ids
    assert encode("some text").ids == [end["id"], *plain]
    model, variables = models.load_hf(out)
    assert model.apply(variables, np.ones((1, 4), np.int32)).shape == (1, 4, 300)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(server, tmp_path, number, status):
    workdir = tmp_path / "run"
    endless = [*command(server), "--config.train.steps=1000000", "--config.train.checkpoint_every=0"]
    pid = server.start("train.py", *endless, f"--workdir={workdir}")
    deadline = time.monotonic() + 60
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill(pid, number)
    ended = server.end()
    assert ended.code == status, ended.err
    assert "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if "is saved" in line]
    assert line.endswith("the same command continues from there")
    step = int(re.search(r"step (\d+) is saved", line)[1])
    assert [entry.name for entry in (workdir / "checkpoints").iterdir()] == [str(step)]
    again = server.run("train.py", *endless, f"--config.train.steps={step + 2}", f"--workdir={workdir}")
    assert again.code == 0 and f"continuing from the checkpoint of step {step}" in again.err, again.err


def test_evaluate_ends_with_one_json_object(server, trained):
    ended = server.run("evaluate.py", f"--workdir={trained}", "--json")
    assert ended.code == 0, ended.err
    last = json.loads(ended.out.splitlines()[-1])
    assert last["step"] == 6
    # less than of 257 equally likely tokens, log 257 = 5.55: six steps have taught something
    assert 0 < last["loss"] < 5.5 and 0 < last["bits_per_byte"] < 10 and last["max_violation"] > 0
    # the whole of the held-out text here, two batches of it in training: the same text, so nearly the same loss
    in_training = json.loads((trained / "evaluations.jsonl").read_text().splitlines()[-1])
    assert abs(last["loss"] - in_training["loss"]) < 0.5
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0, "<|endoftext|>": 1}, unk_token="w"))
    words.save(str(server.folder / "words.json"))
    ended = server.run("evaluate.py", f"--workdir={trained}", f"--tokenizer={server.folder / 'words.json'}")
    assert ended.code == 2 and f"words.json is not the tokenizer of --workdir={trained}" in ended.err
    other = server.run("evaluate.py", f"--workdir={trained}", "--json", "--experts_per_token=1", "--batches=1")
    assert other.code == 0, other.err
    assert json.loads(other.out.splitlines()[-1])["loss"] != last["loss"]


def test_another_text_is_evaluated_whole(server, trained, tmp_path):
    (tmp_path / "a.txt").write_text("the sum of two numbers")  # 22 bytes: a window and a bit
    (tmp_path / "b.txt").write_text("too short")
    asked = ("evaluate.py", f"--workdir={trained}", "--json")
    ended = server.run(*asked, f"--source=text:{tmp_path}/a.txt")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out.splitlines()[-1])["targets"] == 23  # and the document's end
    assert "1 documents)" in ended.out
    seen = server.run(*asked, f"--source=text:{server.folder}/./text/*.txt", "--batches=1")
    assert seen.code == 0 and "warning: the run was trained on this text; leave --source out" in seen.err, seen.err
    short = server.run(*asked, f"--source=text:{tmp_path}/b.txt")
    assert (short.code, short.out) == (2, "") and "fewer than one window" in short.err


def test_a_run_is_evaluated_on_whatever_devices_are_there(server, trained, tmp_path):
    """Its config asks for four devices; here is one."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    manifest = workdir / "checkpoints" / "6" / "checkpoint.json"
    stored = json.loads(manifest.read_text())
    stored["config"]["mesh"] |= {"data": 2, "fsdp": 2}
    manifest.write_text(json.dumps(stored))
    here, there = (server.run("evaluate.py", f"--workdir={w}", "--json") for w in (trained, workdir))
    assert there.code == 0, there.err
    assert json.loads(here.out.splitlines()[-1]) == json.loads(there.out.splitlines()[-1])


def test_generate_from_a_copy_of_the_checkpoint_alone(server, trained, tmp_path):
    shutil.copytree(trained / "checkpoints" / "6", tmp_path / "copy")
    arguments = [f"--workdir={tmp_path / 'copy'}", "--prompt=the sum ", "--max_new_tokens=8"]
    greedy, again = (server.run("generate.py", *arguments) for _ in range(2))
    assert greedy.code == 0, greedy.err
    assert greedy.out == again.out
    assert greedy.out.startswith("the sum ") and len(greedy.out) > len("the sum ")


def test_generate_says_what_becomes_of_expert_choice(server, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    ended = server.run("train.py", *command(server, "expert_choice"), "--config.train.steps=1", workdir)
    assert ended.code == 0, ended.err
    ended = server.run("generate.py", workdir, "--prompt=the ", "--max_new_tokens=2")
    assert ended.code == 0 and "each token takes its top 1 experts by score instead" in ended.err, ended.err


def test_mistakes_are_one_line_and_lose_nothing(server, trained, tmp_path):
    new = f"--workdir={tmp_path / 'new'}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too short")

    def source(text):
        return f"--config.data.source=text:{text}"

    def train(*changes, workdir=new):
        return "train.py", *command(server), *changes, *([workdir] if workdir else [])

    cases = [
        (train("--config.train.stpes=7"), "nearest is config.train.steps"),
        (train("--config.train.steps=many"), "steps.*many"),
        (train("--config.model.moe.experts_per_token=9"), "9 .*num_experts=8"),
        (train("--config.model.moe.router=moejax.routing:swich"), "swich.*switch"),
        (train("--config.model.moe.capacity_factor=0"), "capacity_factor=0"),
        (train(source(f"{tmp_path}/nowhere/*.txt")), "nowhere"),
        (train(source(f"{tmp_path}/empty/*.txt")), "empty"),
        (train(source(f"{tmp_path}/short/*.txt")), "sequence_length=16"),
        (train("--config.seed=5", workdir=f"--workdir={trained}"), "changed: seed: 0 -> 5"),
        (train("--config.mesh.data=3"), "'data': 3.*need 3 devices and there are 1"),
        (train(workdir=None), "--workdir"),
        (("train.py", new), "--config is missing"),
        (train(workdir=f"--workdir={tmp_path}/empty/a.txt"), "a.txt is a file"),
        (("evaluate.py", f"--workdir={trained}", "--batches=0"), "batches=0"),
        (("evaluate.py", new), "there is no checkpoint; train first"),
        (("generate.py", new), "there is no checkpoint; train first"),
        (("evaluate.py", f"--workdir={trained}", "--experts_per_token=9"), "9 .*num_experts=8"),
        (("generate.py", f"--workdir={trained}", "--max_new_tokens=0"), "at least 1 new token"),
        (("generate.py", f"--workdir={trained}", "--tokenizer=a.json"), "this run has its own"),
    ]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for arguments, message in cases:
        ended = server.run(*arguments)
        assert ended.code == 2, (message, ended)
        assert "Traceback" not in ended.err, (message, ended.err)
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (message, ended.err)
        assert re.search(message, errors[0]), (message, errors[0])
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate.py", "--workdir="), "--workdir= is empty; give a folder, or . for this one"),
        (("generate.py", "--workdir={trained}", "--seed=99999999999999999999"), "--seed=99999999999999999999"),
        (("generate.py", "--workdir={trained}", "--seed=x"), "--seed=x"),
        (("generate.py", "--workdir={trained}", "--prompt_file={trained}"), "can't be read as text, one prompt a line"),
        (("train_tokenizer.py", "--vocab_size=99999999999999999999"), "--vocab_size=99999999999999999999"),
        (("ablate.py", "--config=experiments/configs/ablations/balance.py", "--report_only",
          "--workdir={trained}/config.json"), "holds no evaluated run"),
    ],
)  # fmt: skip
def test_mistakes_in_the_flags_are_one_line_too(server, trained, arguments, words):
    ended = server.run(*(argument.format(trained=trained) for argument in arguments))
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_real_start_and_help():
    """Not through the server: the file itself, by its path, from the repository's root."""
    ended = subprocess.run([sys.executable, "experiments/train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "python experiments/train.py --config=experiments/configs/fine_grained.py --workdir=runs/x" in ended.stdout
