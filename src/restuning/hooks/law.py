"""The law, written once: OP(x) becomes OP(x) + tuner(x, OP(x)), by hooks that live in a `with` block.

Beside it, what the law cannot say: tokens appended to the stream (`rewrites`), and prefixes merged into the attention.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.sites import Site, Sites
from restuning.errors import MethodError, SiteError
from restuning.hooks.attention import Call, merged, on_call, on_weight
from restuning.hooks.points import Hook, Tuner, Tuners, _as, _on_grid_of, _on_read, _on_write, as_tokens
from restuning.hooks.prompts import AppendedTokens, _beside, _rewritten


def group_by_site(tuners: Iterable[tuple[Site, str, Tuner]]) -> dict[Site, list[tuple[str, Tuner]]]:
    """Site by site, in their order."""
    found: dict[Site, list[tuple[str, Tuner]]] = {}
    for site, name, tuner in tuners:
        found.setdefault(site, []).append((name, tuner))
    return found


class SiteSum:
    """What is added at one site: the sum of its tuners. Holds what the operation read only until it has spoken, and
    what its tuners were given to carry, so that it can say the same once more."""

    def __init__(
        self, site: Site, tuners: Tuners, carries: Mapping[str, dict[str, Any]], grown: list[AppendedTokens]
    ) -> None:
        self.site, self.tuners, self.carries, self.grown = site, tuners, carries, grown
        self.x: dict[str, list[Tensor]] = {source: [] for source in {_source(t) for _, t in tuners} - {"out"}}
        self.given: dict[str, dict[str, Any]] = {}
        self.spoke = self.again = False

    def read(self, source: str, x: Tensor) -> None:
        self.x[source].append(x)

    def says(self, x: Tensor, y: Tensor) -> Tensor:
        """Read and written in one."""
        for source in self.x:
            self.read(source, x)
        return self.write(y)

    def write(self, y: Tensor) -> Tensor:
        self.spoke = True
        if not all(self.x.values()):
            raise SiteError("an operation spoke before it read: the anatomy's points are in the wrong order")
        x = {source: stack.pop() for source, stack in self.x.items()}
        said = x["out"] = y
        for name, tuner in self.tuners:
            on_grid = getattr(tuner, "on_grid", False)
            if on_grid and said.ndim == 4 and said.shape[2] != said.shape[3]:
                raise MethodError(f"{type(tuner).__name__} needs a square map, not {said.shape[2]} x {said.shape[3]}")
            more = sum(g.more for g in self.grown if self.site.block in g.span) if on_grid else 0
            read = x[_source(tuner)]
            if getattr(tuner, "on_maps", False):
                pair = [read, said]
            else:
                pair = [t[:, : t.shape[1] - more] for t in (as_tokens(_on_grid_of(said, read)), as_tokens(said))]
            added = tuner(*pair, self._carry(name)) if _carries(tuner) else tuner(*pair)
            if added is not None:
                y = y + _as(F.pad(added, (0, 0, 0, more)) if more else added, y)
        return y

    def _carry(self, name: str) -> dict[str, Any]:
        if self.again:
            return dict(self.given[name])
        self.given[name] = dict(self.carries[name])
        return self.carries[name]


class Attachment:
    """Every site says OP(x) plus what its tuners add to it, while `on()` lasts."""

    def __init__(self, backbone: nn.Module, sites: Sites, tuners: Mapping[Site, Tuners]) -> None:
        carries: dict[str, dict[str, Any]] = {name: {} for here in tuners.values() for name, _ in here}
        self.joints: list[SiteSum] = []
        self._hooks: list[Hook] = []
        self._again = [False]
        grown: list[AppendedTokens] = []

        def again(state: list[bool] = self._again) -> bool:  # without self: no cycle that would keep activations
            return state[0]

        for site, here in tuners.items():
            plain = [(name, t) for name, t in here if not _rewrites(t)]
            if plain and site.op == "attention":
                change = _merging([t for _, t in plain])
                self._hooks.append(partial(on_call, backbone.get_submodule(site.reads.path), change, again))
            elif plain:
                joint = SiteSum(site, plain, carries, grown)
                self.joints.append(joint)
                if site.weight is not None:
                    owner, weight = backbone.get_submodule(site.weight.owner), partial(_weight, site, backbone)
                    self._hooks.append(partial(on_weight, owner, weight, joint.says, again))
                    continue
                for source in sorted(joint.x):
                    point = site.stream if source == "stream" else site.reads
                    self._hooks.append(_on_read(backbone, point, _reader(joint, source)))
                self._hooks.append(_on_write(backbone, site.writes, joint.write))
        for site, here in tuners.items():  # around all others, so that these read and write the same tokens
            for tuner in (t for _, t in here if _rewrites(t)):
                first = site.block or 0
                span = range(first, first + 1 if _rewrites(tuner) == "block" else len(sites.blocks))
                if getattr(tuner, "unbound", False):
                    self._hooks += _beside(backbone, sites, span, tuner, again)
                else:
                    grown.append(AppendedTokens(span))
                    self._hooks += _rewritten(backbone, sites, grown[-1], tuner)

    @contextmanager
    def on(self, again: bool = False) -> Iterator[None]:
        """again: for blocks of a pass that is over, in whatever order, as often as wanted: they say what they said.

        Raises SiteError if the backbone's forward did not call an operation that carries tuners.
        """
        self._again[0] = again
        for joint in self.joints:
            joint.again = again
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(hook())
            yield
        for joint in self.joints:
            for left in joint.x.values():
                left.clear()
        silent = [
            joint.site.name for joint in self.joints if not joint.spoke and joint.site.op not in ("linear", "words")
        ]
        if silent or (self.joints and not any(joint.spoke for joint in self.joints)):
            raise SiteError(f"the backbone's forward calls no module at {', '.join(silent)}: no tuner can be there")


@contextmanager
def attach(backbone: nn.Module, sites: Sites, tuners: Mapping[Site, Tuners]) -> Iterator[Attachment]:
    """An attachment that is on while it lasts."""
    attachment = Attachment(backbone, sites, tuners)
    with attachment.on():
        yield attachment


def _reader(joint: SiteSum, source: str) -> Callable[[Tensor], None]:
    return lambda x: joint.read(source, x)


def _weight(site: Site, backbone: nn.Module) -> Tensor:
    """As it is at the moment: a backbone that is shared out has other tensors in a block while this runs."""
    weight: Tensor = site.affine(backbone).weight
    return weight


def _source(tuner: Tuner) -> str:
    return getattr(tuner, "source", "normed")


def _carries(tuner: Tuner) -> bool:
    return getattr(tuner, "carries", False)


def _rewrites(tuner: Tuner) -> str | None:
    return getattr(tuner, "rewrites", None)


def _merging(tuners: Sequence[Tuner]) -> Callable[[Call], Tensor]:
    """Tuners of the attention itself say which keys and values are merged into it."""
    return lambda call: merged(call, [tuner(call) for tuner in tuners])
