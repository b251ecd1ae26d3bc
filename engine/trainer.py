"""The training recipe: Adam on the head, a checkpoint an epoch, `best` by held-out likelihood."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.batches import Source, in_order, shuffled
from engine.diagnose import first_non_finite
from engine.distributed import Part, Team, share_norms
from engine.log import RunLog
from utils.config import Config
from utils.errors import UserError
from utils.schema import TrainSection

Rng = np.random.Generator
# Yields (loss to step on, value to log) for the features of a part of a batch, in turn.
Objectives = Callable[[list[Tensor], Rng, Part], Iterable[tuple[Tensor, Tensor]]]
# From epoch, training and held-out images to values to maximise, first one first, by the checkpoint
# that follows them; empty if there are none this epoch.
Judge = Callable[[int, Source, Source], Mapping[str, Sequence[float]]]
# After an epoch, with training and held-out images; changes nothing.
Watch = Callable[[int, Source, Source], None]


@dataclass
class Progress:
    """Where a run stands; kept in the checkpoint's meta data, so that it can go on."""

    epoch: int = 0
    step: int = 0
    best: dict[str, list[float]] = field(default_factory=dict)  # by checkpoint
    best_epoch: int = 0  # of the checkpoint `best`
    loss: float = math.nan  # of the last step


