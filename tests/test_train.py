"""The laws of training: what is trained, and that a run can be stopped anywhere and go on to the same bits."""

import errno
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from restuning.data.objective import objective
from restuning.errors import CheckpointError, MissingExtra, RestuningError
from restuning.training import config as config
from restuning.training.checkpoint import read_state, write_state
from restuning.training.evaluate import HasEpoch, evaluate, predict_logits
from restuning.training.loop import TrainConfig, fit

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """What Accelerate keeps for a whole process is of one test alone."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


class Points:
    """Separable points; `set_epoch` augments, `log` records what was read, `sleep` slows the reading down."""

    def __init__(self, n: int = 22, classes: int = 3, sleep: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % classes
        self.inputs = torch.randn(n, 6, generator=generator) + 4 * nn.functional.one_hot(self.labels, 6)
        self.sleep, self.epoch, self.log = sleep, 0, []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.sleep)
        self.log.append((self.epoch, index))
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        noise = 0.1 * torch.randn(6, generator=generator)
        return self.inputs[index] + noise, int(self.labels[index])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Net(nn.Module):
    """A frozen stem; a trained norm with buffers, dropout, a scale and a head."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8).requires_grad_(False)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(dropout)
        self.alpha, self.head = nn.Parameter(torch.ones(())), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.stem(x))) * self.alpha)


def net(dropout: float = 0.3, norm: bool = True) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Net(dropout)
    if not norm:  # batch statistics depend on how examples are divided into batches
        model.norm = nn.LayerNorm(8)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def close(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


CONFIG = TrainConfig(epochs=3, lr=0.01, batch_size=4)


# ---- what is trained, and how


def test_weight_decay_only_on_trainable_matrices() -> None:
    model = net()
    decayed, bare = config.parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and [p.ndim for p in decayed["params"]] == [2]
    assert bare["weight_decay"] == 0 and {id(p) for p in bare["params"]} == {
        id(p) for p in (model.alpha, model.norm.weight, model.norm.bias, model.head.bias)
    }


def test_a_rate_of_the_head_apart() -> None:
    """Adam's first step goes as far as its rate says, whatever the gradient."""
    once, apart, born = net(0.0), net(0.0), net(0.0)
    for model, factor in ((once, 1.0), (apart, 0.25)):
        fit(model, Points(4), None, replace(CONFIG, epochs=1, weight_decay=1e-9, head_lr_factor=factor))
    moved = [(model.head.weight - born.head.weight).abs().max().item() for model in (once, apart)]
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=1e-2) and torch.equal(once.alpha, apart.alpha)
    with pytest.raises(RestuningError, match="head_lr_factor is 0: expected a number above 0"):
        TrainConfig(head_lr_factor=0)


def test_nothing_to_train() -> None:
    with pytest.raises(RestuningError, match="nothing to train"):
        fit(net().requires_grad_(False), Points(), None, CONFIG)


def test_only_the_trainable_change_and_it_learns() -> None:
    model, before = net(0.0), net(0.0)
    history = fit(model, Points(60), Points(30, seed=1), replace(CONFIG, epochs=8))
    assert torch.equal(model.stem.weight, before.stem.weight)
    assert not torch.equal(model.alpha, before.alpha)
    assert [e.epoch for e in history.epochs] == list(range(8)) and history.stopped == "finished"
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert history.epochs[-1].val_score > 80 and history.epochs[-1].accuracy > 80
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_not_patched() -> None:
    model = net()
    fit(model, Points(), None, replace(CONFIG, epochs=1, precision="bf16"))
    assert "forward" not in vars(model) and type(model) is Net
    fit(model, Points(), None, replace(CONFIG, epochs=1))  # another precision in the same process


def test_fit_trusts_the_module_with_its_mode() -> None:
    class Half(Net):
        def train(self, mode: bool = True) -> "Half":
            super().train(mode)
            self.norm.eval()
            return self

    model = Half()
    fit(model, Points(), Points(), replace(CONFIG, epochs=2))
    assert model.norm.num_batches_tracked == 0 and model.training and not model.norm.training


