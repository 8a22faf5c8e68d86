"""The errors of a user's mistake: their text is one line that says what was given, what was expected and the fix.

The command line prints that line; any other error keeps its traceback.
"""


class UserError(ValueError):
    """An argument, a file or data is not what it has to be.

    A part of one's own may raise it too: the command line prints its text in one line.

    Args:
        text: one line: what was given, what was expected, the fix.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)


class MissingFileError(FileNotFoundError):
    """A file or folder does not exist."""


class UnwritableError(OSError):
    """A file or folder cannot be read or written, or the disk is full."""


class NotFiniteError(FloatingPointError):
    """A loss, gradient or weight is NaN or infinite."""


USER_ERRORS = (UserError, MissingFileError, UnwritableError, NotFiniteError)
