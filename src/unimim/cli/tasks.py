"""The tasks behind the command line: Lightning's CLI, which answers a user's mistake with one line."""

import difflib
import errno
import inspect
import logging
import os
import re
import shlex
import sys
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import pytorch_lightning as pl
import torch
import yaml  # type: ignore[import-untyped]
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from jsonargparse import ActionYesNo, Namespace
from jsonargparse.typing import register_type
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.utilities.cloud_io import get_filesystem
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import unimim
from unimim.caching.target import CachedTarget
from unimim.errors import USER_ERRORS, UnwritableError, UserError
from unimim.letters.interfaces import Head, Masking, Student, TargetGenerator
from unimim.letters.term import TermName
from unimim.lightning import RunsSubcommand, cluster_environment, kill_at_exit, parser_of
from unimim.printing import printable
from unimim.shapes import RGB
from unimim.tasks.callbacks import PictureCallback, TrainingBar
from unimim.tasks.finetuning import FineTuning
from unimim.tasks.knn import knn as nearest_neighbours
from unimim.tasks.pretraining import MaskedImageModeling, print_once
from unimim.tasks.probing import Feature, Probe, accuracy, extract_features
from unimim.tasks.segmentation import UperNetSegmentation
from unimim.tasks.trial import CLASSIFICATION, REGRESSION
from unimim.training.checkpoints import (
    AtomicCheckpointIO,
    KeepRecipe,
    SameCheckpoint,
    check_folders,
    goes_on_in,
    is_in,
    is_whole,
    logged_in,
    newest_first,
    next_free,
    recipe_in,
    run_folder,
)
from unimim.training.cpu import choose_cpu_precision
from unimim.training.faults import INTERRUPTED, StopOnSignal
from unimim.training.launch import check_processes, check_slurm, default_precision
from unimim.training.monitoring import CheckMonitors, why_unsaved
from unimim.weights.checkpoint import SEGMENTATION, load_backbone
from unimim.weights.checkpoint import export as export_backbone
from unimim.weights.files import check_description, check_plain, description, is_in_shards, load_strictly, read_pickle
from unimim.weights.written import naming, remove_dead

LETTER_TYPES: dict[str, type] = {
    "teacher": TargetGenerator,
    "features": TargetGenerator,
    "masking": Masking,
    "student": Student,
    "head": Head,
    "data": pl.LightningDataModule,
    "model": Probe,
}
register_type(TermName, serializer=lambda name: str(TermName(name)), deserializer=TermName)

