"""What tuning Stable Diffusion 1.5's U-Net costs: seven methods side by side, and ten tasks on shared work.

python scripts/bench_unet.py [--side 32] [--device cuda --side 64 --precision bf16]

The U-Net has its published shape and random weights; a step is of one picture (8 · side pixels), with plain gradient
descent, which keeps no state: AdamW would cost full fine-tuning two copies of all it trains. Ratios are taken round by
round, all calls in turn. Writes docs/results/unet.jsonl and .md.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from bench_vit_tiny import commit
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from restuning.model.count import count
from restuning.model.denoiser import output_of
from restuning.model.tuned import Tuned
from restuning.runs.settings import versions
from restuning.utils.profiling import in_turn, peak_bytes, saved_bytes, spread

PAPER = {  # Table 6: FID on COCO, memory in GB, hours an epoch
    "full": (14.85, 72.77, 1.98),
    "lora": (14.50, 61.03, 1.42),
    "adapter": (14.73, 54.30, 1.30),
    "prefix": (15.36, 64.91, 2.20),
    "prompt": (14.90, 63.70, 2.17),
    "res-tuning": (13.96, 54.49, 1.38),
    "bypass": (14.89, 21.35, 0.82),
}
WANTED = {"bytes": 0.05, "step": 0.45, "tasks": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(args.device).eval()
    given = {
        "sample": torch.randn(args.batch, 4, args.side, args.side, device=args.device),
        "timestep": torch.full((args.batch,), 500, device=args.device),
        "encoder_hidden_states": torch.randn(args.batch, 77, 768, device=args.device),
    }
    target = torch.randn_like(given["sample"])
    rows = {}
    for method in PAPER:
        step, tuned = step_of(unet, method, given, target, args)
        forward = forward_of(tuned, given, args)
        rows[method] = {"parameters": count(tuned)["trainable"], "bytes": saved_bytes(forward, tuned.parameters())}
        if args.device != "cpu":
            rows[method]["peak"] = sum(peak_bytes(step, torch.device(args.device)))
        tuned.unload()
    calls, times = {}, {method: [] for method in PAPER}
    for i in range(args.rounds + 1):
        for method in PAPER:
            step, tuned = step_of(unet, method, given, target, args)
            found = in_turn({method: step}, 1)[method]
            tuned.unload()
            times[method] += found if i else []
    for method in PAPER:
        rows[method]["seconds"] = statistics.median(times[method])
        rows[method]["step"] = spread(times[method], times["full"])
        rows[method]["bytes_of_full"] = rows[method]["bytes"] / rows["full"]["bytes"]
    calls = tasks_of(unet, given, args)
    found = in_turn(calls, args.rounds)
    tasks = {"tasks": args.tasks, **spread(found["shared"], found["each"])}
    facts = {**vars(args), "results": str(args.results), "commit": commit(), "versions": versions()}
    record(args, rows, tasks, facts)


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def forward_of(tuned: Tuned, given: dict, args: argparse.Namespace) -> Callable[[], Any]:
    def forward() -> Any:
        with autocast(args):
            return tuned(**given, return_dict=False)[0]

    return forward


def step_of(
    unet: Any, method: str, given: dict, target: torch.Tensor, args: argparse.Namespace
) -> tuple[Callable, Tuned]:
    tuned = Tuned(unet)
    tuned.add_adapter("default", method)
    tuned.to(args.device).train()
    forward = forward_of(tuned, given, args)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-8)

    def step() -> None:
        F.mse_loss(forward().float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, tuned


def tasks_of(unet: Any, given: dict, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One evaluation of the U-Net for all tasks, and one for each: the same pictures come out."""
    tuned = Tuned(unet)
    names = [f"task{i}" for i in range(args.tasks)]
    for name in names:
        tuned.add_adapter(name, "bypass")
        with torch.no_grad():
            for p in tuned.adapters[name].parameters():
                p.add_(torch.randn_like(p) * 0.01)
    tuned.to(args.device).eval()

    @torch.no_grad()
    def shared() -> dict[str, torch.Tensor]:
        tuned.set_adapter(names)
        with autocast(args):
            return tuned.each(**given)

    @torch.no_grad()
    def each() -> dict[str, torch.Tensor]:
        said = {}
        for name in names:
            tuned.set_adapter(name)
            with autocast(args):
                said[name] = output_of(tuned(**given, return_dict=False))
        return said

    if args.precision == "no":
        torch.testing.assert_close(shared(), each(), rtol=1e-3, atol=1e-4)
    return {"shared": shared, "each": each}


def record(args: argparse.Namespace, rows: dict[str, dict], tasks: dict, facts: dict) -> None:
    name = "unet" if args.device == "cpu" else f"unet-{args.device}"
    lines = [json.dumps({"method": method, **row}) for method, row in rows.items()]
    lines += [json.dumps({"tasks": tasks}), json.dumps({"facts": facts})]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    gpu = args.device != "cpu"
    head = ["method", "trained", "kept, MiB", "of full", "step, s", "of full", *(["peak, GiB"] if gpu else [])]
    head += ["paper: GB", "of full", "h an epoch", "of full"]
    table = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for method, row in rows.items():
        _, memory, hours = PAPER[method]
        cells = [
            method,
            f"{row['parameters']:,}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['bytes_of_full']:.3f}",
            f"{row['seconds']:.3f}",
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["step"]),
            *([f"{row['peak'] / 2**30:.2f}"] if gpu else []),
            f"{memory:.2f}",
            f"{memory / PAPER['full'][1]:.2f}",
            f"{hours:.2f}",
            f"{hours / PAPER['full'][2]:.2f}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s), other work beside it"
    ratio = "{median:.3f} ({min:.3f} to {max:.3f})".format(**tasks)
    text = f"""# Stable Diffusion 1.5's U-Net

Its shape with random weights, {args.batch} picture(s) of {8 * args.side} pixels, precision {args.precision}. Kept:
bytes that autograd keeps for a backward pass. A step: forward, backward, plain gradient descent (AdamW would add full
fine-tuning two copies of what it trains). Paper: Table 6, at 512 pixels, batch 8, on an A100.

{chr(10).join(table)}

Wanted of the bypass: at most {WANTED["bytes"]} of full's bytes and {WANTED["step"]} of its step.

{args.tasks} bypasses on one evaluation of the U-Net take {ratio} of {args.tasks} evaluations, each with its bypass;
wanted is at most {WANTED["tasks"]}. (The paper: ten prompts' work at 0.164.)

Command: `python scripts/bench_unet.py --side {args.side} --batch {args.batch} --tasks {args.tasks}
--rounds {args.rounds} --device {args.device} --precision {args.precision}`; commit {facts["commit"]};
torch {torch.__version__}; {where}. Median of {args.rounds} rounds, all calls of a round in turn.
"""
    (args.results / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
