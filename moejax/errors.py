"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was given, what is needed, what to do.

    Scripts print the message and exit with status 2; any other exception is a bug and keeps its traceback.
    """
