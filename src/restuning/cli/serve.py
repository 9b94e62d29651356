"""`serve`."""

import argparse
import os
from pathlib import Path

from restuning.cli.flags import Add
from restuning.serving.settings import ServeSettings


def add_commands(add: Add) -> None:
    serve = add(
        "serve",
        _serve,
        "Serve saved adapters of one backbone over HTTP: every task of a request from one forward.",
        "restuning serve runs/photos runs/sprites --port 8000",
    )
    default = ServeSettings()
    serve.add_argument("adapters", nargs="*", metavar="ADAPTER", help="folders of saved adapters, or NAME=FOLDER")
    serve.add_argument("--adapters", dest="root", type=Path, metavar="FOLDER", help="where adapters are looked for")
    serve.add_argument("--watch", action="store_true", help="serve every adapter that appears in that folder")
    serve.add_argument("--allow-changes", action="store_true", help="let clients add (from that folder) and remove")
    serve.add_argument("--allow-hub", action="store_true", help="let them add from the hub too, by full revision")
    serve.add_argument("--backbone", metavar="NAME", help="the backbone, if not that of the first adapter's files")
    serve.add_argument("--weights", help="the backbone's weights, if not those of a run.json")
    serve.add_argument("--image-size", type=int, help="with --backbone: pixels a side (default: the backbone's own)")
    serve.add_argument("--host", default=default.host, help=f"(default {default.host}: this machine alone)")
    serve.add_argument("--port", type=int, default=default.info, help=f"(default {default.info}; 0: any that is free)")
    serve.add_argument(
        "--api-key", help="what clients must send (default: RESTUNING_API_KEY; where that is empty, none)"
    )
    serve.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: a GPU where there is one)")
    serve.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="autocast (default no)")
    serve.add_argument("--threads", type=int, help="of the computation (default: torch's own number)")
    for flag, kind, about in (
        ("max-batch", int, "items of a forward at most"),
        ("max-wait-ms", float, "how long the first item of a batch waits for others"),
        ("max-queue", int, "items that wait at most; then 429"),
        ("max-body", int, "bytes of a request; then 413"),
        ("max-items", int, "images or texts in a request"),
        ("max-pixels", float, "megapixels of an image"),
        ("max-text", int, "characters of a text"),
        ("decode-seconds", float, "for one image"),
        ("decoders", int, "processes that decode images"),
    ):
        value = getattr(default, flag.replace("-", "_"))
        serve.add_argument(f"--{flag}", type=kind, default=value, metavar="N", help=f"{about} (default {value:g})")


def _serve(args: argparse.Namespace) -> None:
    import json

    from restuning.serving.server import serve

    given = {name: value for name, value in vars(args).items() if name in ServeSettings.__dataclass_fields__}
    key = args.api_key or os.environ.get("RESTUNING_API_KEY") or None
    settings = ServeSettings(**{**given, "adapters": tuple(args.adapters), "api_key": key})

    def listening(url: str) -> None:
        text = json.dumps({"url": url}) if args.json else f"serving at {url} (interactive documentation: {url}/docs)"
        print(text, flush=True)

    serve(settings, listening)
