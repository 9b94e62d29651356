"""`restuning app`."""

import argparse
import json
from dataclasses import dataclass

from restuning.app.settings import AppSettings
from restuning.cli.arguments import Parser, filled
from restuning.utils.options import Json

EXAMPLE = "restuning app projects"


@dataclass(frozen=True)
class App:
    """What is not the page's own."""

    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(AppSettings)
    parser.settings(App)


def run(args: argparse.Namespace) -> None:
    from restuning.app.server import serve  # Gradio takes seconds to import

    own = filled(App, args)

    def listening(url: str) -> None:
        print(json.dumps({"url": url}) if own.json else f"the page is at {url}", flush=True)

    serve(filled(AppSettings, args), listening)
