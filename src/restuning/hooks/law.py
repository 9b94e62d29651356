"""The law, written once: OP(x) becomes OP(x) + tuner(x, OP(x)) (Res-Tuning, Eq. 7), by hooks that live in a `with`
block.

Beside it, what is no sum: tokens appended to the stream (`hooks.prompts`), and keys and values merged into the
attention (`hooks.attention`).
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
from restuning.hooks.operations import read_by_tuner
from restuning.hooks.points import (
    AnyTuner,
    Hook,
    NamedTuners,
    as_tokens,
    in_dtype,
    in_dtype_of,
    in_layout_of,
    in_place_of,
    on_input,
    on_output,
    pooled_to_grid_of,
)
from restuning.hooks.prompts import AppendedTokens, append_tokens, prompts_apart
from restuning.tuners.base import is_prompt

OPTIONAL = ("linear", "words")
"""Operations that a forward need not call: modules that are named by what they are, not by what they do."""


def group_by_site(tuners: Iterable[tuple[Site, str, AnyTuner]]) -> dict[Site, list[tuple[str, AnyTuner]]]:
    """{site: [(adapter, tuner), …]}, in their order.

    Args:
        tuners: (site, name of the adapter, tuner).
    """
    found: dict[Site, list[tuple[str, AnyTuner]]] = {}
    for site, name, tuner in tuners:
        found.setdefault(site, []).append((name, tuner))
    return found


class SiteSum:
    """The sum of the tuners at one site. Holds the operation's input only until its output is there."""

    def __init__(
        self, site: Site, tuners: NamedTuners, states: Mapping[str, dict[str, Any]], appended: list[AppendedTokens]
    ) -> None:
        self.site, self.tuners, self.states, self.appended = site, tuners, states, appended
        self.inputs: dict[str, list[Tensor]] = {kind: [] for kind in {t.input for _, t in tuners} - {"output"}}
        self.states_given: dict[str, dict[str, Any]] = {}  # so that a recomputed block is given the same
        self.called = self.recomputing = False

    def read(self, kind: str, x: Tensor) -> None:
        """Keep the operation's input (`normed`) or the stream before its norm (`residual`) for its output."""
        self.inputs[kind].append(read_by_tuner(x))

    def read_and_add(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum where input and output come together: at a weight that no module is called for."""
        for kind in self.inputs:
            self.read(kind, x)
        return self.add_to_output(y)

    def add_to_output(self, y: Tensor) -> Tensor:
        """OP(x) + Σ tuner(x, OP(x)), in the output's own layout and dtype; summed in the tuners' dtype."""
        self.called = True
        if not all(self.inputs.values()):
            raise SiteError("an operation's output came before its input: the anatomy's points are in the wrong order")
        inputs = {kind: stack.pop() for kind, stack in self.inputs.items()}
        output = inputs["output"] = y
        for name, tuner in self.tuners:
            if tuner.layout == "patches" and output.ndim == 4 and output.shape[2] != output.shape[3]:
                shape = f"{output.shape[2]} x {output.shape[3]}"
                raise MethodError(f"{type(tuner).__name__} needs a square map, not {shape}")
            appended = 0
            if tuner.layout == "map":
                pair = [inputs[tuner.input], output]
            else:
                x = as_tokens(pooled_to_grid_of(output, inputs[tuner.input]))
                if tuner.layout == "patches":
                    appended = sum(a.count for a in self.appended if self.site.block in a.span)
                pair = [t[:, : t.shape[1] - appended] for t in (x, as_tokens(output))]
            pair = [in_dtype_of(tuner, t) for t in pair]
            added = tuner(*pair, self._state(name)) if tuner.form == "stateful" else tuner(*pair)
            if added is not None:
                y = y + in_layout_of(y, F.pad(added, (0, 0, 0, appended)) if appended else added)
        return in_dtype(y, output.dtype)

    def _state(self, name: str) -> dict[str, Any]:
        if self.recomputing:
            return dict(self.states_given[name])
        self.states_given[name] = dict(self.states[name])
        return self.states[name]


class Attachment:
    """Every site's output is OP(x) plus the sum of its tuners, while `on()` lasts."""

    def __init__(self, backbone: nn.Module, sites: Sites, tuners: Mapping[Site, NamedTuners]) -> None:
        states: dict[str, dict[str, Any]] = {name: {} for at_site in tuners.values() for name, _ in at_site}
        self.sums: list[SiteSum] = []
        self._hooks: list[Hook] = []
        self._recomputing = [False]
        appended: list[AppendedTokens] = []

        def recomputing(state: list[bool] = self._recomputing) -> bool:  # without self: no cycle keeps activations
            return state[0]

        for site, at_site in tuners.items():
            if any(tuner.form == "copy" for _, tuner in at_site):
                self._hooks.append(in_place_of(backbone.get_submodule(site.reads.path), at_site))
                continue
            added = [(name, tuner) for name, tuner in at_site if not is_prompt(tuner)]
            if added and site.op == "attention":
                module = backbone.get_submodule(site.reads.path)
                self._hooks.append(partial(on_call, module, _merging([tuner for _, tuner in added]), recomputing))
            elif added:
                total = SiteSum(site, added, states, appended)
                self.sums.append(total)
                if site.weight is not None:
                    owner, weight = backbone.get_submodule(site.weight.owner), partial(_weight, site, backbone)
                    self._hooks.append(partial(on_weight, owner, weight, total.read_and_add, recomputing))
                    continue
                for kind in sorted(total.inputs):
                    point = site.stream if kind == "residual" else site.reads
                    self._hooks.append(on_input(backbone, point, partial(total.read, kind)))
                self._hooks.append(on_output(backbone, site.writes, total.add_to_output))
        for site, at_site in tuners.items():  # around all others, so that these see the same tokens
            for tuner in (tuner for _, tuner in at_site if is_prompt(tuner)):
                first = site.block or 0
                span = range(first, first + 1 if tuner.span == "block" else len(sites.blocks))
                if tuner.unbound:
                    self._hooks += prompts_apart(backbone, sites, span, tuner, recomputing)
                else:
                    appended.append(AppendedTokens(span))
                    self._hooks += append_tokens(backbone, sites, appended[-1], tuner)

    @contextmanager
    def on(self, recomputing: bool = False) -> Iterator[None]:
        """Attach, and detach at the end.

        Args:
            recomputing: for blocks of a pass that is over, run again in any order, as often as needed: tuners are given
                the states that they were given then.

        Raises:
            SiteError: the backbone's forward did not call an operation that carries tuners.
        """
        self._recomputing[0] = recomputing
        for total in self.sums:
            total.recomputing = recomputing
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(hook())
            yield
        for total in self.sums:
            for left in total.inputs.values():
                left.clear()
        uncalled = [s.site.name for s in self.sums if not s.called and s.site.op not in OPTIONAL]
        if uncalled or (self.sums and not any(s.called for s in self.sums)):
            raise SiteError(f"the backbone's forward calls no module at {', '.join(uncalled)}: no tuner can be there")


@contextmanager
def attach(backbone: nn.Module, sites: Sites, tuners: Mapping[Site, NamedTuners]) -> Iterator[Attachment]:
    """An `Attachment` that is on while it lasts."""
    attachment = Attachment(backbone, sites, tuners)
    with attachment.on():
        yield attachment


def _weight(site: Site, backbone: nn.Module) -> Tensor:
    """As it is at the moment: a backbone whose blocks are sharded has other tensors while a block runs."""
    weight: Tensor = site.affine(backbone).weight
    return weight


def _merging(tuners: Sequence[AnyTuner]) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        dtype, pieces = call.q.dtype, [tuner(call) for tuner in tuners]
        return merged(call, [(in_dtype(k, dtype), in_dtype(v, dtype)) for k, v in pieces])

    return run
