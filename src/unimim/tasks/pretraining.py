"""Pretraining: the paper's equation 1 as a LightningModule."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from unimim.data.batches import check_pixels, images_in
from unimim.data.crops import Crop
from unimim.errors import UserError
from unimim.letters.interfaces import Head, Masking, Student, TargetGenerator
from unimim.letters.mask import Mask, Selection, WholeImage
from unimim.letters.students import TimmStudent
from unimim.letters.term import LETTERS as OF_TERM
from unimim.letters.term import Selected, TeacherRun, Term, attach, built, check_selection, selected_by, watched
from unimim.letters.tokens import Tokens
from unimim.lightning import before_transfer, read_anew, trainer_of
from unimim.pictures.patches import attention_map, covered, encoder_features, lit, pasted, picture_of, principal_components
from unimim.printing import printable
from unimim.tasks.optim import all_steps, check_rates, check_warmup, fused_adamw, parameter_groups, schedule
from unimim.tasks.task import Task
from unimim.tasks.trial import try_parts
from unimim.training.faults import SkipNonFinite
from unimim.training.launch import step_in_words
from unimim.training.shards import blocks, broadcast_parameters, shard
from unimim.weights.checkpoint import describe_backbone
from unimim.weights.models import check_object, checkpoint_activations

LETTERS = {
    "teacher": "T",
    "normalization": "N",
    "masking": "M",
    "student": "S",
    "head": "H",
    "loss": "L",
}
FIRST = "first"
"""The name of the term that the six letters make."""


class MaskedImageModeling(Task):
    """L( N(T(x)), H(S(M(x))) ): masked image modeling in six parts ("A Unified View of Masked Image Modeling", eq. 1).

    `terms` adds more of the same: the loss is the sum of w L( N(T(x)), H(S(M(x))) ) over all terms, which share one masking and
    one pass of the student.

    A subclass overrides what it wants otherwise: `training_step`, `select`, `configure_optimizers`, `pictures`, or
    `configure_callbacks`, where it adds to `super()`'s. Parts with parameters that it adds learn with the others.

    Args:
        teacher: T, image -> target of each patch.
        normalization: N, of the target; `nn.Identity()` for none.
        masking: M, which patches are hidden.
        student: S, a timm backbone that sees the corrupted image.
        head: H, given as a factory (usually the class): called with student and teacher.
        loss: L, any module of (prediction, target); torch's own take the mean over the selected patches.
        selection: which patches count in the loss: the masked ones, the visible ones, or all; or the image, whose target is
            [b c] and whose prediction is from CLS.
        terms: further terms by name; the first, made of the letters above, has the name "first".
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
        selection: Selected = "masked",
        lr: float = 1.5e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        warmup_epochs: float = 10,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        checkpointing: bool = False,
        compiled: bool | None = None,
        max_skipped_updates: int = 0,
        terms: dict[str, Term] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[*LETTERS, "terms"])
        if "_instantiator" in self.hparams:  # the command line knows the letters as plain configuration
            self.save_hyperparameters()
        check_selection("model.selection", selection)
        check_rates(lr, weight_decay, betas, warmup_lr, min_lr)
        check_warmup(warmup_epochs)
        check_object("model.teacher", teacher, TargetGenerator, "unimim.HOGTarget()")
        check_object("model.normalization", normalization, nn.Module, "unimim.LayerNorm()")
        check_object("model.masking", masking, Masking, "unimim.BlockMasking()")
        check_object("model.student", student, Student, "unimim.MaskTokenStudent('vit_base_patch16_224')")
        check_object("model.loss", loss, nn.Module, "torch.nn.SmoothL1Loss()")
        if checkpointing:
            checkpoint_activations(student.backbone)
        attach(teacher, student, "model.teacher")
        masking.attach(teacher)
        built_head = built(head, student, teacher, "model.head")
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
        self.further_terms: Any = nn.ModuleDict()
        for name, term in (terms or {}).items():
            check_term(name, term, self.terms)
            term.build(student, self.terms, name)
            self.further_terms[name] = term
        if terms:
            self.metrics = "train/loss", *(f"train/loss/{name}" for name in self.terms)
        try_parts(self)

    # The equation

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """[b 3 H W] with pixels in [0, 1] -> the loss."""
        mask = self.masking(images, self.student.grid_size)  # M
        tokens = self.student(images, mask)  # S(M(x))
        return self.logged({name: term(images, tokens, mask) for name, term in self.terms.items()})  # w L( N(T(x)), H(tokens) )

    @property
    def terms(self) -> dict[str, Term]:
        """All terms by name; the first has the letters that stand in this module."""
        first = Term(self.teacher, self.normalization, self.head, self.loss, self.selection)
        object.__setattr__(first, "select", self.select)
        terms = {FIRST: first}
        for name, term in self.further_terms.items():
            term.share(terms)
            terms[name] = term
        for teacher in {term.teacher: None for term in terms.values()}:
            asking = [term for term in terms.values() if term.teacher is teacher]
            run = TeacherRun(teacher, [term.selection for term in asking])
            for term in asking:
                term.run = run
        return terms

    def select(self, mask: Mask) -> Selection:
        """Chooses the patches that count in the loss of the first term."""
        return selected_by(self.selection, mask)

    # Its encoder

    def forward(self, images: Tensor) -> Tensor:
        """Gives the encoder's tokens of whole images: timm's `forward_features` of what the student's mean and std normalize.

        [b 3 H W] in [0, 1] -> tokens: [b prefix+n d] of a ViT, BEiT or EVA, CLS first; [b h w d] of a Swin.
        `unimim.tasks.probing.pool` makes one vector an image of them.
        """
        tokens: Tensor = self.student.backbone.forward_features(self.student.normalize(images))
        return tokens

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images [b 3 H W] in [0, 1], or (images, labels) -> `forward` of the images."""
        tokens: Tensor = self(images_in(batch))
        return tokens

    # Its optimization

    @property
    def teachers(self) -> dict[TargetGenerator, Head]:
        """Each teacher, and the head of the term that it belongs to."""
        found: dict[TargetGenerator, Head] = {}
        for term in self.terms.values():
            found.setdefault(term.teacher, term.head)
        return found

    def configure_model(self) -> None:
        """Shards what learns, and what follows it in the teachers, where the strategy asks for it."""
        teachers, strategy = self.teachers, getattr(trainer_of(self), "strategy", None)
        for name, term in self.terms.items():
            if getattr(term.head, "uses_student", False) and isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
                raise UserError(
                    f"the head of the term {name!r}, {type(term.head).__name__}, computes with the student's own norm and "
                    f"bias, which shards keep apart: set trainer.strategy to ddp"
                )
        averages = [part for teacher in teachers for part in teacher.modules() if isinstance(part, (Student, Head))]
        parts = [*self.children(), *(part for term in self.further_terms.values() for part in term.children())]
        shard(self, [part for part in parts if part not in teachers and part is not self.further_terms], averages)

    def configure_optimizers(self) -> Any:
        """AdamW over all that learns, with warm-up and cosine per step."""
        groups = parameter_groups([self], self.weight_decay)
        optimizer = fused_adamw(groups, self.lr, self.betas)
        return schedule(optimizer, self.trainer, self.warmup_epochs, self.warmup_lr, self.min_lr)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, after which each teacher that follows the student takes its own."""
        progress = self.global_step / self.total_steps
        super().optimizer_step(*args, **kwargs)
        for teacher, head in self.teachers.items():
            teacher.update(self.student, head, progress)

    # Its training

    def setup(self, stage: str) -> None:
        """
        Raises:
            ValueError: as `check_processes`.
        """
        super().setup(stage)
        strategy = self.trainer.strategy
        on_gpu = strategy.root_device.type == "cuda" and not isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
        if stage == "fit" and (on_gpu if self.compiled is None else self.compiled):
            self.compile_blocks()

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block of student, heads, teachers and their networks, with these `options` of torch.compile; once.

        Blocks and not the whole: the equation between them runs as it is written, and what a user writes there breaks no graph.
        """
        heads = [term.head for term in self.terms.values()]
        for part in (self.student, *heads, *self.teachers, *(one for teacher in self.teachers for one in teacher.networks())):
            for block in blocks(part):
                if block._compiled_call_impl is None:
                    block.compile(**options)

    def on_fit_start(self) -> None:
        """Prints the table of the letters and the effective batch; lets the teachers prepare themselves."""
        print_once(self.summary())
        devices = self.trainer.world_size
        batch = getattr(self.trainer.train_dataloader, "batch_size", None)
        if batch:
            print_once(step_in_words(self.trainer, batch, self.lr))
        for teacher in self.teachers:
            if self.global_rank == 0:
                with self.trainer.precision_plugin.forward_context():
                    teacher.prepare(self.training_images(), self.student.grid_size)
            if devices > 1:  # what was drawn at random, or fitted to the images of the first process, holds for all
                for module in (teacher, *teacher.networks()):
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
        """Adds what the teachers bring to those of every task."""
        return [*super().configure_callbacks(), *(callback for teacher in self.teachers for callback in teacher.callbacks())]

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
        if isinstance(self.student, TimmStudent):
            checkpoint["backbone"] = describe_backbone(self.student)

    # What a person sees

    @torch.no_grad()
    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The equation at work on images [b 3 H W] in [0, 1]: captions, and pictures [b 3 H' W'] in [0, 1].

        Target and prediction are what the loss compares, N(T(x)) and H(S(M(x))), in the same colours; patches that do not
        count in the loss are gray in the prediction. Masks are drawn at random, and everything is in the mode that it is in.
        """
        mask = self.masking(images, self.student.grid_size)
        tokens = self.student(images, mask)
        drawn = {
            "x, the images": images,
            f"M(x), what the student sees: {100 * mask.count / mask.cells:.0f} % hidden": covered(images, mask.tensor),
        }
        for name, term in self.terms.items():
            drawn |= drawn_term(term, images, tokens, mask, f"{name}: " if self.further_terms else "")
        backbone = self.student.backbone
        drawn["the encoder's features of the whole image, first three components"] = principal_components(
            encoder_features(backbone, images)
        )
        attention = attention_map(backbone, images)
        if attention is not None:
            drawn["where the encoder's last block looks, mean of its heads"] = lit(images, attention)
        return drawn

    def summary(self) -> str:
        """Returns the table of the letters: class, parameters, trainable or frozen."""
        rows = [("", "letter", "class", "parameters", "")]
        for name, letter in LETTERS.items():
            rows.append((letter, name, *described(getattr(self, name))))
        for name, term in self.further_terms.items():
            for letter in OF_TERM:
                shared = (f"that of {term.shared[letter]}", "", "") if letter in term.shared else None
                rows.append((OF_TERM[letter], f"{name}.{letter}", *(shared or described(getattr(term, letter)))))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def described(part: nn.Module) -> tuple[str, str, str]:
    """Returns the class of a letter, its number of parameters, and whether they learn."""
    networks = part.networks() if isinstance(part, TargetGenerator) else []
    counts = [p.numel() for module in (part, *networks) for p in module.parameters()]
    learns = any(p.requires_grad for p in part.parameters())
    state = ("trainable" if learns else "frozen") if counts else "no parameters"
    return type(part).__name__, f"{sum(counts):,}" if counts else "-", state


