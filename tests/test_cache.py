"""The cache of targets, against runs that ask the teacher in every step.

Run as a script, this file trains in some processes: `python test_cache.py CACHE PROCESSES`.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import PLAIN, ROOT, tiny_model, tiny_student
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from unimim import (
    AttentiveMasking,
    CachedTarget,
    CodebookTarget,
    EMATarget,
    FashionMNISTData,
    FeatureTarget,
    HOGTarget,
    ImageFolderData,
    MaskedImageModeling,
    MeanColorTarget,
    RandomMasking,
    ResumableSampler,
    SeededSamples,
    TargetGenerator,
)
from unimim.caching import files as target_files
from unimim.caching.files import TargetFiles, in_words
from unimim.caching.target import stored
from unimim.cli.main import main
from unimim.weights import written

IMAGES, BATCH = 22, 4
PAGE = (ROOT / "docs" / "cache.md").read_text()


class Photos(Dataset[Tensor]):
    """Smooth pictures; each time another crop, half of them mirrored."""

    def __init__(self, count: int = IMAGES, seed: int = 0) -> None:
        coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        self.pictures = nn.functional.interpolate(coarse, (48, 48), mode="bilinear")
        self.transform = v2.Compose([v2.RandomResizedCrop(32, (0.3, 1.0)), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.pictures[index])


class PhotosData(pl.LightningDataModule):
    def __init__(self, photos: Dataset[Any], workers: int) -> None:
        super().__init__()
        self.photos, self.workers = photos, workers

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = ResumableSampler(self.photos)
        return DataLoader(SeededSamples(self.photos), BATCH, sampler=sampler, drop_last=True, num_workers=self.workers)


class Rounded(TargetGenerator):
    """Another target, rounded to bfloat16: what a cache has to be equal to."""

    def __init__(self, teacher: TargetGenerator) -> None:
        super().__init__()
        self.teacher, self.dim = teacher, teacher.dim

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return self.teacher(images, grid_size).bfloat16().float()


class Counting(HOGTarget):
    """HOG that counts the images it was shown, as one frozen network would be shown them."""

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        SHOWN.append(len(images))
        return super().forward(images, grid_size)


SHOWN: list[int] = []
"""Images in each call of `Counting`: no attribute of it, which would be a setting."""


class Log(pl.Callback):
    """What each step saw and said."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, str]] = []
        self.images: list[Tensor] = []
        self.indices: list[list[int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.steps.append((trainer.current_epoch, batch_idx, float(outputs["loss"]).hex()))
        self.images.append(batch)
        sampler: Any = trainer.train_dataloader.sampler
        self.indices.append(sampler.share()[batch_idx * BATCH : (batch_idx + 1) * BATCH].tolist())

    def seen(self, epoch: int) -> dict[int, Tensor]:
        """Each image of an epoch by its index."""
        batches = [i for i, step in enumerate(self.steps) if step[0] == epoch]
        return {index: image for i in batches for index, image in zip(self.indices[i], self.images[i], strict=True)}


def fit(
    model: MaskedImageModeling,
    *callbacks: pl.Callback,
    images: Any = None,
    workers: int = 0,
    seed: int = 5,
    ckpt_path: str | None = None,
    **options: Any,
) -> Log:
    pl.seed_everything(seed, verbose=False)
    log = Log()
    data = images if isinstance(images, (DataLoader, pl.LightningDataModule)) else PhotosData(images or Photos(), workers)
    settings = {"max_epochs": 3, "logger": False, "enable_checkpointing": bool(callbacks), **options}
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=[log, *callbacks], **settings
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return log


def model_of(teacher: TargetGenerator, **changes: Any) -> MaskedImageModeling:
    torch.manual_seed(0)
    return tiny_model(teacher=teacher, student=tiny_student(), lr=1e-3, **changes)


def hog() -> HOGTarget:
    return HOGTarget(patch_size=8, cell_size=4)


def tokens() -> dict[str, Any]:
    return {"loss": nn.CrossEntropyLoss()}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five views of HOG in a file, so that there are several, and one that is not full."""
    monkeypatch.setattr(target_files, "FILE_BYTES", 5 * 16 * hog().dim * 2)


def weights(model: MaskedImageModeling) -> list[Tensor]:
    return [*model.student.state_dict().values(), *model.head.state_dict().values()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# What is read is what the teacher says


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_to_targets_rounded_to_bfloat16(tmp_path: Path, workers: int) -> None:
    """As many views as epochs, under the run's seed, are the images of the run without a cache: bit for bit the same run."""
    reference = model_of(Rounded(hog()))
    expected = fit(reference, workers=workers)
    for attempt in ("written", "read"):
        model = model_of(CachedTarget(hog(), str(tmp_path), views=3, view_seed=5))
        assert fit(model, workers=workers).steps == expected.steps, attempt
        assert same(weights(model), weights(reference)), attempt
    unrounded = fit(model_of(hog()), workers=workers)
    assert unrounded.steps != expected.steps


def test_the_teacher_is_asked_once(tmp_path: Path) -> None:
    fit(model_of(CachedTarget(Counting(8, 4), str(tmp_path), views=2)), seed=1)
    written = sum(SHOWN)
    assert written >= 2 * IMAGES
    SHOWN.clear()
    model = model_of(CachedTarget(Counting(8, 4), str(tmp_path), views=2), masking=RandomMasking(0.7))
    fit(model, seed=2, max_epochs=5)
    assert sum(SHOWN) == 2 + 1 + BATCH  # on blank images, when the model is built and when training starts, and to check
    assert model.teacher(torch.rand(3, 3, 32, 32), (4, 4)).dtype == torch.float32  # after training it is the teacher again


def test_views_come_again_whatever_the_seed(tmp_path: Path) -> None:
    """Epoch e shows view e mod K; runs of other seeds see the same views, in another order and with other masks."""
    one, other = (
        fit(model_of(CachedTarget(hog(), str(tmp_path), views=2)), seed=seed, max_epochs=4, limit_train_batches=1.0)
        for seed in (1, 2)
    )
    assert one.indices != other.indices
    views = {}
    for log in (one, other):
        for epoch in range(4):
            for index, image in log.seen(epoch).items():
                assert torch.equal(views.setdefault((epoch % 2, index), image), image)
    assert not any(torch.equal(views[0, i], views[1, i]) for i in range(IMAGES))


def test_tokens_are_stored_as_integers(tmp_path: Path) -> None:
    """They are the very same; a vocabulary that 16 bits do not hold has 32."""
    expected = fit(model_of(MeanColorTarget(3), **tokens()))
    cached = CachedTarget(MeanColorTarget(3), str(tmp_path), views=3, view_seed=5)
    assert fit(model_of(cached, **tokens())).steps == expected.steps
    assert json.loads((tmp_path / "teacher" / "made_with.json").read_text())["target"] == ["torch.int16", 4, 4]
    largest = torch.tensor([2**15 - 1, 2**15])
    assert stored(largest[:1], 2**15).dtype == torch.int16
    assert stored(largest, 2**15 + 1).dtype == torch.int32
    assert torch.equal(stored(largest[:1], 2**15).long(), largest[:1])
    assert torch.equal(stored(largest, 2**15 + 1).long(), largest)


def test_a_codebook_that_was_fitted_is_kept(tmp_path: Path) -> None:
    """Another run, whose k-means would see other images, has the codes of the first."""

    def run(seed: int) -> CachedTarget:
        teacher = CachedTarget(CodebookTarget(hog(), codes=6, fit_images=10), str(tmp_path), views=2)
        fit(model_of(teacher, **tokens()), seed=seed)
        return teacher

    books = [run(seed).teacher.state_dict()["codebook"] for seed in (1, 2)]
    assert books[0].abs().sum() > 0
    assert torch.equal(*books)


def test_a_damaged_codebook_is_named(tmp_path: Path) -> None:
    """One flipped bit of what the teacher has fitted: safetensors has no checksum of its own."""

    def run() -> None:
        fit(model_of(CachedTarget(CodebookTarget(hog(), codes=6, fit_images=10), str(tmp_path), views=1), **tokens()))

    run()
    file = tmp_path / "teacher" / "fitted.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the cache is damaged: .*fitted.safetensors is damaged .*or delete its folder"):
        run()


def test_two_runs_that_begin_at_once_have_one_codebook(tmp_path: Path) -> None:
    """The second has begun before the first, and is done when the first has its own: which is thrown away."""
    others: list[Tensor] = []

    def run(seed: int, kind: type[CodebookTarget]) -> Tensor:
        target = CachedTarget(kind(hog(), codes=6, fit_images=10), str(tmp_path), views=2)
        fit(model_of(target, **tokens()), seed=seed)
        return target.teacher.state_dict()["codebook"]

    class Slow(CodebookTarget):
        def prepare(self, batches: Any, grid_size: tuple[int, int]) -> None:
            super().prepare(batches, grid_size)
            self.own = self.codebook.clone()
            if not others:
                others.append(self.own)
                others.append(run(2, Slow))

    mine = run(1, Slow)
    assert not torch.equal(others[0], others[1])
    assert torch.equal(mine, others[1])
    assert not list(tmp_path.rglob("*.part"))


def test_small_images_that_are_only_mirrored(tmp_path: Path) -> None:
    """Fashion-MNIST's own way to draw, by batches."""
    if not (ROOT / "data" / "FashionMNIST").is_dir():
        pytest.skip("no Fashion-MNIST here: make install fetches it")
    data = {"root": str(ROOT / "data"), "batch_size": BATCH, "train_images": IMAGES}
    expected = fit(model_of(Rounded(hog())), images=FashionMNISTData(**data))
    log = fit(model_of(CachedTarget(hog(), str(tmp_path), views=3, view_seed=5)), images=FashionMNISTData(**data))
    assert log.steps == expected.steps


def photos_on_disk(folder: Path, count: int = 10) -> Path:
    """JPEG files of smooth pictures."""
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(nn.functional.interpolate(coarse, (60, 90), mode="bilinear")):
        folder.mkdir(exist_ok=True)
        to_pil_image(picture).save(folder / f"{number}.jpg", quality=90)
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_crops_that_are_finished_where_the_network_runs(tmp_path: Path, workers: int) -> None:
    """Files cropped by workers in uint8, mirrored, jittered behind the transfer: the views are those of an epoch."""
    folder = str(photos_on_disk(tmp_path / "photos"))

    def data() -> ImageFolderData:
        return ImageFolderData(folder, 32, BATCH, workers, color_jitter=0.4)

    expected = fit(model_of(Rounded(hog())), images=data())
    for seed, attempt in ((5, "written"), (5, "read"), (6, "another seed")):
        log = fit(model_of(CachedTarget(hog(), str(tmp_path / "cache"), views=3, view_seed=5)), images=data(), seed=seed)
        assert (log.steps == expected.steps) == (seed == 5), attempt
        for epoch in range(3):
            seen = expected.seen(epoch)
            assert all(torch.equal(image, seen[index]) for index, image in log.seen(epoch).items() if index in seen)
    other = ImageFolderData(folder, 32, BATCH, workers)
    with pytest.raises(ValueError, match="made with other images than this run sees"):  # without jitter
        fit(model_of(CachedTarget(hog(), str(tmp_path / "cache"), views=3, view_seed=5)), images=other)


def test_a_network_as_teacher(tmp_path: Path) -> None:
    """Losses are equal to the rounding of targets to 8 bits."""
    expected = fit(model_of(features()), max_epochs=1)
    log = fit(model_of(CachedTarget(features(), str(tmp_path), views=1, view_seed=5)), max_epochs=1)
    losses, rounded = ([float.fromhex(step[2]) for step in of.steps] for of in (expected, log))
    assert rounded == pytest.approx(losses, rel=2**-8)
    assert rounded != losses


class SometimesNaN(HOGTarget):
    """No number for the first patch of most images, those that are not dark."""

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        target = super().forward(images, grid_size)
        target[images.mean((1, 2, 3)) > 0.4, 0, 0] = torch.nan
        return target


def test_targets_that_are_not_finite(tmp_path: Path) -> None:
    """They are stored as they are, and the same updates are skipped."""
    reference = model_of(Rounded(SometimesNaN(8, 4)), max_skipped_updates=14)
    expected = fit(reference)
    assert 0 < reference.guard.skipped <= 14
    for attempt in ("written", "read"):
        model = model_of(CachedTarget(SometimesNaN(8, 4), str(tmp_path), views=3, view_seed=5), max_skipped_updates=14)
        assert fit(model).steps == expected.steps, attempt
        assert model.guard.skipped == reference.guard.skipped
        assert same(weights(model), weights(reference))


def test_a_loader_that_other_runs_use_too(tmp_path: Path) -> None:
    """After a run with a cache, whether it came to its end or not, it shows images as before."""
    loader = PhotosData(Photos(), 0).train_dataloader()
    expected = fit(model_of(hog()), images=loader)
    cached = fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)), images=loader)
    assert cached.steps != expected.steps
    assert fit(model_of(hog()), images=loader).steps == expected.steps

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)), Stop(), images=loader)
    assert fit(model_of(hog()), images=loader).steps == expected.steps


