"""Reads T from the disk: a frozen teacher's targets of K fixed views per image, computed once (in no paper; for sweeps)."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from unimim.caching.files import TargetFiles, in_words, whole_in_cache
from unimim.data.sampling import Place, ResumableSampler, View
from unimim.errors import UserError
from unimim.letters.interfaces import TargetGenerator, check_positive, targets_of
from unimim.lightning import read_anew
from unimim.pictures.patches import picture_of
from unimim.shapes import Grid
from unimim.training.resume import check_loader, is_resumable
from unimim.weights.files import CHECKSUM, content_of, header_checksum, read_safetensors
from unimim.weights.models import check_object
from unimim.weights.written import save_tensors

MADE_WITH, FITTED = Path("teacher/made_with.json"), Path("teacher/fitted.safetensors")
"""The files that describe a cache, and hold what its teacher has fitted to the data."""
CHECKED = 8
"""Number of views that the teacher sees again as a check, before a run adds to a cache or reads it."""
SAME_PIXELS = 0.01
"""Largest difference of a quarter's mean colour, in [0, 1], between two decoders or precisions of the same view."""
SAME_TEACHER, SAME_TOKENS = 0.1, 0.3
"""Largest difference of features (in norm) and of tokens (in number) between two precisions of a teacher.

A ViT-B with random weights differs by 0.005 in bfloat16, and by 0.25 from its block before the last.
"""


class CachedTarget(TargetGenerator):
    """Stores the targets of a frozen teacher for K fixed views of each image, and reads them while training.

    Epoch e of a run shows each image as epoch e mod K of a run with the seed `view_seed` would. So crop, flip and jitter are
    those of K views for any seed of the run; the order of the images and the masks still follow the run's seed. This departs
    from the papers' recipes, where each epoch has new views; it is for sweeps and small datasets.

    Before the first step, the size is printed, and all processes compute the missing files of `folder`, each a part of them.
    Any run with the same teacher, grid and data can read the folder, with any number of processes. Features are stored in
    bfloat16, tokens as integers; each view has a checksum, and mean colours to recognize it. The data must be read through
    `ResumableSampler`. Outside of training steps (validations, pictures) the teacher itself computes the targets.

    Args:
        teacher: the frozen target.
        folder: holds the targets; it is created if needed, and shared by all nodes.
        views: K. If the folder has fewer, the missing ones are added; if it has more, the first K are read.
        view_seed: the seed of the views; runs of any seed share them.

    Raises:
        ValueError: the teacher follows the student (an EMA), or there are no views. When training starts: the folder was made
            with another teacher, grid, data or view seed; it is damaged; the disk is too small; the data is read in another
            way. In a step: images that are not the step's own, or not the views that were stored.
    """

    def __init__(self, teacher: TargetGenerator, folder: str, views: int = 4, view_seed: int = 0) -> None:
        super().__init__()
        check_positive("model.teacher", views=views)
        check_object("model.teacher.teacher", teacher, TargetGenerator, "unimim.HOGTarget()")
        if teacher.follows_student:
            raise UserError(f"model.teacher.teacher: {type(teacher).__name__} follows the student, a cache needs what stays")
        self.teacher = teacher
        self.dim = teacher.dim
        self.folder = Path(folder).expanduser()
        self.views = views
        self.view_seed = view_seed
        self.made_with = described(teacher)
        self.of_step: tuple[Tensor, dict[str, Tensor]] | None = None

    def callbacks(self) -> list[pl.Callback]:
        """Returns the callback that fixes the views, writes missing targets, and reads those of each step."""
        return [FixedViews(self)]

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b h w c], or long [b h w]"""
        return self.read(images, grid_size, ["patches"])["patches"]

    def forward_image(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b c], or long [b]"""
        return self.read(images, grid_size, ["image"])["image"]

    def forward_both(self, images: Tensor, grid_size: Grid) -> tuple[Tensor, Tensor]:
        """[b 3 H W] in [0, 1] -> `forward` and `forward_image`"""
        targets = self.read(images, grid_size, ["patches", "image"])
        return targets["patches"], targets["image"]

    def read(self, images: Tensor, grid_size: Grid, kinds: list[str]) -> dict[str, Tensor]:
        """Gives the stored targets of a step's images, of these kinds; outside of a step, the teacher's.

        Raises:
            ValueError: the images are not the step's.
        """
        if self.of_step is None:
            self.teacher.to(images.device)
            return targets_of(self.teacher, images, grid_size, kinds)
        images_of_step, targets = self.of_step
        if images is not images_of_step:
            raise UserError("a cache has targets of the step's own images only: change images in the data, or use no cache")
        return targets

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """Calls the teacher's method."""
        return picture_of(self.teacher, values, target)

    def reconstruction(self, prediction: Tensor, target: Tensor, before: Tensor) -> Tensor | None:
        """Calls the teacher's method."""
        return self.teacher.reconstruction(prediction, target, before)


