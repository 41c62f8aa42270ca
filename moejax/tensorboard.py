"""A run's scalars for TensorBoard, written by the thread that asks: a full disk then costs these files, not the run.

tensorboardX's own writer hands them to a thread, and when that has died of a full disk, waits for it for ever.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class Board:
    """An event file in `folder`; TensorBoard hides what earlier ones of the folder hold from step `first` on.

    The first OSError ends it, with a warning.
    """

    def __init__(self, folder: str | os.PathLike[str], first: int):
        from tensorboardX.proto import event_pb2  # slow to import
        from tensorboardX.record_writer import RecordWriter

        self._folder, self._event = Path(folder), event_pb2.Event
        self._file: RecordWriter | None = None
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with self._guarded():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._folder / name))
            self._write(file_version="brain.Event:2")
            self._write(step=first, session_log=begin)
            self._file.flush()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Those of `values` that are numbers, at `step`."""
        from tensorboardX.summary import scalar

        with self._guarded():
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._write(step=step, summary=scalar(name, value))
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        with self._guarded():
            if self._file is not None:
                self._file.close()

    def _write(self, **fields: Any) -> None:
        if self._file is not None:
            self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            _log.warning("%s: no more scalars for TensorBoard (%s); the run goes on", self._folder, reason)
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # what it holds can't be written either
                if file is not None:
                    file.close()