def test_a_loader_that_is_made_anew_each_epoch(tmp_path: Path) -> None:
    def run(**options: Any) -> list[tuple[int, int, str]]:
        return fit(model_of(CachedTarget(hog(), str(tmp_path), views=2)), **options).steps

    assert run() == run(reload_dataloaders_every_n_epochs=1)


# Files


def test_the_size_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B at 14x14, and ImageNet."""
    monkeypatch.setattr(target_files, "FILE_BYTES", 2**28)
    files = TargetFiles(Path("nowhere"), 1_281_167, (14, 14, 768), torch.bfloat16)
    assert in_words(files.view_bytes) == "301 kB"
    assert TargetFiles(Path("nowhere"), 1_281_167, (14, 14), torch.int16).rows == 1024  # not all in one
    assert files.rows == 891
    assert in_words(files.bytes_of([files.missing(0)])) == "386 GB"
    assert [in_words(size) for size in (0, 12, 999, 1000, 25_500_000, 2e13)] == [
        "0 B",
        "12 B",
        "999 B",
        "1.0 kB",
        "25.5 MB",
        "20.0 TB",
    ]


def test_the_size_is_said_and_refused_where_the_disk_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bytes_of_a_view = 16 * hog().dim * 2
    caplog.set_level("INFO", "pytorch_lightning.utilities.rank_zero")
    folder = tmp_path / "not" / "there"
    free = [IMAGES * 2 * bytes_of_a_view - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free[0]}))
    with pytest.raises(ValueError, match=r"the cache .*there needs 152 kB more \(22 images x 2 views x 3.5 kB = 152 kB\), but"):
        fit(model_of(CachedTarget(hog(), str(folder), views=2)))
    assert not folder.parent.exists()
    free[0] += 1
    fit(model_of(CachedTarget(hog(), str(folder), views=2)))
    assert "22 images x 2 views x 3.5 kB = 152 kB, 152 kB of them are to be written, 152 kB are free" in caplog.text
    free[0] = 0
    fit(model_of(CachedTarget(hog(), str(folder), views=2)))
    assert "22 images x 2 views x 3.5 kB = 152 kB, all there" in caplog.text


def test_an_interrupted_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are there stay as they are, what a killed writer left is no file, and all is as if written at once."""
    write = TargetFiles.write

    def interrupted(self: TargetFiles, view: int, number: int, *tensors: Tensor) -> None:
        if (view, number) == (1, 2):
            (tmp_path / "part" / "view-1" / "00002.safetensors.0.part").write_bytes(b"cut o")
            raise KeyboardInterrupt
        write(self, view, number, *tensors)

    monkeypatch.setattr(TargetFiles, "write", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model_of(CachedTarget(hog(), str(tmp_path / "part"), views=2)))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").rglob("*.safetensors")}
    assert len(before) == 5 + 2
    monkeypatch.setattr(TargetFiles, "write", write)
    with pytest.raises(ValueError, match="made with other images"):  # before any is written
        fit(model_of(CachedTarget(hog(), str(tmp_path / "part"), views=2)), images=Photos(seed=1))
    assert set((tmp_path / "part").rglob("*.safetensors")) == set(before)
    log = fit(model_of(CachedTarget(hog(), str(tmp_path / "part"), views=2)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert log.steps == fit(model_of(CachedTarget(hog(), str(tmp_path / "whole"), views=2))).steps
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert (tmp_path / "part" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_more_views_are_added(tmp_path: Path) -> None:
    fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)))
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    fit(model_of(CachedTarget(hog(), str(tmp_path), views=3)))
    assert sorted(path.name for path in tmp_path.glob("view-*")) == ["view-0", "view-1", "view-2"]
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 * len(first)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["a bit", "its end", "zeros"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    """A bit of the last image's target is found when that image is read; after the file was deleted, it is written again."""
    expected = fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)))
    path = tmp_path / "view-0" / "00003.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-2000] ^= 1
    elif damage == "its end":
        content = content[:-1]
    else:
        content[-4096:] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"view-0/00003.safetensors is damaged .*: delete it, and the next run .* writes it again"
    ) as e:
        fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)))
    assert "\n" not in str(e.value)
    path.unlink()
    assert fit(model_of(CachedTarget(hog(), str(tmp_path), views=1))).steps == expected.steps


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: None) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, "save_file", full)
    with pytest.raises(OSError, match="the cache cannot write .*00000.safetensors .*No space left on device.*: make room"):
        fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)))
    assert not list(tmp_path.rglob("*.part"))