class FixedViews(pl.Callback):
    """Connects a `CachedTarget` with a training's data; `CachedTarget.callbacks` returns it.

    It fixes the views and writes missing targets before the first step, and gives each step its targets.
    """

    files: TargetFiles
    sampler: ResumableSampler | None = None
    kinds: tuple[str, ...] = ("patches",)
    """The kinds of targets that the terms of the training ask for: "patches", "image" or both."""

    def __init__(self, target: CachedTarget) -> None:
        self.target = target
        self.reader = ThreadPoolExecutor(1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Prepares the cache: checks it, writes the missing files, and fixes the views.

        Raises:
            ValueError, OSError: see `CachedTarget`.
        """
        loop: Any = trainer.fit_loop
        loop.setup_data()
        target, folder, grid_size = self.target, self.target.folder, pl_module.student.grid_size
        dataset = sampler_of(trainer).dataset
        asking = {term.selection == "image" for term in pl_module.terms.values() if term.teacher is target}
        self.kinds = tuple(kind for kind in ("patches", "image") if (kind == "image") in asking)
        blank = torch.zeros(1, 3, *pl_module.student.image_size, device=pl_module.device)
        example = self.looked(trainer, pl_module, blank)
        self.files = TargetFiles(folder, len(dataset), tuple(example.shape[1:]), example.dtype)  # type: ignore[arg-type]
        made_with = {
            **target.made_with,
            "grid_size": grid_size,
            "image_size": pl_module.student.image_size,
            "images": self.files.images,
            "view_seed": target.view_seed,
            "target": [str(example.dtype), *self.files.shape],
            "rows": self.files.rows,
        }
        # the first process's view of the disk, so that all do the same
        begun, missing, free = trainer.strategy.broadcast(self.on_disk())
        if begun:
            check_same(folder, made_with)
            if trainer.is_global_zero:
                self.files.remove_dead()
        self.announce(missing, free)
        if not begun:
            if trainer.is_global_zero:
                self.begin(trainer, pl_module, made_with)
            trainer.strategy.barrier("cache: it has begun")
            check_same(folder, made_with)  # another run may have been faster
        if (folder / FITTED).is_file():
            target.teacher.load_state_dict(fitted(folder / FITTED))
        self.check(trainer, pl_module, missing)
        for view, numbers in enumerate(missing):
            self.write(trainer, pl_module, view, numbers[trainer.global_rank :: trainer.world_size])
        trainer.strategy.barrier("cache: it is written")
        self.files.open_all(target.views)
        self.fix(trainer)
        read_anew(trainer)  # the loader may have started to read other views

    def on_disk(self) -> tuple[bool, list[list[int]], int]:
        """Returns whether the cache was started, the numbers of each view's missing files, and the free bytes of the disk."""
        folder = self.target.folder
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        missing = [self.files.missing(view) for view in range(self.target.views)]
        return (folder / MADE_WITH).is_file(), missing, shutil.disk_usage(there).free

    def announce(self, missing: list[list[int]], free: int) -> None:
        """Logs how much will be written.

        Raises:
            ValueError: the disk has too little space.
        """
        folder, views, files = self.target.folder, self.target.views, self.files
        needed = files.bytes_of(missing)
        in_all = in_words(files.images * views * files.view_bytes)
        size = f"{files.images:,} images x {views} views x {in_words(files.view_bytes)} = {in_all}"
        if needed > free:
            raise UserError(
                f"the cache {folder} needs {in_words(needed)} more ({size}), but its disk has {in_words(free)} free: give "
                f"fewer views (--views), or another folder (--cache)"
            )
        rank_zero_info(
            f"cache {folder}: {size}, {in_words(needed)} of them are to be written, {in_words(free)} are free"
            if needed
            else f"cache {folder}: {size}, all there"
        )

    def begin(self, trainer: pl.Trainer, pl_module: Any, made_with: dict[str, Any]) -> None:
        """Prepares the teacher, then writes what it has fitted and the description of the cache. Runs on one process.

        If another run does the same at the same time, both use the folder of the first.
        """
        teacher = self.target.teacher
        with trainer.precision_plugin.forward_context():
            teacher.prepare(pl_module.training_images(), pl_module.student.grid_size)
        with whole_in_cache((self.target.folder / MADE_WITH).parent) as part:
            part.mkdir()
            if state := {key: value.cpu().contiguous() for key, value in teacher.state_dict().items()}:
                save_tensors(state, part / FITTED.name, {CHECKSUM: header_checksum(state, "")})  # such as a codebook
            (part / MADE_WITH.name).write_text(json.dumps(made_with, indent=1) + "\n")

    def fix(self, trainer: pl.Trainer) -> None:
        """Makes the training's sampler show the fixed views."""
        self.sampler = sampler_of(trainer)
        views = self.target.views, self.target.view_seed
        if self.sampler.views not in (None, views):
            raise UserError(
                f"the cache {self.target.folder} has {views[0]} views of seed {views[1]}, and that of another term has "
                f"{self.sampler.views[0]} of seed {self.sampler.views[1]}: give all caches of a training the same"
            )
        self.sampler.views = views

    def write(self, trainer: pl.Trainer, pl_module: Any, view: int, numbers: list[int]) -> None:
        """Computes and writes these files of a view."""
        indices = [index for number in numbers for index in self.files.indices(number)]
        waiting: list[tuple[Tensor, Tensor]] = []  # (targets, quarters) of images that are in no file yet
        silent = not trainer.is_global_zero or trainer.progress_bar_callback is None or not indices
        with tqdm(total=len(indices), unit="image", desc=f"cache: view {view}", disable=silent) as bar:
            for images in self.images(trainer, pl_module, view, indices):
                waiting.append((self.looked(trainer, pl_module, images).cpu(), quarter_colors(images).cpu()))
                while numbers and sum(len(some) for some, _ in waiting) >= (rows := len(self.files.indices(numbers[0]))):
                    targets, quarters = map(torch.cat, zip(*waiting, strict=True))
                    self.files.write(view, numbers.pop(0), targets[:rows], quarters[:rows])
                    waiting = [(targets[rows:].clone(), quarters[rows:].clone())]
                    bar.update(rows)

    def images(self, trainer: pl.Trainer, pl_module: Any, view: int, indices: list[int]) -> Iterator[Tensor]:
        """Yields batches of these images as training sees them in a view; repeats the last image to fill the last batch."""
        loader: Any = trainer.train_dataloader
        places: list[Place] = [(View(self.target.view_seed, view), index) for index in indices]
        if places:
            with loader.sampler.choose(places + places[-1:] * (-len(places) % loader.batch_size)):
                yield from pl_module.training_images()

    @torch.no_grad()
    def looked(self, trainer: pl.Trainer, pl_module: Any, images: Tensor) -> Tensor:
        """Gives the teacher's targets of images [b 3 H W], in the stored dtype; both kinds lie one behind the other."""
        with trainer.precision_plugin.forward_context():
            targets = targets_of(self.target.teacher, images, pl_module.student.grid_size, self.kinds)
        if len(targets) == 1:
            return stored(targets[self.kinds[0]], self.target.dim)
        whole = torch.cat([targets[kind].reshape(len(images), -1) for kind in self.kinds], dim=1)
        return stored(whole, self.target.dim)

    def apart(self, whole: Tensor, grid_size: Grid) -> dict[str, Tensor]:
        """Takes stored targets apart again, by kind."""
        if len(self.kinds) == 1:
            return {self.kinds[0]: whole}
        h, w = grid_size
        channels = whole.shape[1] // (h * w + 1)
        patches, image = whole.split([h * w * channels, channels], dim=1)
        if whole.is_floating_point():
            return {"patches": rearrange(patches, "b (h w c) -> b h w c", h=h, w=w), "image": image}
        return {"patches": rearrange(patches, "b (h w) -> b h w", h=h), "image": image[:, 0]}

    def check(self, trainer: pl.Trainer, pl_module: Any, missing: list[list[int]]) -> None:
        """Checks, with some images of the first view that has any, that images and teacher are those of the stored targets.

        Raises:
            ValueError: they are not.
        """
        present = [sorted(set(range(self.files.count)) - set(numbers)) for numbers in missing]
        view = next((view for view, numbers in enumerate(present) if numbers), 0)
        candidates = [index for number in present[view] for index in self.files.indices(number)]
        loader: Any = trainer.train_dataloader
        count = min(CHECKED, len(candidates), loader.batch_size)
        if not count:
            return
        indices = [candidates[len(candidates) * i // count] for i in range(count)]
        known, quarters = self.files.read(view, indices)
        (images,) = self.images(trainer, pl_module, view, indices)
        self.check_pixels((quarter_colors(images[:count]).cpu() - quarters).abs().max())
        said = self.looked(trainer, pl_module, images[:count]).cpu()
        if known.is_floating_point():
            said, known = (target.float().nan_to_num(0, 0, 0) for target in (said, known))  # some may be wrong in both
            difference, most = float((said - known).norm() / known.norm().clamp_min(1e-9)), SAME_TEACHER
        else:
            difference, most = float((said != known).float().mean()), SAME_TOKENS
        if not difference <= most:
            raise UserError(
                f"{self.target.folder} was made with another teacher: what {type(self.target.teacher).__name__} says of the "
                f"same images differs by {difference:.2f} (of 1) from what is stored; give another folder (--cache)"
            )

    def check_pixels(self, farthest: Tensor) -> None:
        """Checks the largest difference of mean colours between images and stored views.

        Raises:
            ValueError: mean colours differ by more than `SAME_PIXELS`.
        """
        if not farthest <= SAME_PIXELS:
            raise UserError(
                f"{self.target.folder} was made with other images than this run sees (colours differ by {float(farthest):.3f} "
                f"of 1): give the data and augmentation that it was made with, or another folder (--cache)"
            )

    # Each step

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.ahead: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}
        self.share: tuple[int, Tensor] | None = None
        self.farthest = torch.zeros((), device=pl_module.device)
        self.looked_at_pixels = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fixes the views again: Lightning may have a new loader (`reload_dataloaders_every_n_epochs`), not yet read."""
        self.fix(trainer)
        for network in self.target.teacher.networks():  # no step uses them
            network.cpu()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        """Gives the targets of the step's images to the teacher, while those of the next step are read.

        Raises:
            ValueError: a file is damaged, or, in the first step, the images are not the stored ones.
        """
        epoch = trainer.current_epoch
        now = self.ahead.pop((epoch, batch_idx), None) or self.request(pl_module, epoch, batch_idx)
        self.ahead = {(epoch, batch_idx + 1): self.request(pl_module, epoch, batch_idx + 1)}
        target, quarters = (part.to(batch.device, non_blocking=True) for part in now.result())
        self.farthest = torch.maximum(self.farthest, (quarter_colors(batch) - quarters).abs().max())
        if not self.looked_at_pixels:
            self.looked_at_pixels = True
            self.check_pixels(self.farthest)
        target = target.float() if target.is_floating_point() else target.long()
        self.target.of_step = batch, self.apart(target, pl_module.student.grid_size)

    def request(self, pl_module: Any, epoch: int, batch_idx: int) -> Future[tuple[Tensor, Tensor]]:
        """Starts to read the targets of a batch of this epoch; reads nothing after the end of the epoch."""
        if self.share is None or self.share[0] != epoch:
            self.share = epoch, sampler_of(pl_module.trainer).share()
        size = pl_module.trainer.train_dataloader.batch_size
        indices = self.share[1][batch_idx * size : (batch_idx + 1) * size].tolist()
        pinned = pl_module.device.type == "cuda"
        return self.reader.submit(self.files.read, epoch % self.target.views, indices, pinned)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.target.of_step = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Checks that all images of the epoch were those that are stored.

        Raises:
            ValueError: some images of the epoch were not the stored ones.
        """
        self.check_pixels(self.farthest)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stops the reader, and resets the teacher and the data's sampler."""
        self.reader.shutdown()
        self.target.of_step = None
        if self.sampler:
            self.sampler.views = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def fitted(path: Path) -> dict[str, Tensor]:
    """Reads what a teacher has fitted to the data of a cache.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return read_safetensors(path)
    except ValueError as error:
        raise UserError(f"the cache is damaged: {error}; or delete its folder, which the next run writes again") from error


def sampler_of(trainer: pl.Trainer) -> ResumableSampler:
    """Returns the training's sampler, which knows the place of each image in an epoch.

    Raises:
        ValueError: the training's data is read in another way; see also `check_loader`.
    """
    loader: Any = trainer.train_dataloader
    if not is_resumable(trainer):
        raise UserError(
            f"a cache finds the targets of an image by its place in a ResumableSampler, but the data is read through a "
            f"{type(getattr(loader, 'sampler', loader)).__name__}: DataLoader(SeededSamples(dataset), batch_size, "
            f"sampler=ResumableSampler(dataset), drop_last=True)"
        )
    check_loader(trainer)
    sampler: ResumableSampler = loader.sampler
    return sampler


def stored(target: Tensor, dim: int) -> Tensor:
    """Converts features to bfloat16, tokens to int16 or, if they need it, int32."""
    if target.is_floating_point():
        return target.to(torch.bfloat16)
    return target.to(torch.int16 if dim <= 2**15 else torch.int32)


def quarter_colors(images: Tensor) -> Tensor:
    """Averages each quarter, [b 3 H W] -> float32 [b 3 2 2]: these colours differ between views, also mirrored ones."""
    return F.adaptive_avg_pool2d(images.float(), 2)


def described(teacher: TargetGenerator) -> dict[str, Any]:
    """Describes a teacher so that two can be compared: the classes and plain settings of its parts, a hash of all tensors."""
    found: dict[str, Any] = {}
    tensors = hashlib.blake2b(digest_size=16)
    for path, part in teacher.named_modules(prefix="teacher"):
        if isinstance(part, TargetGenerator):
            found[path] = place_free(f"{type(part).__module__}.{type(part).__qualname__}")
            plain = {key: value for key, value in vars(part).items() if key[0] != "_" and is_plain(value)}
            found |= {f"{path}.{key}": value for key, value in plain.items() if key != "training"}
    for module in (teacher, *teacher.networks()):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensors.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            tensors.update(content_of(tensor.cpu()))
    return {**found, "teacher.weights": tensors.hexdigest()}


def place_free(value: Any) -> Any:
    """Leaves the file out of the name of a class of ours, which may have lain in another one when a cache was made."""
    return re.sub(r"^unimim\.[\w.]*\.(\w+)$", r"unimim.\1", value) if isinstance(value, str) else value


def is_plain(value: Any) -> bool:
    """Returns whether it is a number, a string, None, or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_same(folder: Path, made_with: dict[str, Any]) -> None:
    """Checks that a cache was made with the settings of this run.

    Raises:
        ValueError: the cache in the folder was made with another setting (the first is named), or its description cannot be
            read.
    """
    file = folder / MADE_WITH
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or missing ({error}): let all nodes share the folder of the cache, or give another (--cache)"
        ) from error
    ours = json.loads(json.dumps(made_with))
    for key in (*ours, *found):
        theirs = place_free(found.get(key))
        if theirs != ours.get(key):
            raise UserError(
                f"{folder} was made with {key} {theirs}, this run has {ours.get(key)}: give another folder (--cache), "
                f"or the teacher, grid, data and view seed that it was made with"
            )
