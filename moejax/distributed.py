"""Several processes of one run: how they find one another, that they are alike, and what the others do when one ends.

jax.distributed does the meeting. Its coordination service, which process 0 hosts, also carries a short text of each
process: a sign of life every few seconds, and at the end why it ended. A process that dies or fails would leave the
others waiting in a collective for ever; here they end within a minute, with a line that names it. Where process 0 dies,
jax ends the others in the same moment, by abort; a small process beside each outlives it for that line.
"""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as _jax_distributed  # its client has no public name; orbax takes it the same way

from moejax.errors import UserError, writing

BEAT_SECONDS = 4.0  # between two signs of life
SILENCE_SECONDS = 30.0  # without one for so long, a process is taken for dead
# jax's own patience (100 by default) is the second line: it ends a process with a stack trace, as soon as half of this
# after another's death, when that had last been heard of half of it before.
JAX_SECONDS = 80
WAITING_SECONDS = 20.0  # for the others to come, after which a line says so
SHARED_SECONDS = 60.0  # for so long a network's disk may remember that there was no such folder
MPI_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_ALIVE, _ALIKE, _FACTS = "moejax/alive/", "moejax/alike/", "moejax/facts/"


# Waits until its parent, process argv[1], has gone without having ended it; then looks whether argv[2]:argv[3] has too.
_WITNESS = """
import os, signal, socket, sys, time
parent, host, port, line = sys.argv[1:]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while os.getppid() == int(parent):
    time.sleep(0.5)
try:
    socket.create_connection((host, int(port)), timeout=5).close()
except OSError:
    os.write(2, f"error: {line}\\n".encode())
"""


@dataclasses.dataclass(frozen=True)
class Life:
    """What a process says of itself: signs of life so far, and why it ended (None: it goes on, "": all was done)."""

    host: str
    beat: int = 0
    ended: str | None = None


