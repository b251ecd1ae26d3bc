"""Batches of images or cached features, read one ahead in the background."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

Read = Callable[[np.ndarray], list[np.ndarray]]  # indices (B,) -> arrays with B rows
# arrays with B rows and a generator for each row -> arrays of the same shapes
Augment = Callable[[list[np.ndarray], Sequence[np.random.Generator]], list[np.ndarray]]


@dataclass(frozen=True)
class Source:
    """Images or their features: `read(indices)` gives arrays, `features` makes them a pyramid."""

    count: int
    read: Read
    features: Callable[[list[Tensor]], list[Tensor]]
    augment: Augment | None = None

    def pyramids(
        self,
        batches: list[np.ndarray],
        key: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
    ) -> Iterator[list[Tensor]]:
        """Yield the feature pyramid of every batch of indices, augmented if there is a `key`.

        The key, the number of a batch and the place of an image in it decide what is drawn for it.
        Where batches are parts of larger ones, `firsts` are the places of their first images.
        """
        for number, arrays in enumerate(read_ahead(batches, self.read)):
            if key is not None and self.augment is not None:
                first = firsts[number] if firsts is not None else 0
                places = range(first, first + len(arrays[0]))
                draws = [np.random.default_rng([*key, number, place]) for place in places]
                arrays = self.augment(arrays, draws)
            with paddle.no_grad():  # closed before the yield, or it would cover the training step
                features = self.features([paddle.to_tensor(array) for array in arrays])
            yield features


def shuffled(
    count: int, batch_size: int, *, drop_last: bool, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the batches of one epoch: a function of seed and epoch alone, so runs can resume."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    batches = _cut(order, batch_size)
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def in_order(count: int, batch_size: int) -> list[np.ndarray]:
    """Return the batches that cover everything once, in order."""
    return _cut(np.arange(count), batch_size)


def read_ahead(batches: list[np.ndarray], read: Read) -> Iterator[list[np.ndarray]]:
    """Yield `read(batch)` for every batch while a thread reads the next one."""
    if not batches:
        return
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, batches[0])
        for following in batches[1:]:
            ready = pending.result()
            pending = pool.submit(read, following)
            yield ready
        yield pending.result()


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
