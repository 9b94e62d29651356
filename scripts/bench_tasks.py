"""Ten tasks painted side by side on the small text-to-image base: exact, and on a trajectory that they share.

python scripts/bench_tasks.py [--base runs/emoji/pipeline --pictures runs/emoji/data --tuned runs/emoji/tasks]

Ten bypasses (ten seeds on the category of scripts/bench_emoji.py; what is missing is trained), the same prompts and
noise. Times are of all ten, all ways in turn; a deviation is the root mean square of the pixels' difference from what
each task paints alone, over that between the tuned and the untuned base. Writes docs/results/tasks.jsonl and .md.
"""

import argparse
import json
import statistics
from pathlib import Path

import bench_emoji
import torch
from bench_vit_tiny import commit

from restuning.data.captions import load_captions
from restuning.diffusion.base import denoiser_kwargs, denoiser_of, load_base, pictures_of, texts_of
from restuning.diffusion.generation import SHARES, Asked, painted
from restuning.diffusion.training import execute
from restuning.model.tuned import Tuned
from restuning.runs.settings import RESULT, RUN, versions
from restuning.utils.profiling import in_turn, spread

SEEDS, PROMPTS, ROUNDS = range(10), 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/emoji/pipeline"))
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji/data"))
    parser.add_argument("--tuned", dest="out", type=Path, default=Path("runs/emoji/tasks"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rate = bench_emoji.chosen(args, "bypass")
    pipe = load_base(str(args.base))
    tuned, names = Tuned(denoiser_of(pipe)), []
    for category in bench_emoji.CATEGORIES:
        for seed in SEEDS:
            out = args.out / f"{category}-bypass-{seed}"
            if not (out / RESULT).exists():
                execute(bench_emoji.run_of(args, category, "bypass", rate, seed), out, resume=(out / RUN).exists())
            names.append(f"{category}-{seed}")
            tuned.load_adapter(out, names[-1])
    data = load_captions(f"captions:{args.pictures / f'{bench_emoji.CATEGORIES[0]}-test'}")
    prompts = [data.captions(i)[0] for i in range(0, len(data), len(data) // PROMPTS)][:PROMPTS]
    given = denoiser_kwargs(pipe, texts_of(pipe, ["" for _ in prompts] + prompts), 64)
    shape = (len(prompts), 32, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def paint(share: str, some: list[str]) -> torch.Tensor:
        asked = Asked(tuple(prompts), steps=args.steps, sampler="dpm", share=share)
        found = painted(pipe, tuned, some, asked, noise, given)
        return torch.stack([found[name] for name in some])

    def alone() -> torch.Tensor:
        return torch.cat([paint("exact", [name]) for name in names])

    calls = {"one after another": alone, **{share: lambda share=share: paint(share, names) for share in SHARES}}
    exact = pixels(pipe, alone())
    far = rms(exact - pixels(pipe, paint("exact", [""])))
    deviation = {name: rms(pixels(pipe, call()) - exact) / far for name, call in calls.items()}
    times = in_turn(calls, ROUNDS)
    rows = [
        {
            "way": name,
            "seconds": statistics.median(times[name]),
            "ratio": spread(times[name], times["one after another"]),
            "deviation": deviation[name],
        }
        for name in calls
    ]
    facts = {"tasks": len(names), "prompts": prompts, "steps": args.steps, "commit": commit(), "versions": versions()}
    args.results.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in [*rows, facts])
    (args.results / "tasks.jsonl").write_text(lines + "\n")
    table = ["| | seconds | of one after another | deviation |", "|---|--:|--:|--:|"]
    for row in rows:
        ratio = "{median:.3f} ({min:.3f} to {max:.3f})".format(**row["ratio"])
        table.append(f"| {row['way']} | {row['seconds']:.1f} | {ratio} | {row['deviation']:.3f} |")
    text = f"""# Ten tasks side by side

{len(names)} bypasses on the small text-to-image base ([emoji.md](emoji.md)), {len(prompts)} prompts each, of one noise;
DPM-Solver, {args.steps} steps, guidance 3. A deviation is the root mean square of the pixels' difference from what each
task paints alone, over the same between tuned and untuned base: below 1, a picture is nearer to the task's own than the
base's is.

{chr(10).join(table)}

Command: `python scripts/bench_tasks.py`; commit {facts["commit"]}; torch {torch.__version__}, CPU,
{torch.get_num_threads()} thread(s), other work beside it; median of {ROUNDS} rounds, all ways in turn.
"""
    (args.results / "tasks.md").write_text(text)
    print(text)


def pixels(pipe: object, latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, b, c, h, w) → pictures, in [0, 1]."""
    import numpy

    images = pictures_of(pipe, latents.flatten(0, 1))
    return torch.stack([torch.from_numpy(numpy.asarray(i).copy()) for i in images]).float().view(len(latents), -1) / 255


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


if __name__ == "__main__":
    main()
