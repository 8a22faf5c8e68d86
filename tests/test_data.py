"""The data modules on real files: every layout, mode and mistake."""

import gzip
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model
from PIL import Image
from torch import distributed

from unimim import ClassFolderData, FashionMNISTData, ImageFolderData
from unimim.data.folder import ImageFiles, each_once, image_files
from unimim.data.photos import read_image
from unimim.samples import fashion_mnist


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30), value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).convert(mode).save(path)
    return path


def folder(root: Path, **options: object) -> ImageFolderData:
    data = ImageFolderData(**{"root": str(root), "image_size": 16, "batch_size": 2, "num_workers": 0, **options})
    data.setup()
    return data


def trained_on(data: ImageFolderData) -> list[torch.Tensor]:
    """The batches of an epoch as a training step gets them."""
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_a_folder_that_says_so_is_passed_over_with_all_below(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("a", "a/b", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.jpg")
    assert len(image_files(tmp_path)) == 3
    (tmp_path / "a" / ".nomedia").touch()
    with caplog.at_level("INFO"):
        assert image_files(tmp_path) == [tmp_path / "c" / "x.jpg"]
    assert caplog.text.count(f"1 image in 1 folder of {tmp_path}; passed over: 1 with a file .nomedia (a)\n") == 1


def test_batches_of_the_loader_alone_are_told_to_need_the_data_module(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "x.jpg")
    data = ImageFolderData(str(tmp_path), 32, batch_size=1, num_workers=0)
    data.setup()
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"gave a Crop, which the data module finishes on the device: fit\(model, data\)"):
        trainer.fit(tiny_model(), data.train_dataloader())


def test_nested_and_flat_folders_any_size_and_mode(tmp_path: Path) -> None:
    save(tmp_path / "flat.png", "P", (5, 90))
    save(tmp_path / "a" / "gray.jpg", "L")
    save(tmp_path / "a" / "b" / "cmyk.JPEG", "CMYK")
    save(tmp_path / "a" / "alpha.webp", "RGBA", (300, 200))
    save(tmp_path / "one.bmp", "1", (1, 1))
    (tmp_path / "notes.txt").write_text("no image")
    batches = trained_on(folder(tmp_path))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 16, 16)] * 2
    for batch in batches:
        assert batch.dtype == torch.float32
        assert batch.min() >= 0
        assert batch.max() <= 1


def test_sixteen_bit_gray_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_augmentation_crops_flips_and_jitters(tmp_path: Path) -> None:
    """On an image whose left half is black: without any augmentation it stays, with a flip it turns."""
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, 16:] = 200
    Image.fromarray(left).save(tmp_path / "a.png")

    def augmented(**options: object) -> torch.Tensor:
        (batch,) = trained_on(folder(tmp_path, batch_size=1, **options))
        return batch[0]

    plain = augmented(crop_scale=(1.0, 1.0), flip=0.0)
    flipped = augmented(crop_scale=(1.0, 1.0), flip=1.0)
    torch.testing.assert_close(plain.flip(-1), flipped)
    data = folder(tmp_path, batch_size=1, crop_scale=(0.05, 0.06), flip=0.0)
    small = [data.images[epoch, 0][0] for epoch in range(20)]
    assert any(crop.max() < 20 for crop in small)  # a crop of a twentieth is often of one half only
    jittered = augmented(crop_scale=(1.0, 1.0), flip=0.0, color_jitter=0.4)
    assert not torch.allclose(plain, jittered)
    assert jittered.max() <= 1