def test_tuple_inputs_and_another_loss() -> None:
    class Pairs(Points):
        def __getitem__(self, index):
            x, label = super().__getitem__(index)
            return (x[:2], x[2:]), label

    class Two(Net):
        def forward(self, inputs):
            return super().forward(torch.cat(list(inputs), dim=1))

    model = Two()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert (
        len(fit(model, Pairs(), Pairs(), replace(CONFIG, epochs=1), objective=replace(objective(), loss=smooth)).epochs)
        == 1
    )
    assert predict_logits(model, Pairs(), 5)[0].shape == (22, 3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0), ("epochs", 1.5), ("lr", 0.0), ("lr", math.nan), ("lr", -1e-3), ("weight_decay", -0.1),
        ("batch_size", 0), ("warmup_epochs", -1), ("accumulate", 0), ("clip", 0.0), ("seed", -1), ("patience", 0),
        ("workers", -1), ("save_seconds", 0), ("precision", "fp8"), ("epochs", None), ("lr", math.inf),
    ],
)  # fmt: skip
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(RestuningError, match=f"^{field} is {value!r}: expected"):
        TrainConfig(**{field: value})


def test_zeros_that_mean_none() -> None:
    assert TrainConfig(weight_decay=0, warmup_epochs=0, seed=0, workers=0).clip is None


def test_patience_needs_validation_and_resume_a_file() -> None:
    with pytest.raises(RestuningError, match="patience is 2"):
        fit(net(), Points(), None, replace(CONFIG, patience=2))
    with pytest.raises(RestuningError, match="state is None"):
        fit(net(), Points(), None, CONFIG, resume=True)
    with pytest.raises(RestuningError, match="train has 0 examples"):
        fit(net(), Points(0), None, CONFIG)


def test_schedule() -> None:
    lrs = [config.learning_rate(step, 100, 10, 0.5) for step in range(100)]
    assert lrs[0] == 0.05 and lrs[9] == 0.5 and lrs[10] == 0.5 and max(lrs) == 0.5
    assert lrs[10:] == sorted(lrs[10:], reverse=True) and 0 < lrs[-1] < 1e-3
    assert lrs[55] == pytest.approx(0.25)
    assert config.learning_rate(0, 5, 0, 1.0) == 1.0
    # warm-up is at most a fifth: with 5 epochs the second one starts at the peak
    assert fit(net(), Points(), None, replace(CONFIG, epochs=5)).epochs[0].lr == CONFIG.lr


def test_accumulation_is_a_larger_batch() -> None:
    small, large = net(0, norm=False), net(0, norm=False)
    a = fit(small, Points(), None, replace(CONFIG, batch_size=4, accumulate=2, clip=0.5))
    b = fit(large, Points(), None, replace(CONFIG, batch_size=8, clip=0.5))
    assert close(small, large) < 1e-5  # 22 examples: the last step has one short batch
    assert a.epochs[-1].loss == pytest.approx(b.epochs[-1].loss, abs=1e-5)
    unclipped = net(0, norm=False)
    fit(unclipped, Points(), None, replace(CONFIG, batch_size=8))
    assert close(large, unclipped) > 1e-6


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=GPU)])
def test_precision(tmp_path: Path, precision: str) -> None:
    model, config, state = net(), replace(CONFIG, epochs=6, precision=precision, clip=1.0), tmp_path / "state.pt"
    history = fit(model, Points(60), Points(), config)
    assert history.epochs[-1].loss < history.epochs[0].loss and model.head.weight.dtype == torch.float32
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Stop(150, KeyboardInterrupt(), 60), Points(), config, state=state)
    resumed = net()
    fit(resumed, Points(60), Points(), config, state=state, resume=True)
    assert same(model, resumed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(RestuningError, match="precision fp16 needs a GPU"):
        fit(net(), Points(), None, replace(CONFIG, precision="fp16"))


@GPU
def test_fp16_clips_unscaled_gradients_and_keeps_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, clip, file = [], nn.utils.clip_grad_norm_, tmp_path / "state.pt"
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)))
    config = replace(CONFIG, precision="fp16", clip=1.0)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Stop(30, KeyboardInterrupt()), None, config, state=file)
    assert max(norms) < 100  # the scale is 65536
    state = torch.load(file, weights_only=True)
    state["scaler"]["scale"] = 1024.0
    torch.save(state, file)
    fit(net(), Points(), None, config, state=file, resume=True)
    assert torch.load(file, weights_only=True)["scaler"]["scale"] == 1024


