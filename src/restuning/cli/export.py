"""`export`."""

import argparse
import json
from pathlib import Path

from restuning.cli.flags import Add


def add_commands(add: Add) -> None:
    export = add(
        "export",
        _export,
        "Write a saved adapter with its backbone as one graph, which onnxruntime or torch runs without this library.",
        "restuning export runs/photos --format onnx --out exported/photos",
    )
    export.add_argument("adapter", type=Path, help="folder of a saved adapter")
    export.add_argument("--format", choices=["onnx", "torch-export"], default="onnx", help="(default onnx)")
    export.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    export.add_argument("--weights", help="the backbone's weights, if not those of its run.json")
    export.add_argument("--inputs", help="images or texts to compare on (default: what the run was tested on)")


def _export(args: argparse.Namespace) -> None:
    from restuning.runs.export import export

    about = export(args.adapter, args.out, args.format, args.weights, args.inputs)
    if args.json:
        print(json.dumps(about))
        return
    checked = about["checked"]
    print(
        f"{args.out / about['file']}: differs from the model by {checked['largest_difference']:.1e} at most, "
        f"on {checked['items']} of {checked['on']}"
    )
