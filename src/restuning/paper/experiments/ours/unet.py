"""What tuning Stable Diffusion 1.5's U-Net costs: seven methods side by side, and ten tasks on shared work.

The U-Net has its published shape and random weights; a step is of one image (8 · side pixels), with plain gradient
descent, which keeps no state: AdamW would cost full fine-tuning two copies of all it trains. Ratios are taken round by
round, all calls in turn.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.model.count import count
from restuning.model.denoiser import output_of
from restuning.model.tuned import Tuned
from restuning.paper.experiments.measured import Place, ratio, table
from restuning.paper.experiments.tab6 import EXPERIMENT
from restuning.paper.results import Record, where
from restuning.utils.profiling import in_turn, peak_bytes, saved_bytes, spread

PAPER = {row.method: row.paper for row in EXPERIMENT.rows if isinstance(row.method, str)}
WANTED = {"bytes": 0.05, "step": 0.45, "tasks": 0.15}


@dataclass(frozen=True)
class UNet:
    """side: of the latents; batch: images; tasks: bypasses on one evaluation."""

    side: int = 32
    batch: int = 1
    rounds: int = 5
    tasks: int = 10
    device: str = "cpu"
    precision: Literal["no", "bf16"] = "no"

    def run(self, place: Place) -> Iterator[Record]:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        unet.to(self.device).eval()
        given = {
            "sample": torch.randn(self.batch, 4, self.side, self.side, device=self.device),
            "timestep": torch.full((self.batch,), 500, device=self.device),
            "encoder_hidden_states": torch.randn(self.batch, 77, 768, device=self.device),
        }
        target, rows, facts = torch.randn_like(given["sample"]), dict[str, Record](), where()
        for method in PAPER:
            step, forward, tuned = self._step(unet, method, given, target)
            rows[method] = {"parameters": count(tuned)["trainable"], "bytes": saved_bytes(forward, tuned.parameters())}
            if self.device != "cpu":
                rows[method]["peak"] = sum(peak_bytes(step, torch.device(self.device)))
            tuned.unload()
        times: dict[str, list[float]] = {method: [] for method in PAPER}
        for i in range(self.rounds + 1):
            for method in PAPER:
                step, _, tuned = self._step(unet, method, given, target)
                found = in_turn({method: step}, 1)[method]
                tuned.unload()
                times[method] += found if i else []
        for method, row in rows.items():
            row |= {"seconds": statistics.median(times[method]), "step": spread(times[method], times["full"])}
            row["bytes_of_full"] = row["bytes"] / rows["full"]["bytes"]
            yield {"method": method, **row, **facts}
        together = in_turn(self._together(unet, given), self.rounds)
        yield {"tasks": {"tasks": self.tasks, **spread(together["shared"], together["each"])}, **facts}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def _step(
        self, unet: Any, method: str, given: Mapping[str, Tensor], target: Tensor
    ) -> tuple[Callable[[], None], Callable[[], Tensor], Tuned]:
        tuned = Tuned(unet)
        tuned.add_adapter("default", method)
        tuned.to(self.device).train()
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-8)

        def forward() -> Tensor:
            with self._autocast():
                return tuned(**given, return_dict=False)[0]  # type: ignore[no-any-return]

        def step() -> None:
            torch.autograd.backward(F.mse_loss(forward().float(), target))
            optimizer.step()
            optimizer.zero_grad()

        return step, forward, tuned

    def _together(self, unet: Any, given: Mapping[str, Any]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """One evaluation of the U-Net for all tasks, and one for each: the same images come out."""
        tuned = Tuned(unet)
        names = [f"task{i}" for i in range(self.tasks)]
        for name in names:
            tuned.add_adapter(name, "bypass")
            with torch.no_grad():
                for p in tuned.adapters[name].parameters():
                    p.add_(torch.randn_like(p) * 0.01)
        tuned.to(self.device).eval()

        @torch.no_grad()
        def shared() -> dict[str, Tensor]:
            tuned.set_adapter(names)
            with self._autocast():
                return tuned.each(**given)

        @torch.no_grad()
        def each() -> dict[str, Tensor]:
            outputs = {}
            for name in names:
                tuned.set_adapter(name)
                with self._autocast():
                    outputs[name] = output_of(tuned(**given, return_dict=False))
            return outputs

        if self.precision == "no":
            torch.testing.assert_close(shared(), each(), rtol=1e-3, atol=1e-4)
        return {"shared": shared, "each": each}

    def text(self, records: Sequence[Record]) -> str:
        rows, tasks = {r["method"]: r for r in records if "method" in r}, [r for r in records if "tasks" in r]
        columns = ["method", "trained", "kept, MiB", "kept, of full", "step, s", "step, of full"]
        columns += ["peak, GiB"] * any("peak" in r for r in records)
        columns += ["paper: GB", "GB of full", "paper: h an epoch", "h of full"]
        cells = []
        for method, row in rows.items():
            full, paper = PAPER["full"], PAPER[method]
            memory, hours = (paper[k] or 0.0 for k in ("memory_GB", "hours_per_epoch"))
            cells.append(
                [
                    method,
                    f"{row['parameters']:,}",
                    f"{row['bytes'] / 2**20:,.1f}",
                    f"{row['bytes_of_full']:.3f}",
                    f"{row['seconds']:.3f}",
                    ratio(row["step"], 2),
                    *([f"{row['peak'] / 2**30:.2f}"] if "peak" in row else []),
                    f"{memory:.2f}",
                    f"{memory / (full['memory_GB'] or 1):.2f}",
                    f"{hours:.2f}",
                    f"{hours / (full['hours_per_epoch'] or 1):.2f}",
                ]
            )
        text = f"""# Stable Diffusion 1.5's U-Net

Its shape with random weights, {self.batch} image(s) of {8 * self.side} pixels, precision {self.precision}. Kept: bytes
that autograd keeps for a backward pass. A step: forward, backward, plain gradient descent (AdamW would add full
fine-tuning two copies of what it trains). Paper: Table 6, at 512 pixels, batch 8, on an A100. Median of {self.rounds}
rounds, all calls of a round in turn.

{table(columns, cells)}

Wanted of the bypass: at most {WANTED["bytes"]} of full's bytes and {WANTED["step"]} of its step."""
        for found in (r["tasks"] for r in tasks if isinstance(r["tasks"], dict)):
            text += f"""

{found["tasks"]} bypasses on one evaluation of the U-Net take {ratio(found)} of {found["tasks"]} evaluations, each with
its bypass; wanted is at most {WANTED["tasks"]}. (The paper: ten prompts' work at 0.164.)"""
        return text
