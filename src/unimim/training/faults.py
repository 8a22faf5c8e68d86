"""What a training does when it cannot go on as planned: an update that is not finite, a signal to stop."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unimim.errors import NotFiniteError, UserError
from unimim.lightning import log_step, replace_signal_handlers, stop_sigterm_broadcast
from unimim.training.checkpoints import replace
from unimim.training.waiting import may_wait

SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1"))
"""Those that ask a training to stop; SIGINT is Ctrl-C. (Windows has no SIGUSR1.)"""
INTERRUPTED = 130
"""The exit status after Ctrl-C, which shells have for it (128 + 2): no command that should follow a finished training runs."""


class SkipNonFinite(pl.Callback):
    """An update whose loss or gradient is NaN or infinite changes nothing, on any process; too many end the training.

    Whether an update is finite stays on the device, and is shared by the processes there: no step waits for it. The fused
    optimizers of torch skip by it; any other is skipped too, but then every step waits. It is read at logging steps (on a CPU
    in every one), at every save and at the end. With accumulation one bad batch skips the whole update. Weights, the
    optimizer's state and what moves in a forward pass (buffers in the state dict, as the statistics of a batch norm and the
    center of iBOT) are as they were before the update's first batch; the schedule goes on, and an EMA follows weights that
    stayed.

    The three tasks bring their own, set by their `max_skipped_updates`.

    Args:
        max_skipped: updates of this process's life that may be skipped; one more ends it.

    Attributes:
        skipped: how many were, a number on the device; so are the others.
        skipped_step, skipped_norm: the last of them, and its gradient's norm.
        norm: of the gradient of the last update that was made, over all processes and before clipping.

    Raises:
        ValueError: max_skipped is below 0.
        FloatingPointError: while training or saving, more updates were skipped, or the weights to save are not finite.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        if max_skipped < 0:
            raise UserError(f"model.max_skipped_updates is a number of updates, not below 0: got {max_skipped}")
        self.max_skipped = max_skipped
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Nothing skipped so far."""
        self.bad, self.skipped, self.skipped_step, self.skipped_norm, self.norm = torch.zeros(5, device=device)
        self.before: list[Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reset(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps what a forward pass may move, before the first batch of an update."""
        if self.before is None:
            self.before = [flattened(alike) for alike in by_kind(saved_buffers(pl_module))]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.bad = torch.maximum(self.bad, (~loss.detach().isfinite()).float())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]  # the same in every process
        processes = trainer.world_size
        shared = torch.stack([self.bad, sum_of_squares(shards, self.bad) + sum_of_squares(whole, self.bad) / processes])
        if processes > 1:
            distributed.all_reduce(shared)
        norm = shared[1].sqrt()
        bad = shared[0] > 0
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # else such gradients are how it finds its scale
            bad = bad | ~norm.isfinite()
        self.skipped = self.skipped + bad
        self.skipped_step = torch.where(bad, float(trainer.global_step), self.skipped_step)
        self.skipped_norm = torch.where(bad, norm, self.skipped_norm)
        self.norm = torch.where(bad, self.norm, norm)
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad()  # what has no gradient is not updated
        if self.before is not None:  # the buffers of now, for a forward pass may have put others in their place
            for buffers, before in zip(by_kind(saved_buffers(pl_module)), self.before, strict=True):
                put_back(buffers, torch.where(bad, before, flattened(buffers)))
        self.before = None
        self.bad = torch.zeros_like(self.bad)
        if may_wait(trainer):
            self.check_skipped(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_skipped(trainer)

    def check_skipped(self, trainer: pl.Trainer) -> None:
        """
        Raises:
            FloatingPointError: more updates were skipped than may be.
        """
        skipped = int(self.skipped)
        if skipped > self.max_skipped:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            raise NotFiniteError(
                f"the loss or its gradient became NaN or infinite by step {int(self.skipped_step)} (lr {lr:.2e}, gradient norm "
                f"{float(self.skipped_norm):.3g}, in the last update that was made {float(self.norm):.3g}): try a lower "
                f"model.lr, trainer.gradient_clip_val, or trainer.precision 32-true; of {skipped} such updates none was made "
                f"(model.max_skipped_updates is {self.max_skipped}), and the last checkpoint is kept"
            )

    def check_saved(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """To be called, on all processes, before weights are saved; of `EMAWeightAveraging` also those that it keeps beside.

        Raises:
            FloatingPointError: as `check_skipped`, or of one process some weight in the checkpoint is not finite.
        """
        self.check_skipped(trainer)
        states = [checkpoint["state_dict"], checkpoint.get("current_model_state", {})]
        tensors = [
            (name, t.to_local() if isinstance(t, DTensor) else t)
            for state in states
            for name, t in state.items()
            if isinstance(t, Tensor)
        ]
        bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
        if not trainer.strategy.reduce_boolean_decision(not bad):
            named = ", ".join(bad[:3]) or "some of another process's weights"
            raise NotFiniteError(
                f"the model is not saved at step {trainer.global_step}, because not all of it is finite: {named}; the last "
                f"checkpoint is kept"
            )


def sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Of all their numbers, at least in float32; 0 of no tensor, on the device of `like`."""
    if not tensors:
        return torch.zeros_like(like)
    if tensors[0].device.type == "cpu" and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return torch.stack([torch.dot(t.flatten(), t.flatten()) for t in tensors]).sum().to(like.dtype)  # half the time
    norms = torch._foreach_norm(tensors, dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack(norms).square().sum().to(like.dtype)


def saved_buffers(module: nn.Module) -> list[Tensor]:
    """Those in the state dict, in its order. What is left out of it, as a table of positions, is computed and does not move."""
    return [
        buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]


def by_kind(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def flattened(tensors: list[Tensor]) -> Tensor:
    """A copy of all their numbers in one row, for which a device is asked once and not once a tensor."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def put_back(tensors: list[Tensor], numbers: Tensor) -> None:
    """Writes the numbers of `flattened` into these tensors."""
    parts = numbers.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def guarded(trainer: pl.Trainer, guard: SkipNonFinite) -> list[pl.Callback]:
    """What `configure_callbacks` of a task returns of its guard: the guard, unless the Trainer has it already."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if guard in callbacks else [guard]


class StopOnSignal(pl.Callback):
    """SIGTERM, SIGUSR1 or Ctrl-C saves a checkpoint between two steps, says where and how to go on, and ends the program.

    The exit status is 0, which tells a scheduler that all is well, and after Ctrl-C 130, which stops a shell's `&&`. A second
    Ctrl-C ends the program at once, wherever it is, and saves nothing.

    One process that gets the signal stops all, after the same step: the running one, or the next that updates the weights. On
    several GPUs, where agreeing waits for the device, it is the next logging step (`trainer.log_every_n_steps`). A signal
    during a validation is heeded after the first such step that follows it. The checkpoint lies where the ModelCheckpoint's
    do; without one (`trainer.enable_checkpointing` false) nothing is saved. Once it is complete, the signal's checkpoint before
    it is removed: this run's, or the one from which it goes on under `--resume auto`.

    From the `setup` of the callbacks on signals are heeded, and workers of the data outlive SIGUSR1 and Ctrl-C. Before the
    first step (a teacher that is fitted to the data, the trial validation) nothing is saved: Ctrl-C ends the program at once,
    the others end it where training would begin, with exit status 0. A Ctrl-C that the process was told to ignore (a job of
    a shell in the background) is ignored.

    Where another handler of SIGUSR1 is there when training starts, it is called after the save, on every process, and training
    goes on: Lightning's under Slurm, which requeues the job. In Python: `Trainer(callbacks=[StopOnSignal()])`.

    Attributes:
        command: gives the line that goes on from a checkpoint, which is then said; None says none.
    """

    def __init__(self) -> None:
        self.resumed_from: str | None = None
        self.command: Callable[[str], str] | None = None
        self.found: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the signals, before the workers of the data are forked; and again from where Lightning does.

        Lightning 2.6 sets back in the end those that it found. It sends a broadcast from within its handler, where it meets
        whatever collective the other processes are in (and may wait for ever), and ends a validation in one process alone; it
        knows no save.
        """
        self.received = 0
        self.begun = False
        self.process, self.is_first = os.getpid(), trainer.is_global_zero
        self.previous: dict[int, Any] = {}
        takes = stage == "fit" and threading.current_thread() is threading.main_thread()
        if takes:
            self.found = self.take()

        def register(lightnings_own: Callable[[], None]) -> None:
            self.give_back()
            lightnings_own()
            if takes:
                self.previous = self.take()

        replace_signal_handlers(trainer, register)

    def take(self) -> dict[int, Any]:
        """Handles the signals here; returns the handlers before."""
        ignored = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else []
        return {number: signal.signal(number, self.note) for number in SIGNALS if number not in ignored}

    def give_back(self) -> None:
        """The handlers that `setup` found."""
        for number, handler in self.found.items():
            signal.signal(number, handler)
        self.found = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.give_back()

    def note(self, number: int, frame: Any) -> None:
        """The handler: it may run amid anything, and only remembers.

        Raises:
            KeyboardInterrupt: at Ctrl-C, where there is nothing to save.
        """
        if number == signal.SIGINT:
            if os.getpid() != self.process:  # a worker of the data, which a terminal tells too: it ends with this process
                return
            if not self.begun:
                signal.default_int_handler(number, frame)
            signal.signal(number, signal.SIG_DFL)  # which ends also one that waits for another process, for ever
            if self.is_first:
                os.write(2, b"\nCtrl-C: saves a checkpoint after the running step, and ends; once more ends at once\n")
        self.received = number

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun = True
        self.step = trainer.global_step
        callbacks: Any = trainer  # others change what is saved, so this is the last but for ModelCheckpoint
        callbacks.callbacks = sorted(callbacks.callbacks, key=lambda other: (isinstance(other, Checkpoint), other is self))
        stop_sigterm_broadcast(trainer)
        if number := self.agreed(trainer):
            self.stop(trainer, number, "before this run's first step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # amid an accumulation
            return
        self.step = trainer.global_step
        if (trainer.world_size == 1 or may_wait(trainer)) and (number := self.agreed(trainer)):
            told = "there is no ModelCheckpoint, so nothing is saved"
            if callback := next((one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)), None):
                name = f"epoch={trainer.current_epoch}-step={self.step}-{signal.Signals(number).name}.ckpt"
                place = f"{callback.dirpath}/{name}"
                trainer.save_checkpoint(place, weights_only=False)
                if self.resumed_from and self.resumed_from.endswith(tuple(f"-{one.name}.ckpt" for one in SIGNALS)):
                    replace(trainer, Path(self.resumed_from), Path(place))
                self.resumed_from = told = place
                if self.command and trainer.is_global_zero:
                    told += f"\nto go on: {self.command(place)}"
            try:
                self.stop(trainer, number, f"after step {self.step}: {told}")
            except SIGTERMException:
                log_step(trainer)
                raise

    def agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any process has got, 0 for none. To be called on all."""
        if trainer.world_size == 1:
            return self.received
        highest = torch.tensor(self.received, device=trainer.strategy.root_device)
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
        return int(highest)

    def stop(self, trainer: pl.Trainer, number: int, told: str) -> None:
        """Ends the training on every process, or hands on to the handler that was there before."""
        self.received = 0
        if trainer.is_global_zero:
            print(f"{signal.Signals(number).name} {told}", flush=True)
        requeue = self.previous.get(number)
        if number not in (signal.SIGTERM, signal.SIGINT) and callable(requeue):
            requeue(number, None)
            return
        raise SIGTERMException(*status_after(number))


def status_after(number: int) -> list[int]:
    """With what `SystemExit` is made after a signal: nothing, which is exit status 0, or the one after Ctrl-C."""
    return [INTERRUPTED] if number == signal.SIGINT else []
