"""The public API is a decision: a change of it shows in `fixtures/api.txt`.

`python tests/test_api.py` writes the file anew.
"""

import inspect
import re
from pathlib import Path

import restuning as rt

SNAPSHOT = Path(__file__).parent / "fixtures" / "api.txt"


def described() -> str:
    """Every public name with its signature, methods of classes too."""
    lines = []
    for name in rt.__all__:
        value = getattr(rt, name)
        if inspect.isclass(value):
            lines.append(f"class {name}{signature(value)}")
            lines += [f"    .{member}{signature(what)}" for member, what in members(value)]
        elif callable(value):
            lines.append(f"{name}{signature(value)}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def members(cls: type) -> list[tuple[str, object]]:
    """Its own methods, and those of its bases in this package that are not public themselves."""
    public = {getattr(rt, name) for name in rt.__all__ if inspect.isclass(getattr(rt, name))} - {cls}
    own = [
        base for base in cls.__mro__ if base is cls or (base.__module__.startswith("restuning") and base not in public)
    ]
    found = {name: value for base in reversed(own) for name, value in vars(base).items()}
    return sorted(
        (name, value)
        for name, value in found.items()
        if not name.startswith("_") and callable(getattr(cls, name, None))
    )


def signature(value: object) -> str:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    try:
        parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    text = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
    text = re.sub(r"<(function \w+) at 0x[0-9a-f]+>", r"<\1>", text)
    return f"({text})"


def test_the_public_api_is_the_recorded_one() -> None:
    assert described() == SNAPSHOT.read_text(encoding="utf-8")


def test_every_public_name_is_imported_for_type_checkers_too() -> None:
    source = Path(rt.__file__).read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:")[1].split("\n_PUBLIC")[0]
    names = {line.split(" as ")[-1].strip() for line in block.splitlines() if " as " in line}
    assert names == set(rt.__all__) - {"__version__"}


def test_public_names_have_docstrings() -> None:
    assert not [n for n in rt.__all__ if callable(getattr(rt, n)) and not inspect.getdoc(getattr(rt, n))]


if __name__ == "__main__":
    SNAPSHOT.write_text(described(), encoding="utf-8")
