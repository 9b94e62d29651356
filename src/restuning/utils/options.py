"""Settings as flags: a field of a dataclass that is `Annotated` with an `Option` is a flag of the command line.

Types and defaults are the field's own, and stand nowhere else; a field without an `Option` is no flag.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from restuning.errors import RestuningError


@dataclass(frozen=True)
class Option:
    """How a field is shown and read on the command line.

    Args:
        help: one line, without the default, which is added to it.
        flag: its name, if not the field's.
        aliases: older names, read and not shown.
        metavar: what stands for the value.
        parse: text → value, if not the field's type. Raises ValueError.
        choices: the values that can be, if the field's type does not name them.
        positional: an argument, not a flag.
    """

    help: str = ""
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    positional: bool = False


def blocks(text: str) -> tuple[int, ...]:
    """`0-5` or `0,3,7`. Raises RestuningError."""
    try:
        found: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        return tuple(found)
    except ValueError as error:
        raise RestuningError(f"{text!r}: expected blocks such as 0-5 or 0,3,7") from error


DATA = (
    "folder:PATH, tar:PATH, table:PATH, text:PATH, glue:NAME, hf:NAME, digits, sprites:location, sprites:orientation, "
    "sprites:scale, sprites:count, or a layout of the paper's sets, see `restuning data list`"
)
CAPTIONS = "captions:FOLDER (metadata.jsonl), coco:JSON, captions-tar:TAR or classes:FOLDER?template=a photo of a {}"
BACKBONE = "restuning-micro (bundled), a timm model, hf:FOLDER, all-MiniLM-L6-v2, or resnet18-stages"
TUNER_SIZE = Option(
    "width of every adapter, rank of LoRA, tokens of every prefix and prompt", flag="tuner-size", aliases=("size",)
)
IMAGE_SIZE = "pixels a side (default: the backbone's own)"
DTYPES = ("float32", "float16", "bfloat16")
POOLS = ("cls", "mean", "cls+mean", "last", "map")

# what many commands have
ImageSize = Annotated[int | None, Option(IMAGE_SIZE)]
Weights = Annotated[str | None, Option("file of pretrained weights, or 'random' (default: bundled, or from the hub)")]
Blocks = Annotated[
    tuple[int, ...] | None, Option("blocks that carry tuners, from 0: 0-5 or 0,3,7 (default all)", parse=blocks)
]
MEMORY = Option(
    "what frozen operations keep for the backward pass: shared is exact and costs no time, compact keeps derivatives "
    "of activations in 8 bits, recompute keeps least, for a quarter more time",
    choices=("plain", "shared", "compact", "recompute"),
)
Pool = Annotated[str | None, Option("what the head reads (default: the backbone's)", choices=POOLS)]
TrainSize = Annotated[
    int | None,
    Option("items to train on, those held out for validation among them (default all)", metavar="N"),
]
ValSize = Annotated[
    int,
    Option(
        "items held out of them for validation (default 0: the data's own, or a fifth where a rate is to be chosen)",
        metavar="N",
    ),
]
TestSize = Annotated[
    int | None,
    Option("items to test on (default all, or a fifth where there is no test split)", metavar="N"),
]
Shots = Annotated[int | None, Option("items of each class to train on, in place of --train-size", metavar="K")]
Tokenizer = Annotated[str | None, Option("a tokenizer's folder or hub id (default: the backbone's own)")]
MaxLength = Annotated[int | None, Option("tokens that texts are cut to (default: longer ones are refused)")]
Json = Annotated[bool, Option("print JSON, for machines")]
Quiet = Annotated[bool, Option("no progress bar, and no line an epoch where there is no terminal")]
Engine = Annotated[Literal["local", "ray"], Option("where jobs are done")]
Workers = Annotated[int | None, Option("start a local Ray cluster of N workers", metavar="N")]
Device = Annotated[str | None, Option("cpu, cuda, cuda:N or mps (default: a GPU where there is one)")]
