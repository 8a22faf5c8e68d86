"""Pretraining: the paper's equation 1 as a LightningModule."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, distributed, nn

from unimim.checkpoint import describe_backbone
from unimim.interfaces import Head, Masking, Student, TargetGenerator
from unimim.losses import CosineLoss, SoftCrossEntropyLoss
from unimim.normalizations import CenteredSoftmax
from unimim.optim import parameter_groups, schedule

LETTERS = {
    "teacher": "T",
    "normalization": "N",
    "masking": "M",
    "student": "S",
    "head": "H",
    "loss": "L",
}
# The losses of (prediction, target) that the recipes choose from; others are taken as they are.
REGRESSION: tuple[type[nn.Module], ...] = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, CosineLoss)
CLASSIFICATION: tuple[type[nn.Module], ...] = (nn.CrossEntropyLoss, SoftCrossEntropyLoss)


class MaskedImageModeling(pl.LightningModule):
    """L( N(T(x)), H(S(M(x))) ): masked image modeling in six parts ("A Unified View of Masked Image Modeling", eq. 1).

    Args:
        teacher: T, image -> target of each patch.
        normalization: N, of the target; `nn.Identity()` for none.
        masking: M, which patches are hidden.
        student: S, a timm backbone that sees the corrupted image.
        head: H, given as a factory (usually the class): called with student and teacher.
        loss: L, any module of (prediction, target); torch's own take the mean over the selected patches.
        selection: which patches count in the loss: the masked ones, the visible ones, or all.
        lr: peak learning rate, absolute. The paper has 1.5e-3 at a batch of 2048 images.
        betas, weight_decay: AdamW's; 0.05 is the paper's. Betas are BEiT v2's for 300 epochs, the paper's are unknown.
        warmup_epochs: epochs (or a part of one) of linear warm-up, from `warmup_lr` (BEiT v2: 10, from 1e-6).
        min_lr: where the cosine ends (BEiT v2: 1e-5).

    Raises:
        ValueError: a number out of its range, or parts that do not fit: they are tried on two blank images at once.
    """

    def __init__(
        self,
        teacher: TargetGenerator,
        normalization: nn.Module,
        masking: Masking,
        student: Student,
        head: Callable[[Student, TargetGenerator], Head],
        loss: nn.Module,
        selection: Literal["masked", "visible", "all"] = "masked",
        lr: float = 1.5e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        warmup_epochs: float = 10,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=list(LETTERS))
        if "_instantiator" in self.hparams:  # the command line knows the letters as plain configuration
            self.save_hyperparameters()
        if selection not in ("masked", "visible", "all"):
            raise ValueError(f"model.selection is {selection!r}, known are 'masked', 'visible' and 'all'")
        if not lr > 0 or weight_decay < 0 or warmup_epochs < 0:
            raise ValueError(
                f"model.lr must be above 0, weight_decay and warmup_epochs not below: got {lr}, {weight_decay}, {warmup_epochs}"
            )
        teacher.attach(student)
        if not isinstance(getattr(teacher, "dim", None), int):
            raise ValueError(f"model.teacher: {type(teacher).__name__} has no dim: set it to the number of channels or classes")
        masking.attach(teacher)
        built_head = head(student, teacher)
        teacher.attach_head(built_head)
        self.teacher = teacher.requires_grad_(False).eval()
        self.normalization = normalization
        self.masking = masking
        self.student = student
        self.head = built_head
        self.loss = loss
        self.selection = selection
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_epochs, self.warmup_lr, self.min_lr = warmup_epochs, warmup_lr, min_lr
        self.diverged = torch.zeros((), dtype=torch.bool)
        self.check_parts()

    # The equation

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """[b 3 H W] with pixels in [0, 1] -> the loss."""
        mask = self.masking(images, self.student.grid_size)  # M  [b h w]
        selected = self.select(mask)
        with torch.no_grad():
            target = self.normalization(self.teacher(images, self.student.grid_size))  # N(T(x))  [b h w c]
        prediction = self.head(self.student(images, mask), mask, selected)  # H(S(M(x)))  [m c]
        loss: Tensor = self.loss(prediction, target[selected])  # L
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def select(self, mask: Tensor) -> Tensor:
        """The patches that count in the loss: bool [b h w] -> bool [b h w]."""
        if self.selection == "masked":
            return mask
        return ~mask if self.selection == "visible" else torch.ones_like(mask)

    # Its optimization

    def configure_optimizers(self) -> Any:
        """AdamW over student, head and a loss that has parameters, with warm-up and cosine per step."""
        groups = parameter_groups([self.student, self.head, self.loss], self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return schedule(optimizer, self.trainer, self.warmup_epochs, self.warmup_lr, self.min_lr)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, after which a teacher that follows the student takes its own."""
        progress = self.global_step / self.total_steps
        super().optimizer_step(*args, **kwargs)
        self.teacher.update(self.student, self.head, progress)

    # Its promises

    def check_parts(self) -> None:
        """Tries all parts on two blank images, so that parts that do not fit fail before the data is read.

        Raises:
            ValueError: grids that do not meet, a shape other than promised, a student that cannot take its images, no patch
                that counts in the loss, or a loss that is not for this kind of target.
        """
        self.eval()
        grid_size = self.student.grid_size
        blank = torch.zeros(2, 3, *self.student.image_size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            mask = self.masking(blank, grid_size)
            target = self.teacher(blank, grid_size)
            try:
                target = self.normalization(target)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                kinds = f"{type(self.normalization).__name__} does not take the {target.dtype} of {type(self.teacher).__name__}"
                raise ValueError(
                    f"model.normalization: {kinds} ({error}); for a discrete one it is torch.nn.Identity"
                ) from error
            if target.dtype in (torch.int32, torch.int16, torch.uint8):
                raise ValueError(f"{type(self.teacher).__name__} gives {target.dtype}: discrete targets are long, add .long()")
            channels = () if target.dtype == torch.long else (self.teacher.dim,)
            promise(self.masking, "mask", mask, (2, *grid_size))
            counts = mask.flatten(1).sum(1).tolist()
            promise(self.teacher, "target", target, (2, *grid_size, *channels))
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"{type(self.masking).__name__} gives a mask of {mask.dtype}, but it has to be bool, True = hidden"
                )
            if counts[0] != counts[1]:
                raise ValueError(
                    f"{type(self.masking).__name__} hides {counts[0]} and {counts[1]} patches of two images: it has to be one "
                    f"count in every image"
                )
            selected = self.select(mask)
            if not selected.any():
                raise ValueError(
                    f"{type(self.masking).__name__} leaves no patch for the loss, which is on the {self.selection} ones: set "
                    f"model.selection to all, or another model.masking"
                )
            try:
                prediction = self.head(self.student(blank, mask), mask, selected)
            except RuntimeError as error:
                given = f"{self.student.name} with model_args {self.student.model_args}"
                raise ValueError(f"student and head do not work on a blank image ({given}): {error}") from error
            promise(self.head, "prediction", prediction, (int(selected.sum()), self.teacher.dim))
            self.check_loss(prediction, target[selected])
        self.train()

    def check_loss(self, prediction: Tensor, target: Tensor) -> None:
        """
        Raises:
            ValueError: the loss is not for this kind of target: discrete, probabilities, or plain numbers.
        """
        loss, normalization = type(self.loss).__name__, type(self.normalization).__name__
        if target.dtype == torch.long:
            if isinstance(self.loss, (*REGRESSION, SoftCrossEntropyLoss, nn.NLLLoss)):
                raise ValueError(
                    f"{type(self.teacher).__name__} is discrete, and {loss} is not for its logits: set model.loss to "
                    f"torch.nn.CrossEntropyLoss"
                )
        elif isinstance(self.loss, CLASSIFICATION) and not is_probability(target):
            raise ValueError(
                f"{loss} is for classes or probabilities, which {type(self.teacher).__name__} with {normalization} does not "
                f"give: set model.loss to a regression such as torch.nn.SmoothL1Loss, or model.normalization to CenteredSoftmax"
            )
        elif isinstance(self.loss, REGRESSION) and isinstance(self.normalization, (CenteredSoftmax, nn.Softmax)):
            raise ValueError(
                f"{normalization} gives probabilities, and {loss} would compare them with logits: set model.loss to "
                f"SoftCrossEntropyLoss"
            )
        try:
            value = self.loss(prediction, target)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)} {target.dtype}"
            raise ValueError(f"model.loss: {loss} does not take prediction and target of {shapes}: {error}") from error
        promise(self.loss, "loss", value, ())

    def on_fit_start(self) -> None:
        """Prints the table of the six letters and the effective batch; gives each process a randomness of its own.

        Raises:
            ValueError: there is nothing to train on.
        """
        print_once(self.summary())
        self.total_steps = self.trainer.estimated_stepping_batches
        devices, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        batch = getattr(self.trainer.train_dataloader, "batch_size", None)
        if self.trainer.num_training_batches == 0:
            raise ValueError(f"{devices} devices share the data, and none has a whole batch of {batch}: lower data.batch_size")
        if batch:
            print_once(
                f"{devices * batch * accumulated} images a step ({devices} devices x {batch} x {accumulated} accumulated), "
                f"peak lr {self.lr:g}"
            )
        if devices > 1:  # else every process would draw the same masks
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        self.diverged = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.global_rank == 0:
            with self.trainer.precision_plugin.forward_context():
                self.teacher.prepare(self.training_images(), self.student.grid_size)
        if devices > 1:  # what was drawn at random, or fitted to the images of the first process, holds for all
            for module in (self.teacher, *self.teacher.networks()):
                for tensor in (*module.parameters(), *module.buffers()):
                    distributed.broadcast(tensor.data, src=0)

    def training_images(self) -> Iterator[Tensor]:
        """Batches as `training_step` gets them; the data is not opened until the first is asked for.

        Raises:
            ValueError: as `check_batch`.
        """
        trainer: Any = self.trainer
        for batch in trainer.train_dataloader:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = self._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            self.check_batch(batch)
            yield batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """
        Raises:
            ValueError: as `check_batch`.
        """
        self.check_batch(batch)

    def check_batch(self, batch: Any) -> None:
        """
        Raises:
            ValueError: the batch is not images alone, or not of the student's size.
        """
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            labelled = " (images and labels?)" if isinstance(batch, (list, tuple)) else ""
            raise ValueError(
                f"pretraining takes batches of images alone, [b 3 H W] in [0, 1], but the data gave a "
                f"{type(batch).__name__}{labelled}"
            )
        self.student.check_image_size(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        """Notes a loss that is not finite, and looks: on a GPU, where a look waits for the device, in few steps only."""
        self.diverged |= ~torch.isfinite(loss.detach())
        trainer: Any = self.trainer
        if loss.device.type == "cpu" or self.global_step % max(1, trainer.log_every_n_steps) == 0:
            self.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` needs to know, and the metrics as last measured; a model that diverged is not saved."""
        self.check_finite()
        checkpoint["backbone"] = describe_backbone(self.student)
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def on_train_end(self) -> None:
        self.check_finite()

    def check_finite(self) -> None:
        """
        Raises:
            FloatingPointError: a loss since the last look was NaN or infinite.
        """
        if self.diverged:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss became NaN or infinite by step {self.global_step} (lr {lr:.2e}): try a lower model.lr, "
                f"trainer.gradient_clip_val, or trainer.precision 32-true; the last checkpoint before it is kept"
            )

    # What a person sees

    def summary(self) -> str:
        """The six letters: class, parameters, trainable or frozen."""
        rows = [("", "letter", "class", "parameters", "")]
        for name, letter in LETTERS.items():
            part = getattr(self, name)
            networks = part.networks() if isinstance(part, TargetGenerator) else []
            counts = [p.numel() for module in (part, *networks) for p in module.parameters()]
            learns = any(p.requires_grad for p in part.parameters())
            state = ("trainable" if learns else "frozen") if counts else "no parameters"
            rows.append((letter, name, type(part).__name__, f"{sum(counts):,}" if counts else "-", state))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def is_probability(target: Tensor) -> bool:
    """Whether every row of [m c] is a distribution."""
    return bool((target >= 0).all()) and torch.allclose(target.sum(1), target.new_ones(()), atol=1e-4)


def promise(part: nn.Module, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: what a part gave for two images is of another shape than it has to be.
    """
    if value.shape != shape:
        raise ValueError(
            f"{type(part).__name__} gives a {name} of shape {tuple(value.shape)} for two images, not {shape}, which the "
            f"student's grid promises (and the teacher's dim, for target and prediction)"
        )


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process only."""
    print(text, flush=True)
