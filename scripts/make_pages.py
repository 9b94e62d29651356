"""Write the generated pages of the site: docs/cli.md, every command and flag; docs/paper.md, the paper's tables.

python scripts/make_pages.py [--out docs]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from restuning.cli.main import COMMANDS, parsers
from restuning.paper.experiments import EXPERIMENTS
from restuning.paper.experiments.spec import COSTS, Experiment

RECORDED = {
    "intro": "[memory](results/bench/memory.md)",
    "tab3c": "[memory](results/bench/memory.md); accuracy on sets at hand: [the small edition](small-edition.md)",
    "tab4": "the same protocol on sets at hand: [the small edition](small-edition.md)",
    "tab5": "its protocol on altered copies: [the small edition](small-edition.md)",
    "tab6": "costs: [the U-Net](results/unet.md); a small base trained here: [emoji](results/emoji.md)",
    "fig4": "[many tasks](results/bench/multitask.md)",
    "fig5": "its protocol on Caltech-101: [the small edition](small-edition.md)",
    "tab16": "its order on a ResNet-18 of three stages: [results](results/resnet.md)",
    "tab17": "its order on MiniLM: [texts](results/text.md)",
}
"""What this repository has measured of a table, where the table's own data or weights were not at hand."""


def cli() -> str:
    """Every command with its flags, as argparse has them."""
    lines = ["# Command line", "", "Written by `python scripts/make_pages.py` from the parsers. Every command has also"]
    lines += ["`--debug` (show where an error came from), `--trust-remote-code` and `--overwrite`.", ""]
    for name, (_, about) in COMMANDS.items():
        _, command = parsers(name)
        assert command is not None
        example = str(command.epilog).removeprefix("example: ").split("; ")
        lines += [f"## restuning {name}", "", about.replace("\n", " "), "", "```", *example, "```", ""]
        lines += ["| flag | what it does |", "|---|---|", *_flags(command), ""]
    return "\n".join(lines)


def _flags(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if action.help == argparse.SUPPRESS or action.dest in ("help", "debug", "trust_remote_code", "overwrite"):
            continue
        name = action.option_strings[0] if action.option_strings else ""
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        many = " …" if action.nargs in ("+", "*") else ""
        shown, text = f"{name} {value}{many}".strip(), (action.help or "").replace("%%", "%")
        yield f"| `{_cell(shown)}` | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def paper() -> str:
    """Every table and figure: what it measures, the command that makes it here, the paper's own values."""
    lines = [
        "# The paper, table by table",
        "",
        "Written by `python scripts/make_pages.py` from `restuning.paper.experiments`. The values are the paper's; the",
        "commands make ours, `DATA` is a folder with the data ([the layouts](guide.md#the-papers-experiments)), and",
        "`restuning report` sets one beside the other. ViT-B/16 of ImageNet-21k and the paper's sets were not at hand",
        "when this was written, so no figure of ours stands here: what was measured on what was at hand is linked.",
        "Parameter counts need no data: `restuning params --paper`.",
        "",
    ]
    for e in EXPERIMENTS.values():
        if e.name.startswith("small"):
            continue
        lines += [f"## {e.about}", "", *([f"{e.note[0].upper()}{e.note[1:]}.", ""] if e.note else [])]
        lines += ["```", e.shown_command, "```", "", *_table(e), ""]
        if e.name in RECORDED:
            lines += [f"Measured here: {RECORDED[e.name]}.", ""]
    return "\n".join(lines)


def _table(e: Experiment) -> Iterator[str]:
    yield "| the paper's | " + " | ".join(COSTS.get(column, column) for column in e.columns) + " |"
    yield "|---|" + "--:|" * len(e.columns)
    for row in e.rows:
        values = (row.paper.get(column) for column in e.columns)
        yield f"| {row.name} | " + " | ".join("" if value is None else f"{value:g}" for value in values) + " |"


PAGES = {"cli.md": cli, "paper.md": paper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    for name, make in PAGES.items():
        (args.out / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
