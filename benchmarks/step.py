"""One optimizer step of a pretraining recipe: where its time goes, and how near it comes to the machine's own matmuls.

    make bench   (python benchmarks/step.py)                          MaskDistill and MAE, outputs/bench/step_RECIPE.json
    python benchmarks/step.py conf/pretrain/NAME.yaml --batch_size 8 --device cuda --precision bf16-mixed

Random weights and random images; the recipe's letters, its optimizer and clipping, the guard against updates that are not
finite and the EMA of a teacher that has one: what a step of Lightning's loop is. Beside it are, in turn with the steps, the
multiplications of the step (their operands as they lie there), and for MAE the model of transformers. `share of matmul rate`
is what the dense model would need (the student three times its forward pass, the teacher once, head on all tokens) by the
time, over the rate of the multiplications, each in the quickest way that torch has for it, so that work left out counts as
speed. The peak of memory is that of a process of its own, imports included. On a GPU the blocks are compiled, beside them not,
and a step that waits for the device is an error.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from report import in_turn, machine, peak_gib, report, wait
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unimim import AttentiveMasking, CPUPrecision, MaskedImageModeling
from unimim.cli.tasks import Parser, draw_weights
from unimim.tasks.optim import fused_adamw, parameter_groups

RECIPES = ("conf/pretrain/maskdistill_vit_base.yaml", "conf/pretrain/mae_vit_base.yaml")
PARTS = ("teacher", "student forward", "head forward", "backward", "optimizer")
WAYS_OF_A_TEACHER = ("forward", "forward_image", "forward_both")
THEIRS = "transformers (reference)"


Precision = Callable[[], AbstractContextManager[Any]]


def built(recipe: str) -> MaskedImageModeling:
    """The recipe's model; its teacher has random weights."""
    parser = Parser()
    parser.add_lightning_class_args(MaskedImageModeling, "model")
    config = parser.parse_object({"model": yaml.safe_load(Path(recipe).read_text())["model"]})
    draw_weights(config.model)
    model: MaskedImageModeling = parser.instantiate(config).model
    return model


def trainer(device: str, precision: str, gradient_clip_val: float | None = None) -> pl.Trainer:
    """One that never runs: its precision and clipping are used, and the guard asks it."""
    plugins = [CPUPrecision()] if (device, precision) == ("cpu", "32-true") else []
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    plain: Any = {"precision": None if plugins else precision, "gradient_clip_val": gradient_clip_val, "logger": False}
    return pl.Trainer(accelerator=device, devices=1, plugins=plugins, **plain, **quiet)