# What is refused


def features(**changes: Any) -> FeatureTarget:
    return FeatureTarget("vit_tiny_patch16_224", weights="random", **{"model_args": PLAIN, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": features(layer=0)}, "was made with teacher.layer 1, this run has 0"),
        ({"teacher": features(norm=False)}, "was made with teacher.norm True, this run has False"),
        ({"teacher": features(resolution=64)}, "was made with teacher.resolution None, this run has 64"),
        ({"teacher": features(mean=(0.1, 0.2, 0.3))}, "was made with teacher.weights [0-9a-f]{32}, this run has [0-9a-f]{32}"),
        (
            {"teacher": hog()},
            "was made with teacher unimim.FeatureTarget, this run has unimim.HOG",
        ),
        ({"view_seed": 1}, "was made with view_seed 0, this run has 1"),
        ({"images": Photos(IMAGES + 1)}, "was made with images 22, this run has 23"),
        ({"images": Photos(seed=1)}, r"was made with other images than this run sees \(colours differ by 0\.\d+ of 1\)"),
    ],
)
def test_another_cache_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def run(teacher: TargetGenerator | None = None, view_seed: int = 0, images: Any = None) -> Log:
        return fit(model_of(CachedTarget(teacher or features(), str(tmp_path), 1, view_seed)), images=images, max_epochs=1)

    run()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        run(**change)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    run()


