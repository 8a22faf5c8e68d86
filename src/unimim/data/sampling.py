"""Draws the order of the images and all random numbers of a training from the run's seed, so that nothing has to be saved.

The order of the images depends on (seed, epoch), the draws of an image's transforms on (seed, epoch, index), and the draws of a
step (masks, drop path, dropout, Mixup) on (seed, epoch, batch index, process). The run's seed is that of `pl.seed_everything`
(environment PL_GLOBAL_SEED), or 0 if there is none.
"""

import hashlib
import os
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, distributed
from torch.utils.data import Dataset, DistributedSampler


class View(NamedTuple):
    """Replaces the epoch number when transforms draw: the image looks as in epoch `number` of a run with this seed."""

    seed: int
    number: int


Epoch = int | View
Place = tuple[Epoch, int]
"""(epoch, index) of a sample."""


def run_seed() -> int:
    """Returns the last seed given to `pl.seed_everything`, here or in the process that started this one; 0 if there is none."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derived_seed(*words: str | Epoch, seed: int | None = None) -> int:
    """Hashes `seed` and `words` to 64 bits, the same on every machine and with every version of Python.

    The default seed is that of a View among the words, else the run's.
    """
    if seed is None:
        seed = next((word.seed for word in words if isinstance(word, View)), run_seed())
    text = "/".join(str(word.number if isinstance(word, View) else word) for word in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(*words: str | Epoch) -> Iterator[None]:
    """Seeds torch on the CPU, numpy and random with `derived_seed(*words)` inside the block, and restores their state after."""
    with isolate_rng(include_cuda=False):
        seed = derived_seed(*words)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        seed_numpy_and_random(seed)
        yield


@contextmanager
def aside(*words: str | int) -> Iterator[None]:
    """Does the same as `seeded` on all devices: draws inside the block do not change the draws of the training."""
    with isolate_rng():
        torch.manual_seed(derived_seed(*words))
        seed_numpy_and_random(derived_seed(*words))
        yield


def seed_numpy_and_random(seed: int) -> None:
    """Seeds numpy and random, whose state timm's RandAugment, erasing and Mixup use."""
    np.random.seed([seed % 2**32, seed >> 32])
    random.seed(seed)


def epoch_and_index(place: Place | int) -> Place:
    """Returns the (epoch, index) of a `ResumableSampler` unchanged; an index alone, from another sampler, gets epoch 0."""
    return place if isinstance(place, tuple) else (0, place)


class ResumableSampler(DistributedSampler[Place]):
    """Yields the images in training order: the (epoch, index) of each image of this process.

    The order depends on (seed, epoch). Of n processes, rank r takes every n-th image, starting with image r. So a step sees the
    same images with any number of processes, if the total batch is the same. The last images, fewer than the number of
    processes, are left out. Lightning keeps this sampler and sets its epoch; without Lightning, call `set_epoch`.

        DataLoader(SeededSamples(dataset), batch_size, sampler=ResumableSampler(dataset), drop_last=True)

    The order uses the seed of the first process. A script may give each process its own (`pl.seed_everything(42 + rank)`),
    which seeds the transforms and steps there. Create the sampler on all processes, as in `train_dataloader`.

    Args:
        dataset: only its length is used. The processes are those of torch.distributed, if it is initialized.

    Attributes:
        views: None, or (count, seed): then epoch e shows images as epoch e mod `count` of a run with this seed would; the
            order of the run does not change. Takes effect at the next iteration.
    """

    def __init__(self, dataset: Sized) -> None:
        several = distributed.is_available() and distributed.is_initialized()
        processes, rank = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
        seed = [run_seed()]
        if several:
            distributed.broadcast_object_list(seed)
        images: Any = dataset
        super().__init__(images, processes, rank, seed=seed[0], drop_last=True)
        self.skipped = 0
        self.views: tuple[int, int] | None = None
        self.chosen: list[Place] | None = None

    def __iter__(self) -> Iterator[Place]:
        if self.chosen is not None:
            return iter(self.chosen)
        return zip(repeat(self.seen_as()), self.share()[self.skipped :].tolist(), strict=False)

    def share(self) -> Tensor:
        """Returns this process's indices of the whole epoch, in order: long [n]."""
        generator = torch.Generator().manual_seed(derived_seed("order", self.epoch, seed=self.seed))
        images: Any = self.dataset
        order = torch.randperm(len(images), generator=generator)[: self.total_size]
        return order[self.rank :: self.num_replicas]

    def seen_as(self) -> Epoch:
        """Returns the epoch that transforms draw by: the sampler's own, or one of the fixed `views`."""
        if self.views is None:
            return self.epoch
        count, seed = self.views
        return View(seed, self.epoch % count)

    @contextmanager
    def choose(self, places: list[Place]) -> Iterator[None]:
        """Makes an iteration go over these places instead of an epoch's, inside the block."""
        self.chosen = places
        try:
            yield
        finally:
            self.chosen = None

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        if epoch != self.epoch:
            self.skipped = 0
        super().set_epoch(epoch)

    def resume(self, epoch: int, skipped: int) -> None:
        """Continues inside an epoch, after `skipped` samples of this process. `len()` is still that of a whole epoch."""
        self.set_epoch(epoch)
        self.skipped = skipped


class SeededSamples(Dataset[Any]):
    """Wraps a dataset, and seeds the transforms of each sample with (seed, epoch, index).

    Their draws for an image (by torch, numpy or random) depend on nothing else: not on the batch, the worker, the process or
    earlier draws. Index it by (epoch, index), as `ResumableSampler` yields them.

    Args:
        dataset: any object with `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place | int) -> Any:
        epoch, index = epoch_and_index(place)
        with seeded("sample", epoch, index):
            return self.dataset[index]
