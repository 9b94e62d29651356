"""`restuning serve`."""

import argparse
import json
import os
from dataclasses import dataclass

from restuning.cli.arguments import Parser, filled
from restuning.serving.server import serve
from restuning.serving.settings import ServeSettings
from restuning.utils.options import Json

EXAMPLE = "restuning serve runs/photos runs/sprites --port 8000"


@dataclass(frozen=True)
class Serve:
    """What is not the server's own."""

    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(ServeSettings)
    parser.settings(Serve)


def run(args: argparse.Namespace) -> None:
    own = filled(Serve, args)
    settings = filled(ServeSettings, args, api_key=os.environ.get("RESTUNING_API_KEY") or None)

    def listening(url: str) -> None:
        text = json.dumps({"url": url}) if own.json else f"serving at {url} (interactive documentation: {url}/docs)"
        print(text, flush=True)

    serve(settings, listening)
