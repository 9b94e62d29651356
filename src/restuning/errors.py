"""What a person can put right: every such error is one line that says what was wrong, where, and what was expected."""


class RestuningError(Exception):
    """Bad input. Its text is one line; the command line prints it and exits with code 2."""


def line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class DataError(RestuningError):
    """A data set, a split or an image that cannot be used."""


class Diverged(RestuningError):
    """A run whose loss or parameters are no numbers any more."""


class Locked(RestuningError):
    """A folder that another process works in."""


class SiteError(RestuningError):
    """A backbone, an operation or a block that was not found."""


class TowersError(SiteError):
    """A model of several towers, of which none was named: `towers` are their paths."""

    def __init__(self, model: str, towers: tuple[str, ...]) -> None:
        super().__init__(
            f"{model} has {len(towers)} towers: name the one that is meant, tower={' or '.join(map(repr, towers))}"
        )
        self.towers = towers


class MethodError(RestuningError):
    """A method or a tuner that is unknown or does not fit."""


class CheckpointError(RestuningError):
    """A file that is damaged, foreign, or made for another backbone."""


class MissingExtra(RestuningError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package '{package}': pip install 'restuning[{extra}]'")
