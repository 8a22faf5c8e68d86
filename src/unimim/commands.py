"""The tasks behind the command line: Lightning's CLI, which answers a user's mistake with one line."""

import difflib
import inspect
import logging
import os
import re
import sys
import traceback
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import pytorch_lightning as pl
import torch
from jsonargparse import ActionYesNo, Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import unimim
from unimim.backbones import description, load_strictly, read_file
from unimim.checkpoint import SEGMENTATION, load_backbone
from unimim.checkpoint import export as export_backbone
from unimim.finetuning import FineTuning
from unimim.interfaces import Head, Masking, Student, TargetGenerator
from unimim.pretraining import CLASSIFICATION, REGRESSION, MaskedImageModeling, print_once
from unimim.probing import Feature, Probe, accuracy, extract_features
from unimim.probing import knn as nearest_neighbours
from unimim.segmentation import UperNetSegmentation

LETTER_TYPES: dict[str, type] = {
    "teacher": TargetGenerator,
    "features": TargetGenerator,
    "masking": Masking,
    "student": Student,
    "head": Head,
    "data": pl.LightningDataModule,
    "model": Probe,
}
Result = TypeVar("Result")
UNION = "Does not validate against any of the Union subtypes"
"""How jsonargparse begins when a class that may be left out cannot be made; what its constructor said follows in a list."""


def pretrain(args: list[str]) -> LightningCLI:
    """Runs `unimim pretrain ARGS` and returns the CLI, with `model`, `trainer` and `datamodule`."""
    return in_one_line(lambda: PretrainCLI(MaskedImageModeling, **settings("pretrain"), args=args))


def finetune(args: list[str]) -> LightningCLI:
    """Runs `unimim finetune ARGS` and returns the CLI."""
    return in_one_line(lambda: FinetuneCLI(FineTuning, **settings("finetune"), args=args))


def segment(args: list[str]) -> LightningCLI:
    """Runs `unimim segment ARGS` and returns the CLI."""
    return in_one_line(lambda: SegmentCLI(UperNetSegmentation, **settings("segment"), args=args))


def probe(args: list[str]) -> LightningCLI:
    """Runs `unimim probe ARGS` and returns the CLI; `--model` says which probe."""
    return in_one_line(lambda: ProbeCLI(Probe, subclass_mode_model=True, **settings("probe"), args=args))


def knn(args: list[str]) -> float:
    """Runs `unimim knn ARGS`: prints and returns the accuracy of a frozen encoder's nearest neighbours."""
    return in_one_line(lambda: run_function(knn_accuracy, "unimim knn", args))


def export(args: list[str]) -> Path:
    """Runs `unimim export ARGS`: writes a checkpoint's backbone for timm, with a model card."""
    return in_one_line(lambda: run_function(export_checkpoint, "unimim export", args))


def knn_accuracy(
    checkpoint: str,
    data: pl.LightningDataModule,
    k: int = 20,
    temperature: float = 0.07,
    feature: Feature = "mean",
    device: Literal["cpu", "cuda", "mps"] = "cuda" if torch.cuda.is_available() else "cpu",
) -> float:
    """Top-1 accuracy of the k nearest neighbours among the training images, for the validation images.

    Args:
        checkpoint: what `load_backbone` takes: a checkpoint or a timm name.
        data: a data module with labelled_dataloader("train") and ("val").
        k: neighbours that vote.
        temperature: of their votes.
        feature: the mean of the patch tokens, or the CLS token.
        device: where the backbone runs.

    Raises:
        ValueError: there is no such device here; and as `load_backbone`.
    """
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        raise ValueError(f"device is {device}, but torch finds none here: give --device cpu")
    data.prepare_data()
    data.setup("validate")
    backbone = load_backbone(checkpoint).to(device)
    splits: Any = data
    (bank, bank_labels), (features, labels) = (
        extract_features(backbone, splits.labelled_dataloader(split), feature) for split in ("train", "val")
    )
    reached = accuracy(nearest_neighbours(features, bank, bank_labels, k, temperature), labels)
    print(f"k-NN: {reached:.4f} of {len(labels)} images, k {k}, {len(bank)} in the bank")
    return reached


def export_checkpoint(checkpoint: str, output: str | None = None, to: Literal["timm", "safetensors"] = "timm") -> Path:
    """Writes the backbone in a checkpoint as a file that timm loads strictly, and a model card beside it.

    Args:
        checkpoint: of pretraining or fine-tuning.
        output: the file to write, which must not exist; beside the checkpoint, if not given.
        to: timm (a file of torch.save) or safetensors.
    """
    ending = ".pth" if to == "timm" else ".safetensors"
    written = export_backbone(checkpoint, output or Path(checkpoint).with_suffix(ending), to)
    print(f"{written}, and {written}.md")
    return written


