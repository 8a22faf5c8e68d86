"""The trainings of `test_sharding`, all in one start of two processes: `sharding_runs.py FOLDER` writes what it finds."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytorch_lightning as pl
import torch
from conftest import PLAIN, tiny_model, tiny_student
from einops import reduce
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from unimim import (
    CenteredSoftmax,
    DecoderHead,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    FineTuning,
    LayerNorm,
    LinearHead,
    MaskedImageModeling,
    Masking,
    PixelTarget,
    PrototypeHead,
    SoftCrossEntropyLoss,
    Term,
    UperNetSegmentation,
)
from unimim.data.folder import each_once
from unimim.shapes import Grid
from unimim.tasks.probing import extract_features
from unimim.training.faults import SkipNonFinite

IMAGES = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 6
PIXELS = torch.randint(0, 5, (16, 32, 32), generator=torch.Generator().manual_seed(2))
BATCH = 4
CLIP = 0.01
BARRIERS = Mock(wraps=distributed.barrier)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "gradient_clip_val": CLIP,
}


class DarkestFirst(Masking):
    """Hides the six darkest patches: a mask that depends on nothing but the image."""

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        h, w = grid_size
        brightness = reduce(images, "b c (h p) (w q) -> b h w", "mean", h=h, w=w)
        hidden = brightness.flatten(1).argsort(1).argsort(1) < 6
        return hidden.view(brightness.shape)


def noisy(model: nn.Module) -> Any:
    """Every parameter filled with noise: the same in every process and run."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def pretraining(kind: str, **parts: Any) -> MaskedImageModeling:
    torch.manual_seed(0)
    return tiny_model(student=tiny_student(kind), masking=DarkestFirst(), lr=1e-3, warmup_epochs=0, **parts)


