"""The augmentation in two parts, beside torchvision's transforms of a PIL image under the same seed."""

import io
import json
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, tiny_model
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from unimim import HOGTarget, ImageFolderData, KNNCallback
from unimim.data.crops import GAP, SATURATION, Crop, CropAugmentation
from unimim.data.photos import read_image

CHINA, FLOWER = (Image.fromarray(pixels).resize((500, 375)) for pixels in load_sample_images().images)


def stored(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, quality=90, **options)
    return path


def reference(size: tuple[int, int], scale: tuple[float, float], color_jitter: float) -> Callable[[Image.Image], Tensor]:
    """What is meant, in torchvision's own words."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(0.5),
            *([v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def differences(path: Path, size: tuple[int, int], scale: tuple[float, float], color_jitter: float, seeds: int) -> Tensor:
    """In levels of 256, of ours from the reference: [seeds 3 H W]."""
    augmentation, expected = CropAugmentation(size, scale, 0.5, color_jitter), reference(size, scale, color_jitter)
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        pixels, jitter = augmentation.draw(augmentation.cut(Image.open(path), generator), generator)
        assert pixels.dtype == torch.uint8
        torch.manual_seed(seed)
        image = expected(read_image(path))
        assert torch.equal(torch.get_rng_state(), generator.get_state())  # not a number more or less
        found.append(255 * (augmentation.finish(pixels[None], jitter[None])[0] - image))
    return torch.stack(found)


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_crops_are_pils_but_for_rounding(tmp_path: Path, size: tuple[int, int]) -> None:
    """The same boxes and flips: another box, by one pixel, is off by several levels in the mean.

    Both resize in two passes with uint8 between them, which PIL sometimes takes in the other order: what is clipped there, at
    a hard edge, may differ by more than a level.
    """
    for photo in (CHINA, FLOWER):
        off = differences(stored(photo, tmp_path / "a.jpg"), size, (0.2, 1.0), 0.0, 20).abs()
        assert (off > 1.01).float().mean() < 1e-3
        assert off.mean((1, 2, 3)).max() < 0.25
        assert off.mean() < 0.05
        assert off.max() < 12


def test_colors_are_pils_to_a_few_levels(tmp_path: Path) -> None:
    """PIL rounds down after each of three steps; a missing one, or another order, is off by tens of levels."""
    off = differences(stored(CHINA, tmp_path / "a.jpg"), (128, 128), (0.2, 1.0), 0.4, 40)
    assert off.abs().max() < 8
    assert off.abs().mean((1, 2, 3)).max() < 2


def test_jitter_is_torchvisions_on_tensors() -> None:
    images = torch.randint(0, 256, (20, 3, 24, 24), dtype=torch.uint8)
    ours, theirs = CropAugmentation((24, 24), (1.0, 1.0), 0.0, 0.8), v2.ColorJitter(0.8, 0.8, 0.8)
    generator = torch.Generator().manual_seed(0)
    drawn = [ours.draw(image, generator) for image in images]
    torch.manual_seed(0)
    expected = [(torch.rand(1), theirs(image / 255))[1] for image in images]  # the one number is for the flip
    batch = ours.finish(torch.stack([pixels for pixels, _ in drawn]), torch.stack([jitter for _, jitter in drawn]))
    torch.testing.assert_close(batch, torch.stack(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(500, 375), (90, 60), (3, 1000), (1000, 3), (2, 2), (1, 1)])
def test_boxes_and_jitter_are_torchvisions_to_the_bit(size: tuple[int, int]) -> None:
    """Where none of ten boxes fits, in what is long and narrow, the largest in the centre."""
    image = Image.new("RGB", size)
    ours = CropAugmentation((24, 24), (0.2, 1.0), 0.0, 1.5)
    crop, jitter = v2.RandomResizedCrop(24, (0.2, 1.0)), v2.ColorJitter(1.5, 1.5, 1.5)
    for seed in range(50):
        torch.manual_seed(seed)
        box, colors = crop.make_params([image]), jitter.make_params([image])
        generator = torch.Generator().manual_seed(seed)
        left, top, right, bottom = ours.draw_box(image.height, image.width, generator)
        assert (left, top, right - left, bottom - top) == tuple(box[key] for key in ("left", "top", "width", "height"))
        factors = [colors[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
        steps = [(which, factors[which]) for which in colors["fn_idx"].tolist() if which <= SATURATION]
        assert torch.equal(ours.draw_jitter(generator), torch.tensor(steps))


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *product(["jpg", "png", "webp", "tif"], ["1", "L", "RGB"]),
        *product(["png", "webp", "tif"], ["LA", "P", "RGBA"]),
        *product(["png", "tif"], ["I;16"]),
        *product(["jpg", "tif"], ["CMYK"]),
    ],
)
@pytest.mark.parametrize("orientation", [1, 8])
def test_files_of_any_kind_are_cropped_as_they_are_read(tmp_path: Path, suffix: str, mode: str, orientation: int) -> None:
    """Of 90x60 to 128x128, so that nothing is reduced; beside it what `read_image` makes of the file."""
    photo = CHINA.resize((90, 60))
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(deep if mode == "I;16" else photo.convert(mode), tmp_path / f"a.{suffix}", exif=exif)
    off = differences(path, (128, 128), (0.2, 1.0), 0.0, 3).abs()
    assert off.mean() < 0.1
    assert off.max() < 12


def test_large_photos_of_other_modes_are_reduced_too(tmp_path: Path) -> None:
    for mode in ("L", "CMYK"):
        path = stored(CHINA.convert(mode), tmp_path / "a.jpg")
        off = differences(path, (40, 50), (0.8, 1.0), 0.0, 5)
        assert 0.1 < off.abs().mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_cropped_as_they_stand(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = CHINA.resize((1000, 600))
    off = differences(stored(large, tmp_path / "a.jpg", exif=exif), (32, 48), (0.8, 1.0), 0.0, 3)
    assert off.abs().mean() < (2 if orientation == 1 else 0.02)  # only what lies upright is reduced as it is decoded


def test_large_photos_are_reduced_by_their_decoder_and_hardly_change(tmp_path: Path) -> None:
    """Four by four photos as one, 2000x1500, of which 112x112 are wanted."""
    tiles = [np.asarray(photo) for photo in (CHINA, FLOWER, FLOWER, CHINA)]
    mosaic = Image.fromarray(np.tile(np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]), (2, 2, 1)))
    off = differences(stored(mosaic, tmp_path / "a.jpg"), (112, 112), (0.5, 1.0), 0.0, 3)
    assert 0.1 < off.abs().mean() < 1
    assert off.mean().abs() < 0.05
    assert off[..., 4:-4, 4:-4].abs().max() < 30  # at its edge the filter sees the photo beyond the box, PIL's crop has none


def test_what_is_decoded_has_twice_the_pixels_that_are_wanted() -> None:
    photo = io.BytesIO()
    Image.new("RGB", (1999, 1501)).save(photo, "jpeg")
    augmentation = CropAugmentation((100, 150), (0.2, 1.0), 0.0, 0.0)
    for height, width, expected in (
        (400, 600, 2), (399, 600, 1), (400, 599, 1), (799, 1199, 2), (800, 1200, 4), (1501, 1199, 2), (1501, 1999, 4),
    ):  # fmt: skip
        image = Image.open(photo)
        assert augmentation.reduce(image, height, width) == expected
        assert image.size == (-(-1999 // expected), -(-1501 // expected))
        assert expected == 1 or min(height / expected / 100, width / expected / 150) >= GAP
    small = CropAugmentation((10, 10), (0.2, 1.0), 0.0, 0.0)
    assert small.reduce(Image.open(photo), 1500, 1900) == 8  # JPEG has no less
    png = io.BytesIO()
    Image.new("RGB", (1999, 1501)).save(png, "png")
    assert small.reduce(Image.open(png), 1500, 1900) == 1


def test_boxes_are_distributed_as_torchvisions(tmp_path: Path) -> None:
    """A photo whose pixels say where they are: the corners that 500 crops come from, of other seeds than the reference's."""
    place = np.zeros((150, 200, 3), np.uint8)
    place[..., 0], place[..., 1] = np.linspace(0, 255, 200), np.linspace(0, 255, 150)[:, None]
    path = tmp_path / "a.bmp"
    Image.fromarray(place).save(path)
    augmentation, expected = CropAugmentation((8, 8), (0.2, 1.0), 0.0, 0.0), reference((8, 8), (0.2, 1.0), 0.0)
    generator = torch.Generator().manual_seed(1)
    ours = torch.stack([augmentation.cut(Image.open(path), generator) for _ in range(500)]) / 255
    image = read_image(path)
    torch.manual_seed(2)
    theirs = torch.stack([expected(image) for _ in range(500)])

    def boxes(crops: Tensor) -> Tensor:
        """Centre and extent in both directions: [n 4]. A mirrored crop has the same."""
        sides = torch.stack([crops[:, 0, 4, 0], crops[:, 0, 4, -1], crops[:, 1, 0, 4], crops[:, 1, -1, 4]], 1)
        left, right, top, bottom = sides.unbind(1)
        return torch.stack([left + right, (right - left).abs(), top + bottom, bottom - top], 1)

    for found, wanted in zip(boxes(ours).T, boxes(theirs).T, strict=True):
        grid = torch.linspace(0, 2, 200)
        distance = ((found[:, None] < grid).float().mean(0) - (wanted[:, None] < grid).float().mean(0)).abs().max()
        assert distance < 1.63 * (2 / 500) ** 0.5  # Kolmogorov and Smirnov, 1 %