def settings(task: str) -> dict[str, Any]:
    """What Lightning's CLI is told, the same for every task."""
    return {
        "datamodule_class": pl.LightningDataModule,
        "subclass_mode_data": True,
        "auto_configure_optimizers": False,
        "seed_everything_default": 0,
        "save_config_callback": SaveConfig,
        "trainer_defaults": {
            "enable_model_summary": False,  # the pretraining's table of the six letters takes its place
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "outputs", "name": task}},
        },
        "parser_class": Parser,
        "parser_kwargs": {"prog": f"unimim {task}"},
    }


def in_one_line(command: Callable[[], Result]) -> Result:
    """Runs a command; a mistake of the user ends in `SystemExit` with one line.

    With UNIMIM_TRACEBACK set it keeps its traceback.
    """
    for name in unimim.__all__:  # a class is known by its short name once it is imported
        getattr(unimim, name)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's calls, not of the user's
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # the teacher has to be
    try:
        return command()
    except Exception as error:
        if os.environ.get("UNIMIM_TRACEBACK") or not is_mistake(error):
            raise
        lines = str(error).strip().splitlines()
        of_a_class = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
        last_line = of_a_class[0] if UNION in lines[0] else lines[-1]  # a worker's error has its traceback above
        sys.exit(f"unimim: error: {re.sub(r'^[a-zA-Z.]+(Error|Exception): ', '', last_line)}")


def is_mistake(error: Exception) -> bool:
    """Whether a `raise` of this package made it, here or in a data loader's worker: then its text says it all."""
    if isinstance(error, MisconfigurationException) or (isinstance(error, ValueError) and str(error).startswith(UNION)):
        return True
    if not isinstance(error, (ValueError, FileNotFoundError, FloatingPointError)):
        return False
    in_worker = re.findall(r'File "(.+?)", line .+\n\s*(.+)', str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    filename, line = in_worker[-1] if in_worker else (last.filename, last.line or "")
    return Path(filename).is_relative_to(Path(__file__).parent) and line.startswith("raise")


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml beside what the logger writes, and nothing where there is no logger."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class TaskCLI(LightningCLI):
    """What the tasks share. `names` are the subcommands."""

    names: tuple[str, ...] = ("fit",)

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "model"}
        return dict.fromkeys(cls.names, loaders)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Leaves `sys.argv` whole, which DDP reads to start the other processes."""
        self.config = parser.parse_args(args)
        checkpoint = self.config[self.config.subcommand].ckpt_path
        if checkpoint not in (None, "hpc") and not zipfile.is_zipfile(checkpoint):
            found = "is truncated, or no checkpoint" if Path(checkpoint).is_file() else "does not exist"
            if checkpoint in ("last", "best"):  # Lightning would look in this run's own folder, find none, and start anew
                found = "names no file: give its path, such as outputs/pretrain/version_0/checkpoints/NAME.ckpt"
            sys.exit(f"unimim: error: ckpt_path: {checkpoint} {found}")

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's own hyperparameters over those that are given; here what is given counts."""