def beit() -> MaskedImageModeling:
    """With a frozen teacher."""
    network = noisy(nn.Conv2d(3, 6, 8, 8))
    teacher = FeatureTarget(network, dim=6, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    return noisy(pretraining("beit_shared_bias", teacher=teacher))


def mae() -> MaskedImageModeling:
    return noisy(pretraining("visible_vit", head=partial(DecoderHead, width=16, depth=2, num_heads=2), checkpointing=True))


def data2vec() -> MaskedImageModeling:
    return pretraining("vit", teacher=EMATarget(top_blocks=2, momentum=0.5), normalization=LayerNorm())


def ibot() -> MaskedImageModeling:
    return pretraining(
        "beit_bias_per_block",
        teacher=EMAHeadTarget(prototypes=12, momentum=0.5, final_momentum=1.0),
        normalization=CenteredSoftmax(channels=12),
        head=partial(PrototypeHead, hidden=16, bottleneck=8),
        loss=SoftCrossEntropyLoss(),
    )


def several_terms() -> MaskedImageModeling:
    """The average's target, pixels, and a head that shares the first term's teacher."""
    terms = {
        "pixels": Term(PixelTarget(8), LayerNorm(), LinearHead, nn.MSELoss()),
        "all": Term("first", LayerNorm(), LinearHead, nn.SmoothL1Loss(), "all", 0.5),
    }
    return pretraining("vit", teacher=EMATarget(top_blocks=2, momentum=0.5), normalization=LayerNorm(), terms=terms)


class Inferring(FineTuning):
    """Validates in inference mode, as Lightning does on a GPU (and on a CPU with gloo does not)."""

    def on_validation_epoch_start(self) -> None:
        with torch.inference_mode():
            super().on_validation_epoch_start()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        with torch.inference_mode():
            super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        with torch.inference_mode():
            super().on_validation_epoch_end()


def finetune(name: str = "vit_tiny_patch16_224", **changes: Any) -> FineTuning:
    given = {"model_args": PLAIN, "num_classes": 6, "lr": 1e-3, "warmup_epochs": 0, "label_smoothing": 0.0, **changes}
    return noisy(Inferring(name, **given))


def swin() -> FineTuning:
    narrow = {"img_size": 32, "patch_size": 1, "embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}
    return finetune("swin_tiny_patch4_window7_224", model_args={**narrow, "window_size": 4, "drop_path_rate": 0.0})


def segment(**changes: Any) -> UperNetSegmentation:
    """Its batch norms see the images of a process, for torch cannot synchronise them on a CPU; their statistics stay."""
    model_args = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
    given = {"model_args": model_args, "num_classes": 5, "channels": 8, "dropout": 0.0, "lr": 1e-4, "warmup_steps": 0}
    model = noisy(UperNetSegmentation("vit_tiny_patch16_224", **{**given, **changes}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


TASKS: dict[str, Callable[[], Any]] = {
    "beit": beit,
    "mae": mae,
    "data2vec": data2vec,
    "ibot": ibot,
    "several terms": several_terms,
    "finetune": partial(finetune, checkpointing=True),
    "swin": swin,
    "segment": segment,
}


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Five images of several sizes: some are one window of 32 pixels, some are more."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        sides = (32, 32 + 16 * index)
        return torch.rand(3, *sides, generator=generator), torch.randint(0, 5, sides, generator=generator)


class Data(pl.LightningDataModule):
    """Always the same images in the same order; five to validate on, which two processes cannot share evenly."""

    def __init__(self, task: pl.LightningModule, processes: int = 2) -> None:
        super().__init__()
        self.processes = processes
        kind = "segment" if isinstance(task, UperNetSegmentation) else "classify" if isinstance(task, FineTuning) else "images"
        self.training: Any = {
            "images": IMAGES,
            "classify": TensorDataset(IMAGES, LABELS),
            "segment": TensorDataset(IMAGES, PIXELS),
        }[kind]
        self.validation: Any = {"images": [], "classify": TensorDataset(IMAGES[:5], LABELS[:5]), "segment": Scenes()}[kind]

    def train_dataloader(self) -> Any:
        rank = distributed.get_rank() if self.processes > 1 else 0
        in_order = DistributedSampler(self.training, self.processes, rank, shuffle=False)
        return DataLoader(self.training, BATCH // self.processes, sampler=in_order)

    def val_dataloader(self) -> Any:
        if not len(self.validation):
            return []
        return DataLoader(self.validation, 1, sampler=each_once(self.validation))


class Spy(pl.Callback):
    """The loss as logged and the norm of the gradients, and the gradients of the first step, all before clipping."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gradients = {name: whole(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients = self.gradients or gradients
        self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


class NaNOnOne(nn.Module):
    """MSE; in the second process one call's loss is not a number, though its gradient is."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.count = call, 0

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.count += 1
        bad = distributed.is_initialized() and distributed.get_rank() == 1 and self.count - 1 == self.call
        return nn.functional.mse_loss(prediction, target) + (torch.nan if bad else 0.0)


class NaNInAShard(pl.Callback):
    """In the second process's part of one gradient, in the third step."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            gradient: Any = pl_module.head.linear.weight.grad
            gradient.to_local()[0, 0] = torch.nan


class LeaveOut(pl.Callback):
    """The third update, of which no gradient is left."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 2:
            optimizer.zero_grad()


class Barriers(pl.Callback):
    """How many there are in each step, its loss in this process, and the loss as logged after it."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.losses: list[float] = []
        self.logged: list[float | None] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = BARRIERS.call_count

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.counts.append(BARRIERS.call_count - self.before)
        self.losses.append(float(outputs["loss"]))
        logged = trainer.callback_metrics.get("train/loss")
        self.logged.append(None if logged is None else float(logged))


class Features(pl.Callback):
    """The encoder's features at the end of an epoch, as `KNNCallback` takes them."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backbone: Any = pl_module.student.backbone
        with torch.no_grad():
            self.found, _ = extract_features(backbone, [(IMAGES[:3], LABELS[:3])])


def fsdp2(**options: Any) -> Strategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)


def fit(
    model: Any,
    strategy: Any = "auto",
    processes: int = 2,
    resume: Path | None = None,
    callbacks: list[pl.Callback] | None = None,
    **options: Any,
) -> pl.Trainer:
    """Trains for an epoch: four steps; rank 1 begins with other weights, which count nothing."""
    keeping = any(isinstance(callback, ModelCheckpoint) for callback in callbacks or [])
    given = {"max_epochs": 1, "callbacks": callbacks or [], "enable_checkpointing": keeping, **QUIET, **options}
    trainer = pl.Trainer(devices=processes, strategy=strategy, **given)
    if processes > 1 and trainer.global_rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    trainer.fit(model, datamodule=Data(model, processes), ckpt_path=resume, weights_only=True)
    return trainer


def whole(value: Tensor) -> Tensor:
    """A copy, gathered."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, gathered."""
    return {key: whole(value) for key, value in model.state_dict().items()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two state dicts."""
    assert one.keys() == other.keys()
    differences = {key: float((one[key].float() - other[key].float()).abs().max()) for key in one}
    return max(value for key, value in differences.items() if "num_batches_tracked" not in key)


def metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def strategies_compared(folder: Path) -> Iterator[tuple[str, Any]]:
    """The same training under DDP and under FSDP2."""
    for name, make in TASKS.items():
        options = {"accumulate_grad_batches": 2} if name == "swin" else {}
        spies, features = [Spy(), Spy()], [Features(), Features()]
        pretrains = name in ("beit", "mae", "data2vec", "ibot", "several terms")
        ours, sharded = make(), make()
        start = whole_weights(ours)
        watch = [[spy, feature] if pretrains else [spy] for spy, feature in zip(spies, features, strict=True)]
        one = fit(ours, "ddp", callbacks=watch[0], **options)
        other = fit(sharded, fsdp2(), callbacks=watch[1], **options)
        learning = [parameter for parameter in sharded.parameters() if parameter.requires_grad]
        weights = whole_weights(ours), whole_weights(sharded)
        networks = sharded.teacher.networks() if pretrains else []
        yield (
            name,
            {
                "difference": furthest(*weights),
                "moved": furthest(start, weights[0]),
                "in shards": all(isinstance(parameter, DTensor) for parameter in learning),
                "share": sum(p.to_local().numel() for p in learning) / sum(p.numel() for p in learning),
                "frozen": [type(parameter).__name__ for network in networks for parameter in network.parameters()],
                "least norm": min(spies[0].norms),
                "last norm": [spy.norms[-1] for spy in spies],
                "guard's norm": [float(model.guard.norm) for model in (ours, sharded)],
                "losses": [spy.losses for spy in spies],
                "metrics": [metrics(one), metrics(other)],
                "counted": [int(model.confusion.confmat.sum()) for model in (ours, sharded) if name == "segment"],
                "features": float((features[0].found - features[1].found).abs().max()) if pretrains else 0.0,
            },
        )
        if one.global_rank == 0:
            torch.save([spy.gradients for spy in spies], folder / f"{name}.gradients")


def skipped() -> dict[str, Any]:
    """Of four updates the third, which is not finite in one process, against a training of which it is left out."""
    strange = partial(pretraining, "vit", max_skipped_updates=1)
    runs = {
        "left out": (strange(), fsdp2(), [LeaveOut()]),
        "made": (strange(), fsdp2(), []),
        "loss": (strange(loss=NaNOnOne(3)), fsdp2(), []),
        "loss, DDP": (strange(loss=NaNOnOne(3)), "ddp", []),
        "shard": (strange(), fsdp2(), [NaNInAShard()]),
    }
    weights, found = {}, {}
    for name, (model, strategy, callbacks) in runs.items():
        trainer = fit(noisy(model), strategy, callbacks=callbacks)
        weights[name] = whole_weights(model)
        moments: Any = trainer.optimizers[0].state.values()
        steps = {float(whole(state["step"])) for state in moments}
        found[name] = {
            "skipped": int(model.guard.skipped),
            "steps": sorted(steps),
            "difference": furthest(weights["left out"], weights[name]),
        }
    ends: list[Any] = [None, None]
    for name, make, callbacks in (
        ("loss", partial(NaNOnOne, 3), []),
        ("shard", nn.MSELoss, [NaNInAShard()]),
    ):
        said: dict[str, str] = {}
        with refused(said, name):
            fit(noisy(pretraining("vit", loss=make())), fsdp2(), callbacks=callbacks)
        distributed.all_gather_object(ends, said[name])
        found[name]["ends"] = list(ends)
    return found


def norm_of_both_kinds() -> dict[str, float]:
    """As the guard and a literal one find it: of a gradient in shards, one that is whole, and one of three rows in shards."""
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    parameters, gradients = [], [torch.randn(rows, 4, generator=generator) for rows in (6, 5, 1)]
    for gradient, sharded in zip(gradients, (True, False, True), strict=True):
        parameters.append(nn.Parameter(distribute_tensor(gradient, mesh, [Shard(0)]) if sharded else gradient.clone()))
        parameters[-1].grad = parameters[-1].detach().clone()
    trainer: Any = SimpleNamespace(
        world_size=2,
        global_step=0,
        precision_plugin=None,
        log_every_n_steps=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    guard, model = SkipNonFinite(), beit()
    with CommDebugMode() as counted:
        guard.on_before_optimizer_step(trainer, model, torch.optim.SGD(parameters))
    literal = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return {"ours": float(guard.norm), "literal": float(literal), "collectives": counted.get_total_counts()}


def logged_as_on_a_gpu() -> dict[str, Any]:
    """Three steps, of which the second is logged."""
    spy = Barriers()
    only_logged = patch("unimim.tasks.task.may_wait", lambda trainer: trainer._logger_connector.should_update_logs)
    with only_logged, patch("torch.distributed.barrier", BARRIERS):
        fit(finetune(), "ddp", callbacks=[spy], log_every_n_steps=2, num_sanity_val_steps=0, limit_train_batches=3)
    losses: list[Any] = [None, None]
    distributed.all_gather_object(losses, spy.losses)
    return {"barriers": spy.counts, "logged": spy.logged, "losses": losses}


def half_precision() -> dict[str, Any]:
    """bf16-mixed against DDP's, and against float32; and what bf16-true keeps."""
    ours, mixed, single, half = beit(), beit(), beit(), beit()
    fit(ours, "ddp", precision="bf16-mixed")
    fit(mixed, fsdp2(), precision="bf16-mixed")
    fit(single, fsdp2())
    fit(half, fsdp2(), precision="bf16-true")
    return {
        "kept": sorted({str(parameter.dtype) for parameter in mixed.parameters()}),
        "kept in half": sorted({str(parameter.dtype) for parameter in half.parameters()}),
        "difference": furthest(whole_weights(ours), whole_weights(mixed)),
        "from single": furthest(whole_weights(single), whole_weights(mixed)),
    }


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)


def resumed(folder: Path, name: str, options: dict[str, Any]) -> float:
    """How far two epochs are from one, a file, and another."""
    model = data2vec()
    trainer = fit(model, fsdp2(**options), callbacks=[each_epoch(folder / name)], max_epochs=2)
    again = noisy(data2vec())
    fit(again, fsdp2(**options), resume=folder / name / "0.ckpt", max_epochs=2)
    weights = whole_weights(model)
    if trainer.global_rank == 0:
        torch.save(weights, folder / f"{name}.weights")
    return furthest(weights, whole_weights(again))


def averaged(folder: Path) -> dict[str, float]:
    """An average of the weights under DDP: two epochs against one, a file, and another."""
    ends = []
    for resume in (None, folder / "averaged" / "0.ckpt"):
        model = finetune()
        average = EMAWeightAveraging(decay=0.5, use_buffers=False)
        keep = each_epoch(folder / ("again" if resume else "averaged"))
        fit(model, "ddp", callbacks=[average, keep], max_epochs=2, resume=resume)
        kept = {f"average.{key}": value for key, value in average._average_model.state_dict().items()}
        ends.append({**whole_weights(model), **kept})
    return {"difference": furthest(*ends)}


@contextmanager
def refused(found: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
        found[name] = "nothing"
    except (ValueError, RuntimeError, FloatingPointError) as error:
        found[name] = f"{type(error).__name__}: {error}"


def refusals() -> dict[str, str]:
    found: dict[str, str] = {}
    with refused(found, "average"):
        fit(finetune(), fsdp2(), callbacks=[EMAWeightAveraging()])
    with refused(found, "tensor parallel"):
        fit(finetune(), ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))
    with refused(found, "whole"):
        fit(segment(inference="whole"), fsdp2())
    with refused(found, "batch norm"):
        fit(finetune("resnet10t", model_args={}), fsdp2(), sync_batchnorm=True, num_sanity_val_steps=0)
    return found


def main(folder: Path) -> None:
    found: dict[str, Any] = {"tasks": dict(strategies_compared(folder)), "half": half_precision()}
    found["resumed"] = {
        "shards": resumed(folder, "shards", {"save_distributed_checkpoint": True}),
        "file": resumed(folder, "file", {"save_distributed_checkpoint": False}),
    }
    found["averaged"] = averaged(folder)
    found["skipped"] = skipped()
    found["norms"] = norm_of_both_kinds()
    found["logged"] = logged_as_on_a_gpu()
    found["refused"] = refusals()
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
