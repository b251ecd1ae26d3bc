"""The training recipe: Adam on the head, a checkpoint an epoch, `best` by held-out likelihood."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.batches import Read, in_order, read_ahead, shuffled
from engine.diagnose import first_non_finite
from engine.log import RunLog
from utils.config import Config
from utils.errors import UserError
from utils.schema import TrainSection

Select = Callable[[int], Sequence[float] | None]  # epoch -> values to maximise, first one first


@dataclass(frozen=True)
class Source:
    """Training data: `read(indices)` gives arrays, `features` turns them into a pyramid."""

    count: int
    read: Read
    features: Callable[[list[Tensor]], list[Tensor]]

    def pyramids(self, batches: list[np.ndarray]) -> Iterator[list[Tensor]]:
        """Yield the feature pyramid of every batch of indices."""
        for arrays in read_ahead(batches, self.read):
            with paddle.no_grad():  # closed before the yield, or it would cover the training step
                features = self.features([paddle.to_tensor(array) for array in arrays])
            yield features


@dataclass
class Progress:
    """Where a run stands; kept in the checkpoint's meta data, so that it can go on."""

    epoch: int = 0
    step: int = 0
    best: list[float] | None = None
    best_epoch: int = 0
    loss: float = math.nan  # of the last step, nats per dimension


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
    ) -> None:
        self.detector, self.config, self.folder, self.log = detector, config, folder, log
        self.label, self.meta = label, meta
        self.settings: TrainSection = config.train
        self.progress = Progress()
        self.optimizer = _adam(detector, config.train)
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

    def fit(self, train: Source, holdout: Source, select: Select | None = None) -> None:
        """Train to the last epoch or until patience runs out.

        `best` follows the likelihood of the held-out images, or what `select` returns.
        """
        progress, settings = self.progress, self.settings
        steps = len(self._batches(train, 0))
        with tqdm(
            total=settings.epochs * steps, initial=progress.epoch * steps, unit="step",
            desc=self.label, disable=None, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            while progress.epoch < settings.epochs and not self._out_of_patience():
                epoch = progress.epoch + 1
                started = time.perf_counter()
                loss = self._train_epoch(train, epoch, bar)
                nll = self._holdout_nll(holdout, epoch)
                progress.epoch = epoch
                self.log.event(
                    "epoch", epoch, train_nll=loss, holdout_nll=nll, lr=self.optimizer.get_lr(),
                    seconds=round(time.perf_counter() - started, 3),
                )  # fmt: skip
                value = [-nll] if select is None else select(epoch)
                self._keep(None if value is None else list(value))
        if progress.epoch < settings.epochs:
            self.log.say(f"[{self.label}] stopped: no better epoch for {settings.patience} epochs")

    def _batches(self, source: Source, epoch: int) -> list[np.ndarray]:
        settings = self.settings
        return shuffled(
            source.count, settings.batch_size, drop_last=settings.drop_last, seed=settings.seed,
            epoch=epoch,
        )  # fmt: skip

    def _train_epoch(self, train: Source, epoch: int, bar: tqdm) -> float:
        self.detector.train()
        self.optimizer.set_lr(learning_rate(self.settings, epoch))
        batches = self._batches(train, epoch)
        meter = _Meter()
        losses = []
        for index, features in enumerate(train.pyramids(batches), 1):
            meter.data_ready()
            losses.append(self._step(features, epoch))
            meter.step_done(len(batches[index - 1]))
            bar.update()
            if index % self.settings.log_every == 0 or index == len(batches):
                self._report(epoch, index, len(batches), losses, meter)
                meter = _Meter()
        return float(np.mean(losses))

    def _step(self, features: list[Tensor], epoch: int) -> float:
        with paddle.amp.auto_cast(enable=self.settings.amp):
            loss, nll = self.detector.objective(features)
        if not math.isfinite(loss.item()):
            step = self.progress.step + 1
            self._explain(features, f"loss is {loss.item()} at epoch {epoch}, step {step}")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        self.progress.step += 1
        self.progress.loss = nll.item()
        return self.progress.loss

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

    def _keep(self, value: list[float] | None) -> None:
        """Write `best` if this epoch is as good as any before, then `last`."""
        progress = self.progress
        if value is not None and (progress.best is None or value >= progress.best):
            progress.best, progress.best_epoch = value, progress.epoch
            checkpoint.save(self.folder / "best", self.detector, self.config, self._meta())
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
        self.log.say(
            f"[{self.label}] epoch: {epoch}/{self.settings.epochs}, iter: {index}/{steps}, "
            f"lr: {self.optimizer.get_lr():.6g}, loss: {losses[-1]:.6f}, "
            f"avg_reader_cost: {cost['avg_reader_cost']:.5f} sec, "
            f"avg_batch_cost: {cost['avg_batch_cost']:.5f} sec, "
            f"avg_samples: {cost['avg_samples']:.1f}, ips: {cost['ips']:.2f} images/sec "
            f"(epoch so far: {np.mean(losses):.6f} nats per dimension)"
        )
        self.log.event("step", self.progress.step, epoch=epoch, loss=losses[-1], **cost)


def learning_rate(settings: TrainSection, epoch: int) -> float:
    """Return the rate of an epoch (from 1): linear warm-up, then constant or half a cosine."""
    if epoch <= settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    if settings.schedule == "constant":
        return settings.lr
    span = max(settings.epochs - settings.warmup_epochs, 1)
    done = (epoch - 1 - settings.warmup_epochs) / span
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def _adam(detector: paddle.nn.Layer, settings: TrainSection) -> paddle.optimizer.Adam:
    trained = [p for p in detector.parameters() if not p.stop_gradient]
    clip = settings.clip_norm
    return paddle.optimizer.Adam(
        learning_rate=settings.lr,
        parameters=trained,
        weight_decay=settings.weight_decay or None,  # coupled L2, as in PyTorch's Adam
        grad_clip=paddle.nn.ClipGradByGlobalNorm(clip) if clip else None,
    )


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