class PretrainCLI(TaskCLI):
    """`unimim pretrain fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--random_weights",
            action=ActionYesNo,
            default=False,
            help="build every pretrained network that has no file of weights with random ones, to try a recipe offline",
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if not config.random_weights:
            return
        changed = []
        for path, part in parts(config.model, "model"):
            of_ones_own = isinstance(part.init_args.get("network"), Namespace)  # it has the argument itself, or has none
            if (
                "weights" in part.init_args
                and not of_ones_own
                and part.init_args.weights in (None, "random", default(part, "weights"))
            ):
                part.init_args.weights = "random"
                changed.append(f"{path} ({part.class_path.rpartition('.')[-1]})")
        if changed:
            print_once(
                f"WARNING: --random_weights: {', '.join(changed)} built with RANDOM weights. "
                f"This run tries the recipe; what it learns means nothing."
            )

    def after_fit(self) -> None:
        """Says where the encoder is."""
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path:
            print_once(f"checkpoint: {path}\nthe encoder, in Python: unimim.load_backbone({path!r})")


class WholeModelCLI(TaskCLI, ABC):
    """What fine-tuning and segmentation share: a checkpoint that says which model it holds, and predictions of photos."""

    names = ("fit", "validate", "predict")
    task: str
    """As the user knows it."""
    photos: str
    """Data that takes a folder of photos."""
    usage: str
    """Which commands take its checkpoint."""
    weights: dict[str, Any] | None = None
    """Those of the checkpoint, until it is known that they fit."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A checkpoint of the task says which model it holds, so that no other file is needed.

        Arguments of the backbone that are given count beside the checkpoint's, as far as its weights fit them; a layer that is
        given has to be the checkpoint's.
        """
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if config.ckpt_path is None and self.config.subcommand != "fit":
            name = self.config.subcommand
            sys.exit(f"unimim: error: ckpt_path is missing: {name} needs --ckpt_path FILE of a {self.task}")
        if config.ckpt_path in (None, "hpc"):
            return
        content = read_file(config.ckpt_path)
        described = description(content)
        if described is None or not self.holds(content):
            sys.exit(
                f"unimim: error: ckpt_path: {config.ckpt_path} is no checkpoint of {self.task} that names its backbone (one of "
                f"pretraining is given as --model.checkpoint)"
            )
        all_given = parser.parse_args(args, defaults=False)[self.config.subcommand]
        given = all_given.get("model", Namespace())
        layers = {"backbone": described["name"], **self.layers(content)}
        for key, value in layers.items():
            if key in given and given[key] != value:
                sys.exit(f"unimim: error: model.{key} is {given[key]}, of {config.ckpt_path} it is {value}: leave it out")
        for key, value in {**self.remembered(content, given), **layers}.items():
            config.model[key] = value
        config.model.model_args = {**described["model_args"], **(given.get("model_args") or {})}
        config.model.checkpoint = None  # the weights come from ckpt_path
        if self.config.subcommand == "predict" and config.data is not None:
            for key, value in self.photos_as_trained_on(content).items():
                if key in config.data.init_args and f"data.init_args.{key}" not in all_given:
                    config.data.init_args[key] = value
        self.weights = content["state_dict"]

    def instantiate_classes(self) -> None:
        """Refuses, in one line, a checkpoint that does not fit the arguments of the backbone that are given beside it."""
        super().instantiate_classes()
        if self.weights is not None:
            load_strictly(self.model, self.weights, self.config[self.subcommand].ckpt_path)
            self.weights = None

    @abstractmethod
    def holds(self, content: dict[str, Any]) -> bool:
        """Whether a checkpoint that names its backbone is one of the task."""

    @abstractmethod
    def layers(self, content: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a checkpoint's model that make its layers, but for the backbone's."""

    def remembered(self, content: dict[str, Any], given: Namespace) -> dict[str, Any]:
        """Other arguments that are taken from a checkpoint's model where they are not `given`."""
        return {}

    @staticmethod
    def photos_as_trained_on(content: dict[str, Any]) -> dict[str, Any]:
        """The settings of the data that show photos as the checkpoint's model knows images, where they are not given."""
        return {}

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "predict":
            return
        self.config.predict.trainer.devices = self.config.predict.trainer.num_nodes = 1  # it sees all files in their order
        self.check_output(Path(self.config.predict.output))

    def check_output(self, output: Path) -> None:
        """Ends where the predictions cannot be written, or would be over others."""
        if output.exists():
            sys.exit(f"unimim: error: output: {output} exists, and is not overwritten: give another --output")
        if not output.parent.is_dir():
            sys.exit(f"unimim: error: output: there is no folder {output.parent}")

    def before_predict(self) -> None:
        """Looks that the data can be predicted."""
        if type(self.datamodule).predict_dataloader is pl.LightningDataModule.predict_dataloader:
            kind = type(self.datamodule).__name__
            sys.exit(f"unimim: error: data: {kind} has no predict_dataloader: --data {self.photos} takes a folder of photos")

    def after_fit(self) -> None:
        """Says where the model is."""
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path:
            print_once(f"checkpoint: {path}\nto use it: {self.usage}")


class FinetuneCLI(WholeModelCLI):
    """`unimim finetune fit|validate|predict`."""

    task = "fine-tuning"
    photos = "ClassFolderData"
    usage = "unimim finetune validate|predict --ckpt_path, unimim export --checkpoint"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", default="predictions.csv", help="where predict writes file, labels and probabilities")

    def holds(self, content: dict[str, Any]) -> bool:
        return "classes" in content and bool(content["backbone"]["model_args"].get("num_classes"))

    def layers(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"num_classes": content["backbone"]["model_args"]["num_classes"]}

    def after_predict(self) -> None:
        """Writes the predictions."""
        output = Path(self.config.predict.output)
        images = self.datamodule.splits["predict"]
        predictions = self.trainer.predict_loop.predictions
        written = self.model.write_predictions(images.files, predictions, output, images.unreadable.tolist())
        print_once(f"{written} files: {output}")


