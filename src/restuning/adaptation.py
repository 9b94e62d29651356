"""One adapter of a backbone: its tuners, its side path, its head."""

from torch import nn

from restuning._types import Recipe
from restuning.errors import MethodError
from restuning.methods import Bypass, Full, Method, Residual
from restuning.saved import Card
from restuning.side import BypassNet
from restuning.wiring.sites import Site, Sites
from restuning.wiring.tail import head_width


class Adaptation(nn.Module):
    """One adapter: `tuners` added inside the backbone, a `side` path beside it, a `head` after it. Its state_dict is
    the checkpoint."""

    def __init__(self, sites: Sites, method: Method, pool: str, num_classes: int | None, card: Card) -> None:
        super().__init__()
        self.card, self.method = card, method
        self.depth, self.full = len(sites.blocks), isinstance(method, Full)
        self.sites: dict[str, Site] = {}
        self.tuners = nn.ModuleDict()
        self.side: BypassNet | None = None
        if isinstance(method, Residual):
            for op, recipe in method.tuners.items():
                for site in sites.at(op, method.blocks):
                    name = f"{site.block}_{op}"
                    self.sites[name], self.tuners[name] = site, _module(recipe, site)
        elif isinstance(method, Bypass):
            ends = sites.at("block", method.blocks)

            def side(recipe: Recipe | None) -> dict[int, nn.Module]:
                return {} if recipe is None else {site.block: _module(recipe, site) for site in ends}

            self.side = BypassNet(self.depth, side(method.horizontal), side(method.vertical))
        width = head_width(sites.port.writes, pool)
        self.head: nn.Module = nn.Identity() if num_classes is None else nn.Linear(width, num_classes)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def reads_features(self) -> bool:
        """Whether the backbone's own features are all that it needs: nothing is tuned inside the backbone."""
        return not self.full and not self.tuners

    @property
    def layers(self) -> range:
        """The features that it reads: all of them for a side path, else only what the last block says."""
        return range(0 if self.side is not None else self.depth, self.depth + 1)


def _module(recipe: Recipe, site: Site) -> nn.Module:
    module = recipe(site.port)
    if not isinstance(module, nn.Module):
        raise MethodError(f"the tuner of {site.op} made a {type(module).__name__}: expected an nn.Module")
    return module
