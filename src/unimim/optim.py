"""The optimizer's side of every recipe: which parameters decay, and the learning rate of each step."""

import math
from typing import Any

import pytorch_lightning as pl
from timm.models.beit import Beit
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what learns in `modules`, with weight decay and without.

    1-D parameters, positions and tokens do not decay.
    """
    groups: dict[float, dict[str, Any]] = {}
    for module in modules:
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=undecayed(module)):
            merged = groups.setdefault(group["weight_decay"], {"params": [], "weight_decay": group["weight_decay"]})
            merged["params"].extend(group["params"])
    return list(groups.values())


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


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> LambdaLR:
    """Linear from `warmup_lr` to the optimizer's lr in `warmup_steps`, then a half cosine to `min_lr` at `total_steps`.

    To be stepped once per optimizer step. Rates are absolute, for the largest of the optimizer's groups; groups of a lower
    lr are scaled alike.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (warmup_lr + (peak - warmup_lr) * step / warmup_steps) / peak
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return (min_lr + (peak - min_lr) * (1 + math.cos(math.pi * done)) / 2) / peak

    return LambdaLR(optimizer, factor)


def schedule(
    optimizer: Optimizer, trainer: pl.Trainer, warmup_epochs: float, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and `warmup_cosine` over all steps of this training.

    Accumulation is accounted for; `warmup_epochs` may be a part of one, and is cut to the length of the training.

    Raises:
        ValueError: the training has no end.
    """
    if trainer.estimated_stepping_batches == math.inf:
        raise ValueError("an endless training has no cosine: set trainer.max_epochs or trainer.max_steps")
    total_steps = int(trainer.estimated_stepping_batches)
    trainer.fit_loop.setup_data()  # the line above leaves the data alone when max_steps is given
    steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), total_steps)
    scheduler = warmup_cosine(optimizer, warmup_steps, total_steps, warmup_lr, min_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
