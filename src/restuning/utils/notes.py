"""What a person should know though nothing is refused, such as files that were not read."""

import warnings


class Note(UserWarning):
    """The command line prints it as a line when the command is done; in Python it is a warning."""


def note(text: str) -> None:
    """Tell it, once for each text."""
    warnings.warn(text, Note, stacklevel=3)