class Trainer:
    """Train a detector's head; everything random depends on the seed and the epoch only."""

    def __init__(
        self,
        detector: paddle.nn.Layer,
        config: Config,
        folder: Path,
        log: RunLog,
        *,
        label: str,
        meta: dict[str, Any],
        objectives: Objectives | None = None,
        team: Team | None = None,
    ) -> None:
        self.detector, self.config, self.folder, self.log = detector, config, folder, log
        self.label, self.meta = label, meta
        self.settings: TrainSection = config.train
        self.objectives = objectives or _whole_batch(detector)
        self.team = team or Team()
        if self.team.size > 1:
            share_norms(detector, self.team)
        self.progress = Progress()
        self.trained = [p for p in detector.parameters() if not p.stop_gradient]
        self.optimizer = Adam(self.trained, config.train)
        self.scaler = paddle.amp.GradScaler(enable=config.train.amp)

    def resume(self) -> bool:
        """Go on from `last`; False if there is no checkpoint yet."""
        last = checkpoint.read(self.folder / "last")
        if last is None:
            return False
        checkpoint.check_same_data(last, self.meta)
        last.load_head(self.detector)
        last.load_optimizer(self.detector, self.optimizer)
        self.progress = Progress(**last.meta["progress"])
        if self.settings.amp:
            self.scaler.load_state_dict(last.meta["scaler"])
        return True

    def fit(
        self, train: Source, holdout: Source, judge: Judge | None = None,
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        """Train to the last epoch or until patience runs out.

        `best` follows the likelihood of the held-out images, unless `judge` decides it. `watch`
        only looks on, at the end of every epoch.
        """
        progress, settings = self.progress, self.settings
        steps = len(self._batches(train, 1, 0)) * settings.sub_epochs
        with tqdm(
            total=settings.epochs * steps, initial=progress.epoch * steps, unit="step",
            desc=self.label, disable=None if self.team.leads else True, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            while progress.epoch < settings.epochs and not self._out_of_patience():
                epoch = progress.epoch + 1
                started = time.perf_counter()
                loss = self._train_epoch(train, epoch, bar)
                if self.team.leads:
                    self._finish_epoch(epoch, train, holdout, judge, loss, started)
                    if watch is not None:
                        watch(epoch, train, holdout)
                progress.epoch = epoch
                progress.best_epoch = int(self.team.leaders([progress.best_epoch])[0])
        if progress.epoch < settings.epochs:
            self.log.say(f"[{self.label}] stopped: no better epoch for {settings.patience} epochs")

    def _finish_epoch(
        self,
        epoch: int,
        train: Source,
        holdout: Source,
        judge: Judge | None,
        loss: float,
        started: float,
    ) -> None:
        """Look at held-out and test images, and write what is to be kept."""
        settings = self.settings
        nll = self._holdout_nll(holdout, epoch)
        self.detector.fit_scorer(train.pyramids(in_order(train.count, settings.batch_size)))
        self.progress.epoch = epoch
        self.log.event(
            "epoch", epoch, train_nll=loss, holdout_nll=nll, lr=self.optimizer.get_lr(),
            seconds=round(time.perf_counter() - started, 3),
        )  # fmt: skip
        wanted = judge(epoch, train, holdout) if judge else {}
        self._keep({"best": [-nll], **wanted} if settings.select_on == "holdout" else wanted)

    def _batches(self, source: Source, epoch: int, part: int) -> list[np.ndarray]:
        settings = self.settings
        return shuffled(
            source.count, settings.batch_size, drop_last=settings.drop_last, seed=settings.seed,
            epoch=(epoch - 1) * settings.sub_epochs + part + 1,
        )  # fmt: skip

    def _train_epoch(self, train: Source, epoch: int, bar: tqdm) -> float:
        self.detector.train()
        losses: list[float] = []
        for part in range(self.settings.sub_epochs):
            self._train_part(train, epoch, part, bar, losses)
        return float(np.mean(losses))

    def _train_part(
        self, train: Source, epoch: int, part: int, bar: tqdm, losses: list[float]
    ) -> None:
        settings = self.settings
        batches = self._batches(train, epoch, part)
        ours = [self.team.part(batch) for batch in batches]
        pyramids = train.pyramids(
            [each.rows for each in ours], [settings.seed, epoch, part],
            [each.first for each in ours],
        )  # fmt: skip
        steps = len(batches) * settings.sub_epochs
        meter = _Meter()
        for index, features in enumerate(pyramids, 1):
            meter.data_ready()
            done = part * len(batches) + index
            self.optimizer.set_lr(learning_rate(settings, epoch, (done - 1) / steps))
            losses.append(self._step(features, ours[index - 1], epoch))
            meter.step_done(len(batches[index - 1]))
            bar.update()
            if index % settings.log_every == 0 or index == len(batches):
                self._report(epoch, done, steps, losses, meter)
                meter = _Meter()

    def _step(self, features: list[Tensor], part: Part, epoch: int) -> float:
        rng = np.random.default_rng([self.settings.seed, self.progress.step])
        values = []
        self.team.idle = part.share == 0
        with paddle.amp.auto_cast(enable=self.settings.amp):
            for loss, value in self.objectives(features, rng, part):
                numbers = paddle.stack([loss.astype("float32"), value.astype("float32")])
                of_all, logged = self.team.total(numbers.tolist())  # waits for a GPU, once
                if not math.isfinite(of_all):
                    step = self.progress.step + 1
                    self._explain(features, f"loss is {of_all} at epoch {epoch}, step {step}")
                self._descend(loss)
                values.append(logged)
        self.progress.step += 1
        self.progress.loss = float(np.mean(values))
        return self.progress.loss

    def _descend(self, loss: Tensor) -> None:
        with paddle.amp.auto_cast(enable=False):
            self.scaler.scale(loss).backward()
            self.team.sum_gradients(self.trained)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.clear_grad(set_to_zero=False)

    def _explain(self, features: list[Tensor], what: str) -> NoReturn:
        where = first_non_finite(self.detector, lambda: self.detector.objective(features))
        progress = self.progress
        last = f"{progress.loss:.4f}" if progress.step else "none"
        kept = f"epoch {progress.epoch} is kept" if progress.epoch else "none yet"
        raise UserError(
            f"{self.folder}: {what} (last finite loss: {last}); first seen in {where}; lower "
            f"train.lr or set train.clip_norm, then start again; checkpoint: {kept}"
        )

    def _holdout_nll(self, holdout: Source, epoch: int) -> float:
        self.detector.eval()
        values = []
        for features in holdout.pyramids(in_order(holdout.count, self.settings.batch_size)):
            with paddle.no_grad():
                values.append(self.detector.features_nll(features).numpy())
            if not np.isfinite(values[-1]).all():  # must not replace a sound checkpoint
                where = f"after epoch {epoch}, step {self.progress.step}"
                self._explain(features, f"loss of held-out images is not finite {where}")
        return float(np.mean(np.concatenate(values), dtype=np.float64))

    def _keep(self, values: Mapping[str, Sequence[float]]) -> None:
        """Write each checkpoint for which this epoch is as good as any before, then `last`."""
        progress = self.progress
        better = [
            name
            for name, value in values.items()
            if name not in progress.best or list(value) >= progress.best[name]
        ]
        progress.best |= {name: list(values[name]) for name in better}
        if "best" in better:
            progress.best_epoch = progress.epoch
        for name in better:
            checkpoint.save(self.folder / name, self.detector, self.config, self._meta())
        checkpoint.save(
            self.folder / "last", self.detector, self.config, self._meta(), self.optimizer
        )

    def _meta(self) -> dict[str, Any]:
        scaler = {k: float(v) for k, v in self.scaler.state_dict().items()}
        return {**self.meta, "progress": vars(self.progress), "scaler": scaler}

    def _out_of_patience(self) -> bool:
        progress, patience = self.progress, self.settings.patience
        return 0 < patience <= progress.epoch - progress.best_epoch and progress.epoch > 0

    def _report(
        self, epoch: int, index: int, steps: int, losses: list[float], meter: "_Meter"
    ) -> None:
        cost = meter.per_batch()
        unit = "-ln sigmoid" if self.settings.fiber_batch else "nats per dimension"
        self.log.say(
            f"[{self.label}] epoch: {epoch}/{self.settings.epochs}, iter: {index}/{steps}, "
            f"lr: {self.optimizer.get_lr():.6g}, loss: {losses[-1]:.6f}, "
            f"avg_reader_cost: {cost['avg_reader_cost']:.5f} sec, "
            f"avg_batch_cost: {cost['avg_batch_cost']:.5f} sec, "
            f"avg_samples: {cost['avg_samples']:.1f}, ips: {cost['ips']:.2f} images/sec "
            f"(epoch so far: {np.mean(losses):.6f} {unit})"
        )
        self.log.event("step", self.progress.step, epoch=epoch, loss=losses[-1], **cost)


def learning_rate(settings: TrainSection, epoch: int, share: float = 0.0) -> float:
    """Return the rate when a share of an epoch (from 1) is done: linear warm-up, then the schedule.

    The schedule changes from epoch to epoch, the warm-up from step to step.
    """
    if epoch > settings.warmup_epochs:
        return _scheduled(settings, epoch - 1)
    start, end = settings.lr / 10, _scheduled(settings, settings.warmup_epochs)  # 10: CFLOW-AD
    return start + (end - start) * (epoch - 1 + share) / settings.warmup_epochs


def _scheduled(settings: TrainSection, epochs_done: int) -> float:
    done = min(epochs_done / (settings.schedule_epochs or settings.epochs), 1.0)
    height = {
        "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done,
    }[settings.schedule]  # fmt: skip
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * height)


def _whole_batch(detector: paddle.nn.Layer) -> Objectives:
    return lambda features, rng, part: [detector.objective(features, part.share)]


class Adam(paddle.optimizer.Adam):
    """Adam with coupled L2 decay, as PyTorch's, and a limit of the gradients' global norm.

    Both change the gradients in place: Paddle's own would hold three more copies of all of them.
    """

    def __init__(self, trained: list[Tensor], settings: TrainSection) -> None:
        super().__init__(
            learning_rate=settings.lr, beta1=settings.betas[0], beta2=settings.betas[1],
            epsilon=settings.epsilon, parameters=trained,
        )  # fmt: skip
        self._trained, self._settings = trained, settings

    @paddle.no_grad()
    def step(self) -> None:
        moved = [p for p in self._trained if p.grad is not None]
        clip, decay = self._settings.clip_norm, self._settings.weight_decay
        if clip:
            squares = [(p.grad * p.grad).reshape([p.shape[0], -1]).sum(1).sum() for p in moved]
            factor = clip / paddle.clip(paddle.stack(squares).sum().sqrt(), min=clip)
            for parameter in moved:
                parameter.grad.multiply_(factor)
        if decay:
            for parameter in moved:
                parameter.grad.add_(parameter * decay)
        super().step()


class _Meter:
    """Time spent waiting for data and altogether, and images seen, since it was made."""

    def __init__(self) -> None:
        self._mark = self._start = time.perf_counter()
        self._waiting, self._samples, self._batches = 0.0, 0, 0

    def data_ready(self) -> None:
        self._waiting += time.perf_counter() - self._mark

    def step_done(self, samples: int) -> None:
        self._samples += samples
        self._batches += 1
        self._mark = time.perf_counter()

    def per_batch(self) -> dict[str, float]:
        spent = max(self._mark - self._start, 1e-9)
        return {
            "avg_reader_cost": self._waiting / self._batches,
            "avg_batch_cost": spent / self._batches,
            "avg_samples": self._samples / self._batches,
            "ips": self._samples / spent,
        }