CHOSEN = "UNIMIM_RESUME"
"""The variable in which a process tells those that it starts what `--resume auto` found, after its own id."""
FREE = {"model": ("max_skipped_updates", "checkpointing", "compiled"), "data": ("batch_size", "num_workers", "timeout")}
"""What may differ between runs of one recipe: it changes no number of a good training, or the run that goes on says so."""
WORKERS = ("DataLoader worker (pid", "DataLoader timed out", "</torch_", "Too many open files. Communication")
"""What tells torch's errors of the data's workers."""
GLOO = ("gloo/transport", "timeout caused pair closure")
"""What tells an error of gloo, by which processes without GPUs talk; the second where an earlier wait has failed."""
NO_ROOM = "make room, or set another folder (save_dir of trainer.logger, trainer.default_root_dir); the checkpoints are kept"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing has."""
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
    backbone: str | None = None,
    checkpoint_key: str | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    model_args: dict[str, Any] | None = None,
) -> float:
    """Top-1 accuracy of the k nearest neighbours among the training images, for the validation images.

    Args:
        checkpoint: what `load_backbone` takes: a checkpoint or a timm name.
        data: a data module with labelled_dataloader("train") and ("val").
        k: neighbours that vote.
        temperature: of their votes.
        feature: the mean of the patch tokens, or the CLS token.
        device: where the backbone runs.
        backbone: the timm name of what a file holds, where it does not say it.
        checkpoint_key: the entry of the file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        model_args: further arguments of the timm model.

    Raises:
        ValueError: there is no such device here; and as `load_backbone`.
    """
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        raise UserError(f"device is {device}, but torch finds none here: give --device cpu")
    data.prepare_data()
    data.setup("validate")
    check_plain(model_args, "model_args")
    encoder = load_backbone(checkpoint, backbone, True, checkpoint_key, mean, std, **(model_args or {})).to(device)
    splits: Any = data
    (bank, bank_labels), (features, labels) = (
        extract_features(encoder, splits.labelled_dataloader(split), feature) for split in ("train", "val")
    )
    reached = accuracy(nearest_neighbours(features, bank, bank_labels, k, temperature), labels)
    print(f"k-NN: {reached:.4f} of {len(labels)} images, k {k}, {len(bank)} in the bank")
    return reached


def export_checkpoint(
    checkpoint: str,
    output: str | None = None,
    to: Literal["timm", "safetensors"] = "timm",
    backbone: str | None = None,
    checkpoint_key: str | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Writes the backbone in a checkpoint as a file that timm loads strictly, and a model card beside it.

    Args:
        checkpoint: of pretraining or fine-tuning.
        output: the file to write, which must not exist; beside the checkpoint, if not given.
        to: timm (a file of torch.save) or safetensors.
        backbone: the timm name of what a file holds, where it does not say it.
        checkpoint_key: the entry of the file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        model_args: further arguments of the timm model.
    """
    check_plain(model_args, "model_args")
    ending = ".pth" if to == "timm" else ".safetensors"
    destination = output or Path(checkpoint).with_suffix(ending)
    given: dict[str, Any] = {"checkpoint_key": checkpoint_key, "mean": mean, "std": std, **(model_args or {})}
    written = export_backbone(checkpoint, destination, to, backbone, **given)
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
        "save_config_kwargs": {"save_to_log_dir": False},
        "trainer_defaults": {
            "callbacks": [StopOnSignal()],
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
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(is_no_tip)
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # the teacher has to be
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
    try:
        return command()
    except SystemExit as end:
        sys.exit(printable(end.code) if isinstance(end.code, str) else end.code)
    except Exception as error:
        if os.environ.get("UNIMIM_TRACEBACK"):
            raise
        if any(sign in str(error) for sign in GLOO):
            sys.exit(printable(f"unimim: error: {cause_of_silence(str(error))}"))
        if cause := cause_in_workers(error):
            sys.exit(printable(f"unimim: error: {cause}"))
        if not is_mistake(error):
            raise
        lines = str(error).strip().splitlines()
        last_line = lines[-1]  # a worker's error has its traceback above
        if UNION in lines[0]:
            of_a_class = [line.strip() for line in dropwhile(lambda line: not line.strip().startswith("- "), lines)]
            of_a_class = of_a_class or lines[-1:]
            last_line = " ".join(of_a_class[: 2 if of_a_class[0].endswith(":") else 1]).removeprefix("- ")
        sys.exit(printable(f"unimim: error: {re.sub(r'^[a-zA-Z.]+(Error|Exception): ', '', last_line)}"))


def is_no_tip(record: logging.LogRecord) -> bool:
    """Whether Lightning says something of this run."""
    return "Tip:" not in record.getMessage()


def cause_of_silence(text: str) -> str:
    """Why another process gave no answer, and gloo's words for it: `[.../gloo/transport/tcp/pair.cc:561] WORDS. ADVICE`."""
    words = re.split(r"\[\S*gloo/transport\S*\] ", text)[-1].split(". ")[0].strip()
    if re.search("timed? ?out", words, re.IGNORECASE):
        return f"another process of this run hangs, or takes longer than trainer.strategy.timeout for a step ({words})"
    if re.search("closed by peer|reset by peer|broken pipe", words, re.IGNORECASE):
        return f"another process of this run has ended; what it said tells why ({words})"
    return f"the processes of this run cannot reach each other ({words})"


def cause_in_workers(error: BaseException) -> str:
    """Why the workers that read the data failed, and what to change, with torch's words for it; empty of any other error."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, RuntimeError) or not any(sign in texts[0] for sign in WORKERS):
        return ""
    text = max(texts, key=lambda text: "killed by signal" in text)  # says more than that a worker exited, and comes first
    words = text.strip().splitlines()[-1].removeprefix("RuntimeError: ").rstrip(". ")
    if "timed out" in words:
        return (
            f"the data's workers gave no batch in the time of data.timeout ({words}): see whether the disk of data.root hangs, "
            f"or give a longer --data.timeout"
        )
    if "Too many open files" in text:
        return f"the data's workers and this process may not open so many files ({words}): raise the limit with ulimit -n 65536"
    if "Bus error" in text or "</torch_" in text:
        return (
            f"the data's workers have too little shared memory ({words}): give the machine a larger /dev/shm (docker run "
            f"--shm-size 16g), fewer --data.num_workers or a smaller --data.batch_size"
        )
    if "Killed" in words:
        return (
            f"a worker of the data was killed, as the system does when memory runs out ({words}): give fewer "
            f"--data.num_workers or a smaller --data.batch_size, or the job more memory"
        )
    return f"a worker of the data ended ({words}): --data.num_workers 0 reads within this process, and shows where"


def is_mistake(error: Exception) -> bool:
    """Returns whether an error is a user's mistake, of which its text says all: ours, Lightning's or jsonargparse's."""
    of_a_union = isinstance(error, ValueError) and str(error).startswith(UNION)
    return of_a_union or isinstance(error, (*USER_ERRORS, MisconfigurationException))


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, beside its checkpoints, and nothing where there is no logger.

    A run that goes on in the folder of its checkpoint writes config-N.yaml. Lightning's own writes it for W&B into the working
    directory, where the next run finds it and ends.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: a run of this folder has one already, which began at the same time.
            OSError: the disk is full, or cannot be written.
        """
        if not trainer.loggers:
            return
        folder = run_folder(trainer)
        path, files = f"{folder}/{self.config_filename}", get_filesystem(folder)
        if files.isfile(path):
            if not goes_on_in(trainer, self.config.get("ckpt_path"), folder):
                raise UserError(
                    f"{path} is there already, of an earlier run: set another version, name or save_dir of trainer.logger"
                )
            path = next_free(path)
        with naming(path, NO_ROOM):
            files.makedirs(folder, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, multifile=self.multifile)


class TaskCLI(RunsSubcommand, LightningCLI):
    """What the tasks share. `names` are the subcommands."""

    names: tuple[str, ...] = ("fit",)

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "model"}
        return dict.fromkeys(cls.names, loaders)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Leaves `sys.argv` whole, which DDP reads to start the other processes."""
        self.words = list(args)
        self.config = parser.parse_args(configs_first(args))
        config = self.config[self.config.subcommand]
        checkpoint = config.ckpt_path
        if config.resume and (checkpoint or self.config.subcommand != "fit"):
            reason = "finds the checkpoint itself: leave --ckpt_path out" if checkpoint else "is for fit"
            sys.exit(f"unimim: error: --resume auto {reason}")
        if checkpoint not in (None, "hpc") and is_in_shards(checkpoint):
            check_shards(checkpoint, config.trainer.strategy)
        elif checkpoint not in (None, "hpc") and not zipfile.is_zipfile(checkpoint):
            found = "is truncated, or no checkpoint" if Path(checkpoint).is_file() else "does not exist"
            if checkpoint in ("last", "best"):  # Lightning would look in this run's own folder, find none, and start anew
                found = "names no file: give its path, such as outputs/pretrain/version_0/checkpoints/NAME.ckpt"
            sys.exit(f"unimim: error: ckpt_path: {checkpoint} {found}")
        for key, value in model_arguments(config.model, "model"):
            check_plain(value, key)

    def instantiate_classes(self) -> None:
        """Looks for the checkpoint of `--resume auto`, once the configuration is what a run saves; looks at Slurm before."""
        config: Any = self.config[self.subcommand]
        check_slurm(config.trainer.plugins)
        if self.subcommand != "fit":
            super().instantiate_classes()
            return
        self.resumes, config.resume = config.resume is not None, None  # the configuration that is saved has the path itself
        whole = yaml.safe_load(parser_of(self, self.subcommand).dump(config, skip_none=False))
        recipe = {part: whole.get(part) for part in ("seed_everything", "model", "data")}
        if self.resumes:
            self.resume(recipe)
        super().instantiate_classes()
        callbacks: Any = self.trainer
        callbacks.callbacks += [KeepRecipe(recipe), CheckMonitors()]
        if self.resumes:
            callbacks.callbacks.append(SameCheckpoint(config.ckpt_path))
        for callback in callbacks.callbacks:
            if isinstance(callback, StopOnSignal):
                callback.command = self.going_on
                if self.resumes:
                    callback.resumed_from = config.ckpt_path

    def going_on(self, checkpoint: str) -> str:
        """The command that goes on from a checkpoint of this run, as a person pastes it.

        It has `--resume auto` where that would take this very checkpoint, and else its path.
        """
        config: Any = self.config[self.subcommand]
        words, given = [], iter(self.words)
        for word in given:
            if word in ("--ckpt_path", "--resume"):
                next(given, None)
            elif not word.startswith(("--ckpt_path=", "--resume=")):
                words.append(word)
        in_a_file = config.ckpt_path is not None and not self.resumes and len(words) == len(self.words)
        found = newest_first(path for place, names in local_places(config.trainer).items() for path in place.glob(names))
        auto = not in_a_file and bool(found) and found[0].resolve() == Path(checkpoint).resolve()
        more = ["--resume", "auto"] if auto else ["--ckpt_path", checkpoint]
        by = "(by the same launcher) " if cluster_environment(self.trainer).creates_processes_externally else ""
        return by + shlex.join([*self.parser.prog.split(), *words, *more])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Chooses what is not given: the precision, `AtomicCheckpointIO` to write checkpoints, and what a person sees.

        Looks that as many processes were started as the Trainer counts, and that W&B's run can be logged.
        """
        given = self.config_init[self.subcommand].trainer
        if given.precision is None:
            kwargs["precision"] = default_precision(given.accelerator, given.plugins)
        plugins = given.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(part, CheckpointIO) for part in (*plugins, getattr(given.strategy, "_checkpoint_io", None))):
            plugins = [*plugins, AtomicCheckpointIO()]
        callbacks = given.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        trainer = super().instantiate_trainer(plugins=plugins, callbacks=self.shown(callbacks), **kwargs)
        choose_cpu_precision(trainer)
        check_processes(trainer)
        if self.subcommand == "fit":
            config: Any = self.config.fit
            check_folders(trainer, config.ckpt_path, self.resumes)
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.save = partial(save_metrics, logger, logger.save)  # type: ignore[method-assign]
            remove_dead(self.parts_left(trainer))
        start_wandb(trainer)
        return trainer

    def parts_left(self, trainer: pl.Trainer) -> Iterator[Path]:
        """The parts of checkpoints in the folders where runs of this logger save, on the first process."""
        if trainer.is_global_zero:
            for place, pattern in local_places(self.config.fit.trainer).items():
                yield from place.glob(f"{pattern}.*part")

    def shown(self, callbacks: list[pl.Callback]) -> list[pl.Callback]:
        """The callbacks that are given, and what shows the training to a person."""
        given: Any = self.config_init[self.subcommand].trainer
        has_bar = given.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in callbacks)
        return callbacks if has_bar else [*callbacks, TrainingBar()]

    def run_subcommand(self, run: Callable[[], None]) -> None:
        """After an error, ends the processes that Lightning started with this one as it ends: one that hangs would stay.

        Raises:
            ValueError: EarlyStopping waits for a metric that a module or callback of one's own does not log.
            OSError: a file of the run cannot be written.
        """
        try:
            run()
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # by which Lightning has ended
                sys.exit(INTERRUPTED)
            raise
        except Exception as error:
            kill_at_exit(self.trainer.strategy)
            if str(error).startswith("Early stopping conditioned on metric"):
                raise UserError(" ".join(str(error).split())) from error
            if not is_mistake(error) and (file := unwritten(self.trainer, error)):
                reason = error.strerror if isinstance(error, OSError) else error
                raise UnwritableError(f"{file} cannot be written ({reason}): {NO_ROOM}") from error
            raise

    def after_fit(self) -> None:
        """Says why a run has saved no checkpoint, where it has not."""
        if why := why_unsaved(self.trainer):
            print_once(f"no checkpoint was saved: {why}")

    def resume(self, recipe: dict[str, Any]) -> None:
        """Sets ckpt_path to the newest complete checkpoint of this recipe, if there is one; says so.

        Processes that the first one starts take its choice. Those that torchrun or Slurm starts look themselves, all at once,
        before any of them writes; `SameCheckpoint` sees to it that they found the same. So each of them reads the file once
        more than it loads it: 0.5 s a GB on one CPU, from the memory of a machine where another has just read it.

        Raises:
            ValueError: there is none, but one of Lightning's own requeueing, from which it would go on whatever it is; and as
                `checkpoint_places`.
        """
        config: Any = self.config[self.subcommand]
        parent, _, chosen = os.environ.get(CHOSEN, "").partition(":")
        if parent == str(os.getppid()) and int(os.environ.get("LOCAL_RANK", 0)) > 0:  # else it is a run of its own
            config.ckpt_path = chosen or None
            return
        places = checkpoint_places(config.trainer)
        found = newest_first(path for place, pattern in places.items() for path in place.glob(pattern))
        path, differences = first_of(recipe, found)
        config.ckpt_path = None if path is None else str(path)
        os.environ[CHOSEN] = f"{os.getpid()}:{path or ''}"
        more = [f"{len(differences) - 3} more"] if len(differences) > 3 else []
        because = "; ".join(differences[:3] + more)
        if path is None:
            root = Path(config.trainer.default_root_dir or ".")
            if SLURMEnvironment.detect() and (left := next(root.glob("hpc_ckpt_*.ckpt"), None)):
                raise UserError(
                    f"--resume auto finds no checkpoint of this recipe, but Lightning would go on from {left}, of a run "
                    f"that it requeued: move it elsewhere, or give --ckpt_path {left}"
                )
            named = " or ".join(map(str, places))
            because = because and f", because {because}"
            print_once(f"--resume auto: {named} has no complete checkpoint of this recipe: the run starts anew{because}")
            return
        if is_in_shards(path):
            check_shards(str(path), config.trainer.strategy)
        if because:
            print_once(f"--resume auto: newer ones are passed over, because {because}")
        print_once(f"--resume auto: this run goes on from {path}")
        go_on_in_wandb(config.trainer, path)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--resume",
            type=Literal["auto"],
            default=None,
            help="auto: go on from the newest complete checkpoint of this recipe where its runs save, if there is one (fit)",
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's own hyperparameters over those that are given; here what is given counts."""


class PretrainCLI(TaskCLI):
    """`unimim pretrain fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--random_weights",
            action=ActionYesNo,
            default=False,
            help="build every pretrained network that has no file of weights with random ones, to try a recipe offline",
        )
        parser.add_argument(
            "--cache",
            type=str | None,
            default=None,
            help="read the frozen teacher's targets from this folder, into which those that it lacks are written first",
        )
        parser.add_argument("--views", type=int | None, default=None, help="fixed views of each image in the cache (4)")
        parser.add_argument(
            "--pictures",
            type=bool,
            default=True,
            help="draw a few images, their targets and predictions while training (PictureCallback in trainer.callbacks: how)",
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.read_from_cache(config)
        if not config.random_weights:
            return
        if changed := draw_weights(config.model):
            print_once(
                f"WARNING: --random_weights: {', '.join(changed)} built with RANDOM weights. "
                f"This run tries the recipe; what it learns means nothing."
            )

    def read_from_cache(self, config: Namespace) -> None:
        """Puts the teachers into a `CachedTarget` each if there is a --cache, also in the configuration that is saved.

        The targets of a further term lie in a folder of its name within that of the first.
        """
        if config.cache is not None:
            terms = {name: term.init_args for name, term in (config.model.get("terms") or {}).items()}
            for name, owner in {"": config.model, **terms}.items():
                if isinstance(owner.teacher, str):  # it is that of another term
                    continue
                if owner.teacher.class_path.endswith("CachedTarget"):
                    key = f"model.terms.{name}.teacher" if name else "model.teacher"
                    sys.exit(f"unimim: error: --cache: {key} is a CachedTarget already, leave --cache out")
                views = {} if config.views is None else {"views": config.views}
                arguments = {argument: known.default for argument, known in inspect.signature(CachedTarget).parameters.items()}
                arguments |= {"teacher": owner.teacher, "folder": str(Path(config.cache, name)), **views}
                owner.teacher = Namespace(class_path="unimim.CachedTarget", init_args=Namespace(arguments))
        elif config.views is not None:
            sys.exit("unimim: error: --views is for a cache: give --cache FOLDER")
        config.cache = config.views = None

    def shown(self, callbacks: list[pl.Callback]) -> list[pl.Callback]:
        if not self.config_init[self.subcommand].pictures:
            callbacks = [callback for callback in callbacks if not isinstance(callback, PictureCallback)]
        elif not any(isinstance(callback, PictureCallback) for callback in callbacks):
            callbacks = [*callbacks, PictureCallback()]
        return super().shown(callbacks)

    def after_fit(self) -> None:
        """Says where the pictures and the encoder are, and how it learns to classify."""
        super().after_fit()
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, PictureCallback) and callback.path:
                print_once(f"pictures: {callback.path}")
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path:
            student = self.model.student
            print_once(
                f"checkpoint: {path}\nthe encoder, in Python: unimim.load_backbone({path!r})\nnext: unimim finetune fit "
                f"--model.backbone {student.name} --model.checkpoint {shlex.quote(path)} --data ClassFolderData --data.root "
                f"FOLDER --data.image_size {max(student.image_size)} --model.num_classes CLASSES --trainer.max_epochs 100"
            )


class WholeModelCLI(TaskCLI, ABC):
    """What fine-tuning and segmentation share: a checkpoint that says which model it holds, and predictions of photos."""

    names = ("fit", "validate", "predict")
    task: str
    """As the user knows it."""
    photos: str
    """Data that takes a folder of photos."""
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
        if self.config.subcommand == "fit" and is_in_shards(config.ckpt_path):  # what is given says which model it is
            return
        content = read_pickle(Path(config.ckpt_path), mmap=True)
        check_description(content, config.ckpt_path)
        described = description(content)
        if described is None or not self.holds(content):
            sys.exit(
                f"unimim: error: ckpt_path: {config.ckpt_path} is no checkpoint of {self.task} that names its backbone (one of "
                f"pretraining is given as --model.checkpoint)"
            )
        all_given = parser.parse_args(configs_first(args), defaults=False)[self.config.subcommand]
        given = all_given.get("model", Namespace())
        layers = {"backbone": described["name"], **self.layers(content)}
        for key, value in layers.items():
            if key in given and given[key] != value:
                sys.exit(f"unimim: error: model.{key} is {given[key]}, of {config.ckpt_path} it is {value}: leave it out")
        for key, value in {**self.remembered(content, given), **layers}.items():
            check_plain(value, f"{config.ckpt_path}: hyper_parameters.{key}")
            config.model[key] = value
        config.model.model_args = {**described["model_args"], **(given.get("model_args") or {})}
        config.model.checkpoint = None  # the weights come from ckpt_path
        if self.config.subcommand == "predict" and config.data is not None:
            for key, value in self.photos_as_trained_on(content).items():
                check_plain(value, f"{config.ckpt_path}: datamodule_hyper_parameters.{key}")
                if key in config.data.init_args and f"data.init_args.{key}" not in all_given:
                    config.data.init_args[key] = value
        ours: Any = parser
        try:
            ours.validate(self.config)  # what came from the file, by the types of the arguments
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{config.ckpt_path} is refused: {ours.one_line(str(error))}") from error
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
        fitted = content.get("datamodule_hyper_parameters", {})
        return {"bit_depth": fitted["bit_depth"]} if "bit_depth" in fitted else {}

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

    def photo_options(self) -> str:
        """What the command line needs to say of photos beside where they are."""
        return ""

    def before_predict(self) -> None:
        """Looks that the data can be predicted."""
        if type(self.datamodule).predict_dataloader is pl.LightningDataModule.predict_dataloader:
            kind = type(self.datamodule).__name__
            sys.exit(f"unimim: error: data: {kind} has no predict_dataloader: --data {self.photos} takes a folder of photos")

    def after_fit(self) -> None:
        """Says where the model is, and how it predicts."""
        super().after_fit()
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path:
            command = f"{self.parser.prog} predict --ckpt_path {shlex.quote(path)} --data {self.photos} --data.root PHOTOS"
            print_once(f"checkpoint: {path}\nnext: {command}{self.photo_options()}")


class FinetuneCLI(WholeModelCLI):
    """`unimim finetune fit|validate|predict`."""

    task = "fine-tuning"
    photos = "ClassFolderData"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", default="predictions.csv", help="where predict writes file, labels and probabilities")

    def holds(self, content: dict[str, Any]) -> bool:
        return "classes" in content and bool(content["backbone"]["model_args"].get("num_classes"))

    def layers(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"num_classes": content["backbone"]["model_args"]["num_classes"]}

    def photo_options(self) -> str:
        size = self.datamodule.hparams.get("image_size")  # data of one's own may be without
        return f" --data.image_size {size}" if isinstance(size, int) else ""

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
    of_layers = ("num_classes", "blocks", "channels", "auxiliary_weight")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", default="predictions", help="the folder for predict's overlays and label maps")

    def holds(self, content: dict[str, Any]) -> bool:
        known = content.get("hyper_parameters", {})
        return set(self.of_layers) <= set(known) and any(key.startswith(SEGMENTATION) for key in content["state_dict"])

    def layers(self, content: dict[str, Any]) -> dict[str, Any]:
        return {key: content["hyper_parameters"][key] for key in self.of_layers}

    def remembered(self, content: dict[str, Any], given: Namespace) -> dict[str, Any]:
        known = inspect.signature(UperNetSegmentation).parameters
        return {key: value for key, value in content["hyper_parameters"].items() if key in known and key not in given}

    @staticmethod
    def photos_as_trained_on(content: dict[str, Any]) -> dict[str, Any]:
        """Fitted in the size in which a validation was; for images that were of one size (scenes), that one's short side."""
        fitted = content.get("datamodule_hyper_parameters", {})
        size = fitted.get("image_size")
        sides = fitted.get("resize") or ((4 * size, size) if isinstance(size, int) else None)
        return {**WholeModelCLI.photos_as_trained_on(content), **({} if sides is None else {"resize": sides})}

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


def check_shards(checkpoint: str, strategy: Any) -> None:
    """Ends with one line where a strategy cannot read a folder of shards."""
    if not reads_shards(strategy):
        name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
        sys.exit(
            f"unimim: error: ckpt_path: {checkpoint} is a folder of shards, which trainer.strategy {name} cannot "
            f"read: set it to ModelParallelStrategy, or make the folder one file with python -m "
            f"lightning_fabric.utilities.consolidate_checkpoint {checkpoint} --output_file FILE"
        )


def reads_shards(strategy: Any) -> bool:
    """Returns whether a configured strategy puts a model in shards, and reads its checkpoints by itself."""
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    return name == "ModelParallelStrategy" or "fsdp" in name.lower()


def configs_first(words: list[str]) -> list[str]:
    """The words of a subcommand, its files of configuration before all others: an option counts over them wherever it stands.

    jsonargparse takes the words as they come, and W&B's agent promises no order.
    """
    if not words or words[0].startswith("-"):  # the subcommand comes later
        return words
    files: list[str] = []
    others: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if word in ("-c", "--config"):
            files += [word, *islice(rest, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return [words[0], *files, *others]


def save_metrics(logger: CSVLogger, save: Callable[[], None]) -> None:
    """What a CSVLogger does to save, with an error that names its file.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    with naming(f"{logger.log_dir}/metrics.csv", NO_ROOM):
        save()


def unwritten(trainer: pl.Trainer, error: Exception) -> str | None:
    """The file of a run that could not be written, if an error of the disk says so: it is in a folder of the run, or above.

    A disk that is full names no file; the run's folder stands for it.
    """
    if not isinstance(error, OSError):
        return None
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = [*logged_in(trainer), trainer.default_root_dir, *(str(saver.dirpath) for saver in savers if saver.dirpath)]
    if error.filename is None:
        return f"a file in {folders[0]}" if error.errno in NO_SPACE else None
    file = str(error.filename)
    in_run = any(is_in(file, folder) or is_in(folder, file) for folder in folders[:1] + folders[2:])
    return file if in_run else None


def start_wandb(trainer: pl.Trainer) -> None:
    """Starts the run of a WandbLogger with no terminal in sight, where wandb would ask for a key and wait for an answer.

    Raises:
        ValueError: wandb cannot start one: it has no key and is not told to be offline, or does not reach its server.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            terminal = sys.stdin
            try:
                with Path(os.devnull).open() as sys.stdin:
                    _ = logger.experiment
            except wandb.Error as error:
                raise UserError(
                    f"trainer.logger: W&B starts no run ({str(error).strip().rstrip('.')}): give it a key with wandb login, or "
                    f"set WANDB_MODE=offline, which needs no account"
                ) from error
            finally:
                sys.stdin = terminal


def local_places(trainer: Namespace) -> dict[Path, str]:
    """As `checkpoint_places`; none where a logger or a disk is one that it refuses."""
    try:
        return checkpoint_places(trainer)
    except ValueError:  # which --resume auto says, if it is asked for
        return {}


def checkpoint_places(trainer: Namespace) -> dict[Path, str]:
    """The folders in which runs save that have this `trainer` section, each with the pattern of the checkpoints in it.

    Raises:
        ValueError: the logger chooses a folder (another than CSVLogger, TensorBoardLogger and WandbLogger), or one is on no
            local disk.
    """
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    configured = [callback for callback in callbacks if isinstance(callback, Namespace)]
    savers = [callback for callback in configured if issubclass(import_object(callback.class_path), ModelCheckpoint)]
    dirpaths = [callback.get("init_args", Namespace()).get("dirpath") for callback in savers]
    logger = first_logger(trainer)
    kind = kind_of(logger)
    root = trainer.default_root_dir or "."
    places = {str(dirpath): "**/*.ckpt" for dirpath in dirpaths if dirpath}
    if kind in ("CSVLogger", "TensorBoardLogger"):
        places[f"{logger.init_args.save_dir}/{logger.init_args.name or ''}"] = "*/checkpoints/**/*.ckpt"
    elif kind == "WandbLogger":
        places[wandb_project(logger, root)] = "*/checkpoints/**/*.ckpt"
    elif kind is False:
        places[f"{root}/checkpoints"] = "**/*.ckpt"
    else:
        raise UserError(
            f"--resume auto looks through the runs of a CSVLogger, a TensorBoardLogger or a WandbLogger, but trainer.logger is "
            f"{kind}: put a CSVLogger before it, or give --ckpt_path FILE"
        )
    for place in places:
        if get_protocol(place) != "file":
            raise UserError(f"--resume auto looks through folders of local disks, not {place}: give --ckpt_path FILE")
    return {Path(place).expanduser(): pattern for place, pattern in places.items()}


def first_logger(trainer: Namespace) -> Any:
    """As configured: the one that names the run's folder."""
    return trainer.logger[0] if isinstance(trainer.logger, list) and trainer.logger else trainer.logger


def kind_of(logger: Any) -> Any:
    """The name of a configured logger's class; else what stands in its place, such as False."""
    return logger.class_path.rpartition(".")[-1] if isinstance(logger, Namespace) else logger


def wandb_project(logger: Namespace, root: str) -> str:
    """Where the runs of a WandbLogger have their folders, each named by its id."""
    given = logger.init_args
    project = given.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return f"{given.get('save_dir') or given.get('dir') or root}/{project}"


def go_on_in_wandb(trainer: Namespace, checkpoint: Path) -> None:
    """Lets a WandbLogger that names the run's folder go on with the run in whose folder a checkpoint is. Says which it is.

    A run that has an id of its own (given, or of W&B's agent) keeps it.
    """
    logger = first_logger(trainer)
    if kind_of(logger) != "WandbLogger":
        return
    given = logger.init_args
    project = Path(wandb_project(logger, trainer.default_root_dir or ".")).expanduser()
    own = given.get("id") or given.get("version") or os.environ.get("WANDB_RUN_ID")
    if own is None and checkpoint.is_relative_to(project) and "WANDB_SWEEP_ID" not in os.environ:
        own = given.id = checkpoint.relative_to(project).parts[0]
    if own is not None and checkpoint.is_relative_to(project / own):
        print_once(f"--resume auto: it goes on with the W&B run {own}")
    else:
        print_once(f"--resume auto: a new run begins in W&B{'' if own is None else f', {own}'}")


def first_of(recipe: dict[str, Any], found: list[Path]) -> tuple[Path | None, list[str]]:
    """The first complete checkpoint of a recipe, and how those before it differ. Says which are not complete."""
    differences: dict[str, None] = {}
    for path in found:
        theirs = recipe_in(path)
        difference = differing(recipe, theirs) if theirs else None
        if difference:
            name, here, there = difference
            differences[f"{name} differs: {there} in {path.parent}, {here} here"] = None
        elif theirs == {}:
            differences[f"{path} does not say of which recipe it is"] = None
        elif theirs and is_whole(path):
            return path, list(differences)
        else:
            print_once(f"--resume auto: {path} is not complete, and is passed over")
    return None, list(differences)


def differing(ours: Any, theirs: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two recipes differ, with both values, if they do.

    An argument that one of them does not know, because a class has got it since or has lost it, is no difference.
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None if ours == theirs else (key, ours, theirs)
    free = FREE.get(key.partition(".")[0], ())
    of_a_class = key == "model" or key.endswith("init_args")
    names = [name for name in {**ours, **theirs} if name not in free]
    names = [name for name in names if (name in ours) == (name in theirs) or not of_a_class]
    found = (differing(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip(".")) for name in names)
    return next((difference for difference in found if difference), None)


def model_arguments(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields each `model_args` in a parsed configuration with its key; jsonargparse would make the classes that it names."""
    if isinstance(config, Namespace):
        for key, value in vars(config).items():
            if key == "model_args":
                yield f"{path}.{key}", without_namespaces(value)
            else:
                yield from model_arguments(value, f"{path}.{key}")


def without_namespaces(value: Any) -> Any:
    """Returns a part of a parsed configuration as dicts and lists."""
    value = vars(value) if isinstance(value, Namespace) else value
    if isinstance(value, dict):
        return {key: without_namespaces(part) for key, part in value.items()}
    return [without_namespaces(part) for part in value] if isinstance(value, list) else value


def parts(config: Any, path: str) -> Iterator[tuple[str, Namespace]]:
    """Yields every class in a parsed configuration, with the path of its key."""
    if isinstance(config, Namespace) and "class_path" in config and isinstance(config.get("init_args"), Namespace):
        yield path, config
        config = config.init_args
    if isinstance(config, (Namespace, dict)):
        for key, value in (vars(config) if isinstance(config, Namespace) else config).items():
            yield from parts(value, f"{path}.{key}")


def draw_weights(model: Namespace) -> list[str]:
    """Random weights for every pretrained network in a parsed configuration that has no file of weights; says which."""
    changed = []
    for path, part in parts(model, "model"):
        of_ones_own = isinstance(part.init_args.get("network"), Namespace)  # it has the argument itself, or has none
        if (
            "weights" in part.init_args
            and not of_ones_own
            and part.init_args.weights in (None, "random", default(part, "weights"))
        ):
            part.init_args.weights = "random"
            changed.append(f"{path} ({part.class_path.rpartition('.')[-1]})")
    return changed


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line that name the field and the nearest known names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of one class within the whole: the message goes up and gains its key
            super().error(message, ex)
        sys.exit(f"unimim: error: {self.one_line(message)}")

    def one_line(self, message: str) -> str:
        """The field, the reason and the nearest known names, of jsonargparse's message in several lines."""
        if 'in "<unicode string>"' in message:  # of the YAML in a --config
            what = " ".join(message.removeprefix("Problems parsing config: ").replace('"<unicode string>", ', "").split())
            return f"--config is no YAML of plain data: {what}"
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
        if found := re.search(r"Expected a <class 'collections.abc.Sequence'>\. Got value: (\S+)$", reason):
            return f"{field}: expected a list, got {found[1]}: write [{found[1]}]"
        if found := re.search(r"Expected a typing.Literal\[(.+?)\]\. Got value: (.+?)(?:\. Got value: .+)?$", reason):
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
        ours = [name for name, value in classes.items() if value.__module__ == "unimim.letters.normalizations"]
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
