"""Models in shards, block by block: each process holds a part of every weight, its gradient and its optimizer state."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from unimim.errors import UserError
from unimim.lightning import averages_buffers, layer_sync, trainer_of

LISTS = ("blocks", "stages", "layers")
"""How timm calls the lists of what a network repeats; the first of them that a network has is taken."""
FORWARDS = ("forward_features", "forward_intermediates")
"""The methods by which students, pyramids and averages call their `backbone`, a timm model."""


def shard(task: pl.LightningModule, modules: Sequence[nn.Module], followers: Sequence[nn.Module] = ()) -> None:
    """Shards modules of a task over all processes (FSDP2), in its `configure_model`; does nothing under DDP.

    Each block is gathered when its turn comes and let go behind it; what else a module has (embedding, positions, norm) is one
    more such unit. All processes begin with the weights of the first, as under DDP. Buffers and a frozen teacher stay whole.

    `precision: bf16-mixed` is what it is under DDP: autocast, over weights that are kept and gathered in float32. Under
    `bf16-true` the weights and the optimizer's state are bfloat16. Gradients are summed in float32 under both.

    Args:
        task: the strategy of its trainer decides.
        modules: those that learn. Their forward pass is their own, or one of `FORWARDS` of their `backbone`.
        followers: copies of these that an average keeps, in equal shards, so that they can follow.

    Raises:
        ValueError: under `ModelParallelStrategy`, processes that share no data (there is no plan of tensor parallelism), or
            batch norms on a GPU that are not synchronised; under `FSDPStrategy`, followers; and as `check_average`.
    """
    trainer = trainer_of(task)
    if trainer is None:  # its weights are loaded, and nothing is trained
        return
    strategy = trainer.strategy
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            check_average(callback, task)
    if isinstance(strategy, FSDPStrategy) and followers:
        raise UserError(
            "model.teacher: an average cannot follow the flat shards of FSDPStrategy: set trainer.strategy to "
            "ModelParallelStrategy, whose shards it can follow, or to ddp"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh["data_parallel"]
    if mesh.size() != trainer.world_size:
        raise UserError(
            f"trainer.strategy: of {trainer.world_size} processes only {mesh.size()} would share the data, the others would "
            f"split tensors, for which these models have no plan: set data_parallel_size to {trainer.world_size} and "
            f"tensor_parallel_size to 1"
        )
    if (synchronised := layer_sync(strategy)) is not None:  # which this strategy of Lightning leaves alone
        synchronised.apply(task)
    elif strategy.root_device.type != "cpu" and any(isinstance(part, _BatchNorm) for part in task.modules()):
        raise UserError(
            "batch norms would gather statistics of their own in each process, and a file of shards mixes them: set "
            "trainer.sync_batchnorm to true"
        )
    task.to(strategy.root_device)
    broadcast_parameters(task)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*modules, *followers):
        if isinstance(module, FSDPModule) or next(module.parameters(), None) is None:  # of an earlier fit; nothing to shard
            continue
        encoder: Any = getattr(module, "backbone", None)
        repeated = set(blocks(module))
        for part in reversed(list(module.modules())):  # the inner ones first
            if part in repeated or part in (encoder, module):
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in FORWARDS:
            if hasattr(encoder, name):
                register_fsdp_forward_method(encoder, name)


def check_average(average: WeightAveraging, task: pl.LightningModule) -> None:
    """
    Raises:
        ValueError: an average of the weights (`EMAWeightAveraging`) of a task that is in shards, which it cannot follow; or one
            that takes averages of integers too, as BEiT's and Swin's tables of relative positions: 0.9999 * 41 + 0.0001 * 41 is
            a little less than 41, which becomes 40.
    """
    strategy = type(task.trainer.strategy)
    if issubclass(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise UserError(
            f"trainer.callbacks: {type(average).__name__} holds a whole copy, which cannot follow the shards of "
            f"{strategy.__name__}: leave it out, or set trainer.strategy to ddp"
        )
    if averages_buffers(average) and not all(buffer.is_floating_point() for buffer in task.buffers()):
        raise UserError(
            f"trainer.callbacks: {type(average).__name__} would average integers, and round them to wrong ones: set its "
            f"use_buffers to false"
        )


def broadcast_parameters(module: nn.Module) -> None:
    """Gives all processes the parameters and buffers of the first; shards stay as they are."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            distributed.broadcast(tensor.data, src=0)


def blocks(module: nn.Module) -> list[nn.Module]:
    """What a network repeats, by timm's structure: the blocks of a ViT, of all stages of a Swin or ConvNeXt, of a decoder.

    Of a network that has none of `LISTS`, as a ResNet, nothing: it is one unit.
    """
    for name in LISTS:
        lists = [part for where, part in module.named_modules() if where.rpartition(".")[2] == name]
        found = [block for part in lists if isinstance(part, (nn.Sequential, nn.ModuleList)) for block in part]
        if found:
            return found
    return []


def wrapping_policy(task: nn.Module) -> CustomPolicy:
    """The `auto_wrap_policy` for `FSDPStrategy` (FSDP1) that wraps each of the `blocks`, whatever their class.

    In Python: `Trainer(strategy=FSDPStrategy(auto_wrap_policy=wrapping_policy(model)))`. Which blocks it chooses is tested; a
    training was not run, for FSDP1 needs a GPU. `ModelParallelStrategy` is the one to prefer.
    """
    chosen = set(blocks(task))
    return CustomPolicy(lambda module: module in chosen)


def gather(module: nn.Module) -> None:
    """Makes every shard in a module whole, until `scatter`.

    So a validation needs no more of the other processes, which may have fewer batches, or fewer windows in an image.
    """
    with torch.inference_mode(False), torch.no_grad():  # else training would go on with tensors that cannot
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()


def scatter(module: nn.Module) -> None:
    """Lets go of what `gather` took."""
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()