class Step:
    """One optimizer step of a model on a batch that stays the same.

    Args:
        model: as built.
        images: [b 3 H W].
        trainer: its precision and clipping.
    """

    def __init__(self, model: MaskedImageModeling, images: Tensor, trainer: pl.Trainer) -> None:
        self.model, self.images, self.trainer = model, images, trainer
        on_cpu = isinstance(trainer.precision_plugin, CPUPrecision)
        trainer.precision_plugin.connect(model, [], [])
        self.autocast: Precision = nullcontext if on_cpu else trainer.precision_plugin.forward_context
        """In which others compute; ours has the context below."""
        self.context: Precision = trainer.precision_plugin.forward_context
        self.device = images.device.type
        self.calls: dict[nn.Module, Any] = {}
        groups = parameter_groups([model], model.weight_decay)
        self.optimizer = fused_adamw(groups, 1e-6, model.betas)  # so that nothing diverges
        model.log = lambda *_, **__: None  # type: ignore[method-assign]  # nothing is logged
        model.guard.on_fit_start(trainer, model)

    def __call__(self) -> None:
        """The whole step."""
        with self.context():
            loss = self.model.training_step(self.images, 0)
        self.backward(loss)
        self.update()

    def backward(self, loss: Tensor) -> None:
        """The gradients."""
        self.model.guard.on_before_backward(self.trainer, self.model, loss)
        loss.backward()

    def update(self) -> None:
        """What follows the gradients, in Lightning's order."""
        model, trainer = self.model, self.trainer
        model.guard.on_before_optimizer_step(trainer, model, self.optimizer)
        trainer.precision_plugin.clip_gradients(self.optimizer, trainer.gradient_clip_val or 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for teacher, head in model.teachers.items():
            teacher.update(model.student, head, 0.0)

    def compiled(self) -> None:
        """With each block compiled, as `compiled` has it on a GPU; what comes after is not."""
        if not self.calls:
            self.model.compile_blocks()
            self.calls = {part: part._compiled_call_impl for part in self.parts() if part._compiled_call_impl}
        for part, call in self.calls.items():
            part._compiled_call_impl = call
        self()
        for part in self.calls:
            part._compiled_call_impl = None

    def parts(self) -> list[nn.Module]:
        """All modules, the teacher's frozen networks too."""
        frozen = [network for teacher in self.model.teachers for network in teacher.networks()]
        return [part for whole in (self.model, *frozen) for part in whole.modules()]

    def split(self) -> dict[str, float]:
        """Seconds of each part of a step, for which the device is waited for in between."""
        model, seconds = self.model, dict.fromkeys(PARTS, 0.0)
        heads = {term.head: None for term in model.terms.values()}
        letters = [("student forward", model.student, "forward"), *(("head forward", head, "forward") for head in heads)]
        letters += [("teacher", teacher, way) for teacher in model.teachers for way in WAYS_OF_A_TEACHER]
        if isinstance(model.masking, AttentiveMasking):  # which asks the teacher, and the teacher remembers what it said
            letters.append(("teacher", model.masking, "forward"))
        within: list[str] = []

        def timed(name: str, call: Callable[..., Any]) -> Any:
            def timing(*arguments: Any) -> Any:
                if within:  # a letter that another one calls counts as a part of that one
                    return call(*arguments)
                within.append(name)
                wait(self.device)
                start = perf_counter()
                result = call(*arguments)
                wait(self.device)
                seconds[name] += perf_counter() - start
                within.clear()
                return result

            return timing

        for name, letter, way in letters:
            setattr(letter, way, timed(name, getattr(letter, way)))
        whole = perf_counter()
        with self.context():
            loss = model.training_step(self.images, 0)
        timed("backward", self.backward)(loss)
        timed("optimizer", self.update)()
        for _, letter, way in letters:
            delattr(letter, way)  # that of its class again
        rest = perf_counter() - whole - sum(seconds.values())
        return seconds | {"rest": rest}


def dense_flops(step: Step) -> float:
    """Of a dense step: the teacher's forward pass, and three times that of student and head, this on all tokens it gets.

    Attention is counted as two plain products: not every version of torch knows what its fused kernel for CPUs takes.
    """
    model, images = step.model, step.images
    grid = model.student.grid_size
    with torch.no_grad(), step.autocast(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as of_teacher:
            for term in model.terms.values():
                term.run(images, grid, term.selection)  # a teacher that terms share runs once
        mask = model.masking(images, grid)
        with FlopCounterMode(display=False) as of_student:
            tokens = model.student(images, mask)
            for term in model.terms.values():
                selected = term.select(mask)
                term.head(tokens, mask, selected if model.student.drops_patches or term.selection == "image" else mask.full())
    return float(of_teacher.get_total_flops() + 3 * of_student.get_total_flops())


class Multiplications(TorchDispatchMode):
    """Counts the 2-D multiplications within it, by shapes, strides and type of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        match str(function):  # torch may be without oneDNN
            case "aten.mm.default" | "aten.addmm.default":
                self.count(*args[-2:])
            case "mkldnn._linear_pointwise.default":
                self.count(args[0].flatten(0, -2), args[1].t())
            case "aten.mkldnn_linear_backward_weights.default":
                gradient, input = (operand.to_dense() for operand in args[:2])
                self.count(gradient.t(), input)
        return function(*args, **(kwargs or {}))

    def count(self, a: Tensor, b: Tensor) -> None:
        """[m k], [k n]"""
        self.found[(*a.shape, b.shape[1], a.stride(), b.stride(), a.dtype)] += 1


WAYS: dict[str, Callable[..., Tensor]] = {
    "torch.mm": lambda a, b, result: torch.mm(a, b, out=result),
    "oneDNN": lambda a, b, _: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""),
    "oneDNN, as weights' gradients": lambda a, b, _: torch.ops.aten.mkldnn_linear_backward_weights(
        a.t().to_mkldnn(), b.to_mkldnn(), b, False
    )[0],
}
"""How torch multiplies [m k], [k n], with memory for a result, to [m n]: those of oneDNN on a CPU in float32 alone."""


class Matmuls:
    """The step's own multiplications, each kind once in each way that torch has for it.

    Args:
        step: whose.
        share: kinds that make up less than this share of all FLOPs are left out.
    """

    def __init__(self, step: Step, share: float = 0.005) -> None:
        with Multiplications() as counting:
            step()
        flops = {kind: 2.0 * kind[0] * kind[1] * kind[2] * count for kind, count in counting.found.items()}
        kinds = [kind for kind in flops if flops[kind] >= share * sum(flops.values())]
        self.device = step.device
        self.weights = {kind: flops[kind] for kind in kinds}
        self.operands = {kind: self.tensors(*kind) for kind in kinds}
        self.rates = {kind: {way: list[float]() for way in self.ways(kind[-1])} for kind in kinds}

    def ways(self, dtype: torch.dtype) -> list[str]:
        """Those of `WAYS` that there are."""
        has_onednn = self.device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        return list(WAYS) if has_onednn else ["torch.mm"]

    def tensors(self, m: int, k: int, n: int, of_a: Any, of_b: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Two operands and a result."""
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype, device=self.device).normal_()
            for shape, stride in (((m, k), of_a), ((k, n), of_b))
        )
        return a, b, torch.empty(m, n, dtype=dtype, device=self.device)

    def __call__(self) -> None:
        """Each once; on a GPU ten times, where one is too short to be timed."""
        for kind, operands in self.operands.items():
            times = 1 if self.device == "cpu" else 10
            for way, rates in self.rates[kind].items():
                wait(self.device)
                start = perf_counter()
                for _ in range(times):
                    WAYS[way](*operands)
                wait(self.device)
                rates.append(2 * kind[0] * kind[1] * kind[2] * times / (perf_counter() - start))

    def rate(self, ways: Collection[str] = WAYS.keys()) -> float:
        """FLOP/s: the median of all kinds, weighted by their FLOPs in the step.

        That of a kind is of the quickest of these `ways`: the median of its calls without the warm-up.
        """
        quickest = {
            kind: max(statistics.median(rates[1:]) for way, rates in by_way.items() if way in ways)
            for kind, by_way in self.rates.items()
        }
        reached, half = 0.0, sum(self.weights.values()) / 2
        for rate, kind in sorted((rate, kind) for kind, rate in quickest.items()):
            reached += self.weights[kind]
            if reached >= half:
                return rate
        raise AssertionError("the weights reach their half")


