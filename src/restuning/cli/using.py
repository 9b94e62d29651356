"""`evaluate`, `predict`."""

import argparse
import json
from pathlib import Path

from restuning.cli.flags import DATA, SIZES, Add, table
from restuning.errors import RestuningError


def add_commands(add: Add) -> None:
    evaluate = add(
        "evaluate",
        _evaluate,
        "Measure a saved adapter on a data set's test split.",
        "restuning evaluate runs/photos --data folder:photos",
    )
    evaluate.add_argument("adapter", type=Path, help="folder of a saved adapter")
    evaluate.add_argument("--data", help=f"{DATA} (default: the data it was trained on)")
    evaluate.add_argument("--test-size", type=int, metavar="N", help=SIZES["test"])
    evaluate.add_argument("--weights", help="the backbone's weights, if not those of its run.json")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--per-class", action="store_true", help="the metrics of every class too")
    evaluate.add_argument("--confusion", type=Path, metavar="FILE", help="a picture of what was taken for what")

    predict = add(
        "predict",
        _predict,
        "Classify an image, a folder of images, a text or a file of texts with saved adapters of one backbone.",
        "restuning predict runs/photos runs/sprites picture.jpg --top 3",
    )
    predict.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folders of saved adapters")
    predict.add_argument(
        "input",
        metavar="INPUT",
        help="an image, a folder of images, a .txt of a text a line (pairs by a tab), or a text",
    )
    predict.add_argument("--top", type=int, default=1, metavar="K", help="how many classes to print (default 1)")
    predict.add_argument(
        "--embeddings", type=Path, metavar="FILE", help="write what every head reads, (items, d), as safetensors"
    )
    predict.add_argument("--weights", help="the backbone's weights, if not those of a run.json")


def _evaluate(args: argparse.Namespace) -> None:
    from restuning.data import check, load_task, prepared
    from restuning.data.objective import confusion, objective
    from restuning.data.task import some
    from restuning.runs.load import load_tuned, transform_of
    from restuning.runs.settings import RUN, read_run
    from restuning.training.evaluate import predict_logits

    if args.batch_size < 1:
        raise RestuningError(f"--batch-size {args.batch_size}: expected at least 1")
    tuned = load_tuned(args.adapter, args.weights)
    config = tuned.adapter_config()
    run = read_run(args.adapter / RUN) if (args.adapter / RUN).exists() else None
    if args.data is None and run is None:
        raise RestuningError(f"--data is missing, and {args.adapter} has no {RUN} that names it")
    asked = objective(config.kind)
    if args.confusion is not None and config.kind not in ("single-label", "per-token"):
        raise RestuningError(f"--confusion: a {config.kind} task has none")
    spec = args.data or (run.data if run else "")
    same = run is not None and spec == run.data
    test = (task := load_task(spec, test_size=run.test_size if run and same else args.test_size)).test
    if same and args.test_size is not None:
        test = some(spec, test, args.test_size)  # of those that it was not trained on
    if (tuple(task.classes), task.kind) != (tuple(config.classes or ()), config.kind):
        raise RestuningError(
            f"{spec} is {task.kind} of {len(task.classes)} classes ({', '.join(task.classes[:3])}, …), the adapter "
            f"{config.kind} of {len(config.classes or ())} ({', '.join((config.classes or ())[:3])}, …): "
            "expected the same"
        )
    check(test)
    logits, labels = predict_logits(
        tuned, prepared(test, transform_of(args.adapter, config.preprocessing)), args.batch_size
    )
    metrics = {name: round(value, 4) for name, value in asked.metrics(logits, labels)}
    each = {}
    if args.per_class:
        each = {name: [round(v, 4) for v in t.tolist()] for name, t in asked.each(logits, labels).items()}
    if args.confusion is not None:
        from restuning.utils.figures import matrix

        matrix(confusion(logits, labels).tolist(), task.classes, args.confusion)
    if args.json:
        said = {"data": spec, "examples": len(test), **metrics}
        print(json.dumps({**said, "classes": list(task.classes), "per_class": each} if each else said))
        return
    print(f"{len(test)} examples: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    if each:
        rows = [[c, *(f"{values[i]:g}" for values in each.values())] for i, c in enumerate(task.classes)]
        table(["class", *each], rows)


def _predict(args: argparse.Namespace) -> None:
    from restuning.runs.predict import predict

    rows = predict(args.adapters, args.input, args.top, args.weights, args.embeddings)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        if "values" in row:
            said = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
        elif "words" in row:
            said = " ".join(f"{word['word']}/{word['class']}" for word in row["words"])
        else:
            said = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in row["top"])
        print(f"{row['input']}  {row['adapter']}  {said}")
