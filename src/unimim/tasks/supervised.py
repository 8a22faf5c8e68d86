"""The base of fine-tuning and segmentation: a whole timm model learns from images with labels."""

from abc import ABC
from typing import Any, ClassVar

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from unimim.data.batches import check_classes, check_images, check_labelled
from unimim.errors import UserError
from unimim.shapes import RGB
from unimim.tasks.optim import fitting_lr
from unimim.tasks.task import Task
from unimim.training.launch import step_in_words
from unimim.training.resume import accumulated
from unimim.training.shards import gather, scatter
from unimim.weights.checkpoint import agreeing_classes, describe_network, load_backbone
from unimim.weights.models import check_timm_model, create_backbone, uncompiled


class Supervised(Task, ABC):
    """A task that trains all of a timm model on (images, labels); a subclass has the steps, the metrics and the optimizer.

    Its constructor calls `start_from`, and sets `num_classes`, `lr`, `recipe_batch`, `scale_lr` and `guard`.

    Attributes:
        classes: names of the classes in the order of their labels, as the data or the checkpoint gives them.
        lr_scale: factor on every learning rate, for the images of a step: 1, if `scale_lr` does not ask for another.
        pretrained_from: the file whose weights the training began with.
    """

    name_of_task: ClassVar[str]  # in messages, as is the next
    name_of_classifier: ClassVar[str]
    where_backbone: ClassVar[str] = "backbone"  # the attribute that is the timm model
    label_axes: ClassVar[int] = 1  # of labels [b]; 3 of [b H W]
    ignored_label: ClassVar[int] = -100  # torch's

    mean: Tensor
    std: Tensor
    num_classes: int
    lr: float
    recipe_batch: int | None
    scale_lr: bool
    lr_scale = 1.0

    def start_from(
        self,
        backbone: str | nn.Module | None,
        checkpoint: str | None,
        checkpoint_key: str | None,
        mean: RGB | None,
        std: RGB | None,
        model_args: dict[str, Any] | None,
        given: dict[str, Any],
    ) -> Any:
        """Returns the timm model to train, a named one made with `given`, and registers its mean and std.

        To be called after `save_hyperparameters`: `hparams` keeps all arguments that make a named one again.

        Raises:
            ValueError: there is none, or it is no timm model; checkpoint or model_args beside a model; as `load_backbone`.
        """
        self.classes: list[str] = []
        self.checkpoint = self.pretrained_from = checkpoint
        network: Any = backbone
        if backbone is None:  # it has a default so that a checkpoint of the task can say it on the command line
            raise UserError("model.backbone is missing: a timm name, such as vit_base_patch16_224, or a timm model")
        if isinstance(backbone, str):
            if checkpoint is None:
                network = create_backbone(backbone, given)
            else:
                network = load_backbone(checkpoint, backbone, True, checkpoint_key, mean, std, **given)
                given = network.load_report.backbone["model_args"]  # with those it was pretrained with
            self.hparams.update({"model_args": given, "checkpoint": None})  # so that its own checkpoint needs no other file
        elif checkpoint is not None or model_args is not None:
            raise UserError("model.checkpoint and model.model_args are for a backbone given by its name")
        check_timm_model("model.backbone", network)
        network = uncompiled(network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1))
        return network

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of this training."""
        return self.lr * self.lr_scale

    def names_of_classes(self) -> list[str]:
        """Returns the names of the classes; where nothing names them, their labels."""
        return self.classes or [str(label) for label in range(self.num_classes)]

    def normalize(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b 3 H W] by `mean` and `std`.

        Raises:
            ValueError: as `check_images`.
        """
        check_images(images)
        return (images - self.mean) / self.std

    # What it checks and says

    def check_batch(self, batch: Any) -> None:
        """Looks at the form of the first batch; a subclass whose batches are of another form overrides it.

        Raises:
            ValueError: it is not (images, labels), or the labels are of no class.
        """
        check_labelled(batch, self.num_classes, self.label_axes, self.ignored_label, self.trainer.predicting)

    def check_batch_size(self, size: int) -> None:
        """Looks at the data's batch size; a subclass that cannot train on every size overrides it."""

    def setup(self, stage: str) -> None:
        """Takes the names of the classes from the data, and the learning rate that fits the batch.

        Raises:
            ValueError: the data has no labels, or another number of classes; and as `Task.setup` and `check_batch_size`.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "predict" or data is None:
            return
        check_classes(data, self.num_classes, self.name_of_task, self.name_of_classifier)
        self.classes = list(getattr(data, "classes", self.classes))
        batch = getattr(data, "batch_size", None)
        if stage == "fit" and batch is not None:
            self.check_batch_size(batch)
            images = batch * self.trainer.world_size * accumulated(self.trainer, 0)
            self.lr_scale = fitting_lr(self.lr, images, self.recipe_batch, self.scale_lr) / self.lr

    def on_fit_start(self) -> None:
        """Logs images per step, learning rate and precision."""
        if batch := getattr(self.trainer.train_dataloader, "batch_size", None):
            rank_zero_info(step_in_words(self.trainer, batch, self.peak_lr))

    def on_train_start(self) -> None:
        """Says so where nothing pretrained is trained on. (Under FSDP2 the checkpoint of a resumed run is not known before.)"""
        if isinstance(self.hparams.get("backbone"), str) and self.checkpoint is None and self.trainer.ckpt_path is None:
            rank_zero_info(f"no model.checkpoint: {self.hparams['backbone']} is trained from scratch")

    def on_validation_epoch_start(self) -> None:
        gather(self)

    def on_validation_epoch_end(self) -> None:
        scatter(self)

    # What a checkpoint says

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` needs to know, the names of the classes, and where the training began."""
        super().on_save_checkpoint(checkpoint)
        described = describe_network(self.get_submodule(self.where_backbone), self.hparams, self.mean, self.std)
        if described is not None:
            checkpoint["backbone"] = described
        checkpoint.update(classes=self.classes, pretrained_from=self.pretrained_from)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the names of the classes from it, and where its training began.

        Raises:
            ValueError: the data has other classes than the checkpoint; and as `check_resumed`.
        """
        super().on_load_checkpoint(checkpoint)
        self.classes = agreeing_classes(self.classes, list(checkpoint.get("classes", [])))
        self.pretrained_from = checkpoint.get("pretrained_from")
