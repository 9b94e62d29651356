"""What tuners cost in time beside a frozen ViT-B/16 (random weights, 224 x 224): ratios, taken in turn in one run.

python scripts/bench_speed.py [--batch 8] [--rounds 9]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import restuning as rt
from restuning.measure import saved_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone = rt.load_backbone("vit_base_patch16_224", "random")
    x, labels = torch.randn(args.batch, 3, 224, 224), torch.arange(args.batch) % 100
    dual = rt.adapt(backbone, "res-tuning", 100)
    side = rt.adapt(backbone, "bypass", 100)
    optimizer = torch.optim.AdamW([p for p in side.parameters() if p.requires_grad])

    def bare() -> None:
        with torch.no_grad():
            backbone(x)

    def attached() -> None:
        with torch.no_grad():
            dual(x)

    def step() -> None:
        optimizer.zero_grad()
        side(x, labels=labels)["loss"].backward()
        optimizer.step()

    times = in_turn({"forward": bare, "forward, dual adapters": attached, "bypass step": step}, args.rounds)
    full = rt.adapt(rt.load_backbone("vit_base_patch16_224", "random"), "full", 100).train()
    report = {
        "batch": args.batch,
        "seconds (median)": {name: round(statistics.median(t), 3) for name, t in times.items()},
        "forward with dual adapters / forward": ratio(times["forward, dual adapters"], times["forward"]),
        "bypass training step / forward": ratio(times["bypass step"], times["forward"]),
        "MiB saved for backward": {
            name: round(saved_bytes(lambda m=model: m(x, labels=labels)["loss"], model.parameters()) / 2**20, 2)
            for name, model in {"bypass": side, "res-tuning": dual, "full": full}.items()
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Pair by pair: minimum, median, maximum."""
    r = sorted(x / y for x, y in zip(a, b, strict=True))
    return {"min": round(r[0], 3), "median": round(statistics.median(r), 3), "max": round(r[-1], 3)}


if __name__ == "__main__":
    main()
