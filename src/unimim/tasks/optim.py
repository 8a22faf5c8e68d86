"""The optimizer's side of every recipe: which parameters decay, and the learning rate of each step."""

import math
from fnmatch import fnmatch
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from timm.models import group_parameters
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import auto_group_layers, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unimim.errors import UserError
from unimim.training.resume import accumulated
from unimim.weights.models import timm_model

FAMILIES = (VisionTransformer, Beit, Eva, SwinTransformer)
"""Those whose layers for fine-tuning are known from their official code."""


def check_rates(lr: float, weight_decay: float, betas: tuple[float, ...], warmup_lr: float = 0.0, min_lr: float = 0.0) -> None:
    """
    Raises:
        ValueError: a number of an AdamW and its schedule is out of its range, or no number.
    """
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise UserError(f"model: lr above 0, weight_decay not below 0, both finite; got {lr}, {weight_decay}")
    if not 0 <= min_lr <= lr or not 0 <= warmup_lr <= lr:
        raise UserError(f"model: min_lr and warmup_lr within 0 to lr; got {min_lr}, {warmup_lr} with lr {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"model.betas are at least 0 and below 1, got {list(betas)}")


def check_warmup(warmup_epochs: float) -> None:
    """
    Raises:
        ValueError: it is no number of epochs.
    """
    if not 0 <= warmup_epochs < math.inf:
        raise UserError(f"model.warmup_epochs is a number of epochs, not below 0: got {warmup_epochs}")


def parameter_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what learns in `modules`, with weight decay and without.

    1-D parameters, positions and tokens do not decay, but for those that a student names in `decayed`. (The official codes
    keep tokens as [1 1 d] and spare 1-D parameters, so that a token decays unless their own list spares it; which ones do is
    said in `unimim.letters.initialization`.)
    """
    groups: dict[float, dict[str, Any]] = {}
    for module in modules:
        named = {id(parameter) for parameter in decayed(module)}
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=undecayed(module)):
            for parameter in group["params"]:
                rate = weight_decay if id(parameter) in named else group["weight_decay"]
                groups.setdefault(rate, {"params": [], "weight_decay": rate})["params"].append(parameter)
    return list(groups.values())


def decayed(module: nn.Module) -> list[nn.Parameter]:
    """What the students and heads within `module` name in their `decayed`."""
    return [
        parameter
        for part in module.modules()
        for name, parameter in part.named_parameters()
        if name.rpartition(".")[2] in getattr(part, "decayed", ())
    ]


def undecayed(module: nn.Module) -> set[str]:
    """The positions and tokens of every backbone within `module`, by their parameter's name.

    Backbones name them in `no_weight_decay()`. BEiT's bias tables do decay in the official code, against timm's list.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
        if not (isinstance(part, Beit) and name.endswith("relative_position_bias_table"))
    }


