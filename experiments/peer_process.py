"""A script of experiments/peers in an interpreter of its own, for the commands that set ours beside it."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.errors import UserError


class Peer:
    """`python peers/SCRIPT ARGUMENTS`, which answers with JSON objects, one a line; a context that ends it.

    UserError, with the last line of its complaints, where it can't be started or fails.
    """

    def __init__(self, python: str, script: str, *arguments: str):
        self._python, self._script = python, script
        command = [python, str(Path(__file__).parent / "peers" / script), *arguments]
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True,
                start_new_session=True,  # so that processes it started, torch's compilers, end with it
            )  # fmt: skip
        except OSError as error:
            self._complaints.close()
            raise UserError(f"--peer_python={python}: can't be run ({error.strerror})") from error

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._complaints.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The answers to come, until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print something of their own
                yield json.loads(line)
        if self._process.wait():
            raise self._failed("no output")

    def answer(self) -> dict[str, Any]:
        """The next one."""
        for found in self:
            return found
        raise self._failed("it ended without an answer")

    def go_on(self) -> dict[str, Any]:
        """Sends it an empty line, for one that waits for them; its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
            print(file=self._process.stdin, flush=True)
        return self.answer()

    def _failed(self, otherwise: str) -> UserError:
        self._complaints.seek(0)
        last = (self._complaints.read().strip().splitlines() or [otherwise])[-1]
        return UserError(f"--peer_python={self._python} could not run {self._script}: {last}")