def test_an_accelerator_of_the_callers() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        assert len(fit(net(), Points(), None, CONFIG, accelerator=Accelerator(mixed_precision="no")).epochs) == 3
        with pytest.raises(RestuningError, match=r"TrainConfig\.accumulate"):
            fit(net(), Points(), None, CONFIG, accelerator=Accelerator(gradient_accumulation_steps=2))
        with pytest.raises(RestuningError, match="precision"):
            fit(net(), Points(), None, replace(CONFIG, precision="bf16"))
    finally:
        AcceleratorState._reset_state()


# ---- randomness


def test_data_order_is_a_function_of_seed_and_epoch() -> None:
    a, b = Points(), Points()
    torch.manual_seed(1)
    fit(net(), a, None, CONFIG)
    torch.manual_seed(2)
    fit(net(), b, Points(), CONFIG)
    assert a.log == b.log and isinstance(a, HasEpoch)
    epochs = [[index for epoch, index in a.log if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs) and epochs[0] != epochs[1]
    other = Points()
    fit(net(), other, None, replace(CONFIG, seed=1))
    assert other.log != a.log


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models = [net(), net()]
    for i, model in enumerate(models):
        fit(model, Points(), Points(), replace(CONFIG, epochs=2, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)
        if i == 0:
            before = torch.manual_seed(4).get_state()
    assert same(*models)


def test_workers_change_nothing() -> None:
    a, b = net(), net()
    fit(a, Points(), None, replace(CONFIG, epochs=2))
    fit(b, Points(), None, replace(CONFIG, epochs=2, workers=1))
    assert same(a, b)


# ---- states


class Stop(Points):
    """Raises when its n-th example is read."""

    def __init__(self, at: int, error: BaseException, n: int = 22) -> None:
        super().__init__(n)
        self.at, self.error = at, error

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if len(self.log) == self.at:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("at", [0, 5, 13, 21, 22, 50, 65])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupt_and_resume_to_the_same_bits(tmp_path: Path, at: int, accumulate: int) -> None:
    config = replace(CONFIG, accumulate=accumulate, patience=3)
    whole, parted, state = net(), net(), tmp_path / "run" / "state.pt"
    expected = fit(whole, Points(), Points(10), config)
    with pytest.raises(KeyboardInterrupt):
        fit(parted, Stop(at, KeyboardInterrupt()), Points(10), config, state=state)
    place = torch.load(state, weights_only=True)["place"]
    step = (at % 22) // (4 * accumulate)
    assert (place["epoch"], place["step"]) == (at // 22, step)
    data, resumed = Points(), net(dropout=0.3)
    history = fit(resumed, data, Points(10), config, state=state, resume=True)
    assert same(whole, resumed)
    assert [replace(e, seconds=0) for e in history.epochs] == [replace(e, seconds=0) for e in expected.epochs]
    assert len(data.log) == 22 * (3 - at // 22) - step * 4 * accumulate  # no batch is read twice
    again = net()
    assert fit(again, Points(), Points(10), config, state=state, resume=True) == history  # a finished run
    assert same(again, resumed)
    assert [p.name for p in state.parent.iterdir()] == ["state.pt"]


def test_interrupt_during_validation(tmp_path: Path) -> None:
    whole, parted, resumed, state = net(), net(), net(), tmp_path / "state.pt"
    fit(whole, Points(), Points(10), CONFIG)
    with pytest.raises(KeyboardInterrupt):
        fit(parted, Points(), Stop(15, KeyboardInterrupt(), 10), CONFIG, state=state)
    place = torch.load(state, weights_only=True)["place"]
    assert (place["epoch"], place["step"]) == (1, 6)
    fit(resumed, Points(), Points(10), CONFIG, state=state, resume=True)
    assert same(whole, resumed)


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path: Path) -> None:
    class Signals(Net):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 8:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    state = tmp_path / "state.pt"
    torch.manual_seed(7)
    model, whole, resumed = Signals(), net(), net()
    for other in (whole, resumed):
        other.load_state_dict(model.state_dict())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Points(), None, CONFIG, state=state)
    assert signal.getsignal(signal.SIGINT) is before
    place = torch.load(state, weights_only=True)["place"]
    assert (place["epoch"], place["step"]) == (1, 2)  # 6 steps, and the 8th forward's step is done
    fit(whole, Points(), None, CONFIG)
    fit(resumed, Points(), None, CONFIG, state=state, resume=True)
    assert same(whole, resumed)


def test_a_torn_step_is_not_saved(tmp_path: Path) -> None:
    def interrupted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            net(), Points(), None, CONFIG, state=tmp_path / "state.pt", objective=replace(objective(), loss=interrupted)
        )
    tensors = torch.load(tmp_path / "state.pt", weights_only=True)["tensors"]
    assert tensors["norm.num_batches_tracked"] == 0  # the forward pass had counted one


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, accelerate
sys.path.insert(0, sys.argv[1])
from test_train import CONFIG, Points, fit, net
from dataclasses import replace
folder = Path(sys.argv[2])
config = replace(CONFIG, epochs=8, patience=8, save_seconds=0.01)
fit(net(), Points(), None, CONFIG)  # what is imported late is imported before the forks
kills, places, chance = 0, set(), random.Random(5)
while True:
    child = os.fork()
    if child == 0:
        model = net()
        fit(model, Points(sleep=0.004), Points(10), config, state=folder / "state.pt", resume=True)
        torch.save(model.state_dict(), folder / "final.pt")
        os._exit(0)
    time.sleep(chance.uniform(0.03, 0.2 + 0.02 * kills))  # longer and longer: a busy machine must get on too
    os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    kills += 1
    if (folder / "state.pt").exists():
        place = torch.load(folder / "state.pt", weights_only=True)["place"]
        places.add((place["epoch"], place["step"]))
print(json.dumps([kills, sorted(places)]))
"""


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter that can import this file."""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> str:
    """What the first one printed."""
    try:
        results = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
    return results[0][0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    kills, places = json.loads(finish(start(KILLED, str(tmp_path))).splitlines()[-1])
    assert kills >= 3 and any(step for _, step in places), places
    whole, killed = net(), net()
    torch.set_num_threads(1)
    fit(whole, Points(), Points(10), replace(CONFIG, epochs=8, patience=8, save_seconds=0.01))
    killed.load_state_dict(torch.load(tmp_path / "final.pt", weights_only=True))
    assert same(whole, killed)


def test_resume_without_a_file_starts(tmp_path: Path) -> None:
    whole, model = net(), net()
    fit(whole, Points(), None, CONFIG)
    fit(model, Points(), None, CONFIG, state=tmp_path / "state.pt", resume=True)
    assert same(whole, model) and (tmp_path / "state.pt").exists()


def test_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    short = replace(CONFIG, epochs=1)
    fit(net(), Points(), None, short, state=state)

    def refused(match: str, model: nn.Module, data: Points, config: TrainConfig) -> None:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=match) as error:
            fit(model, data, None, config, state=state, resume=True)
        assert "\n" not in str(error.value)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    refused("lr was 0.01, and is 0.02 now", net(), Points(), replace(CONFIG, epochs=1, lr=0.02))
    refused("epochs was 1, and is 3 now", net(), Points(), CONFIG)
    refused("training examples was 22, and is 30 now", net(), Points(30), short)
    other = net()
    other.head = nn.Linear(8, 5)
    refused(
        r"head.weight was torch.float32 \[3, 8\], and is torch.float32 \[5, 8\]",
        other,
        Points(),
        replace(CONFIG, epochs=1),
    )
    more = net()
    more.stem.requires_grad_(True)
    refused("stem.weight was absent, and is", more, Points(), short)
    fewer = net()
    fewer.alpha.requires_grad_(False)
    refused("alpha was torch.float32 .*, and is absent now", fewer, Points(), short)
    fit(net(), Points(), None, replace(CONFIG, epochs=1, workers=1, save_seconds=5), state=state, resume=True)


def test_a_state_of_an_older_version(tmp_path: Path) -> None:
    """What it did not know yet was as it is by default."""
    file, data = tmp_path / "state.pt", Points()
    fit(net(), data, None, replace(CONFIG, epochs=1), state=file, progress=False)
    state = read_state(file)
    del state["facts"]["schedule"]
    write_state(file, state)
    fit(net(), data, None, replace(CONFIG, epochs=1), state=file, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="schedule was cosine, and is constant now"):
        other = replace(CONFIG, epochs=1, schedule="constant")
        fit(net(), data, None, other, state=file, resume=True, progress=False)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign"])
def test_a_damaged_state_is_one_line(tmp_path: Path, damage: str) -> None:
    state = tmp_path / "state.pt"
    fit(net(), Points(), None, replace(CONFIG, epochs=1), state=state)
    good = state.read_bytes()
    weights = torch.load(state, weights_only=True)["tensors"]["head.weight"].numpy().tobytes()
    at = good.index(weights)
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    bad = {"cut": good[:-100], "flipped": flipped, "empty": b"", "text": b"hello", "foreign": buffer.getvalue()}
    state.write_bytes(bad[damage])
    with pytest.raises(CheckpointError, match=r"state\.pt") as error:
        fit(net(), Points(), None, replace(CONFIG, epochs=1), state=state, resume=True)
    assert "\n" not in str(error.value) and state.read_bytes() == bad[damage]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    state, data = tmp_path / "state.pt", Points()
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Stop(30, KeyboardInterrupt()), None, CONFIG, state=state)
    before = state.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RestuningError, match="No space left on device; the previous state is intact") as error:
            fit(net(), data, None, CONFIG, state=state, resume=True)
    assert "\n" not in str(error.value)
    assert state.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    whole, resumed = net(), net()
    fit(whole, Points(), None, CONFIG)
    fit(resumed, Points(), None, CONFIG, state=state, resume=True)
    assert same(whole, resumed)


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = Points()
    with pytest.raises(RestuningError, match="cannot write the state"):
        fit(net(), data, None, CONFIG, state=tmp_path / "file" / "state.pt")
    assert data.log == []


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path: Path, accumulate: int, bad: float) -> None:
    calls = 0

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(logits, labels) * (bad if calls == 9 else 1)

    model, state = net(), tmp_path / "state.pt"
    config = replace(CONFIG, accumulate=accumulate, epochs=2)
    with pytest.raises(RestuningError) as error:
        fit(model, Points(), None, config, state=state, objective=replace(objective(), loss=loss))
    step = 2 // accumulate
    assert str(error.value).startswith(f"epoch 1, step {step}: the loss is {bad} at lr 0.0") and "\n" not in str(
        error.value
    )
    assert all(p.isfinite().all() for p in model.parameters())
    kept = torch.load(state, weights_only=True)
    assert (kept["place"]["epoch"], kept["place"]["step"]) == (1, 0)
    whole, resumed = net(), net()
    fit(whole, Points(), None, config)
    fit(resumed, Points(), None, config, state=state, resume=True)
    assert same(whole, resumed)


