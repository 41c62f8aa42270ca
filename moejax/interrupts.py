"""Ctrl-C and SIGTERM (a scheduler that takes the machine back) between two steps and not in the middle of one."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM is only noted, for a loop that looks at `asked` and calls `end`.

    A second one ends the process at once, as if there were no handler. tell: write a line to stderr when the first
    one comes. on: False leaves signals as they are, and so does any thread but the main one, where Python allows no
    handlers. Several processes would have to agree on the step: give on=False there.
    """

    def __init__(self, *, tell: bool = True, on: bool = True):
        self.tell, self.on = tell, on
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """What was noted, in the user's words."""
        return NAMES[self.asked] if self.asked else ""

    def __enter__(self) -> "Interrupts":
        if self.on and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NAMES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.end()

    def end(self) -> None:
        """Ends as the signal would have, if one was noted: KeyboardInterrupt, or SystemExit with 128 + 15."""
        if self.asked is signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise SystemExit(128 + self.asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        for each in NAMES:
            signal.signal(each, signal.SIG_DFL)
        if self.tell:  # not through sys.stderr: the signal may have come in the middle of a write to it
            line = f"\n{self.name}: saving after this step; once more ends at once\n"
            os.write(2, line.encode())
