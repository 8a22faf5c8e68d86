"""Makes a killed run resume as if it was never interrupted. `unimim.data.sampling` says what each draw depends on."""

import hashlib
import os
import warnings
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor

from unimim.data.sampling import ResumableSampler, SeededSamples, derived_seed, seed_numpy_and_random
from unimim.errors import UserError
from unimim.lightning import is_validation_due, read_anew, set_progress

NOT_RESUMABLE = "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable"
"""Lightning's warning about every loader without a `state_dict`."""


class ExactResume(pl.Callback):
    """Seeds each step, and lets a resumed training continue at exactly the image where its checkpoint was written.

    The tasks bring their own (`configure_callbacks`); for other LightningModules, give it to the Trainer. It keeps the place
    inside an epoch if the data is read through `ResumableSampler`; with other samplers Lightning warns.

    A checkpoint written between two optimizer steps, while gradients accumulate, continues at the first batch of that
    accumulation. One written before or during a validation that was due continues with that whole validation; one written
    after an epoch's last batch continues with the end of the epoch. Callbacks find the metrics as last measured.

    With another number of processes, images or accumulated batches, training continues after the images already seen, rounded
    down to whole steps, and logs this. Unless a step has as many images as before, the order then differs from that of an
    uninterrupted run. Schedules count steps, not images. A checkpoint without these numbers (from another sampler, or written
    without this callback) has no place inside its epoch: this is logged, and Lightning continues in its own way.

    Not covered: draws before `on_train_batch_start`, such as in a user's `on_after_batch_transfer`, and draws in a validation;
    means over an epoch (`self.log(on_epoch=True)` in a training step), which cover the resumed part only; a validation that was
    due at the step with which `max_steps` ends the training.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None
        self.names: str | None = None
        self.metrics: dict[str, float] = {}
        self.buffers: dict[str, Tensor] = {}
        self.quiet = ExitStack()

    # Each step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds torch on every device, numpy and random for this step."""
        self.quiet.close()
        seed = derived_seed("step", trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(seed)
        seed_numpy_and_random(seed)
        # a GradientAccumulationScheduler sets it when an epoch starts; Lightning skips that if a run resumes inside an epoch
        trainer.accumulate_grad_batches = accumulated(trainer, trainer.current_epoch)
        if trainer.accumulate_grad_batches > 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            self.buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets Lightning warn again, and lets another training read the loader from its beginning."""
        self.quiet.close()
        if is_resumable(trainer):
            loader: Any = trainer.train_dataloader
            loader.sampler.skipped = 0

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    # What is saved

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the numbers that set the order of the images, and the metrics; corrects states that would change a resumed run.

        An epoch that was cut short (`max_steps`, `should_stop`) is not finished, although Lightning counts it as done. Running
        means in the model moved with each batch of an unfinished accumulation, and these batches will be seen again; the means
        of averaged weights (`EMAWeightAveraging`, whose state dict then comes first) did not move.
        """
        if not is_resumable(trainer):
            return
        checkpoint["run"] = {**numbers(trainer), **settings(trainer), "names": self.names}
        checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loop: Any = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
        if batches.is_last_batch:
            return
        if batches.current.processed and epochs.current.processed == epochs.current.started:
            for counted in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counted["processed"] = counted["completed"] = counted["started"] - 1
        if batches.current.processed % trainer.accumulate_grad_batches:
            state = checkpoint.get("current_model_state", checkpoint["state_dict"])
            state.update({name: buffer for name, buffer in self.buffers.items() if name in state})

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint.get("run")
        self.metrics = checkpoint.get("metrics", {})

    # Going on

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets Lightning's progress and the sampler to a whole step, and starts to read the data there.

        Lightning opens the loader before it knows the epoch, and workers may already have read from it (its issue 21938).

        Raises:
            ValueError: as `check_loader`.
        """
        if not is_resumable(trainer):
            return
        check_loader(trainer)
        loop: Any = trainer.fit_loop
        loader: Any = trainer.train_dataloader
        self.names = digest_of_names(loader.sampler.dataset) if trainer.is_global_zero else None
        if not loop.is_resuming:
            return
        self.say_what_differs(trainer)
        epochs, batches, validation = loop.epoch_progress, loop.epoch_loop.batch_progress, loop.epoch_loop.val_loop
        closed = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_train_batch_end and batches.is_last_batch
        for progress in (epochs.current, epochs.total):
            progress.processed -= int(closed)  # Lightning takes an epoch as over after its last batch, before its end
            progress.completed = progress.processed
        begun = epochs.current.started > epochs.current.processed
        over = begun and batches.is_last_batch
        if self.saved is None:
            amid = begun and not over
            epoch = trainer.current_epoch
            goes_on = f"the rest of epoch {epoch} has the first images" if amid else f"epoch {epoch + int(over)} has the images"
            rank_zero_info(
                f"the checkpoint does not say which images its run had seen (it is of another sampler, or was written without "
                f"ExactResume): {goes_on} of this run's order"
            )
            if amid:
                loader.sampler.set_epoch(trainer.current_epoch)
                read_anew(trainer)
                return
        measured = {name: torch.tensor(value, device=pl_module.device) for name, value in self.metrics.items()}
        trainer.callback_metrics.update(measured)
        validated = batches.current.completed == batches.current.processed and is_done(validation.batch_progress)
        seen = batches.current.processed if begun else 0
        done = self.batches_done(trainer, seen, over)
        whole = done == trainer.num_training_batches
        for progress, count in ((batches.current, done), (batches.total, batches.total.processed - seen + done)):
            progress.ready = progress.started = progress.processed = progress.completed = count
        due = done > 0 and (over or done == seen) and not validated and is_validation_due(trainer)
        set_progress(trainer, begun, due)
        loader.sampler.resume(trainer.current_epoch, len(loader.sampler) if whole else done * loader.batch_size)
        read_anew(trainer)
        self.quiet.enter_context(warnings.catch_warnings())  # until the first batch
        warnings.filterwarnings("ignore", message=NOT_RESUMABLE)

    def say_what_differs(self, trainer: pl.Trainer) -> None:
        """Logs which settings and images differ from those that the checkpoint's run saved."""
        saved, now = self.saved or {}, settings(trainer)
        changed = [f"{name} {saved[name]}, now {now[name]}" for name in now if name in saved and saved[name] != now[name]]
        if changed:
            rank_zero_info(f"the checkpoint's run had {'; '.join(changed)}: numbers differ from what they would have been")
        names = saved.get("names")
        if names and self.names and names != self.names and saved["images"] == numbers(trainer)["images"]:
            rank_zero_info("the images are others than those of the checkpoint's run: as many, but with other file names")

    def batches_done(self, trainer: pl.Trainer, seen: int, whole: bool) -> int:
        """Converts `seen` batches of the checkpoint's run to batches of this run, in whole optimizer steps.

        Logs the numbers of the two runs if they differ.

        Args:
            whole: whether the whole epoch was seen.
        """
        now = numbers(trainer)
        batches = int(trainer.num_training_batches)
        if self.saved is None:
            return batches if whole else 0
        saved = self.saved
        before, after = images_a_step(saved), images_a_step(now)
        images = seen // saved["accumulate_grad_batches"] * before
        steps = images // after
        if any(saved[name] != now[name] for name in now):
            again = f" ({left} are seen again)" if (left := images - steps * after) and not whole else ""
            kept = before == after and all(saved[name] == now[name] for name in ("images", "seed"))
            rank_zero_info(
                f"the checkpoint is of {told(saved)}, this run has {told(now)}: it goes on after {images} images of epoch "
                f"{trainer.current_epoch}{again}, and "
                + ("masks differ" if kept else "the order of the images differs")
                + " from what it would have been"
                + ("" if before == after else "; schedules go on by their steps")
            )
        return batches if whole else min(steps * now["accumulate_grad_batches"], batches)


def exact_resume(trainer: pl.Trainer) -> list[pl.Callback]:
    """Returns an `ExactResume` for a task's `configure_callbacks`, or nothing if the Trainer already has one."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(callback, ExactResume) for callback in callbacks) else [ExactResume()]


def is_resumable(trainer: pl.Trainer) -> bool:
    """Returns whether training reads its data through `ResumableSampler`."""
    return isinstance(getattr(trainer.train_dataloader, "sampler", None), ResumableSampler)


def is_done(progress: Any) -> bool:
    """Returns whether a validation has finished."""
    return bool(progress.is_last_batch and progress.current.completed == progress.current.ready)


def check_loader(trainer: pl.Trainer) -> None:
    """Checks that a training loader works with `ResumableSampler`.

    Raises:
        ValueError: the loader makes no batches, its dataset takes no (epoch, index), or the sampler was created before
            torch.distributed was initialized; or the dataset's own error for its first sample.
    """
    loader: Any = trainer.train_dataloader
    dataset, sampler = loader.dataset, loader.sampler
    if loader.batch_size is None:
        raise UserError(
            "the training's DataLoader has batch_size=None, but a place within an epoch is counted in batches: give it a "
            "batch_size"
        )
    if sampler.num_replicas != trainer.world_size:
        raise UserError(
            f"ResumableSampler shares the images among {sampler.num_replicas} processes, but {trainer.world_size} train: make "
            f"it in train_dataloader, where torch.distributed is initialized"
        )
    if isinstance(dataset, SeededSamples):
        return
    try:
        dataset[len(dataset), 0]  # of an epoch that is no index either: an array would take that for its first axis
    except (TypeError, LookupError, ValueError) as error:
        if isinstance(error, ValueError):
            dataset[0]  # a first file that cannot be read is no fault of the place, and says so itself
        raise UserError(
            f"ResumableSampler yields (epoch, index), which {type(dataset).__name__} does not take ({error}): wrap it, "
            f"DataLoader(SeededSamples(dataset), ...)"
        ) from error


def accumulated(trainer: pl.Trainer, epoch: int) -> int:
    """Returns the batches per update in this epoch: the Trainer's number, or that of a GradientAccumulationScheduler."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches


def numbers(trainer: pl.Trainer) -> dict[str, int]:
    """Returns the numbers that set the order of the images and the place in an epoch."""
    loader: Any = trainer.train_dataloader
    return {
        "processes": loader.sampler.num_replicas,
        "batch_size": loader.batch_size,
        "accumulate_grad_batches": accumulated(trainer, trainer.current_epoch),
        "images": len(loader.sampler.dataset),
        "seed": loader.sampler.seed,
    }


def settings(trainer: pl.Trainer) -> dict[str, str]:
    """Returns the other settings that change the result of a step, in readable words."""
    clip: Any = trainer
    by = GradClipAlgorithmType(clip.gradient_clip_algorithm or "norm").value
    return {
        "precision": str(trainer.precision),
        "gradient clipping": f"{clip.gradient_clip_val} by {by}" if clip.gradient_clip_val else "none",
        "strategy": type(trainer.strategy).__name__,
    }


def digest_of_names(dataset: Any) -> str | None:
    """Hashes the names of a dataset's `files`, relative to their common folder; gives None if it has no files.

    The folder itself may change, for example to a copy on a node's own disk.
    """
    files = getattr(dataset.dataset if isinstance(dataset, SeededSamples) else dataset, "files", None)
    if not files or not isinstance(files, list) or not all(isinstance(file, (str, os.PathLike)) for file in files):
        return None
    names = [os.fspath(file) for file in files]
    if len({os.path.isabs(name) for name in names}) > 1:  # noqa: PTH117 (of a million names, paths would take seconds)
        return None
    shared = len(os.path.commonpath([os.path.dirname(name) for name in (min(names), max(names))]))  # noqa: PTH120
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name[shared:].lstrip(os.sep).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def images_a_step(run: dict[str, int]) -> int:
    """Returns the images per optimizer step, over all processes."""
    return run["processes"] * run["batch_size"] * run["accumulate_grad_batches"]


def told(run: dict[str, int]) -> str:
    """Gives the numbers of a run in readable words."""
    step = "{processes} processes x {batch_size} images x {accumulate_grad_batches} accumulated"
    return f"{step}, {{images}} images in all, seed {{seed}}".format(**run)