class SegmentCLI(WholeModelCLI):
    """`unimim segment fit|validate|predict`."""

    task = "segmentation"
    photos = "SegmentationFolderData"
    usage = "unimim segment validate|predict --ckpt_path"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", default="predictions", help="the folder for predict's overlays and label maps")

    def holds(self, content: dict[str, Any]) -> bool:
        return any(key.startswith(SEGMENTATION) for key in content["state_dict"])

    def layers(self, content: dict[str, Any]) -> dict[str, Any]:
        return {key: content["hyper_parameters"][key] for key in ("num_classes", "blocks", "channels", "auxiliary_weight")}

    def remembered(self, content: dict[str, Any], given: Namespace) -> dict[str, Any]:
        known = inspect.signature(UperNetSegmentation).parameters
        return {key: value for key, value in content["hyper_parameters"].items() if key in known and key not in given}

    @staticmethod
    def photos_as_trained_on(content: dict[str, Any]) -> dict[str, Any]:
        """Fitted in the size in which a validation was; for images that were of one size (scenes), that one's short side."""
        fitted = content.get("datamodule_hyper_parameters", {})
        size = fitted.get("image_size")
        sides = fitted.get("resize") or ((4 * size, size) if isinstance(size, int) else None)
        return {} if sides is None else {"resize": sides}

    def check_output(self, output: Path) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            sys.exit(f"unimim: error: output: {output} is no empty folder, and is not overwritten: give another --output")
        if not output.exists():
            super().check_output(output)

    def before_predict(self) -> None:
        super().before_predict()
        self.config_init.predict.return_predictions = False  # they are written one by one
        trainer: Any = self.trainer
        self.writer = WritePhotos(Path(self.config.predict.output))
        trainer.callbacks.append(self.writer)

    def after_predict(self) -> None:
        """Says where the pictures are."""
        print_once(f"{self.writer.written} photos: {self.config.predict.output}")