def initialize(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Makes this process one of several; call it before anything asks jax for devices.

    coordinator: HOST:PORT of process 0; process_id: 0 … num_processes − 1. All three, or none of them under Slurm, on
    Cloud TPU and GKE, or under MPI (Open MPI before 5, any other with mpi4py), where jax finds them out.

    Raises:
      UserError: some of the three are given and not all; none is and nothing tells them; the others can't be met.
    """
    given = {"--coordinator": coordinator, "--process_id": process_id, "--num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} not given; give --coordinator=HOST:PORT, --process_id and "
                        "--num_processes together, or none of them under Slurm, on TPU or under MPI")  # fmt: skip
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT, where process 0 runs and a port that is free")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: it must lie in 0 … {num_processes - 1} (--num_processes)")
    who = "others" if num_processes is None else f"{num_processes - 1} others"
    waiting = threading.Timer(WAITING_SECONDS, os.write, (2, f"waiting for the {who} to start\n".encode()))
    waiting.daemon = True
    waiting.start()
    by_mpi = missing and any(name in os.environ for name in MPI_LAUNCHED) and find_spec("mpi4py") is not None
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            cluster_detection_method="mpi4py" if by_mpi else None,
            heartbeat_timeout_seconds=JAX_SECONDS, shutdown_timeout_seconds=2 * JAX_SECONDS,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, ValueError) and "should be defined" in reason:
            reason = "neither Slurm, Cloud TPU, GKE nor MPI started this process, as far as its environment tells"
        raise UserError(f"--distributed: {reason}; give --coordinator=HOST:PORT --process_id=I --num_processes=N, "
                        "the same HOST:PORT and N to each") from error  # fmt: skip
    finally:
        waiting.cancel()
    if jax.process_count() > 1:
        global _watch
        state = _jax_distributed.global_state
        _watch = _Watch(state.client, jax.process_index(), jax.process_count(), str(state.coordinator_address))
        _watch.start()


def check_alike(facts: Mapping[str, Any]) -> None:
    """Waits for all processes and raises the same UserError in each unless all have the same facts (JSON, by name).

    The line names the first process that differs from process 0, the fact and both its values.
    """
    if _watch is None:
        return
    client, me, nth = _watch.client, _watch.me, f"{next(_watch.rounds)}/"
    mine = json.loads(json.dumps(dict(facts)))
    if me == 0:
        client.key_value_set(_FACTS + nth, json.dumps(mine))
    first = json.loads(client.blocking_key_value_get(_FACTS + nth, int(1000 * 2 * JAX_SECONDS)))
    client.key_value_set(f"{_ALIKE}{nth}{me:06}", difference(first, mine))
    # the slowest may still tokenise its text
    client.wait_at_barrier(_ALIKE + nth, int(1000 * 10 * JAX_SECONDS))
    for name, text in client.key_value_dir_get(_ALIKE + nth):
        if text:
            who = int(name.rpartition("/")[2])
            raise UserError(f"process {who} differs from process 0 in {text}: start all with the same command and code")


def check_shared(folder: Path) -> None:
    """Waits for all processes and raises the same UserError in each unless `folder` is one that all of them share."""
    if _watch is None:
        return
    place = folder / ".shared"
    if _watch.me == 0:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            place.write_text(uuid.uuid4().hex, encoding="utf-8")
    check_alike({})  # process 0 has written it
    deadline = time.monotonic() + SHARED_SECONDS
    while not place.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    found = place.read_text(encoding="utf-8") if place.is_file() else None
    check_alike({"a file of process 0 in --workdir, which must be on a disk that all share,": found})
    if _watch.me == 0:
        place.unlink(missing_ok=True)


def difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first fact in which `other` differs from `first`, with both values; "" if they are alike."""
    for name in sorted(first.keys() | other.keys()):
        if first.get(name) != other.get(name):
            return f"{name} ({other.get(name)!r}, and {first.get(name)!r} in process 0)"
    return ""


def finish() -> None:
    """Says that this process is about to end as all others are: after the last step, or a stop that they agreed on."""
    if _watch is not None:
        _watch.tell("")


def leave(code: int, reason: str, error: BaseException | None = None) -> None:
    """Call as the last thing, with the exit status and, if that is not 0, why in one line. One process: does nothing.

    Status 0, or any after `finish`, waits for the others. Else they are told the reason and this process ends without
    waiting, for they may be waiting for it in a collective. An `error` of jax's own may be how another's death shows
    here: the one that died is named first.
    """
    if _watch is None:
        return
    if code == 0:
        finish()
    if _watch.life.ended == "":
        _watch.over.set()
        jax.distributed.shutdown()
        _watch.dismiss()
        return
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(SILENCE_SECONDS + 5 * BEAT_SECONDS)  # if another died, the watch ends this process before
    if error is not None:
        traceback.print_exception(error)
    _watch.tell(reason)
    if _watch.me == 0:
        time.sleep(2 * BEAT_SECONDS)  # the texts go with process 0: the others read this one first
    sys.stdout.flush()
    sys.stderr.flush()
    _watch.dismiss()
    os._exit(code)


def verdict(lives: Mapping[int, Life], seen: dict[int, tuple[int, float]], now: float) -> str | None:
    """The line that names a process that ended while others go on, or None.

    lives: what the others say of themselves. seen: process -> (its last beat, when it was seen), brought up to `now`
    (seconds) by each call.
    """
    for process, life in lives.items():
        if life.ended:
            return f"process {process} ({life.host}) ended: {life.ended}"
        beat, when = seen.get(process, (-1, now))
        if life.beat != beat or process not in seen:
            seen[process] = (life.beat, now)
        elif life.ended is None and now - when > SILENCE_SECONDS:
            return (f"process {process} ({life.host}) gave no sign of life for {now - when:.0f} s: it died or lost "
                    "its network; the same command, on as many processes as there are, continues from the newest "
                    "checkpoint")  # fmt: skip
    return None


def _lost(coordinator: str) -> str:
    return (f"process 0 ({coordinator}), which the others meet at, can't be reached: it died or lost its network; the "
            "same command, on as many processes as there are, continues from the newest checkpoint")  # fmt: skip


class _Watch(threading.Thread):
    """Says that this process lives, and ends it when another ended."""

    def __init__(self, client: Any, me: int, processes: int, coordinator: str):
        super().__init__(name="processes", daemon=True)
        self.client, self.me, self.processes = client, me, processes
        self.over = threading.Event()
        self.rounds = itertools.count()
        self.life = Life(host=socket.gethostname())
        self.lost = _lost(coordinator)
        self.witness = None
        if me:
            host, _, port = coordinator.rpartition(":")
            command = [sys.executable, "-I", "-S", "-c", _WITNESS, str(os.getpid()), host.strip("[]"), port, self.lost]
            self.witness = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.tell(None)

    def dismiss(self) -> None:
        """Ends the witness: this process ends without its help."""
        if self.witness is not None:
            self.witness.kill()
            self.witness.wait()

    def tell(self, ended: str | None) -> None:
        self.life = dataclasses.replace(self.life, ended=ended, beat=self.life.beat + 1)
        text = json.dumps(dataclasses.asdict(self.life))
        self.client.key_value_set(f"{_ALIVE}{self.me}", text, allow_overwrite=True)

    def others(self) -> dict[int, Life]:
        """Process 0 last: when it ends because another did, that other is named."""
        found = {int(name.rpartition("/")[2]): text for name, text in self.client.key_value_dir_get(_ALIVE)}
        order = sorted(found.keys() - {self.me}, key=lambda process: (process == 0, process))
        return {process: Life(**json.loads(found[process])) for process in order}

    def run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        while not self.over.wait(BEAT_SECONDS):
            try:
                self.tell(self.life.ended)
                line = verdict(self.others(), seen, time.monotonic())
            except jax.errors.JaxRuntimeError:
                line = self.lost
            if line and not self.over.is_set():
                os.write(2, f"error: {line}\n".encode())
                self.dismiss()
                if self.me == 0:
                    time.sleep(2 * BEAT_SECONDS)  # the texts go with process 0: the others find out by themselves first
                os._exit(1)


_watch: _Watch | None = None