def drawn_term(term: Term, images: Tensor, tokens: Tokens, mask: Mask, caption: str) -> dict[str, Tensor]:
    """Returns the pictures of one term: target, prediction, and the images that this means, where it means any."""
    seen = watched(term)
    seen(images, tokens, mask)
    before, target, predicted, selected = (letter.given for letter in (seen.run, seen.normalization, seen.head, seen.select))
    if isinstance(selected, WholeImage):  # as a grid of one patch
        selected = Mask(torch.ones(len(images), 1, 1, dtype=torch.bool, device=images.device), 1)
        target = rearrange(target, "b ... -> b 1 1 ...")
    prediction = predicted.new_zeros(*selected.tensor.shape, predicted.shape[-1])
    prediction[selected.tensor] = predicted
    of_target = f"{type(term.normalization).__name__} of {type(term.teacher).__name__}"
    of_image = term.selection == "image"
    of, teacher = ("the image", None) if of_image else (f"{term.selection} patches", term.teacher)
    drawn = {
        f"{caption}N(T(x)), the target: {of_target}": picture_of(teacher, target, target),
        f"{caption}H(S(M(x))), the prediction, of {of}": covered(picture_of(teacher, prediction, target), ~selected.tensor),
    }
    reconstruction = None if of_image else term.teacher.reconstruction(prediction, target, before)
    if reconstruction is not None:
        lent = "" if torch.equal(target, before) else ", which is given the TRUE mean and spread of each patch"
        drawn[f"{caption}the images, completed by the prediction{lent}"] = pasted(reconstruction, images, selected.tensor)
    return drawn


def check_term(name: str, term: Any, earlier: dict[str, Term]) -> None:
    """
    Raises:
        ValueError: it is no term, or its name is taken or cannot be one.
    """
    check_object(f"model.terms.{name}", term, Term, "unimim.Term(teacher, normalization, head, loss)")
    if name in earlier or not re.fullmatch("[a-z_][a-z0-9_]*", name):
        raise UserError(
            f"model.terms has the name {name!r}: give another, of small letters, digits and _ ({FIRST!r} is the first term's)"
        )


@rank_zero_only
def print_once(text: str) -> None:
    """Prints on the first process only."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)
