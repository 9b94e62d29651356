"""What tuners cost in time beside a frozen ViT-B/16 (random weights, 224 x 224): ratios, taken in turn in one run.

python scripts/bench_speed.py [--batch 8] [--rounds 9]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch.nn import functional as F

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
    prefix = rt.adapt(backbone, "prefix", 100).train()
    lora = rt.adapt(backbone, rt.Residual({"qkv": rt.Lora(8, dropout=0.0)}), 100).train()
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
    theirs = peft.get_peft_model(rt.load_backbone("vit_base_patch16_224", "random"), config).train()
    head = torch.nn.Linear(768, 100)

    def train(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    def bound() -> torch.Tensor:
        with bound_prefix(prefix):
            return F.cross_entropy(prefix.adapters["default"].head(backbone(x)), labels)

    steps = {
        "unbound prefix step": train(prefix, lambda: prefix(x, labels=labels)["loss"]),
        "bound prefix step": train(prefix, bound),
        "LoRA step": train(lora, lambda: lora(x, labels=labels)["loss"]),
        "PEFT's LoRA step": train(theirs, lambda: F.cross_entropy(head(theirs(x)), labels)),
    }
    times |= in_turn(steps, args.rounds)
    full = rt.adapt(rt.load_backbone("vit_base_patch16_224", "random"), "full", 100).train()
    models = {"bypass": side, "res-tuning": dual, "prefix": prefix, "lora": lora, "full": full}
    report = {
        "batch": args.batch,
        "seconds (median)": {name: round(statistics.median(t), 3) for name, t in times.items()},
        "forward with dual adapters / forward": ratio(times["forward, dual adapters"], times["forward"]),
        "bypass training step / forward": ratio(times["bypass step"], times["forward"]),
        "unbound prefix step / bound prefix step": ratio(times["unbound prefix step"], times["bound prefix step"]),
        "LoRA step / PEFT's LoRA step": ratio(times["LoRA step"], times["PEFT's LoRA step"]),
        "MiB saved for backward": {
            name: round(saved_bytes(lambda m=model: m(x, labels=labels)["loss"], model.parameters()) / 2**20, 2)
            for name, model in models.items()
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))


@contextmanager
def bound_prefix(tuned: rt.Tuned) -> Iterator[None]:
    """Eq. 2 as it is written: the prefixes' keys and values before the backbone's own, in its own attention call."""
    tuners, fused = iter(tuned.adapters["default"].tuners.values()), F.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
        keys, values = (t.expand(len(q), -1, -1, -1) for t in next(tuners)(None))
        return fused(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), **rest)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


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