def layer_decay_groups(backbone: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups for fine-tuning: the lower a layer, the lower its learning rate.

    A layer of id i learns with `lr * layer_decay ** (last - i)`, `last` being the id of the head: depth + 1 (see `layer_ids`).
    The rate is in each group, so any optimizer and scheduler of torch applies it. 1-D parameters, positions and tokens do
    not decay; of the bias tables, BEiT's do and Swin's do not. Groups are named `layer_3` and `layer_3_no_decay`, which
    is what Lightning's LearningRateMonitor shows.

    Args:
        backbone: a timm model, with or without its classifier, or a wrapper of one; what needs no gradient is in no group.
        lr: of the head, absolute.
        weight_decay: of what decays.
        layer_decay: factor from each layer to the one below; 1 for none.
    """
    ids = layer_ids(backbone)
    network = timm_model(backbone)
    last = depth(network) + 1 if isinstance(network, FAMILIES) else max(ids.values())
    kept = undecayed(backbone)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in kept)
        key = f"layer_{ids[name]}" if decays else f"layer_{ids[name]}_no_decay"
        if key not in groups:
            rate = lr * layer_decay ** (last - ids[name])
            groups[key] = {"params": [], "name": key, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def layer_ids(backbone: Any) -> dict[str, int]:
    """Which layer each parameter of a timm model belongs to: 0 the embedding, 1 ... depth the blocks, depth + 1 the rest.

    The ids are those of each family's official code: MAE's for a ViT, BEiT v2's for BEiT, EVA's for EVA, SimMIM's (and Swin's
    own) for Swin. timm's `group_matcher` differs from them in three places: it has the final norm with the last block
    (they: with the head), a bias table that BEiT's blocks share with the embedding (with the head), and Swin's downsampling,
    which timm moved to the start of the next stage, with that stage's first block (with the last block before it).

    Other families have timm's own layers, uncorrected; the head's id is then the highest. What a wrapper of the model (peft's,
    torch.compile's) adds within a layer is of that layer, and what it adds beside the model has the head's id.
    """
    network = timm_model(backbone)
    if network is not backbone:
        ids = layer_ids(network)
        head = depth(network) + 1 if isinstance(network, FAMILIES) else max(ids.values())
        of = {id(parameter): ids[name] for name, parameter in network.named_parameters()}
        return {name: of.get(id(parameter), head) for name, parameter in backbone.named_parameters()}
    if not hasattr(backbone, "group_matcher"):
        return dict(auto_group_layers(backbone))
    ids = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    if isinstance(backbone, FAMILIES):
        head = depth(backbone) + 1
        for name in ids:
            if name.startswith(("norm.", "rel_pos_bias.")):
                ids[name] = head
            elif isinstance(backbone, SwinTransformer) and ".downsample." in name:
                ids[name] -= 1
    return ids


def depth(backbone: Any) -> int:
    """The number of blocks of a ViT, BEiT, EVA or Swin."""
    stages = backbone.layers if isinstance(backbone, SwinTransformer) else [backbone]
    blocks: list[Any] = [stage.blocks for stage in stages]
    return sum(map(len, blocks))


def fused_adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> AdamW:
    """torch's fused AdamW, which skips an update on the device where `found_inf` says so (see `faults.SkipNonFinite`).

    With `precision: 16-mixed` the gradients are unscaled before the step and not within it, as they have to be for clipping.
    It stays fused when the state of one that was not is loaded.

    Raises:
        ValueError: nothing learns.
    """
    if not any(group["params"] for group in groups):
        raise UserError("nothing is left to learn, every parameter has requires_grad=False: let some of them learn")
    optimizer: Any = AdamW(groups, lr=lr, betas=betas, fused=True)
    optimizer.register_load_state_dict_pre_hook(as_fused)
    optimizer._step_supports_amp_scaling = False  # else Lightning refuses to clip, and the GradScaler sets found_inf itself
    return optimizer


def as_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict as one of a fused optimizer: its counts of steps are then loaded to the weights' device.

    Raises:
        ValueError: it is of other groups of parameters.
    """
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if theirs != ours or misplaced(optimizer, state):
        raise UserError(
            f"the checkpoint's optimizer has groups of {theirs} parameters, this one of {ours}"
            f"{', of other shapes' if theirs == ours else ''}: what decays, or how much by layer, was chosen otherwise when "
            f"that run began; give its own configuration, --config RUN/config.yaml, with which it goes on as it began"
        )
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def misplaced(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Returns whether a state dict has an average of another shape than the parameter that would get it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    found = ((state["state"].get(index, {}).get("exp_avg"), one) for index, one in zip(indices, parameters, strict=True))
    # FSDP1 has parts of parameters, in one dimension
    return any(average is not None and average.shape != one.shape for average, one in found if one.ndim > 1)


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> LambdaLR:
    """Linear from `warmup_lr` to the optimizer's lr in `warmup_steps`, then a half cosine to `min_lr` at `total_steps`.

    To be stepped once per optimizer step. Rates are absolute, for the largest of the optimizer's groups; groups of a lower
    lr are scaled alike.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    first, last = warmup_lr / peak, min_lr / peak  # when both are 0, the factors below do not depend on the peak

    def factor(step: int) -> float:
        if step < warmup_steps:
            return first + (1 - first) * step / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)


def schedule(
    optimizer: Optimizer, trainer: pl.Trainer, warmup_epochs: float, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and `warmup_cosine` over all steps of this training.

    Accumulation is accounted for, also where it changes by epoch; `warmup_epochs` may be a part of one, and is cut to the
    length of the training.

    Raises:
        ValueError: as `optimizer_steps`; a warm-up over epochs of data without a length.
    """
    total_steps = optimizer_steps(trainer)
    if warmup_epochs and trainer.num_training_batches == math.inf:
        raise UserError(
            f"model.warmup_epochs is {warmup_epochs:g}, but the data is a stream, whose epoch has no length: set "
            f"trainer.limit_train_batches to the batches of an epoch, or warmup_epochs to 0"
        )
    steps = [steps_in(trainer, epoch) for epoch in range(math.ceil(warmup_epochs))]
    warmup = warmup_epochs * steps[0] if len(set(steps)) == 1 else sum(steps[:-1]) + (warmup_epochs % 1 or 1) * sum(steps[-1:])
    warmup_steps = min(round(warmup), total_steps)
    scheduler = warmup_cosine(optimizer, warmup_steps, total_steps, warmup_lr, min_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_poly(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, warmup_ratio: float = 1e-6, power: float = 1.0
) -> LambdaLR:
    """(1 - step / total_steps) ** power, times a warm-up that is linear from `warmup_ratio` to 1 in `warmup_steps`.

    As in mmcv 1, which BEiT v2's segmentation uses, the fall to 0 begins at step 0 and goes on under the warm-up, so that the
    rate never reaches the optimizer's lr. (mmengine, its successor, begins the fall where the warm-up ends.) To be stepped
    once per optimizer step.
    """

    def factor(step: int) -> float:
        fall = max(0.0, 1 - step / total_steps) ** power
        done = step / warmup_steps if step < warmup_steps else 1.0
        return fall * (warmup_ratio + (1 - warmup_ratio) * done)

    return LambdaLR(optimizer, factor)


def optimizer_steps(trainer: pl.Trainer) -> int:
    """All steps of this training, as `all_steps`.

    Raises:
        ValueError: it has no end, or no batch.
    """
    limit: Any = trainer.limit_train_batches
    if limit == 0:
        raise UserError(f"there is nothing to train on: trainer.limit_train_batches is {limit}")
    steps = all_steps(trainer)
    if steps == math.inf and trainer.max_epochs == -1:
        raise UserError("an endless training has no cosine and no poly: set trainer.max_epochs or trainer.max_steps")
    if steps == math.inf:
        raise UserError(
            "the data is a stream, whose epoch has no length, so that cosine and poly have no end: set trainer.max_steps, or "
            "trainer.limit_train_batches to the batches of an epoch"
        )
    if trainer.num_training_batches == 0:
        batch = getattr(trainer.train_dataloader, "batch_size", None)
        raise UserError(
            f"{trainer.world_size} devices share the data, and none has a whole batch of {batch}: lower data.batch_size"
        )
    return int(steps)


def all_steps(trainer: pl.Trainer) -> float:
    """The steps of the optimizer in this training; infinity where it has no end, or its epochs no length.

    Unlike Lightning's `estimated_stepping_batches`, it knows a GradientAccumulationScheduler, which changes from epoch to epoch
    how many batches an update has.
    """
    trainer.fit_loop.setup_data()
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs in (None, -1) or trainer.num_training_batches == math.inf:
        return limit
    return min(limit, sum(steps_in(trainer, epoch) for epoch in range(max(1, trainer.max_epochs))))


def steps_in(trainer: pl.Trainer, epoch: int) -> int:
    """Steps of the optimizer in an epoch; the last of it may be of fewer batches."""
    return math.ceil(trainer.num_training_batches / accumulated(trainer, epoch))


def fitting_lr(lr: float, images: int, recipe_batch: int | None, scale_lr: bool) -> float:
    """The learning rate for a step of `images`: `lr`, or where `scale_lr` asks for it `lr * images / recipe_batch`.

    Says so where the step is not the recipe's; `recipe_batch` None is silent.
    """
    if recipe_batch is None or images == recipe_batch:
        return lr
    fitting = lr * images / recipe_batch
    if scale_lr:
        rank_zero_info(f"{images} images a step, the recipe has {recipe_batch}: lr {lr:g} becomes {fitting:g}")
        return fitting
    rank_zero_warn(
        f"{images} images a step, but lr {lr:g} is meant for {recipe_batch}: {fitting:g} would fit "
        f"(--model.scale_lr true takes it)"
    )
    return lr
