"""The one exception that means: the user can mend this."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was given, what is needed, what to do.

    Scripts print the message and exit with status 2; any other exception is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a UserError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}): free its disk, and the same command "
                        "continues; or name another folder") from error  # fmt: skip
