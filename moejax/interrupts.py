"""Ctrl-C and SIGTERM (a scheduler that takes the machine back) between two steps and not in the middle of one."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from moejax import distributed

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM is only noted, for a loop that asks `at` and calls `end`.

    A second one ends the process at once, as if there were no handler. tell: write a line to stderr when the first
    one comes. Any thread but the main one leaves signals as they are, for Python allows it no handlers.

    Several processes agree on the step, whichever of them got the signal: jax's own handler of SIGTERM tells the
    others, and Ctrl-C is passed on to it. There a second SIGTERM does nothing more.
    """

    def __init__(self, *, tell: bool = True):
        self.tell = tell
        self.together = jax.process_count() > 1
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """What was noted, in the user's words."""
        return NAMES[self.asked] if self.asked else ""

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            mine = (signal.SIGINT,) if self.together else tuple(NAMES)
            self._before = {number: signal.signal(number, self._note) for number in mine}
        return self

    def at(self, step: int) -> bool:
        """Whether to save and end after this step. Ask once after every step, in every process."""
        if not self.together:
            return self.asked is not None
        stopping = multihost_utils.reached_preemption_sync_point(step)
        if stopping and self.asked is None:
            self.asked = signal.SIGTERM
        return stopping

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.end()

    def end(self) -> None:
        """Ends as the signal would have, if one was noted: KeyboardInterrupt, or SystemExit with 128 + 15."""
        if self.asked is not None:
            distributed.finish()
        if self.asked is signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise SystemExit(128 + self.asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self.together:
            signal.raise_signal(signal.SIGTERM)
        if self.tell:  # not through sys.stderr: the signal may have come in the middle of a write to it
            line = f"\n{self.name}: saving after this step; once more ends at once\n"
            os.write(2, line.encode())
