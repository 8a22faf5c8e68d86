"""What is no pixel in [0, 1], or no label of a class, is told when the first batch comes, in every task and loop."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import PLAIN, tiny_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unimim import AttentiveProbe, CodebookTarget, FineTuning, HOGTarget, LinearProbe, MaskedImageModeling, UperNetSegmentation
from unimim.data import batches
from unimim.data.batches import OVERSHOOT, check_pixels
from unimim.tasks.probing import extract_features

VIT = "vit_tiny_patch16_224"
TASKS = ["pretraining", "finetuning", "segmentation", "probing"]
FAULTS = {
    "bytes": (lambda images: (images * 255).to(torch.uint8), r"torch.uint8 of shape \(4, 3, 32, 32\), .* divide by 255"),
    "bytes_as_floats": (lambda images: images * 255, r"within 0.*25\d.*, but have to lie in \[0, 1\]: divide them by 255"),
    "normalized": (lambda images: (images - 0.45) / 0.225, r"within -2 to 2.444, .*: leave out Normalize"),
    "in_-1_to_1": (lambda images: 2 * images - 1, r"within -1 to 1, .*: leave out Normalize"),
    "grey": (
        lambda images: images[:, :1],
        r"\(4, 1, 32, 32\), but they have to be \[b 3 H W\]: .*images.expand\(-1, 3, -1, -1\)",
    ),
    "channels_last": (lambda images: images.permute(0, 2, 3, 1), r"\(4, 32, 32, 3\), .*images.permute\(0, 3, 1, 2\)"),
    "alpha": (lambda images: torch.cat([images, images[:, :1]], 1), "red, green and blue alone"),
    "doubles": (lambda images: images.double(), r"torch.float64 .* computes in torch.float32: give images.float\(\)"),
    "NaN": (
        lambda images: images.where(images != images[2, 0, 5, 5], torch.nan),
        "1 of the 4 images of the first batch have NaN pixels",
    ),
    "booleans": (lambda images: images > 0.5, "torch.bool .* floating-point numbers"),
}


def pixels(count: int = 4) -> Tensor:
    """With 0 and 1 among them."""
    images = torch.rand(count, 3, 32, 32)
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 1
    return images


def task(name: str) -> pl.LightningModule:
    if name == "pretraining":
        return tiny_model()
    if name == "finetuning":
        return FineTuning(VIT, model_args=PLAIN, num_classes=3)
    if name == "segmentation":
        return UperNetSegmentation(VIT, model_args={**PLAIN, "depth": 4}, num_classes=3, channels=8)
    return LinearProbe(timm.create_model(VIT, **PLAIN, num_classes=0, global_pool=""), 3, lrs=(0.1,))


def loader(name: str, images: Tensor, labels: Tensor | None = None) -> DataLoader[Any]:
    if name == "pretraining":
        return DataLoader(images, batch_size=4)
    if labels is None:
        labels = torch.arange(len(images)) % 3
        labels = labels[:, None, None].expand(-1, 32, 32) if name == "segmentation" else labels
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=4)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **{"max_epochs": 1, **quiet, **options})


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_training_says_what_is_wrong_with_its_first_batch(tmp_path: Path, fault: str, name: str) -> None:
    spoil, said = FAULTS[fault]
    with pytest.raises(ValueError, match=said) as caught:
        trainer(tmp_path).fit(task(name), loader(name, spoil(pixels())))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TASKS[1:])
@pytest.mark.parametrize("fault", ["bytes_as_floats", "normalized", "grey"])
def test_a_validation_does_and_one_within_a_training_too(tmp_path: Path, fault: str, name: str) -> None:
    spoil, said = FAULTS[fault]
    bad = loader(name, spoil(pixels()))
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).validate(task(name), bad, verbose=False)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(task(name), loader(name, pixels()), bad)


@pytest.mark.parametrize("name", TASKS[:3])
def test_a_prediction_does_and_takes_images_with_and_without_labels(tmp_path: Path, name: str) -> None:
    spoil, said = FAULTS["normalized"]
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).predict(task(name), DataLoader(spoil(pixels()), batch_size=4))
    model, images = task(name), pixels()
    labelled = DataLoader(list(zip(images, torch.arange(4), strict=True)), batch_size=4)
    alone, beside = (trainer(tmp_path).predict(model, data) for data in (DataLoader(images, batch_size=4), labelled))
    torch.testing.assert_close(alone, beside, rtol=0, atol=0)


def test_the_encoder_is_what_pretraining_gives_for_whole_images(tmp_path: Path) -> None:
    """As a user of timm does it: the backbone's `forward_features` of images normalized by its `pretrained_cfg`."""
    model, images = tiny_model().eval(), pixels()
    mean, std = (torch.tensor(model.student.backbone.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = model.student.backbone.forward_features((images - mean) / std)
    assert expected.shape == (4, 17, 24)
    torch.testing.assert_close(model(images), expected)
    (predicted,) = trainer(tmp_path).predict(model, DataLoader(images, batch_size=4))
    torch.testing.assert_close(predicted, expected)


@pytest.mark.parametrize("make", [torch.zeros_like, lambda images: images.round(), torch.ones_like])
def test_black_white_and_both_are_pixels(make: Any) -> None:
    check_pixels(make(pixels()))


def test_the_tolerance_is_the_most_that_bicubic_interpolation_makes() -> None:
    """4x4 pixels that are 1 where the weights of their middle are positive, or where they are negative."""
    signs = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    brightest = (signs[:, None] * signs > 0).float().expand(1, 1, 4, 4)
    middle = torch.zeros(1, 1, 1, 2)
    high, low = (float(F.grid_sample(x, middle, "bicubic", align_corners=True)) for x in (brightest, 1 - brightest))
    assert (low, high) == (pytest.approx(-OVERSHOOT, abs=1e-5), pytest.approx(1 + OVERSHOOT, abs=1e-5))
    check_pixels(F.interpolate(torch.rand(8, 3, 8, 8).round(), scale_factor=7, mode="bicubic"))
    for outside in (1 + OVERSHOOT + 0.01, -OVERSHOOT - 0.01):
        with pytest.raises(ValueError, match="have to lie in"):
            check_pixels(pixels().index_fill(3, torch.arange(24), outside))
        with pytest.warns(UserWarning, match=r"lie within .*, though most within \[0, 1\]"):  # as noise makes them
            check_pixels(pixels().index_fill(3, torch.tensor([5]), outside))
    with pytest.raises(ValueError, match="divide them by 255"):  # white drawings on black, in 0 to 255
        check_pixels(pixels().round().mul(0).index_fill(3, torch.tensor([5]), 255))


def test_pixels_that_were_divided_twice_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="brighter than 0.003922 of .* divided by 255 twice"):
        check_pixels(pixels() / 255)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_the_type_is_the_trainers(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    """Lightning converts what the loader gives."""
    for given in (torch.float32, dtype):
        trainer(tmp_path, precision=precision).fit(task("finetuning"), loader("finetuning", pixels().to(given)))


def test_only_the_first_batch_of_a_loop_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a training and once in its validations, also in those of later epochs; and again in the next training."""
    looked: list[int] = []
    monkeypatch.setattr(batches, "check_pixels", lambda images, kind: looked.append(len(images)))
    model, data = task("finetuning"), loader("finetuning", pixels(12))
    runner = trainer(tmp_path)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, data, data)
    assert looked == [4, 4]
    runner.fit_loop.max_epochs = 3
    runner.fit(model, data, data)
    assert looked == [4, 4, 4, 4]


def test_subclasses_have_it_too(tmp_path: Path) -> None:
    class OwnStep(MaskedImageModeling):
        def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
            return self.student(images, self.masking(images, (4, 4))).patches.mean()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_callbacks(self) -> list[pl.Callback]:
            return [*super().configure_callbacks(), pl.callbacks.LambdaCallback()]

    class Dicts(FineTuning):
        def check_batch(self, batch: Any) -> None:
            assert set(batch) == {"label", "image"}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    spoil, said = FAULTS["normalized"]
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(tiny_model(OwnStep), loader("pretraining", spoil(pixels())))
    for images, expected in ((pixels(), None), (spoil(pixels()), said)):
        data = DataLoader([{"label": 0, "image": image} for image in images], batch_size=4)
        model = Dicts(VIT, model_args=PLAIN, num_classes=3)
        if expected is None:
            trainer(tmp_path).fit(model, data)
            continue
        with pytest.raises(ValueError, match=expected):
            trainer(tmp_path).fit(model, data)


def test_a_resumed_training_is_looked_at_too(tmp_path: Path) -> None:
    runner = trainer(tmp_path)
    runner.fit(task("finetuning"), loader("finetuning", pixels()))
    runner.save_checkpoint(tmp_path / "last.ckpt")
    spoil, said = FAULTS["bytes_as_floats"]
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, max_epochs=2).fit(
            task("finetuning"), loader("finetuning", spoil(pixels())), ckpt_path=tmp_path / "last.ckpt"
        )


def test_a_codebook_is_not_fitted_to_what_is_no_pixel(tmp_path: Path) -> None:
    spoil, said = FAULTS["normalized"]
    model = tiny_model(teacher=CodebookTarget(HOGTarget(8, 4), codes=4), loss=torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(model, loader("pretraining", spoil(pixels(8))))


@pytest.mark.parametrize("fault", FAULTS)
def test_features_are_of_pixels(fault: str) -> None:
    backbone = timm.create_model(VIT, **PLAIN, num_classes=0, global_pool="")
    spoil, said = FAULTS[fault]
    with pytest.raises(ValueError, match=said):
        extract_features(backbone, [(spoil(pixels()), torch.arange(4))])
    exact, _ = extract_features(backbone.double(), [(pixels().double(), torch.arange(4))])
    assert exact.shape == (4, 24)


@pytest.mark.parametrize("name", ["finetuning", "segmentation"])
def test_a_model_that_is_called_looks_at_type_and_shape(name: str) -> None:
    model = task(name)
    for fault in ("bytes", "grey"):
        spoil, said = FAULTS[fault]
        with pytest.raises(ValueError, match=said):
            model(spoil(pixels()))


LABELS = {
    "of_no_class": (lambda labels: labels + 1, "lie within 1 to 3, but 3 classes are 0 to 2"),
    "negative": (lambda labels: labels - 99, "lie within -99 to -97"),
    "int32": (lambda labels: labels.int(), r"labels are torch.int32 .* labels.long\(\)"),
    "two": (lambda labels: torch.stack([labels, labels], 1), r"shape \(4, 2"),
}


@pytest.mark.parametrize("name", TASKS[1:])
@pytest.mark.parametrize("fault", LABELS)
def test_labels_of_no_class_are_told(tmp_path: Path, fault: str, name: str) -> None:
    spoil, said = LABELS[fault]
    labels = torch.arange(4) % 3
    labels = spoil(labels[:, None, None].expand(-1, 32, 32) if name == "segmentation" else labels)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(task(name), loader(name, pixels(), labels))


def test_labels_that_are_probabilities_or_do_not_count_are_taken(tmp_path: Path) -> None:
    trainer(tmp_path).fit(task("finetuning"), loader("finetuning", pixels(), torch.full((4, 3), 1 / 3)))
    trainer(tmp_path).fit(task("segmentation"), loader("segmentation", pixels(), torch.full((4, 32, 32), 255)))
    for labels in (torch.tensor([0, -100, 1, 2]), torch.tensor([0, 0, 1, 2], dtype=torch.uint8)):  # as torch's own loss
        trainer(tmp_path, limit_val_batches=0).fit(task("finetuning"), loader("finetuning", pixels(), labels))


def test_half_the_bits_are_taken_and_twice_as_many_are_not() -> None:
    """float16 becomes float32 where it meets mean and std; float64 would make all that follows float64."""
    check_pixels(pixels().half(), torch.float32)
    with pytest.raises(ValueError, match=r"give images.float\(\)"):
        check_pixels(pixels().double(), torch.float32)


@pytest.mark.parametrize("probe", [LinearProbe, AttentiveProbe])
def test_a_batch_that_is_no_pair(tmp_path: Path, probe: Any) -> None:
    data = DataLoader([(image, 0, 0) for image in pixels()], batch_size=4)
    backbone = timm.create_model(VIT, **PLAIN, num_classes=0, global_pool="")
    heads = {} if probe is LinearProbe else {"num_heads": 2}
    with pytest.raises(ValueError, match=r"takes batches \(images \[b 3 H W\], labels \[b\]\), but the data gave a list of 3"):
        trainer(tmp_path).fit(probe(backbone, 3, **heads), data)
    with pytest.raises(ValueError, match="the data gave a Tensor"):
        trainer(tmp_path).fit(task("finetuning"), loader("pretraining", pixels()))
