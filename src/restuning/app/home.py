"""The folder that projects are in, and what is open of it."""

import threading
from pathlib import Path

from restuning.app.given import READ, kept
from restuning.app.project import OWN, Project, checked
from restuning.app.workbench import Workbench
from restuning.errors import DataError


class Home:
    """Projects by name, each opened once for all who work on it.

    Args:
        path: a folder of projects, made if it is not there; or one project, whose folder's folder is taken then.
    """

    def __init__(self, path: Path) -> None:
        path = path.absolute()
        self.first = path.name if path.is_dir() and _is_project(path) else None
        self.path = path.parent if self.first else path
        self.path.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, Workbench] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The projects, sorted; the one that was named first."""
        found = sorted(p.name for p in self.path.iterdir() if p.is_dir() and kept(p.name) and _is_project(p))
        return sorted(found, key=lambda name: name != self.first)

    def new(self, name: str) -> str:
        """An empty project. Raises DataError for a name that is taken or that no folder can have."""
        name = checked(name, "project")
        if (self.path / name).exists():
            raise DataError(f"there is a project {name!r}: choose another name")
        Project(self.path / name).update()
        return name

    def bench(self, name: str) -> Workbench:
        """A project at work. Raises DataError where there is none of this name."""
        with self._lock:
            if name not in self._open:
                if not name or name not in self.names():
                    raise DataError(f"there is no project {name!r}: make one, or choose another")
                self._open[name] = Workbench(Project(self.path / name))
            return self._open[name]


def _is_project(path: Path) -> bool:
    if (path / OWN).is_dir():
        return True
    try:
        inside = [p for p in path.iterdir() if p.is_dir() and kept(p.name)]
        return any(file.suffix.lower() in READ for folder in inside for file in list(folder.iterdir())[:3])
    except OSError:  # nobody may look into it
        return False
