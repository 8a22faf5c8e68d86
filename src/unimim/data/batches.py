"""What a batch has to be: pixels in [0, 1] and labels of known classes; the first of each loop is looked at."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from unimim.errors import UserError

OVERSHOOT = 0.4453125
"""How far beyond [0, 1] pixels may lie: as far as torch's bicubic interpolation takes pixels in [0, 1] at most.

Half way between two pixels its weights along a side are -3/32, 19/32, 19/32, -3/32 (Keys' kernel, a = -0.75): 1.1875 in all are
positive, 0.1875 negative. Over two sides 2 * 1.1875 * 0.1875 are negative. The antialiased one (a = -0.5) stays below 0.29.
"""


MOSTLY = 0.75
"""So many of the pixels may lie within [0, 1] and others far beyond, as with noise; of normalized ones, half lie below 0."""


class CheckBatch(pl.Callback):
    """Looks at the first batch of each training, validation, test and prediction: its form, its pixels, its labels.

    The task says what form it takes, by its `check_batch(batch)`; a subclass whose batches are of another form overrides that.
    In a validation or test of one's own (a subclass that has its own step), the form is free. Pixels are those of the first
    tensor of four axes. Only for this batch the device is waited for.

    The tasks bring their own (`configure_callbacks`).

    Raises:
        ValueError: as the task's `check_batch`, and `check_pixels`.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seen.clear()

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, loop: str, loader: int = 0) -> None:
        """Checks a batch, if it is the first of this loop and loader."""
        if (loop, loader) in self.seen:
            return
        self.seen.add((loop, loader))
        task: Any = pl_module
        step: Any = getattr(type(task), f"{loop}_step", None)
        of_ones_own = loop in ("validation", "test") and not str(getattr(step, "__module__", "")).startswith("unimim.")
        if hasattr(task, "check_batch") and not of_ones_own:
            task.check_batch(batch)
        images = next((tensor for tensor in tensors_in(batch) if tensor.ndim == 4), None)
        if images is not None:
            check_pixels(images, trainer.precision_plugin.convert_input(torch.zeros(1)).dtype)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.look(trainer, pl_module, batch, "training")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.look(trainer, pl_module, batch, "validation", dataloader_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.look(trainer, pl_module, batch, "test", dataloader_idx)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.look(trainer, pl_module, batch, "predict", dataloader_idx)


def checked(trainer: pl.Trainer) -> list[pl.Callback]:
    """What `configure_callbacks` of a task returns: `CheckBatch`, unless the Trainer has it already."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(callback, CheckBatch) for callback in callbacks) else [CheckBatch()]


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch, also in lists, tuples and dicts."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, dict)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_in(item)


def images_in(batch: Any) -> Any:
    """Of (images, labels) the images; anything else as it is."""
    return batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 2 else batch


def check_images(images: Tensor, kind: torch.dtype | None = None) -> None:
    """Looks at type and shape alone, which waits for no device.

    Args:
        images: [b 3 H W]
        kind: their floating type; None takes any.

    Raises:
        ValueError: they are of another type or shape.
    """
    given = f"the images are {images.dtype} of shape {tuple(images.shape)}"
    wanted = "pixels are floating-point numbers in [0, 1]"
    if images.dtype == torch.uint8:
        raise UserError(f"{given}, but {wanted}: divide by 255, images.float() / 255")
    if not images.is_floating_point():
        raise UserError(f"{given}, but {wanted}: make them so, images.float() / HIGHEST")
    if images.ndim != 4 or images.shape[1] != 3:
        if images.ndim != 4:
            fix = "give batches of images, one image as image[None]"
        elif images.shape[1] == 1:
            fix = "give a grey image three equal channels, images.expand(-1, 3, -1, -1)"
        elif images.shape[-1] == 3:
            fix = "put the channels first, images.permute(0, 3, 1, 2)"
        else:
            fix = "give the channels red, green and blue alone"
        raise UserError(f"{given}, but they have to be [b 3 H W]: {fix}")
    if kind is not None and torch.promote_types(images.dtype, kind) != kind:  # fewer bits become as many
        cast = {torch.float32: "float()", torch.float64: "double()"}.get(kind, f"to({kind})")
        raise UserError(f"{given}, but what sees them computes in {kind}: give images.{cast}, or set trainer.precision")


@torch.no_grad()
def check_pixels(images: Tensor, kind: torch.dtype | None = None) -> None:
    """Looks at type, shape and range, and waits for the device.

    Warns of images that are so dark as if they had been divided by 255 twice.

    Args:
        images: [b 3 H W]
        kind: their floating type; None takes any.

    Raises:
        ValueError: they are of another type or shape, not in [0, 1] (see `OVERSHOOT`), or NaN.
    """
    check_images(images, kind)
    if not images.numel():
        return
    low, high = torch.stack(images.aminmax()).tolist()
    within = 1.0 if low >= -OVERSHOOT and high <= 1 + OVERSHOOT else float(((images >= 0) & (images <= 1)).float().mean())
    if low != low:  # of a NaN anywhere both are NaN
        bad = images.isnan().flatten(1).any(1).nonzero().flatten().tolist()
        raise UserError(
            f"{len(bad)} of the {len(images)} images of the first batch have NaN pixels, the first is image {bad[0]}"
        )
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        bytes_like = low >= 0 and high > 10
        if within > MOSTLY and not bytes_like:
            rank_zero_warn(f"the pixels of the first batch lie within {low:.4g} to {high:.4g}, though most within [0, 1]")
            return
        fix = "divide them by 255" if bytes_like else "leave out Normalize, each network normalizes for itself"
        raise UserError(f"the pixels of the first batch lie within {low:.4g} to {high:.4g}, but have to lie in [0, 1]: {fix}")
    if 0 < high < 1.5 / 255:
        rank_zero_warn(f"no pixel of the first batch is brighter than {high:.4g} of [0, 1]: are they divided by 255 twice?")


def check_classes(data: Any, expected: int, task: str, who: str) -> None:
    """
    Raises:
        ValueError: a data module has no labels, which the task needs; one class, or another number than `who` tells apart.
    """
    if getattr(data, "labelled", True) is False:
        raise UserError(f"{task} needs labels, and {type(data).__name__} gives none: set data.labelled to true")
    classes = len(getattr(data, "classes", []))
    if classes == 1:
        raise UserError("the data has 1 class, so that there is nothing to tell apart: give it images of 2 or more")
    if classes not in (0, expected):  # 0: it does not say
        raise UserError(f"the data has {classes} classes, the {who} {expected}: set model.num_classes to {classes}")


def check_labelled(batch: Any, classes: int, axes: int, ignored: int | None = None, predicting: bool = False) -> None:
    """Looks at a batch (images, labels), and waits for the device.

    Args:
        batch: what a task is given.
        classes: labels are below that.
        axes: of the labels: 1 of [b], 3 of [b H W]. Labels of [b] may also be probabilities, [b classes].
        ignored: a label that is allowed beside them.
        predicting: whether images without labels will do, and labels are left alone.

    Raises:
        ValueError: it is no such pair; labels are of another type or shape, or of no class.
    """
    if predicting and isinstance(batch, Tensor):
        return
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        parts = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
        raise UserError(
            f"this task takes batches (images [b 3 H W], labels [{'b' if axes == 1 else 'b H W'}]), but the data gave a "
            f"{type(batch).__name__}{parts}: give the two alone, as tensors"
        )
    images, labels = batch
    if predicting:
        return
    if axes == 1 and labels.is_floating_point() and labels.shape == (len(images), classes):
        return
    if labels.dtype not in (torch.long, torch.uint8) or labels.ndim != axes or len(labels) != len(images):
        raise UserError(
            f"the labels are {labels.dtype} of shape {tuple(labels.shape)} for {len(images)} images, but have to be "
            f"torch.int64 [{'b' if axes == 1 else 'b H W'}]: make them so, as by labels.long()"
        )
    counted = labels if ignored is None else labels[labels != ignored]
    if counted.numel():
        low, high = torch.stack(counted.aminmax()).tolist()
        if low < 0 or high >= classes:
            also = "" if ignored is None else f" (or {ignored}, which does not count)"
            raise UserError(
                f"the labels of the first batch lie within {low} to {high}, but {classes} classes are 0 to {classes - 1}{also}"
                f": set model.num_classes, or count the labels from 0"
            )
