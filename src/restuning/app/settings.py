"""The settings of `restuning app`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.errors import RestuningError
from restuning.utils.options import Option

BENCHES = ("app", "labels")
"""What `restuning bench` measures of the page; see `restuning.app.bench`."""


@dataclass(frozen=True)
class AppSettings:
    """Settings of `restuning app`.

    Args:
        home: a folder of projects, made if it is not there; or one folder class/file of pictures.
        host: the address to listen on; other than loopback, folders of this machine cannot be named on the page.
        port: 0: any that is free.
    """

    home: Annotated[Path, Option("a folder of projects, or one project: a folder class/file", positional=True)] = Path(
        "projects"
    )
    host: Annotated[str, Option("the address to listen on")] = "127.0.0.1"
    port: Annotated[int, Option("0: any that is free")] = 7860

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise RestuningError(f"port {self.port}: expected 0 to 65535")
