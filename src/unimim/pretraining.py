"""Pretraining: the paper's equation 1 as a LightningModule."""

from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from unimim.checkpoint import describe_backbone
from unimim.interfaces import Head, Masking, Student, TargetGenerator
from unimim.optim import parameter_groups, schedule

LETTERS = {
    "teacher": "T",
    "normalization": "N",
    "masking": "M",
    "student": "S",
    "head": "H",
    "loss": "L",
}


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
        ValueError: parts that do not fit together: each is tried on one blank image at once.
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
        teacher.attach(student)
        masking.attach(teacher)
        built_head = head(student, teacher)
        teacher.attach_head(built_head)
        self.teacher = teacher.requires_grad_(False)
        self.normalization = normalization
        self.masking = masking
        self.student = student
        self.head = built_head
        self.loss = loss
        self.selection = selection
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_epochs, self.warmup_lr, self.min_lr = warmup_epochs, warmup_lr, min_lr
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
        """AdamW over student and head, with warm-up and cosine per step."""
        groups = parameter_groups([self.student, self.head], self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return schedule(optimizer, self.trainer, self.warmup_epochs, self.warmup_lr, self.min_lr)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, after which a teacher that follows the student takes its own."""
        super().optimizer_step(*args, **kwargs)
        self.teacher.update(self.student, self.head)

    # Its promises

    def train(self, mode: bool = True) -> "MaskedImageModeling":
        """As in every module, but the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` needs to know."""
        checkpoint["backbone"] = describe_backbone(self.student)

    def check_parts(self) -> None:
        """Tries T, N and M on a blank image, so that parts that do not fit fail before the data is read.

        Raises:
            ValueError: grids that do not meet, or a target or mask of another shape than its class promises.
        """
        grid_size = self.student.grid_size
        blank = torch.zeros(1, 3, *self.student.image_size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            mask = self.masking(blank, grid_size)
            target = self.normalization(self.teacher(blank, grid_size))
        promised = (1, *grid_size) if target.dtype == torch.long else (1, *grid_size, self.teacher.dim)
        if target.shape != promised:
            raise ValueError(
                f"{type(self.teacher).__name__} gives a target of shape {tuple(target.shape)} for one image, but its dim "
                f"and the student's grid promise {promised}"
            )
        if mask.shape != (1, *grid_size) or mask.dtype != torch.bool:
            raise ValueError(
                f"{type(self.masking).__name__} gives a mask of shape {tuple(mask.shape)} and {mask.dtype} for one image, "
                f"but the student's grid promises {(1, *grid_size)} and torch.bool"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """
        Raises:
            ValueError: the batch is not images alone, or not of the student's size.
        """
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            raise ValueError(
                f"pretraining takes batches of images alone, [b 3 H W] in [0, 1], but the data gave a {type(batch).__name__}"
                f"{' (images and labels?)' if isinstance(batch, (list, tuple)) else ''}"
            )
        self.student.check_image_size(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        """Looks at every loss on a CPU; on a GPU, where a look waits for the device, at those that are logged.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        trainer: Any = self.trainer
        logged = self.global_step % trainer.log_every_n_steps == 0
        if (loss.device.type == "cpu" or logged) and not torch.isfinite(loss):
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step} (lr {lr:.2e}): try a lower model.lr, "
                f"trainer.gradient_clip_val, or trainer.precision 32-true; nothing was saved since the last checkpoint"
            )

    # What a person sees

    def on_fit_start(self) -> None:
        """Prints the table of the six letters and the effective batch."""
        print_once(self.summary())
        devices, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if batch := getattr(self.trainer.train_dataloader, "batch_size", None):
            print_once(
                f"{devices * batch * accumulated} images a step ({devices} devices x {batch} x {accumulated} accumulated), "
                f"peak lr {self.lr:g}"
            )

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


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process only."""
    print(text, flush=True)