def test_a_batch_is_each_of_its_images() -> None:
    """In pieces or not, with as many steps of jitter for each, or none."""
    augmentation = CropAugmentation((16, 16), (0.2, 1.0), 0.5, 0.4)
    drawn = [
        augmentation.draw(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), torch.default_generator) for _ in range(19)
    ]
    pixels, jitter = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    alone = torch.cat([augmentation.finish(pixels[[i]], jitter[[i]]) for i in range(19)])
    torch.testing.assert_close(augmentation.finish(pixels, jitter), alone, atol=1e-6, rtol=0)
    plain = augmentation.finish(pixels, jitter[:, :0])
    assert torch.equal(plain, pixels.permute(0, 3, 1, 2) / 255)
    assert plain.is_contiguous()


def test_an_image_is_cropped_alike_by_whatever_worker_and_torchs_own_numbers_are_left_alone(tmp_path: Path) -> None:
    for i in range(6):
        CHINA.crop((i * 60, 0, i * 60 + 90, 90)).save(tmp_path / f"{i}.png")
    data = ImageFolderData(str(tmp_path), 32, 3, 0, color_jitter=0.4)
    data.setup()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    alone = [data.images[0, index] for index in range(6)]
    assert torch.equal(torch.get_rng_state(), expected)
    assert not torch.equal(data.images[1, 0].pixels, alone[0].pixels)
    copy = pickle.loads(pickle.dumps(data.images))  # as a spawned worker gets it
    for workers, images in ((0, data.images), (2, data.images), (0, copy)):
        loader = DataLoader(images, 3, sampler=data.train_dataloader().sampler, num_workers=workers)
        order = torch.tensor([index for _, index in loader.sampler])
        batches = list(loader)
        assert all(isinstance(batch, Crop) for batch in batches)
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), torch.stack([crop.pixels for crop in alone])[order])
        assert torch.equal(torch.cat([batch.jitter for batch in batches]), torch.stack([crop.jitter for crop in alone])[order])