def test_a_teacher_of_the_same_weights_that_says_something_else(tmp_path: Path) -> None:
    class Convolution(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.shift

    def run(shift: float) -> None:
        torch.manual_seed(1)
        network = Convolution(3, 6, 8, 8)
        network.shift = shift
        teacher = FeatureTarget(network, dim=6, mean=(0, 0, 0), std=(1, 1, 1))
        fit(model_of(CachedTarget(teacher, str(tmp_path), 1)), max_epochs=1)

    run(0.0)
    run(0.0)
    with pytest.raises(ValueError, match=r"made with another teacher: what FeatureTarget says of the same images differs by"):
        run(0.2)


def test_images_that_changed_behind_the_checked_ones(tmp_path: Path) -> None:
    """Every image is held against its colours, without waiting for the device: the end of the epoch tells."""
    fit(model_of(CachedTarget(hog(), str(tmp_path), 1)), max_epochs=1)
    photos = Photos()
    checked = {IMAGES * i // BATCH for i in range(BATCH)}
    log = fit(model_of(hog()), max_epochs=1)
    late = next(index for index in log.indices[-1] if index not in checked)
    photos.pictures[late] = photos.pictures[late].flip(-1)  # mirrored, its mean is the same
    with pytest.raises(ValueError, match="was made with other images than this run sees"):
        fit(model_of(CachedTarget(hog(), str(tmp_path), 1)), images=photos, max_epochs=1)


def test_teachers_and_data_that_cannot_be_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EMATarget follows the student, a cache needs what stays"):
        CachedTarget(EMATarget(2), str(tmp_path))
    with pytest.raises(ValueError, match="views is 0, but it is at least 1"):
        CachedTarget(hog(), str(tmp_path), views=0)
    with pytest.raises(ValueError, match="AttentiveMasking samples by a teacher's attention, and CachedTarget has none"):
        model_of(CachedTarget(features(), str(tmp_path)), masking=AttentiveMasking(0.5))
    with pytest.raises(
        ValueError, match="by its place in a ResumableSampler, but the data is read through a SequentialSampler"
    ):
        fit(model_of(CachedTarget(hog(), str(tmp_path))), images=DataLoader(torch.rand(8, 3, 32, 32), batch_size=4))
    unwrapped = DataLoader(Photos(), BATCH, sampler=ResumableSampler(Photos()))
    with pytest.raises(ValueError, match="which Photos does not take .*: wrap it, DataLoader"):
        fit(model_of(CachedTarget(hog(), str(tmp_path))), images=unwrapped)
    labelled = TensorDataset(torch.rand(8, 3, 32, 32), torch.zeros(8))
    with pytest.raises(ValueError, match="pretraining takes batches of images alone"):
        fit(model_of(CachedTarget(hog(), str(tmp_path / "labelled"))), images=labelled)


def test_other_images_than_the_steps_own(tmp_path: Path) -> None:
    class Twice(MaskedImageModeling):
        def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(images.flip(-1), batch_idx)

    parts = model_of(CachedTarget(hog(), str(tmp_path), 1))
    names = ("teacher", "normalization", "masking", "student", "loss")
    head = type(parts.head)
    model = Twice(**{name: getattr(parts, name) for name in names}, head=head)
    with pytest.raises(ValueError, match="a cache has targets of the step's own images only"):
        fit(model)


# Going on, and several processes


def test_a_run_that_goes_on_within_an_epoch(tmp_path: Path) -> None:
    def new() -> MaskedImageModeling:
        return model_of(CachedTarget(hog(), str(tmp_path / "cache"), views=2))

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(new(), saving)
    resumed = fit(new(), ckpt_path=str(tmp_path / "step=9.ckpt"))
    assert resumed.steps == whole.steps[9:]
    assert whole.steps[9][:2] == (1, 4)  # it is within


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_would(tmp_path: Path) -> None:
    """They share what is missing; files are those of one process, losses those of a run without a cache, also in shards."""
    in_processes(tmp_path / "one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("view-*/*"))
    assert len(files) == 3 * 5
    for path in files:
        if int(path.stem) % 2 == 0:
            (tmp_path / "two" / path).unlink()
    said = in_processes(tmp_path / "two", 2)
    for path in files:
        assert (tmp_path / "two" / path).read_bytes() == (tmp_path / "one" / path).read_bytes()
    written = [json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in (0, 1)]
    assert written == [[[view, number] for view in range(3) for number in numbers] for numbers in ((0, 4), (2,))]
    assert len(said["rounded"]) == 3 * 2
    for strategy in ("", " in shards"):
        assert said[f"cached{strategy}"] == said[f"rounded{strategy}"]


def in_processes(folder: Path, processes: int) -> dict[str, Any]:
    """What `train_in_processes` found; those that it started end with it."""
    words = [sys.executable, __file__, str(folder), str(processes)]
    with folder.with_suffix(".log").open("w") as log:
        started = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            started.wait(timeout=400)
        finally:  # of a process that died, the other waits
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, folder.with_suffix(".log").read_text()[-4000:]
    return json.loads(folder.with_suffix(".json").read_text())


def train_in_processes(folder: Path, processes: int) -> None:
    """Losses of the first process, with the cache and with rounded targets; of each, which files it wrote."""
    target_files.FILE_BYTES = 5 * 16 * hog().dim * 2
    write, written = TargetFiles.write, []

    def noted(self: TargetFiles, view: int, number: int, *tensors: Tensor) -> None:
        written.append((view, number))
        write(self, view, number, *tensors)

    TargetFiles.write = noted  # type: ignore[method-assign]
    ways: dict[str, Callable[[], Any]] = {"": lambda: "ddp" if processes > 1 else "auto"}
    if processes > 1:
        ways[" in shards"] = lambda: ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    said = {}
    for name, strategy in ways.items():
        for way, teacher in (("cached", CachedTarget(hog(), str(folder), 3, 5)), ("rounded", Rounded(hog()))):
            said[f"{way}{name}"] = fit(model_of(teacher), devices=processes, strategy=strategy()).steps
    rank = torch.distributed.get_rank() if processes > 1 else 0
    folder.with_suffix(f".{rank}.json").write_text(json.dumps(written))
    if rank == 0:
        folder.with_suffix(".json").write_text(json.dumps(said))


# The command line


SMALL = [
    "fit",
    "--config",
    str(ROOT / "conf/pretrain/demo_hog.yaml"),
    f"--data.root={ROOT / 'data'}",
    "--data.train_images=64",
    "--model.student.model_args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
]


@pytest.mark.skipif(not (ROOT / "data" / "FashionMNIST").is_dir(), reason="no Fashion-MNIST here: make install fetches it")
def test_one_option_and_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep over mask ratios; what a run saves can be run again, and resumed from, as it is."""
    monkeypatch.chdir(tmp_path)
    for ratio in (0.4, 0.6):
        main(["pretrain", *SMALL, "--cache=targets", "--views=2", f"--model.masking.ratio={ratio}"])
    assert len(list(Path("targets").glob("view-*/*"))) == 2 * 13  # 64 images, five in a file
    assert "T  teacher        CachedTarget" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in Path("targets").rglob("*.safetensors")}
    main(["pretrain", "fit", "--config=outputs/pretrain/version_1/config.yaml", "--trainer.max_epochs=1"])
    (saved,) = Path("outputs/pretrain/version_2").rglob("*.ckpt")
    model = MaskedImageModeling.load_from_checkpoint(saved, weights_only=True)
    assert isinstance(model.teacher, CachedTarget)
    assert isinstance(model.teacher.teacher, HOGTarget)
    assert (model.teacher.views, model.teacher.view_seed, model.masking.ratio) == (2, 0, 0.6)
    assert {path: path.stat().st_mtime_ns for path in Path("targets").rglob("*.safetensors")} == written
    for words, message in (
        (["--views=3"], "--views is for a cache: give --cache FOLDER"),
        (
            ["--cache=targets", "--model.teacher=PixelTarget", "--model.teacher.patch_size=8"],
            "was made with teacher unimim.",
        ),
        (["--cache=targets", "--data.train_images=128"], "was made with images 64, this run has 128"),
        (["--config=outputs/pretrain/version_1/config.yaml", "--cache=targets"], "model.teacher is a CachedTarget already"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["pretrain", *SMALL, *words])
        assert message in str(end.value.code)
        assert "\n" not in str(end.value.code)


def test_a_cache_of_a_version_whose_files_lay_elsewhere_is_read(tmp_path: Path) -> None:
    """It names a class of ours with the file that it was in."""
    fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)), max_epochs=1)
    described = tmp_path / "teacher" / "made_with.json"
    text = described.read_text()
    assert '"unimim.HOGTarget"' in text
    described.write_text(text.replace('"unimim.HOGTarget"', '"unimim.targets.hog.HOGTarget"'))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    fit(model_of(CachedTarget(hog(), str(tmp_path), views=1)), max_epochs=1)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.skipif(not (ROOT / "data" / "FashionMNIST").is_dir(), reason="no Fashion-MNIST here: make install fetches it")