class WritePhotos(pl.Callback):
    """Writes the pictures of each photo once it is predicted, in the same subfolders as the photos are in the data's root.

    Photos of one folder that differ only in their ending keep it in the names of their pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.photos = data.splits["predict"]
        paths = [file.relative_to(data.root) for file in self.photos.files]
        stems = Counter(path.with_suffix("") for path in paths)
        self.names = [path if stems[path.with_suffix("")] > 1 else path.with_suffix("") for path in paths]

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.photos.unreadable[batch_idx]:  # the next photo stands in for it
            return
        model: Any = pl_module
        model.write_prediction(batch[0], outputs[0], self.folder / self.names[batch_idx])
        self.written += 1


class ProbeCLI(TaskCLI):
    """`unimim probe fit|validate`."""

    names = ("fit", "validate")

    def before_instantiate_classes(self) -> None:
        if self.subcommand == "validate" and self.config.validate.ckpt_path is None:
            sys.exit("unimim: error: ckpt_path is missing: validate needs --ckpt_path FILE of a probe")


def run_function(function: Callable[..., Result], prog: str, args: list[str]) -> Result:
    """A command that is one function: its parameters are the options, and the first word may be the checkpoint."""
    parser = Parser(prog=prog, description=(function.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action="config", help="a yaml with any of the options")
    parser.add_function_arguments(function, as_group=False, sub_configs=True)
    if args and not args[0].startswith("-"):
        args = ["--checkpoint", *args]
    options = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    options.pop("config")
    return function(**options)


def parts(config: Any, path: str) -> Iterator[tuple[str, Namespace]]:
    """Every class in a parsed configuration, with the path of its key."""
    if isinstance(config, Namespace):
        if "class_path" in config and isinstance(config.get("init_args"), Namespace):
            yield path, config
            config = config.init_args
        for key, value in vars(config).items():
            yield from parts(value, f"{path}.{key}")


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line that name the field and the nearest known names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of one class within the whole: the message goes up and gains its key
            super().error(message, ex)
        sys.exit(f"unimim: error: {self.one_line(message)}")

    def one_line(self, message: str) -> str:
        """The field, the reason and the nearest known names, of jsonargparse's message in several lines."""
        keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
        field = ".".join(keys)
        noise = ("Given value", "Expected a <class 'NoneType'>", "Expected a path but", "Subtypes:", "Errors:")
        lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines()]
        reason = [line for line in lines if not line.startswith(noise)][-1]
        class_path = (re.findall(r"class_path[ =]'([^']+)'", message) or [""])[-1]
        if found := re.search(r"Option '([^']+)' is not accepted", message):
            known = [
                name for name in inspect.signature(import_object(class_path)).parameters if name not in ("student", "target")
            ]
            if "model_args" in known and not closest(found[1], known):
                nested = f"--{field}.model_args.{found[1]}"
                return f"{field}: {class_path} takes no {found[1]!r}; timm's arguments are given as {nested}"
            return f"{field}: {class_path} takes no {found[1]!r}.{closest(found[1], known)} Known: {', '.join(known) or 'none'}"
        if found := re.search(r"dot import path string: (\S+)|has no attribute '([^']+)'", message):
            name = found[1] or found[2]
            known = names_beside(name, message) or names_for(keys[-1] if keys else "")
            known_names = ", ".join(known)
            return f"{field}: there is no class {name!r}.{closest(name, known)}{f' Known: {known_names}' if known else ''}"
        if found := re.search(r"unrecognized arguments: (--\S+)", message):
            name = found[1].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            return f"there is no option {name}.{closest(name, known)}"
        if found := re.search(r"arguments are required: ([^\s,]+)", message):
            name = re.sub(r"^(fit|validate|predict)\.", "", f"{field}.{found[1]}".lstrip("."))
            return f"{name} is missing: give --{name}, or a --config that has it"
        if "is abstract" in reason and (known := names_for(keys[-1] if keys else "")):
            return f"{field}: give one of {', '.join(known)}"
        if found := re.search(r"Expected a typing.Literal\[(.+)\]\. Got value: (.+)", reason):
            known = re.findall(r"'([^']+)'", found[1])
            return f"{field}: {found[2]!r} is none of {', '.join(known)}.{closest(found[2], known)}"
        kinds = [kind for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind != "NoneType"]
        if len(kinds) > 1 and (found := re.search(r"Given value: (.+)", message)):
            return f"{field}: expected {' or '.join(kinds)}, got {found[1]}"
        return f"{field}: {reason}" if field and field not in reason else reason


def names_for(key: str) -> list[str]:
    """The classes that can stand at a key of the configuration."""
    letter = key.rpartition(".")[-1]
    if letter == "loss":
        losses = sorted({*REGRESSION, *CLASSIFICATION}, key=lambda loss: loss.__name__)
        return [f"torch.nn.{loss.__name__}" if loss.__module__.startswith("torch") else loss.__name__ for loss in losses]
    classes = {name: value for name in unimim.__all__ if inspect.isclass(value := getattr(unimim, name))}
    if letter == "normalization":
        ours = [name for name, value in classes.items() if value.__module__ == "unimim.normalizations"]
        return [*ours, "torch.nn.Identity"]
    base = LETTER_TYPES.get(letter, ())
    return [name for name, value in classes.items() if issubclass(value, base) and not inspect.isabstract(value)]


def names_beside(name: str, message: str) -> list[str]:
    """The classes that a user's own module defines, where `name` was looked for in it."""
    module = re.search(rf"Given value: ([\w.]+)\.{re.escape(name)}|module '([\w.]+)' has no attribute", message)
    found = sys.modules.get((module[1] or module[2]) if module else "")
    if found is None or found.__name__.partition(".")[0] in ("unimim", "torch"):
        return []
    return [
        f"{found.__name__}.{key}"
        for key, value in vars(found).items()
        if inspect.isclass(value) and value.__module__ == found.__name__
    ]


def default(part: Namespace, argument: str) -> Any:
    """What an argument of a class is where it is not given."""
    return inspect.signature(import_object(part.class_path)).parameters[argument].default


def import_object(path: str) -> Any:
    """The class at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def closest(name: str, known: list[str]) -> str:
    """' Did you mean a?', or nothing when no known name resembles it."""

    def last(path: str) -> str:
        return path if path.startswith("--") else path.rpartition(".")[-1]

    of = {last(path): path for path in known}
    matches = difflib.get_close_matches(last(name), of, n=1, cutoff=0.4)
    return f" Did you mean {of[matches[0]]!r}?" if matches else ""
