"""LoRA."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Port, Read, Said
from restuning.errors import MethodError
from restuning.tuners.scale import check_rate, check_size


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2022): (alpha / rank) · x A Bᵀ beside an affine map; rank · (reads + writes) parameters.

    rank: r. alpha: its numerator; None: the rank, so a factor of one. dropout: on x, in training.
    A is kaiming-uniform, B zero: the map is unchanged at birth. It merges into the map's weight.
    Raises MethodError for a rank below 1 or above the widths.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_size("Lora", "rank", self.rank)
        check_rate("Lora", self.dropout)

    def __call__(self, port: Port) -> nn.Module:
        if self.rank > min(port.reads, port.writes):
            raise MethodError(f"Lora(rank={self.rank}): expected at most the widths, {port.reads} and {port.writes}")
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        return LoraTuner(port.reads, port.writes, self.rank, factor, self.dropout)


class LoraTuner(nn.Module):
    """(b, n, reads) → (b, n, writes); see `Lora`. a (rank, reads) and b (writes, rank) as PEFT has them."""

    mixes_tokens = False
    merges = True

    def __init__(self, reads: int, writes: int, rank: int, factor: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, reads))
        self.b = nn.Parameter(torch.zeros(writes, rank))
        self.factor, self.dropout = factor, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Read, y: Said) -> Said:
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b if self.factor == 1 else self.b * self.factor)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if weight.ndim != 2:
            raise MethodError(f"LoRA merges into a linear map; this weight is {tuple(weight.shape)}")
        return weight + self.factor * self.b @ self.a, bias