def test_a_cache_is_part_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--resume auto` goes on from a run with the same cache, given either way; from none without it, or with other views."""
    monkeypatch.chdir(tmp_path)
    cached, saved = [*SMALL, "--cache=targets", "--views=2"], ["fit", "--config=outputs/pretrain/version_0/config.yaml"]
    differs = "starts anew, because model.teacher"
    main(["pretrain", *cached, "--trainer.max_epochs=1"])
    for version, (epochs, words, begin, more) in enumerate(
        (
            (2, cached, "this run goes on from ", "outputs/pretrain/version_0/"),
            (3, saved, "this run goes on from ", "outputs/pretrain/version_1/"),
            (1, SMALL, f"{differs}.class_path differs: ", "unimim.CachedTarget in outputs/pretrain/version_2/"),
            (
                1,
                [*SMALL, "--cache=targets"],
                differs,
                "model.teacher.init_args.views differs: 2 in outputs/",
            ),
        ),
        start=1,
    ):
        main(["pretrain", *words, "--resume=auto", f"--trainer.max_epochs={epochs}"])
        said = capsys.readouterr().out
        assert begin in said, version
        assert more in said, version


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the cache cannot write .*file/targets/teacher .*: make room, or give another folder"):
        fit(model_of(CachedTarget(hog(), str(tmp_path / "file" / "targets"), views=1)))


def test_the_benchmark_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is asked in one of the two ways, and the table has its place in docs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark, report = import_module("cache"), import_module("report")
    data = PhotosData(Photos(), 0)
    monkeypatch.setattr(report, "OUTPUT", tmp_path)
    monkeypatch.setattr(benchmark, "MaskTokenStudent", lambda name: tiny_student())
    monkeypatch.setattr(benchmark, "vit_base", lambda: Counting(8, 4))
    monkeypatch.setattr(benchmark, "FashionMNISTData", lambda **_: data)
    monkeypatch.setattr(sys, "argv", ["cache.py", f"--images={IMAGES}", f"--batch_size={BATCH}", "--repetitions=2"])
    SHOWN.clear()
    benchmark.main()
    of_a_run = IMAGES // BATCH * BATCH
    assert 2 * 2 * of_a_run + IMAGES <= sum(SHOWN) <= 2 * 2 * of_a_run + IMAGES + BATCH + 5 * (3 + BATCH)
    results = json.loads((tmp_path / "cache.json").read_text())
    assert [len(row["values"]) for row in results["rows"].values()] == [2, 2, 1]
    assert report.table(results) in capsys.readouterr().out
    page = (ROOT / "docs" / "performance.md").read_text()
    assert report.document_with(page, {"cache": results, "cache_cuda": results}) != page


@pytest.mark.parametrize("line", [line for line in PAGE.splitlines() if line.startswith("unimim pretrain")])
def test_the_commands_of_the_page(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(line)[1:], "--print_config"])
    assert not end.value.code
    assert "cache: targets" in capsys.readouterr().out


def test_the_sizes_on_the_page() -> None:
    """Its table, from the sizes of the targets."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if "14x14 " in line[:20] or "tokens at" in line
    ]
    targets = [((14, 14, 768), torch.bfloat16), ((14, 14, 1024), torch.bfloat16), ((14, 14), torch.int16)]
    assert len(rows) == len(targets)
    for row, (shape, dtype) in zip(rows, targets, strict=True):
        view = TargetFiles(Path("nowhere"), 1, shape, dtype).view_bytes
        assert row[1:] == [in_words(view), in_words(1_281_167 * view), in_words(400_000 * view)]


if __name__ == "__main__":
    train_in_processes(Path(sys.argv[1]), int(sys.argv[2]))