def quick_trainer(**options: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_training_gets_images_in_its_precision(tmp_path: Path, precision: str) -> None:
    for i in range(4):
        CHINA.crop((i * 90, 0, i * 90 + 90, 90)).save(tmp_path / f"{i}.png")
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Tensor, index: int) -> None:
            seen.append(batch)

    trainer = quick_trainer(precision=precision, callbacks=[Look()])
    trainer.fit(tiny_model(), ImageFolderData(str(tmp_path), 32, 2, 0, color_jitter=0.4))
    assert [tuple(batch.shape) for batch in seen] == [(2, 3, 32, 32)] * 2
    for batch in seen:
        assert batch.dtype == {"32": torch.float32, "bf16": torch.bfloat16, "64": torch.float64}[precision[:-5]]
        assert 0 <= batch.min() < batch.max() <= 1


def test_a_target_is_fitted_to_what_training_sees_and_other_batches_pass_as_they_are(tmp_path: Path) -> None:
    """A codebook's batches are those of the first epoch; labelled images for k-NN and one's own validation are no crops."""
    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for i in range(2):
                CHINA.crop((label * 90, i * 90, label * 90 + 90, i * 90 + 90)).save(tmp_path / split / str(label) / f"{i}.png")
    fitted, seen, validated = [], [], []

    class Fitted(HOGTarget):
        def prepare(self, batches: Iterator[Tensor], grid_size: tuple[int, int]) -> None:
            fitted.extend(batches)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Tensor, index: int) -> None:
            seen.append(batch)

        def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, *_: int) -> None:
            validated.append(batch)

    class Validated(ImageFolderData):
        def val_dataloader(self) -> DataLoader:
            return self.labelled_dataloader("val")

    class Model(type(tiny_model())):
        def validation_step(self, batch: object, batch_idx: int) -> None:
            """Looks at nothing."""

    model = tiny_model()
    model.__class__ = Model
    model.teacher = Fitted(patch_size=8, cell_size=4)
    trainer = quick_trainer(callbacks=[Look(), KNNCallback(k=1)], num_sanity_val_steps=0)
    trainer.fit(model, Validated(str(tmp_path), 32, 2, 0, color_jitter=0.4))
    assert len(fitted) == len(seen) == 2
    assert all(torch.equal(one, other) for one, other in zip(fitted, seen, strict=True))
    assert [tuple(images.shape) for images, labels in validated] == [(2, 3, 32, 32)] * 2
    assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in validated)
    assert 0 <= trainer.callback_metrics["val/knn"] <= 1


def test_the_benchmark_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In miniature: all tables are printed and have their place in docs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    import data as benchmark

    monkeypatch.setattr(report, "OUTPUT", tmp_path)
    for name, small in (("FILES", 7), ("LARGE_FILES", 2), ("BATCH", 2), ("REPETITIONS", 3)):
        monkeypatch.setattr(benchmark, name, small)
    threads = torch.get_num_threads()
    benchmark.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    kept = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert {key: len(results["rows"]) for key, results in kept.items()} == {"data": 3, "data_jitter": 4, "data_large": 3}
    for results in kept.values():
        assert report.table(results) in printed
        assert [len(row["values"]) for row in results["rows"].values()] == [3] * len(results["rows"])
    assert "500x375" in kept["data"]["of"]
    assert "2000x1500" in kept["data_large"]["of"]
    report.document_with((ROOT / "docs" / "performance.md").read_text(), kept)
