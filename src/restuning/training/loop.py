"""Train a module on a data set with a loss; stopped at any moment, a run goes on to the same bits.

All that is random is a function of where the run is: the order of the data of (seed, epoch), dropout of (seed, step,
process), augmentation of whatever the data set makes of `set_epoch`. So a state holds no generator, and no batch is
read twice to catch up.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restuning.data.objective import IGNORED, Objective, sort_key
from restuning.data.objective import objective as objective_of
from restuning.errors import Diverged, MissingExtra, RestuningError
from restuning.hooks.fsdp import sharded_parameters
from restuning.training.checkpoint import (
    changing_tensors,
    described,
    read_state,
    refuse_other,
    restore,
    uninterrupted,
    write_state,
)
from restuning.training.config import TrainConfig as TrainConfig
from restuning.training.config import data_order, learning_rate, parameter_groups, seed_of
from restuning.training.consistency import TwoDraws, penalty
from restuning.training.evaluate import Examples, HasEpoch, HasLengths, loader, padded, predict_logits, to_device
from restuning.training.logging import Epoch as Epoch
from restuning.training.logging import History as History
from restuning.training.logging import Place, bar, board, log

if TYPE_CHECKING:
    from accelerate import Accelerator

_DO_NOT_CHANGE_THE_RESULT = ("workers", "save_seconds")


@dataclass
class _Run:
    model: nn.Module
    shell: nn.Module  # the model as Accelerate wraps it; the model itself stays unwrapped and unpatched
    optimizer: Any
    accelerator: "Accelerator"
    train: Examples
    val: Examples | None
    config: TrainConfig
    objective: Objective
    state: Path | None
    place: Place = field(default_factory=Place)
    torn: bool = False  # inside a step: what is in memory is not a state to keep
    saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.steps = math.ceil(math.ceil(len(self.train) / self.config.batch_size) / self.config.accumulate)

    def lr(self, step: int) -> float:
        warmup = min(self.config.warmup_epochs, 0.2 * self.config.epochs)
        steps, schedule = self.config.epochs * self.steps, self.config.schedule
        return learning_rate(step, steps, warmup * self.steps, self.config.lr, schedule)

    def stale(self) -> bool:
        """Whether the last `patience` epochs brought nothing better."""
        seen = [sort_key(e.val_score) for e in self.place.history]
        return bool(self.config.patience and seen and len(seen) - 1 - seen.index(max(seen)) >= self.config.patience)

    def epoch(self, show: Callable[[int, str], None]) -> Epoch:
        """What is left of the epoch; its row."""
        place, config, tick = self.place, self.config, time.perf_counter()
        if isinstance(self.train, HasEpoch):
            self.train.set_epoch(place.epoch)
        self.model.train()
        lengths = self.train.lengths if config.group_by_length and isinstance(self.train, HasLengths) else None
        order = data_order(len(self.train), config.batch_size, config.seed, place.epoch, lengths)
        order = order[place.step * config.accumulate :]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches_of = iter(
            loader(
                self.train,
                # a process left without an example reads one for nothing: all must take part in the step
                batch_sampler=[batch[rank::world] or batch[:1] for batch in order],
                num_workers=config.workers,
                generator=torch.Generator().manual_seed(seed_of(config.seed, place.epoch)),
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )
        for start in range(0, len(order), config.accumulate):
            sizes = [len(batch) for batch in order[start : start + config.accumulate]]
            step = place.epoch * self.steps + place.step
            torch.manual_seed(seed_of(config.seed, step, rank))
            batches = [next(batches_of) for _ in sizes]
            with uninterrupted():
                self.torn = True
                loss, correct = self.step(batches, sizes, self.lr(step))
                place.step, place.seen = place.step + 1, place.seen + sum(sizes)
                place.loss, place.correct = place.loss + loss, place.correct + correct
                tick, before = time.perf_counter(), tick
                place.seconds += tick - before
                self.torn = False
            if time.monotonic() - self.saved >= config.save_seconds:
                self.save()
            show(step + 1, place.text(config.epochs, self.objective.right is not None))
        val_score = None if self.val is None else self.score(self.val)
        with uninterrupted():
            place.seconds += time.perf_counter() - tick
            row = Epoch(
                place.epoch,
                place.loss / place.seen,
                None if self.objective.right is None else 100 * place.correct / place.seen,
                val_score,
                self.lr((place.epoch + 1) * self.steps - 1),
                place.seconds,
            )
            better = all(sort_key(val_score) > sort_key(e.val_score) for e in place.history)
            best = changing_tensors(self.model) if config.patience and better else place.best
            self.place = Place(place.epoch + 1, history=[*place.history, row], best=best, mean=place.mean)
            self.save()
        return row

    def step(self, batches: list[Any], sizes: list[int], lr: float) -> tuple[float, float]:
        """One optimizer step: the gradient of the mean loss over all examples of all batches and processes.

        Returns the summed loss and the number that were right. Batches weigh what they hold, so a short last batch,
        accumulation or more processes change nothing but the rounding.
        """
        accelerator, world = self.accelerator, self.accelerator.num_processes
        total_loss = total_correct = 0.0
        self.optimizer.zero_grad()
        for i, ((inputs, labels), size) in enumerate(zip(batches, sizes, strict=True)):
            own = len(range(accelerator.process_index, size, world))
            labels = labels.to(accelerator.device, non_blocking=True)
            with accelerator.no_sync(self.shell) if i + 1 < len(batches) else nullcontext():
                logits = self.shell(to_device(inputs, accelerator.device))
                if self.config.consistency:
                    logits, other = logits.chunk(2)
                loss = self.objective.loss(logits, labels)
                if self.config.consistency:
                    loss = loss + self.config.consistency * penalty(logits, other)
                right = self.objective.right
                correct = loss.new_zeros(()) if right is None else right(logits[:own], labels[:own]).sum()
                # summed over the processes before the backward pass, so that all of them stop at a bad loss together
                sums = accelerator.reduce(torch.stack([loss.detach().float() * own, correct.float()]), "sum")
                batch_loss, batch_correct = sums.tolist()
                if not math.isfinite(batch_loss):
                    where = f"epoch {self.place.epoch}, step {self.place.step}"
                    raise Diverged(f"{where}: the loss is {batch_loss / size} at lr {lr:g}; lower lr, or set clip")
                accelerator.backward(loss * (own * world / sum(sizes)))
            total_loss, total_correct = total_loss + batch_loss, total_correct + batch_correct
        if self.config.clip is not None:
            accelerator.unscale_gradients(self.optimizer)
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)  # none in a state of an older version
        self.optimizer.step()
        if self.config.ema is not None:
            self._average()
        return total_loss, total_correct

    @torch.no_grad()
    def _average(self) -> None:
        """The mean of the weights, with a decay that grows over the first steps, so that the initial weights do not
        weigh on it."""
        step = self.place.epoch * self.steps + self.place.step
        decay = min(self.config.ema or 0.0, (1 + step) / (10 + step))
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                self.place.mean.setdefault(name, p.detach().clone()).lerp_(p, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts, the weights are their mean, where one is kept."""
        now = changing_tensors(self.model) if self.place.mean else {}
        restore(self.model, self.place.mean)
        try:
            yield
        finally:
            restore(self.model, now)

    def score(self, dataset: Examples) -> float:
        """The objective's first metric, each process on its share."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = len(range(rank, len(dataset), world))
        # all have as many passes, for each may need the others' shares of the backbone: some read a row for nothing
        share = [min(row, len(dataset) - 1) for row in range(rank, math.ceil(len(dataset) / world) * world, world)]
        with self.accelerator.autocast():
            logits, labels = predict_logits(self.model, dataset, self.config.batch_size, self.config.workers, share)
        found = [(logits[:own], labels[:own])]
        if world > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        logits, labels = padded([a for a, _ in found]), padded([b for _, b in found], IGNORED)
        return next(self.objective.metrics(logits, labels))[1]

    def facts(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        config = {k: v for k, v in asdict(self.config).items() if k not in _DO_NOT_CHANGE_THE_RESULT}
        return {**config, "training examples": len(self.train), "processes": self.accelerator.num_processes}

    def save(self) -> None:
        self.saved = time.monotonic()
        if self.state is None or not self.accelerator.is_main_process:
            return
        for name, p in self.model.named_parameters():
            if p.requires_grad and not p.isfinite().all():
                raise Diverged(f"epoch {self.place.epoch}, step {self.place.step}: {name} is no longer finite")
        scaler = self.accelerator.scaler
        state = {
            "facts": self.facts(),
            "tensors": changing_tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "place": {**vars(self.place), "history": [asdict(e) for e in self.place.history]},
        }
        write_state(self.state, state)

    def load(self, path: Path) -> None:
        state = read_state(path)
        facts = self.facts()
        then = {k: v for k, v in asdict(TrainConfig()).items() if k in facts} | state["facts"]  # of an older version
        refuse_other(path, then, facts)
        refuse_other(path, described(state["tensors"]), described(changing_tensors(self.model)))
        restore(self.model, state["tensors"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        history = [Epoch(**row) for row in state["place"].pop("history")]
        self.place = Place(**state["place"], history=history)
        devices = {name: p.device for name, p in self.model.named_parameters()}
        self.place.mean = {name: mean.to(devices[name]) for name, mean in self.place.mean.items()}


@contextmanager
def accelerated(precision: str, given: "Accelerator | None" = None) -> Iterator["Accelerator"]:
    """The caller's accelerator, or one of our own that leaves no setting behind for the next run."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtra("accelerate", "train") from error
    taken = bool(AcceleratorState._shared_state)
    try:
        accelerator = given or Accelerator(mixed_precision=precision)
    except ValueError as error:  # no such GPU, or an accelerator of another precision lives in this process
        raise RestuningError(f"precision {precision} cannot be had here: {error}") from error
    try:
        kind = accelerator.distributed_type.value
        if accelerator.mixed_precision != precision:
            raise RestuningError(f"precision is {precision}, and the accelerator's is {accelerator.mixed_precision}")
        if precision == "fp16" and accelerator.scaler is None:  # Accelerate would train in float32 without a warning
            raise RestuningError(f"precision fp16 needs a GPU, and this runs on {accelerator.device.type}: try bf16")
        if accelerator.gradient_accumulation_steps != 1:
            raise RestuningError("the accelerator accumulates gradients: set TrainConfig.accumulate instead")
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise RestuningError(
                f"the accelerator runs {kind}: expected one process, or data parallelism (MULTI_...); a backbone that "
                "is too large for that is sharded by Tuned.fully_shard(), or by restuning train --shard"
            )
        yield accelerator
    finally:
        if not taken and given is None:
            AcceleratorState._reset_state()


