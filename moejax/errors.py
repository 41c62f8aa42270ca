"""The one exception that means: the user can mend this."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was given, what is needed, what to do.

    Scripts print the message and exit with status 2; any other exception is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the system inside, such as a full disk, into a UserError that names the file or folder."""
    try:
        yield
    except Exception as error:
        reason = _of_the_system(error)
        if reason is None:
            raise
        raise UserError(f"{path} can't be written ({reason}): free its disk, and the same command "
                        "continues; or name another folder") from error  # fmt: skip


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} can't be read ({reason}): make it readable, or fetch it again") from error


def _of_the_system(error: Exception) -> str | None:
    """What the operating system complained of; None where it didn't. tensorstore tells it inside a ValueError."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if isinstance(error, ValueError) and code else None