def test_a_missing_an_empty_and_a_small_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data.root: there is no folder .*nowhere"):
        folder(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no image in or below"):
        folder(tmp_path)
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has 1 images, which is less than one batch of 2: set data.batch_size to 1"):
        folder(tmp_path)


def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    bad = tmp_path / "b.jpg"
    bad.write_bytes(save(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()[:300])
    (tmp_path / "c.png").write_bytes(b"no image at all")
    save(tmp_path / "d.png")
    with pytest.raises(ValueError, match=r"unreadable image .*(b\.jpg|c\.png) .*data\.on_bad_image=skip"):
        list(folder(tmp_path, batch_size=5).train_dataloader())
    data = folder(tmp_path, batch_size=5, on_bad_image="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (batch,) = trained_on(data)
    assert len(batch) == 5  # the next readable image takes the place
    marked = [path.name for path, bad in zip(data.images.files, data.images.unreadable, strict=True) if bad]
    assert marked == ["b.jpg", "c.png"]
    texts = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert len(texts) == 2
    assert "(2 skipped so far)" in texts[1]
    with pytest.warns(UserWarning, match="2 of 5 image files in .* could not be read and were skipped"):
        data.teardown("fit")
    workers = folder(tmp_path, batch_size=5, on_bad_image="skip", num_workers=2)
    for _ in range(2):  # by whatever worker, each file counts once
        list(workers.train_dataloader())
    assert workers.images.unreadable.sum() == 2
    only_bad = ImageFiles([bad], transform=lambda image: torch.zeros(1), on_bad_image="skip")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 1 image files can be read"):
        only_bad[0]


def test_photos_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    """Orientation 6: the camera's top row is at the right. A damaged EXIF turns nothing, and the photo can be read."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10] = 250  # the camera's top
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image = read_image(tmp_path / name)
        assert image.size == (20, 40)
        found = np.asarray(image)
        assert found[:, 12:].min() > 240
        assert found[:, :8].max() < 10
    gray = np.arange(12, dtype=np.uint16).reshape(3, 4) * 256
    Image.fromarray(gray).save(tmp_path / "deep.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], np.rot90(gray // 256, -1))
    for damaged in (b"Exif\0\0no header", exif.tobytes()[:12], exif.tobytes()[:16]):
        Image.fromarray(pixels).save(tmp_path / "damaged.jpg", exif=damaged)
        assert read_image(tmp_path / "damaged.jpg").size == (40, 20)


def test_links_to_folders_are_followed_and_32_bit_gray_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere")
    assert len(folder(tmp_path / "root", batch_size=1).images) == 1
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"unreadable image .*float\.tiff \(32-bit gray, mode F"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize(
    "wrong", [{"flip": 2.0}, {"crop_scale": (1.0, 0.2)}, {"batch_size": 0}, {"image_size": 0}, {"num_workers": -1}]
)
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"data: .*{next(iter(wrong))}"):
        folder(tmp_path, **wrong)


def test_imagenets_layout_pretrains_on_train_and_has_labels(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", value=100 * label)
    data = folder(tmp_path)
    assert len(data.images) == 6
    images, labels = next(iter(data.labelled_dataloader("val")))
    assert labels.tolist() == [0, 1]
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images[:, 0].mean((1, 2)), torch.tensor([0.0, 100 / 255]))
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match="other class folders: bird"):
        data.labelled_dataloader("val")
    flat = folder(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="labels need"):
        flat.labelled_dataloader("train")


def write_idx(root: Path, count: int) -> None:
    """Files in Debian's form, `count` images a split; image i is filled with i, its label is i modulo 10."""
    root.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        with gzip.open(root / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        with gzip.open(root / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels)


def fashion(root: Path, **options: object) -> FashionMNISTData:
    data = FashionMNISTData(str(root), **{"batch_size": 5, "train_images": 20, "val_images": 10, **options})
    data.prepare_data()
    data.setup()
    return data


def test_fashion_mnist_from_debians_package_and_then_from_where_it_is(tmp_path: Path) -> None:
    write_idx(tmp_path / "debian" / fashion_mnist.DEBIAN_FOLDER, 40)
    assert fashion_mnist.provide(tmp_path).startswith("Debian's package dataset-fashion-mnist")
    assert fashion_mnist.provide(tmp_path).startswith("the files in")
    data = fashion(tmp_path)
    images, labels = next(iter(data.labelled_dataloader("train")))
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert images.shape == (20, 3, 32, 32)
    assert (images[:, :, :2] == 0).all()  # padded, not stretched
    torch.testing.assert_close(images[:, 0, 16, 16], torch.arange(20) / 255)
    _, labels = next(iter(data.labelled_dataloader("val")))
    assert labels.tolist() == [i % 10 for i in range(30, 40)]
    assert len(next(iter(data.labelled_dataloader("test", 7)))[1]) == 7
    assert fashion(tmp_path, image_size=64).train_dataloader().dataset[0].shape == (3, 64, 64)


def test_fashion_mnist_comes_flipped_half_of_the_time(tmp_path: Path) -> None:
    write_idx(tmp_path / "debian" / fashion_mnist.DEBIAN_FOLDER, 40)
    data = fashion(tmp_path)
    images, _ = data.splits["train"]
    images[:, :, :14] = 0
    loader = data.train_dataloader()
    seen = []
    for epoch in range(10):
        loader.sampler.set_epoch(epoch)
        seen += list(loader)
    batches = torch.cat(seen)
    lit_right = batches[:, 0, 16, 20] > 0
    lit_left = batches[:, 0, 16, 11] > 0
    assert not (lit_left & lit_right).any()
    assert 70 < lit_right.sum() < 130  # of 190 that are lit at all


def test_two_processes_validate_every_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine each: a sampler that fills up the second share would repeat one."""
    write_idx(tmp_path / "debian" / fashion_mnist.DEBIAN_FOLDER, 40)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    garments = fashion(tmp_path, labelled=True, val_images=9)
    for split, count in (("train", 3), ("val", 9)):
        for i in range(count):
            save(tmp_path / "folder" / split / "a" / f"{i}.png", value=25 * i)
    folders = ClassFolderData(str(tmp_path / "folder"), image_size=16, batch_size=3, num_workers=0)
    folders.setup("validate")
    for data in (garments, folders):
        seen = []
        for rank in range(2):
            monkeypatch.setattr(distributed, "get_rank", lambda group=None, rank=rank: rank)
            seen += [image for images, _ in data.val_dataloader() for image in images]
        expected = [image for images, _ in data.labelled_dataloader("val") for image in images]
        assert len(seen) == len(expected) == 9
        assert all(any(torch.equal(image, other) for other in seen) for image in expected)


def test_fewer_images_than_processes_are_refused_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 4)
    for rank in range(4):
        monkeypatch.setattr(distributed, "get_rank", lambda group=None, rank=rank: rank)
        with pytest.raises(ValueError, match="3 images cannot be shared by 4 processes: set trainer.devices to 3 or less"):
            each_once(range(3))
        assert len(list(each_once(range(4)))) == 1


def test_fashion_mnist_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(fashion_mnist, "FashionMNIST", offline)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", Path("nowhere"))
    with pytest.raises(FileNotFoundError, match=r"not unpacked in .*download failed \(RuntimeError\): give data.root"):
        fashion_mnist.provide(tmp_path)
    with pytest.raises(ValueError, match="exceed the 60,000"):
        FashionMNISTData(train_images=60_000, val_images=1)
    with pytest.raises(ValueError, match="less than one batch"):
        FashionMNISTData(train_images=10, batch_size=64)