def fit(
    model: nn.Module,
    train: Examples,
    val: Examples | None,
    config: TrainConfig,
    *,
    state: Path | None = None,
    resume: bool = False,
    objective: Objective | None = None,
    tracker: Path | None = None,
    after: Callable[[int], None] | None = None,
    progress: bool = True,
    accelerator: "Accelerator | None" = None,
) -> History:
    """Train what has requires_grad, in place; `model.train()` each epoch (frozen parts must keep themselves in eval).

    `state` is the file that a run can go on from: written at the start, every `save_seconds`, after each epoch and on
    Ctrl-C. With `resume`, the run goes on from it, or starts if it is not there yet; without, it is overwritten. after:
    told how many epochs are done, after each, while the weights are their mean if one is kept. On a GPU, "the same
    bits" holds as far as its kernels are deterministic. The global generators are left as they were.
    """
    if resume and state is None:
        raise RestuningError("resume needs a state file: state is None")
    if config.patience is not None and val is None:
        raise RestuningError(f"patience is {config.patience}, and there is no validation set to be patient about")
    if config.group_by_length and not isinstance(train, HasLengths):
        raise RestuningError("group_by_length is for texts, and these examples have no length")
    groups = parameter_groups(model, config.weight_decay, config.head_lr_factor)
    objective = objective or objective_of(smoothing=config.label_smoothing)
    with accelerated(config.precision, accelerator) as accelerator:
        for name, dataset in (("train", train), ("val", val)):
            if dataset is not None and len(dataset) < accelerator.num_processes:
                raise RestuningError(f"{name} has {len(dataset)} examples for {accelerator.num_processes} processes")
        draws = TwoDraws(model, config.consistency_noise) if config.consistency else None
        whole = nn.Sequential(draws or model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, sharded_parameters(whole))  # type: ignore[no-untyped-call]
        shell, optimizer = accelerator.prepare(whole, torch.optim.AdamW(groups, lr=config.lr))
        run = _Run(model, shell, optimizer, accelerator, train, val, config, objective, state)
        if resume and state is not None and state.exists():
            run.load(state)
            accelerator.wait_for_everyone()  # nobody writes what another still reads
        else:
            accelerator.wait_for_everyone()
            run.save()
        main, total = accelerator.is_main_process, config.epochs * run.steps
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            bar(total, progress and main) as show,
            board(tracker if main else None, run.place.epoch) as draw,
            nullcontext() if draws is None else draws.on(),
        ):
            try:
                while run.place.epoch < config.epochs and not run.stale():
                    row = run.epoch(show)
                    log(row.text(config.epochs), progress and main)
                    draw(row.epoch, row.curves())
                    if after is not None and main:
                        with run.averaged():
                            after(row.epoch + 1)
            except KeyboardInterrupt:
                if not run.torn:
                    run.save()
                raise
            finally:
                optimizer.zero_grad()
        if run.place.best or run.place.mean:
            restore(model, run.place.best or run.place.mean)
        accelerator.wait_for_everyone()
    return History(run.place.history, "finished" if run.place.epoch == config.epochs else "early")