def transformers_step(images: Tensor, autocast: Precision) -> Callable[[], None]:
    """`ViTMAEForPreTraining` at ViT-B, with the same fused AdamW."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)

    def step() -> None:
        with autocast():
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="yamls of pretraining")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak", choices=("unimim", THEIRS), help="two steps and nothing else; print their peak of memory")
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        (peak if arguments.peak else measure)(recipe, arguments)


def ours(recipe: str, arguments: argparse.Namespace) -> Step:
    """The recipe's step."""
    torch.manual_seed(0)
    model = built(recipe).to(arguments.device)
    images = torch.rand(arguments.batch_size, 3, *model.student.image_size, device=arguments.device)
    clipping = yaml.safe_load(Path(recipe).read_text())["trainer"].get("gradient_clip_val")
    return Step(model, images, trainer(arguments.device, arguments.precision, clipping))


def peak(recipe: str, arguments: argparse.Namespace) -> None:
    """For a process of its own."""
    step: Callable[[], None]
    if arguments.peak == "unimim":
        mine = ours(recipe, arguments)
        step = mine if arguments.device == "cpu" else mine.compiled
    else:
        images = torch.rand(arguments.batch_size, 3, 224, 224, device=arguments.device)
        step = transformers_step(images, trainer(arguments.device, arguments.precision).precision_plugin.forward_context)
    for _ in range(2):
        step()
    print(json.dumps(peak_gib(arguments.device)))


def check_waits(step: Step) -> None:
    """
    Raises:
        RuntimeError: something in a step waits for the GPU.
    """
    step()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")


def peaks(recipe: str, arguments: argparse.Namespace, ways: list[str]) -> dict[str, float]:
    """GiB, each way in a process of its own."""
    words = ["--batch_size", str(arguments.batch_size), "--device", arguments.device, "--precision", arguments.precision]
    commands = {way: [sys.executable, __file__, recipe, *words, "--peak", way] for way in ways}
    done = {way: subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for way, command in commands.items()}
    return {way: json.loads(process.stdout.splitlines()[-1]) for way, process in done.items()}


def measure(recipe: str, arguments: argparse.Namespace) -> None:
    """Two tables: the steps, and the parts of ours."""
    name, device, repetitions = Path(recipe).stem, arguments.device, arguments.repetitions
    theirs = name == "mae_vit_base"
    memory = peaks(recipe, arguments, ["unimim", *([THEIRS] if theirs else [])])
    step = ours(recipe, arguments)
    flops, matmuls = dense_flops(step), Matmuls(step)
    parts: list[dict[str, float]] = []
    ways: dict[str, Callable[[], object]] = {"unimim": step}
    if device != "cpu":
        check_waits(step)
        ways = {"unimim": step.compiled, "not compiled": step}
    if theirs:
        ways[THEIRS] = transformers_step(step.images, step.autocast)
    in_between = {"matmuls": matmuls, "split": lambda: parts.append(step.split())}
    seconds = in_turn({**ways, **in_between}, repetitions, device=device)
    rate = matmuls.rate()
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        median = statistics.median(seconds[way])
        of_ours = way != THEIRS
        rows[way] = {
            "values": seconds[way],
            "images/s": arguments.batch_size / median,
            "share of matmul rate": flops / median / rate if of_ours else "",
            "peak memory, GiB": memory.get(way, ""),
        }
    setup = f"{arguments.precision}, batch {arguments.batch_size}, {repetitions} repetitions after a warm-up"
    measured_on = machine("timm", *(["transformers"] if theirs else []), device=device)
    dense = f"a dense step {flops / 1e12:.3g} TFLOP, matmuls {rate / 1e12:.3g} TFLOP/s"
    if device == "cpu":
        dense += f" (torch.mm {matmuls.rate(['torch.mm']) / 1e12:.3g})"
    key = f"step_{name}" if device == "cpu" else f"step_{name}_cuda"
    report(
        key,
        rows,
        of="one step",
        unit="s",
        setup=f"{setup}; {dense}",
        machine=measured_on,
        reference=next(reversed(ways)) if len(ways) > 1 else None,
    )
    report(
        f"{key}_parts",
        {part: {"values": [times[part] for times in parts[1:]]} for part in (*PARTS, "rest")},
        of="part of a step",
        unit="s",
        setup=setup,
        machine=measured_on,
    )


if __name__ == "__main__":
    main()
