"""Runs the scripts of experiments/ as processes of their own, several of them for the price of one start.

A server process imports what the scripts import and forks for each of them before any backend exists: what it starts
is a fresh `python SCRIPT ARGUMENTS` but for the two seconds of imports.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import json, os, runpy, sys, traceback
import tensorboardX
import experiments.cli, moejax.ablation, moejax.generate, moejax.train
assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
for request in sys.stdin:
    request = json.loads(request)
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
        err = os.open(request["err"], os.O_WRONLY | os.O_APPEND)
        for descriptor, standard in ((null, 0), (out, 1), (err, 2)):
            os.dup2(descriptor, standard)
        sys.argv = request["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ended: its status (−9 if killed) and what it said."""

    code: int
    out: str
    err: str


class Server:
    """`with Server(folder) as server: server.run("train.py", "--config=…")`; folder keeps caches and outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # its threads would start at the import
            "MOEJAX_CACHE": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.communicate()

    def start(self, script: str, *arguments: str) -> int:
        """Starts experiments/SCRIPT; its process id. `end` waits for it; one at a time."""
        for name in ("out", "err"):
            (self.folder / name).write_text("")
        request = {"argv": [f"experiments/{script}", *map(str, arguments)]}
        request |= {name: str(self.folder / name) for name in ("out", "err")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> Ended:
        code = int(self.process.stdout.readline())
        return Ended(code, *((self.folder / name).read_text() for name in ("out", "err")))

    def run(self, script: str, *arguments: str) -> Ended:
        self.start(script, *arguments)
        return self.end()

    def kill(self, pid: int, signal: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal)