def test_broken_parameters_are_not_saved(tmp_path: Path) -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits * 0).sum().sqrt()  # finite itself, with a gradient that is not

    state = tmp_path / "state.pt"
    with pytest.raises(RestuningError, match=r"alpha is no longer finite"):
        fit(
            net(),
            Points(),
            None,
            replace(CONFIG, save_seconds=1e-9),
            state=state,
            objective=replace(objective(), loss=loss),
        )
    assert all(t.isfinite().all() for t in torch.load(state, weights_only=True)["tensors"].values())


# ---- early stopping


class Fades(Net):
    """Right about everything in its first two validations, and never again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("validations", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        if not self.training:
            self.validations += 1
            logits = logits * 0 + torch.eye(3)[0 if self.validations <= 2 else 1]
        return logits


class Zeros(Points):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(index)[0], 0


@pytest.mark.parametrize("patience, epochs, stopped", [(2, 9, "early"), (None, 5, "finished"), (5, 5, "finished")])
def test_early_stopping(tmp_path: Path, patience: int | None, epochs: int, stopped: str) -> None:
    torch.manual_seed(0)
    model = Fades()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    config = replace(CONFIG, epochs=epochs, patience=patience, batch_size=10)
    history = fit(model, Points(), Zeros(10), config, state=tmp_path / "state.pt")
    assert history.stopped == stopped
    assert [e.val_score for e in history.epochs] == ([100, 100] + [0] * 9)[: 3 if patience == 2 else 5]
    assert model.validations == (1 if patience else 5)  # the first of the best epochs stands, or the last epoch
    assert model.norm.num_batches_tracked == 3 * (1 if patience else 5)
    again = Fades()
    again.load_state_dict(start)
    assert fit(again, Points(), Zeros(10), config, state=tmp_path / "state.pt", resume=True) == history
    assert same(model, again)


# ---- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    shown, quiet = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    fit(net(), Points(), Points(), CONFIG)
    monkeypatch.setattr(sys, "stderr", quiet)
    fit(net(), Points(), Points(), CONFIG, progress=False)
    assert all(word in shown.getvalue() for word in ("epoch 3/3", "loss", "accuracy", "val", "0:00:00"))
    assert quiet.getvalue() == "" and capsys.readouterr().out == ""


def test_a_line_an_epoch_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    history = fit(net(), Points(), Points(), CONFIG)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == CONFIG.epochs
    for number, (line, epoch) in enumerate(zip(lines, history.epochs, strict=True), 1):
        assert line.startswith(f"epoch {number}/{CONFIG.epochs}  loss {epoch.loss:.4f}  accuracy")
        assert f"val {epoch.val_score:.2f}" in line
    fit(net(), Points(), None, CONFIG, progress=False)
    assert capfd.readouterr() == ("", "")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        fit(net(), Stop(30, KeyboardInterrupt()), Points(), CONFIG, state=tmp_path / "s.pt", tracker=tmp_path / "board")
    history = fit(net(), Points(), Points(), CONFIG, state=tmp_path / "s.pt", resume=True, tracker=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/accuracy", "val/score", "lr"}
    points = events.Scalars("train/loss")
    assert [p.step for p in points] == [0, 1, 2]
    assert [p.value for p in points] == pytest.approx([e.loss for e in history.epochs])


@pytest.mark.parametrize("module, package", [
    ("accelerate", "accelerate"), ("rich.console", "rich"), ("torch.utils.tensorboard", "tensorboard"),
])  # fmt: skip
def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(MissingExtra, match=rf"'{package}'.*restuning\[train\]"):
        fit(net(), Points(), None, CONFIG, tracker=tmp_path)


# ---- several processes

TWO = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from restuning.training.config import data_order
from test_train import CONFIG, Points, fit, net
class Stop(Points):
    def __getitem__(self, index):
        if self.epoch == 1 and index in data_order(22, 3, 0, 1)[4]:  # the same step in both
            raise KeyboardInterrupt
        return super().__getitem__(index)
folder, config, rank = Path(sys.argv[2]), replace(CONFIG, accumulate=2, batch_size=3, clip=1.0, patience=3), sys.argv[3]
model = net(0, norm=False)
try:
    fit(model, Stop(), Points(9), config, state=folder / "state.pt")
except KeyboardInterrupt:
    torch.distributed.barrier()
model = net(0, norm=False)
history = fit(model, Points(), Points(9), config, state=folder / "state.pt", resume=True)
torch.save({"model": model.state_dict(), "rows": [[e.loss, e.accuracy, e.val_score] for e in history.epochs]},
           folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        info = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": info, "ACCELERATE_USE_CPU": "true"}
    processes = [start(TWO, str(tmp_path), r, RANK=r, LOCAL_RANK=r, LOCAL_WORLD_SIZE="2", **shared) for r in "01"]
    finish(*processes)
    # 22 examples in batches of 3: the last batch has one, so that one process has none
    config = replace(CONFIG, accumulate=2, batch_size=3, clip=1.0, patience=3)
    model = net(0, norm=False)
    history = fit(model, Points(), Points(9), config)
    rows = [[e.loss, e.accuracy, e.val_score] for e in history.epochs]
    for rank in "01":
        other = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert max((model.state_dict()[k] - v).abs().max().item() for k, v in other["model"].items()) < 1e-6
        assert [x for row in other["rows"] for x in row] == pytest.approx([x for row in rows for x in row], abs=1e-5)


# ---- evaluation


def test_evaluate() -> None:
    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    data = [(row, label) for row, label in zip(logits, (0, 4, 5), strict=True)]
    values = dict(evaluate(Copies(), data, 2))
    assert values["accuracy"] == pytest.approx(100 / 3) and values["top5"] == pytest.approx(200 / 3)
    assert values["loss"] == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([0, 4, 5])).item())
    assert [name for name, _ in evaluate(net(), Points(), 4)] == ["accuracy", "f1", "loss"]
    with pytest.raises(RestuningError, match="0 examples"):
        list(evaluate(net(), Points(0), 4))


def test_evaluation_leaves_no_trace() -> None:
    model = net().train()
    model.norm.eval()
    before = torch.get_rng_state()
    logits, labels = predict_logits(model, Points(), 5)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(labels, Points().labels)
    assert model.training and model.dropout.training and not model.norm.training and not logits.requires_grad
    assert torch.equal(logits, predict_logits(model, Points(), 22)[0]) or torch.allclose(
        logits, predict_logits(model, Points(), 22)[0], atol=1e-6
    )


def test_seeds_differ() -> None:
    places = [(s, e) for s in range(10) for e in range(10)]
    assert len({config.seed_of(*p) for p in places}) == len(places)
    assert config.seed_of(1, 23) != config.seed_of(12, 3)
    order = config.data_order(22, 4, 0, 0)
    assert [len(batch) for batch in order] == [4, 4, 4, 4, 4, 2]
    assert sorted(i for batch in order for i in batch) == list(range(22))


def test_the_mean_of_the_weights_and_a_constant_rate() -> None:
    """By hand: what each step left, averaged with the decay that a young mean has."""
    left: list[torch.Tensor] = []
    told: list[torch.Tensor] = []
    net = Net()
    settings = TrainConfig(epochs=12, batch_size=22, lr=0.05, warmup_epochs=0, schedule="constant", ema=0.6)
    hook = register_optimizer_step_post_hook(lambda *_: left.append(net.head.weight.detach().clone()))
    history = fit(net, Points(), None, settings, after=lambda _: told.append(net.head.weight.detach().clone()))
    hook.remove()
    mean = left[0]
    for step, weight in enumerate(left[1:], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(net.head.weight.detach(), mean)
    assert torch.equal(told[-1], net.head.weight) and not torch.allclose(left[-1], mean)
    assert {epoch.lr for epoch in history.epochs} == {0.05}
