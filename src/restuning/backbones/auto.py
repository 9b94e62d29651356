"""The anatomy of a backbone that no row of the table fits, found by one traced forward.

Every family that repeats blocks along a residual stream can be read off what it does: the lists of modules that run one
after another, the sums that end an operation, the softmax inside an attention, the affine maps before and after it.
What follows the blocks is tried out, and kept if it gives the backbone's own output.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from restuning.backbones.described import describe, under
from restuning.backbones.inputs import inputs_of as inputs_of
from restuning.backbones.modules import count_of, kind_of, weights_in
from restuning.backbones.sites import CLASSIFIERS, Sites
from restuning.backbones.trace import Ran, Trace, trace
from restuning.errors import SiteError, TowersError
from restuning.utils.notes import note

LEAST = 0.6
"""The share of the parameters that the blocks must hold."""


def find(backbone: nn.Module, inputs: Mapping[str, Any] | None = None) -> Sites:
    """The sites of a backbone that no row of the table fits.

    Args:
        backbone: any module whose forward runs blocks one after another.
        inputs: keyword arguments of one forward, of `BATCH` rows; None: as the backbone's own configuration says.

    Raises:
        TowersError: of a model with several towers, which are to be passed one by one.
        SiteError: in one line, what was seen, where it cannot be read, where its blocks hold less than 60 % of its
            parameters, or where nothing that is known gives its output.
    """
    if inputs is None and any(p.is_meta for p in backbone.parameters()) and (twin := _twin(backbone)) is not None:
        return find(twin)
    if inputs is None and backbone in _KNOWN:
        return _KNOWN[backbone]
    given = [inputs] if inputs is not None else list(inputs_of(backbone))
    for i, one in enumerate(given):
        try:
            found = _Finder(backbone, one).sites()
            break
        except TowersError:
            raise
        except SiteError:
            if i + 1 == len(given):
                raise
    if inputs is None:
        _KNOWN[backbone] = found
    if found.found is not None and found.found.instead:
        note(f"{type(backbone).__name__}: {found.found.instead} (pool= names another)")
    return found


TWIN = 200_000_000
"""Parameters up to which a backbone that is only described is built, with random weights, to try its pooling out."""


def _twin(backbone: nn.Module) -> nn.Module | None:
    """A small described backbone with values; None where it is large, or nothing says how it is built."""
    if count_of(backbone) > TWIN:
        return None
    timm, config = getattr(backbone, "pretrained_cfg", None), getattr(backbone, "config", None)
    kind: Any = type(backbone)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            if config is not None:
                return kind(copy.deepcopy(config)).float().eval()  # type: ignore[no-any-return]
            if isinstance(timm, Mapping):
                from timm import create_model

                return create_model(timm["architecture"], num_classes=0).eval()  # type: ignore[no-any-return]
        except Exception:  # it is built in a way of its own
            return None
    return None


_KNOWN: "WeakKeyDictionary[nn.Module, Sites]" = WeakKeyDictionary()


class _Finder:
    def __init__(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.backbone, self.inputs = backbone, inputs
        self.trace: Trace = trace(backbone, inputs)
        self.root = self.trace.root
        self.calls = [self.root, *self.root.within()]
        ran = {id(p): p.numel() for c in self.calls for p in c.module.parameters(recurse=False)}
        self.total = sum(ran.values())
        self.elements: set[Any] = set()
        self.stage_types: set[type] = set()
        self.lists: list[tuple[str, list[Ran]]] = []

    def sites(self) -> Sites:
        """By the lists of blocks; where these hold too little, by what the whole calls, one after another."""
        self._find_lists()
        found: list[Sites] = []
        errors: list[SiteError] = []
        for runs in (self._expand(self.root), self._plain(self.root, 2), self._plain(self.root)):
            blocks = self._chained([ran for ran in runs if self._stream(ran)])
            if not blocks:
                continue
            try:
                found.append(describe(self.backbone, self.trace, blocks, self.inputs, self.share))
            except SiteError as error:
                errors.append(error)
                continue
            if found[-1].found is not None and found[-1].found.share >= LEAST:
                return found[-1]
        if errors:
            raise errors[0]
        raise SiteError(self._refusal(max((s.found.share for s in found if s.found), default=0.0)))

    def share(self, blocks: Sequence[Ran], tail: Sequence[nn.Module] = ()) -> float:
        """What blocks, and what comes after them, hold of the parameters that the forward passed."""
        modules = [*(ran.module for ran in blocks), *tail]
        held = {id(p): p.numel() for module in modules for p in module.parameters()}
        ran = {id(p): p.numel() for c in self.calls for p in c.module.parameters(recurse=False)}
        for module in self.backbone.modules():
            if isinstance(module, nn.Embedding):  # words are looked up, not computed with
                ran.pop(id(module.weight), None)
        for path, module in self.backbone.named_modules():
            if isinstance(module, nn.Linear) and CLASSIFIERS & {*path.split(".")}:
                for p in module.parameters():
                    ran.pop(id(p), None)
        return sum(held.values()) / max(sum((ran | held).values()), 1)

    @staticmethod
    def _stream(ran: Ran) -> bool:
        return ran.output is not None and ran.output.streams

    def _find_lists(self) -> None:
        """The containers whose elements run one after another, are of one class, and compute with two weights at least.

        Of lists in lists the inner ones are meant, unless they run side by side or hold too little.
        """
        first: dict[str, Ran] = {}
        for ran in self.root.within():
            first.setdefault(ran.path, ran)
        inside: dict[str, list[Ran]] = {}
        for path, module in self.backbone.named_modules():
            if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                runs = [first[p] for name, _ in module.named_children() if (p := f"{path}.{name}".lstrip(".")) in first]
                inside[path] = [ran for ran in runs if weights_in(ran.module) > 1 and self._stream(ran)]
        counts = {path: Counter(kind_of(ran.module) for ran in runs) for path, runs in inside.items()}
        kinds = {kind for count in counts.values() for kind, n in count.items() if n > 1}
        lists: dict[str, list[Ran]] = {}
        for path, runs in inside.items():
            same = [ran for ran in runs if kind_of(ran.module) in kinds]
            if same and self._in_a_row(same):
                lists[path] = same
        for path, ran in first.items():  # one layer, called several times in a row
            calls = [other for other in self.calls if other.path == path]
            if len(calls) > 1 and weights_in(ran.module) > 3 and self._stream(ran) and self._in_a_row(calls):
                lists[path.rpartition(".")[0]] = [ran]
        kept = {}
        for path, runs in lists.items():
            held = 0
            for ran in runs:
                within = [p for p in lists if p == ran.path or under(p, ran.path)]
                outer = [
                    p
                    for p in within
                    if not any(under(p, r.path) or p == r.path for o in within if o != p for r in lists[o])
                ]
                elements = sorted((r for p in outer for r in lists[p]), key=lambda r: r.start)
                held += sum(count_of(r.module) for r in elements) if self._in_a_row(elements) else 0
            if held < LEAST * sum(count_of(ran.module) for ran in runs):
                kept[path] = runs
        self.lists = [
            (path, runs)
            for path, runs in kept.items()
            if not any(path == r.path or under(path, r.path) for other in kept if other != path for r in kept[other])
        ]
        self.elements = {kind_of(ran.module) for _, runs in self.lists for ran in runs}
        self.stage_types = {
            type(m)
            for _, runs in self.lists
            for m in self._holders(runs[0])
            if type(m) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        }

    def _in_a_row(self, runs: Sequence[Ran]) -> bool:
        ordered = sorted(runs, key=lambda ran: ran.start)
        pairs = list(pairwise(ordered))
        good = sum(
            any(self.trace.follows(t.tag, [o.tag for o in a.outs]) for t in b.ins) and a.end < b.start for a, b in pairs
        )
        return good == len(pairs)

    def _holders(self, ran: Ran) -> Iterator[nn.Module]:
        """The called modules around a block, but for the whole."""
        while ran.parent is not None and ran.parent is not self.root and ran is not self.root:
            ran = ran.parent
            yield ran.module

    def _expand(self, ran: Ran) -> Iterator[Ran]:
        for child in ran.children:
            if self._stage(child):
                yield from self._expand(child)
            elif self._block(child):
                yield child

    def _stage(self, ran: Ran) -> bool:
        module = ran.module
        if kind_of(module) in self.elements:
            return False
        if type(module) in self.stage_types:
            return True
        if any(under(r.path, ran.path) for _, runs in self.lists for r in runs):
            return True
        kinds = {kind_of(child.module) for child in ran.children}
        around = ran.path.rpartition(".")[0]
        beside = {path for path, _ in self.lists if path.rpartition(".")[0] == around}
        if beside and type(module) is nn.Sequential and type(self._owner(ran.path)) in (nn.Sequential, nn.ModuleList):
            return all(self._stream(child) for child in ran.children)
        return isinstance(module, nn.Sequential) and bool(kinds & self.elements)

    def _block(self, ran: Ran) -> bool:
        module = ran.module
        if kind_of(module) in self.elements:
            return True
        in_list = isinstance(self._owner(ran.path), nn.Sequential | nn.ModuleList | nn.ModuleDict)
        started = any(r.start < ran.start for _, runs in self.lists for r in runs)
        big = count_of(module) >= 0.1 * self.total and started
        owner = ran.path.rpartition(".")[0]
        staged = (
            weights_in(module) > 0
            and owner
            and any(p.rpartition(".")[0] == owner.rpartition(".")[0] for p, _ in self.lists)
        )
        staged = staged and type(self._owner(ran.path)) is nn.Sequential and in_list
        return bool(staged or (weights_in(module) > 1 and ((in_list and self._listed(ran)) or big)))

    def _listed(self, ran: Ran) -> bool:
        """Whether it stands in a container in which there are blocks, or beside one."""
        parent = ran.path.rpartition(".")[0]
        around = parent.rpartition(".")[0]
        return any(path == parent or (under(path, around) and around != "") for path, _ in self.lists) or any(
            under(r.path, parent) for _, runs in self.lists for r in runs
        )

    def _owner(self, path: str) -> nn.Module:
        return self.backbone.get_submodule(path.rpartition(".")[0])

    def _plain(self, ran: Ran, least: int = 1) -> Iterator[Ran]:
        """Without lists: what the whole calls, one after another, of `least` weights; what holds most is opened."""
        for child in (child for child in ran.children if weights_in(child.module) >= least):
            inner = [c for c in child.children if weights_in(c.module) > 1]
            nearly = len(inner) == 1 and count_of(inner[0].module) > 0.9 * count_of(child.module)
            many = len(inner) > 1 and (count_of(child.module) > 0.7 * self.total or type(child.module) is nn.Sequential)
            if nearly or many:
                yield from self._plain(child, least)
            else:
                yield child

    def _chained(self, found: list[Ran]) -> list[Ran]:
        """The chain of those that follow from one another, by what goes in first, that holds the most parameters.

        Raises TowersError where another that runs wholly before or after it holds much too.
        """
        feeds = self.trace.origins([[o.tag for o in ran.outs] for ran in found])
        best: list[tuple[int, int | None]] = []
        for i, ran in enumerate(found):
            before: tuple[int, int | None] = (0, None)
            for j, other in enumerate(found[:i]):
                beside = ran.path.rpartition(".")[0] == other.path.rpartition(".")[0]
                given = ran.ins if beside or not ran.direct else ran.ins[:1]
                if other.end < ran.start and any(feeds[t.tag] >> j & 1 for t in given):
                    before = max(before, (best[j][0], j), key=lambda pair: (pair[0], pair[1] or 0))
            best.append((before[0] + count_of(ran.module), before[1]))
        chain: list[int] = []
        at: int | None = max(range(len(found)), key=lambda i: best[i][0], default=None)
        while at is not None:
            chain.append(at)
            at = best[at][1]
        chosen = [found[i] for i in reversed(chain)]
        others = [ran for i, ran in enumerate(found) if i not in chain]
        apart = [ran for ran in others if chosen and (ran.end < chosen[0].start or ran.start > chosen[-1].end)]
        if sum(count_of(ran.module) for ran in apart) >= 0.15 * self.total:
            firsts = sorted((chosen[0], apart[0]), key=lambda ran: ran.start)
            towers = self._towers(firsts)
            if len({*towers}) == len(towers) and all(towers):
                raise TowersError(type(self.backbone).__name__, towers)
        return chosen

    def _towers(self, firsts: Sequence[Ran]) -> tuple[str, ...]:
        """The outermost modules that hold one of these calls each."""
        around = []
        for ran in firsts:
            holders = []
            while ran.parent is not None:
                ran = ran.parent
                holders.append(ran.path)
            around.append(holders)
        return tuple(
            next((p for p in reversed(own) if all(p not in others for others in around if others is not own)), own[0])
            for own in around
        )

    def _refusal(self, share: float) -> str:
        name = type(self.backbone).__name__
        seen = [f"{p} ({len(runs)} {type(runs[0].module).__name__})" for p, runs in self.lists] or ["no list of blocks"]
        where = self.lists[0][0] if self.lists else "PATH"
        lines = (
            f"restuning.Anatomy({name!r}, blocks={where!r}, ops={{'mha': Op(into('ATTENTION'), out_of('ATTENTION')), "
            "'ffn': Op(into('MLP'), out_of('MLP'))}, width='NORM.weight', norm='FINAL_NORM')"
        )
        return (
            f"no known anatomy fits {name}, and one traced forward finds blocks with {share:.0%} of its parameters "
            f"(expected {LEAST:.0%}): {', '.join(seen[:6])}; describe it: {lines}"
        )
