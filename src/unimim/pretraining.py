"""Pretraining: the paper's equation 1 as a LightningModule."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from unimim.backbones import check_object, checkpoint_activations
from unimim.batches import check_pixels, images_in
from unimim.checkpoint import describe_backbone
from unimim.data.crops import Crop
from unimim.errors import UserError
from unimim.faults import SkipNonFinite
from unimim.interfaces import Head, Masking, Student, TargetGenerator
from unimim.launching import check_processes, step_in_words
from unimim.lightning import before_transfer, read_anew, trainer_of
from unimim.losses import CosineLoss, SoftCrossEntropyLoss
from unimim.normalizations import CenteredSoftmax
from unimim.optim import all_steps, check_rates, check_warmup, fused_adamw, parameter_groups, schedule
from unimim.pictures import attention_map, covered, encoder_features, lit, pasted, principal_components
from unimim.printing import printable
from unimim.selection import counted, inverse, pick
from unimim.sharding import blocks, broadcast_parameters, shard
from unimim.task import Task

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


class MaskedImageModeling(Task):
    """L( N(T(x)), H(S(M(x))) ): masked image modeling in six parts ("A Unified View of Masked Image Modeling", eq. 1).

    A subclass overrides what it wants otherwise: `training_step`, `select`, `configure_optimizers`, `pictures`, or
    `configure_callbacks`, where it adds to `super()`'s. Parts with parameters that it adds learn with the others.

    Args:
        teacher: T, image -> target of each patch.
        normalization: N, of the target; `nn.Identity()` for none.
        masking: M, which patches are hidden.
        student: S, a timm backbone that sees the corrupted image.
        head: H, given as a factory (usually the class): called with student and teacher.
        loss: L, any module of (prediction, target); torch's own take the mean over the selected patches.
        selection: which patches count in the loss: the masked ones, the visible ones, or all.
        lr: peak learning rate, absolute. The paper has 1.5e-3 at a batch of 2048 images.
        betas: AdamW's. They are BEiT v2's for 300 epochs, the paper's are unknown.
        weight_decay: AdamW's (the paper: 0.05).
        warmup_epochs: epochs (or a part of one) of linear warm-up (BEiT v2: 10).
        warmup_lr: where it begins, absolute (BEiT v2 begins at 0: its schedule never sees the script's option of 1e-6).
        min_lr: where the cosine ends (BEiT v2: 1e-5).
        checkpointing: less memory for more time: the student's activations are computed again in the backward pass.
        compiled: whether `torch.compile` makes one kernel of several in each block of student, teacher and head: the first step
            then takes minutes, and the others less. None: on CUDA, unless the model is in shards. (On a CPU it gained 2 %.)
        max_skipped_updates: updates whose loss or gradient is NaN or infinite change nothing; more than this many end the run.

    Raises:
        ValueError: a number out of its range, a class in place of an object or the reverse, or parts that do not fit: they
            are tried on two blank images at once.
    """

    metrics: tuple[str, ...] = ("train/loss",)
    """The names of all that is logged."""

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
        checkpointing: bool = False,
        compiled: bool | None = None,
        max_skipped_updates: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=list(LETTERS))
        if "_instantiator" in self.hparams:  # the command line knows the letters as plain configuration
            self.save_hyperparameters()
        if selection not in ("masked", "visible", "all"):
            raise UserError(f"model.selection is {selection!r}, known are 'masked', 'visible' and 'all'")
        check_rates(lr, weight_decay, betas, warmup_lr, min_lr)
        check_warmup(warmup_epochs)
        check_object("model.teacher", teacher, TargetGenerator, "unimim.HOGTarget()")
        check_object("model.normalization", normalization, nn.Module, "unimim.LayerNorm()")
        check_object("model.masking", masking, Masking, "unimim.BlockMasking()")
        check_object("model.student", student, Student, "unimim.MaskTokenStudent('vit_base_patch16_224')")
        check_factory(head)
        check_object("model.loss", loss, nn.Module, "torch.nn.SmoothL1Loss()")
        if checkpointing:
            checkpoint_activations(student.backbone)
        teacher.attach(student)
        if not isinstance(getattr(teacher, "dim", None), int):
            raise UserError(f"model.teacher: {type(teacher).__name__} has no dim: set it to the number of channels or classes")
        masking.attach(teacher)
        built_head = head(student, teacher)
        check_object("what model.head makes", built_head, Head, "unimim.LinearHead's")
        teacher.attach_head(built_head)
        self.teacher = teacher.requires_grad_(False).eval()
        self.normalization = normalization
        self.masking = masking
        self.student = student
        self.head = built_head
        self.loss = loss
        self.selection = selection
        self.checkpointing = checkpointing
        self.compiled = compiled
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_epochs, self.warmup_lr, self.min_lr = warmup_epochs, warmup_lr, min_lr
        self.guard = SkipNonFinite(max_skipped_updates)
        self.check_parts()

    # The equation

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """[b 3 H W] with pixels in [0, 1] -> the loss."""
        mask = self.masking(images, self.student.grid_size)  # M  [b h w]
        selected = self.select(mask)
        with torch.no_grad():
            target = self.normalization(self.teacher(images, self.student.grid_size))  # N(T(x))  [b h w c]
        prediction = self.head(self.student(images, mask), mask, selected)  # H(S(M(x)))  [m c]
        return self.logged(self.loss(prediction, pick(target, selected)))  # L

    def select(self, mask: Tensor) -> Tensor:
        """The patches that count in the loss: bool [b h w] -> bool [b h w]."""
        if self.selection == "masked":
            return mask
        return inverse(mask) if self.selection == "visible" else counted(torch.ones_like(mask), mask[0].numel())

    # Its encoder

    def forward(self, images: Tensor) -> Tensor:
        """Gives the encoder's tokens of whole images: timm's `forward_features` of what the student's mean and std normalize.

        [b 3 H W] in [0, 1] -> tokens: [b prefix+n d] of a ViT, BEiT or EVA, CLS first; [b h w d] of a Swin.
        `unimim.probing.pool` makes one vector an image of them.
        """
        tokens: Tensor = self.student.backbone.forward_features(self.student.normalize(images))
        return tokens

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images [b 3 H W] in [0, 1], or (images, labels) -> `forward` of the images."""
        tokens: Tensor = self(images_in(batch))
        return tokens

    # Its optimization

    def configure_model(self) -> None:
        """Shards what learns, and what follows it in the teacher, where the strategy asks for it."""
        averages = [part for part in self.teacher.modules() if isinstance(part, (Student, Head))]
        shard(self, [part for part in self.children() if part is not self.teacher], averages)

    def configure_optimizers(self) -> Any:
        """AdamW over all that learns, with warm-up and cosine per step."""
        groups = parameter_groups([self], self.weight_decay)
        optimizer = fused_adamw(groups, self.lr, self.betas)
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
            raw = self.teacher(blank, grid_size)
            try:
                target = self.normalization(raw)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                kinds = f"{type(self.normalization).__name__} does not take the {raw.dtype} of {type(self.teacher).__name__}"
                raise UserError(
                    f"model.normalization: {kinds} ({error}); for a discrete one it is torch.nn.Identity"
                ) from error
            if target.dtype in (torch.int32, torch.int16, torch.uint8):
                raise UserError(f"{type(self.teacher).__name__} gives {target.dtype}: discrete targets are long, add .long()")
            channels = () if target.dtype == torch.long else (self.teacher.dim,)
            promise(self.masking, "mask", mask, (2, *grid_size))
            counts = mask.flatten(1).sum(1).tolist()
            promise(self.teacher, "target", target, (2, *grid_size, *channels))
            if mask.dtype != torch.bool:
                raise UserError(
                    f"{type(self.masking).__name__} gives a mask of {mask.dtype}, but it has to be bool, True = hidden"
                )
            if counts[0] != counts[1]:
                raise UserError(
                    f"{type(self.masking).__name__} hides {counts[0]} and {counts[1]} patches of two images: it has to be one "
                    f"count in every image"
                )
            selected = self.select(mask)
            if not selected.any():
                raise UserError(
                    f"{type(self.masking).__name__} leaves no patch for the loss, which is on the {self.selection} ones: set "
                    f"model.selection to all, or another model.masking"
                )
            try:
                tokens = self.student(blank, mask)
                prediction = self.head(tokens, mask, selected)
            except RuntimeError as error:
                given = f"{self.student.name} with model_args {self.student.model_args}"
                raise UserError(f"student and head do not work on a blank image ({given}): {error}") from error
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
                raise UserError(
                    f"{type(self.teacher).__name__} is discrete, and {loss} is not for its logits: set model.loss to "
                    f"torch.nn.CrossEntropyLoss"
                )
        elif isinstance(self.loss, CLASSIFICATION) and not is_probability(target):
            raise UserError(
                f"{loss} is for classes or probabilities, which {type(self.teacher).__name__} with {normalization} does not "
                f"give: set model.loss to a regression such as torch.nn.SmoothL1Loss, or model.normalization to CenteredSoftmax"
            )
        elif isinstance(self.loss, REGRESSION) and isinstance(self.normalization, (CenteredSoftmax, nn.Softmax)):
            raise UserError(
                f"{normalization} gives probabilities, and {loss} would compare them with logits: set model.loss to "
                f"SoftCrossEntropyLoss"
            )
        try:
            value = self.loss(prediction, target)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)} {target.dtype}"
            raise UserError(f"model.loss: {loss} does not take prediction and target of {shapes}: {error}") from error
        promise(self.loss, "loss", value, ())

    def setup(self, stage: str) -> None:
        """
        Raises:
            ValueError: as `check_processes`.
        """
        super().setup(stage)
        check_processes(self.trainer)
        strategy = self.trainer.strategy
        on_gpu = strategy.root_device.type == "cuda" and not isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
        if stage == "fit" and (on_gpu if self.compiled is None else self.compiled):
            self.compile_blocks()

    def compile_blocks(self, **options: Any) -> None:
        """Each block of student, head, teacher and its networks, with these `options` of torch.compile; once.

        Blocks and not the whole: the equation between them runs as it is written, and what a user writes there breaks no graph.
        """
        for part in (self.student, self.head, self.teacher, *self.teacher.networks()):
            for block in blocks(part):
                if block._compiled_call_impl is None:
                    block.compile(**options)

    def on_fit_start(self) -> None:
        """Prints the table of the six letters and the effective batch; lets the teacher prepare itself."""
        print_once(self.summary())
        devices = self.trainer.world_size
        batch = getattr(self.trainer.train_dataloader, "batch_size", None)
        if batch:
            print_once(step_in_words(self.trainer, batch, self.lr))
        if self.global_rank == 0:
            with self.trainer.precision_plugin.forward_context():
                self.teacher.prepare(self.training_images(), self.student.grid_size)
        if devices > 1:  # what was drawn at random, or fitted to the images of the first process, holds for all
            for module in (self.teacher, *self.teacher.networks()):
                broadcast_parameters(module)

    def on_train_start(self) -> None:
        """Takes the length of the training, by which the teacher's momentum goes."""
        self.total_steps = all_steps(self.trainer)

    def training_images(self) -> Iterator[Tensor]:
        """Batches as `training_step` gets them; the data is not opened until the first is asked for.

        Raises:
            ValueError: as `check_batch`, and of the first as `check_pixels`.
        """
        trainer: Any = self.trainer
        try:
            for number, batch in enumerate(trainer.train_dataloader):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = before_transfer(self, batch)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                self.check_batch(batch)
                if number == 0:
                    check_pixels(batch)
                yield batch
        finally:  # persistent workers have one iterator for all: training would go on behind these batches
            read_anew(trainer)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Adds what the teacher brings to those of every task."""
        return [*super().configure_callbacks(), *self.teacher.callbacks()]

    def check_batch(self, batch: Any) -> None:
        """Looks at the form of the first batch; a subclass whose batches are of another form overrides it.

        Raises:
            ValueError: the batch is not images alone (in a prediction also with labels), not of the student's size, or not
                pixels in three channels.
        """
        trainer = trainer_of(self)
        if trainer is not None and trainer.predicting:
            batch = images_in(batch)
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            labelled = " (images and labels?)" if isinstance(batch, (list, tuple)) else ""
            if isinstance(batch, Crop):
                labelled = ", which the data module finishes on the device: fit(model, data), not its train_dataloader()"
            raise UserError(
                f"pretraining takes batches of images alone, [b 3 H W] in [0, 1], but the data gave a "
                f"{type(batch).__name__}{labelled}"
            )
        self.student.check_image_size(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` needs to know, and the metrics as last measured; what is not finite is not saved."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["backbone"] = describe_backbone(self.student)
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    # What a person sees

    @torch.no_grad()
    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The equation at work on images [b 3 H W] in [0, 1]: captions, and pictures [b 3 H' W'] in [0, 1].

        Target and prediction are what the loss compares, N(T(x)) and H(S(M(x))), in the same colours; patches that do not
        count in the loss are gray in the prediction. Masks are drawn at random, and everything is in the mode that it is in.
        """
        grid_size = self.student.grid_size
        mask = self.masking(images, grid_size)
        selected = self.select(mask)
        before = self.teacher(images, grid_size)
        target = self.normalization(before)
        predicted = self.head(self.student(images, mask), mask, selected)
        prediction = predicted.new_zeros(*selected.shape, predicted.shape[-1])
        prediction[selected] = predicted
        of_target = f"{type(self.normalization).__name__} of {type(self.teacher).__name__}"
        drawn = {
            "x, the images": images,
            f"M(x), what the student sees: {100 * mask.float().mean():.0f} % hidden": covered(images, mask),
            f"N(T(x)), the target: {of_target}": self.teacher.picture(target, target),
            f"H(S(M(x))), the prediction, of {self.selection} patches": covered(
                self.teacher.picture(prediction, target), ~selected
            ),
        }
        reconstruction = self.teacher.reconstruction(prediction, target, before)
        if reconstruction is not None:
            lent = "" if torch.equal(target, before) else ", which is given the TRUE mean and spread of each patch"
            drawn[f"the images, completed by the prediction{lent}"] = pasted(reconstruction, images, selected)
        backbone = self.student.backbone
        drawn["the encoder's features of the whole image, first three components"] = principal_components(
            encoder_features(backbone, images)
        )
        attention = attention_map(backbone, images)
        if attention is not None:
            drawn["where the encoder's last block looks, mean of its heads"] = lit(images, attention)
        return drawn

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


def check_factory(head: object) -> None:
    """
    Raises:
        ValueError: what is given as head cannot make one of a student and a teacher.
    """
    if isinstance(head, nn.Module):
        name = type(head).__name__
        raise UserError(
            f"model.head is a {name} object, but it is made here, of student and teacher: give the class {name}, or "
            f"functools.partial({name}, ...) with its arguments"
        )
    if not callable(head) or (isinstance(head, type) and not issubclass(head, Head)):
        given = f"the class {head.__name__}" if isinstance(head, type) else repr(head)
        raise UserError(f"model.head is {given}, but has to be a class of heads, such as unimim.LinearHead")


def is_probability(target: Tensor) -> bool:
    """Whether every row of [m c] is a distribution."""
    return bool((target >= 0).all()) and torch.allclose(target.sum(1), target.new_ones(()), atol=1e-4)


def promise(part: nn.Module, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: what a part gave for two images is of another shape than it has to be.
    """
    if value.shape != shape:
        raise UserError(
            f"{type(part).__name__} gives a {name} of shape {tuple(value.shape)} for two images, not {shape}, which the "
            f"student's grid promises (and the teacher's dim, for target and prediction)"
        )


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process only."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)
