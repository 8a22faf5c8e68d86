"""k-NN and the linear probe against brute force and scikit-learn, the callback against silence."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from unimim import FineTuning, KNNCallback, load_backbone
from unimim.probing import accuracy, extract_features, knn, linear_probe


def blobs(n: int, d: int = 16, classes: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centers[labels] + 1.2 * torch.randn(n, d), labels


def test_knn_is_brute_force() -> None:
    """In float64, one query and one neighbour at a time."""
    (bank, bank_labels), (features, _) = blobs(200), blobs(70)
    expected = []
    for query in features.double():
        cosines = [float(query @ other / query.norm() / other.norm()) for other in bank.double()]
        votes = torch.zeros(5, dtype=torch.float64)
        for index in sorted(range(200), key=lambda i: -cosines[i])[:20]:
            votes[bank_labels[index]] += torch.exp(torch.tensor(cosines[index] / 0.07, dtype=torch.float64))
        expected.append(int(votes.argmax()))
    assert knn(features, bank, bank_labels).tolist() == expected
    assert knn(features, bank, bank_labels, chunk=7).tolist() == expected
    nearest = (torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(bank).T).argmax(1)
    assert torch.equal(knn(features, bank, bank_labels, k=1), bank_labels[nearest])
    with pytest.raises(ValueError, match="asks 20 neighbours, but only 5 images have labels"):
        knn(features, bank[:5], bank_labels[:5])


def test_the_linear_probe_is_logistic_regression() -> None:
    """scikit-learn's objective is the sum of the losses + |w|^2 / (2 C); ours is their mean + penalty / 2 |w|^2."""
    (features, labels), (test_features, test_labels) = blobs(300), blobs(500)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=1 / (1e-3 * 300), tol=1e-8, max_iter=1000).fit(scaler.transform(features), labels)
    expected = torch.from_numpy(reference.predict(scaler.transform(test_features)))
    predicted = linear_probe(features, labels, test_features)
    assert (predicted == expected).float().mean() >= 0.99
    assert 0.5 < accuracy(predicted, test_labels) < 1.0


def test_features_are_mean_patch_tokens_of_normalized_pixels() -> None:
    model = tiny_model()
    backbone = model.student.backbone.train()
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6)
    features, found = extract_features(backbone, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert torch.equal(found, labels)
    assert backbone.training
    tokens = backbone.eval().forward_features(model.student.normalize(images))
    torch.testing.assert_close(features, tokens[:, 1:].mean(1))


class Labelled(pl.LightningDataModule):
    """Random images, and two labelled splits."""

    def __init__(self) -> None:
        super().__init__()
        self.images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.images, batch_size=4, shuffle=True)

    def labelled_dataloader(self, split: str) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.images, torch.arange(24) % 3), batch_size=8, generator=torch.Generator())


def trained(tmp_path: Path, callbacks: list[pl.Callback]) -> tuple[pl.Trainer, Tensor]:
    pl.seed_everything(0, verbose=False)
    model = tiny_model()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, Labelled())
    return trainer, model.student.mask_token.detach()


def test_the_callback_measures_and_disturbs_nothing(tmp_path: Path) -> None:
    trainer, token = trained(tmp_path, [KNNCallback(every_n_epochs=2, k=1)])
    assert trainer.callback_metrics["val/knn"] == 1.0  # each image is its own nearest neighbour
    _, alone = trained(tmp_path, [])
    assert torch.equal(token, alone)
    with pytest.raises(ValueError, match=r"needs a data module with labelled_dataloader\(split\)"):
        pl.Trainer(callbacks=[KNNCallback()], logger=False, default_root_dir=tmp_path).fit(
            tiny_model(), DataLoader(torch.rand(4, 3, 32, 32))
        )


def test_from_checkpoint_to_fine_tuning(tmp_path: Path) -> None:
    """The file alone gives the encoder back; a classifier on it learns three labels by heart."""
    trainer, _ = trained(tmp_path, [])
    path = trainer.checkpoint_callback.best_model_path
    pretrained = trainer.lightning_module.student.backbone.state_dict()
    backbone = load_backbone(path)
    assert all(torch.equal(value, pretrained[key]) for key, value in backbone.state_dict().items())
    assert backbone.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))
    classifier = load_backbone(path, num_classes=3, global_pool="avg")
    same = {key for key, value in classifier.state_dict().items() if torch.equal(value, pretrained.get(key, value * 0 + 7))}
    fresh = set(classifier.state_dict()) - same
    assert fresh == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    model = FineTuning(classifier, lr=3e-3, layer_decay=0.9, warmup_epochs=1, label_smoothing=0.0)
    data = DataLoader(TensorDataset(Labelled().images, torch.arange(24) % 3), batch_size=8)
    finetuner = pl.Trainer(
        max_epochs=30,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    finetuner.fit(model, data)
    (measured,) = finetuner.validate(model, data, verbose=False)
    assert measured["val/acc1"] == 1.0
    rates = sorted({group["initial_lr"] for group in finetuner.optimizers[0].param_groups})
    assert rates == pytest.approx([3e-3 * 0.9**i for i in (3, 2, 1, 0)])  # embedding, two blocks, head


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_backbone(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of unimim's pretraining"):
        load_backbone(tmp_path / "other.ckpt")
    trainer, _ = trained(tmp_path, [])
    path = Path(trainer.checkpoint_callback.best_model_path)
    (tmp_path / "page.ckpt").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match=r"holds no weights, it starts with b'<!DOCTYPE html>"):
        load_backbone(tmp_path / "page.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="may be truncated"):
        load_backbone(tmp_path / "cut.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["student.backbone.blocks.0.typo"] = checkpoint["state_dict"].pop(
        "student.backbone.blocks.0.norm1.weight"
    )
    torch.save(checkpoint, tmp_path / "renamed.ckpt")
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.norm1.weight\); 1 unexpected \(blocks.0.typo\)"):
        load_backbone(tmp_path / "renamed.ckpt")
    with pytest.raises(ValueError, match="of another shape"):
        load_backbone(path, embed_dim=48)
    for arguments in ({}, {"num_classes": 3}):  # no head; a head on every token
        with pytest.raises(ValueError, match="needs a backbone with a classifier"):
            FineTuning(load_backbone(path, **arguments))


def test_k_larger_than_the_bank_fails_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asks 25 neighbours, but only 24 images have labels"):
        trained(tmp_path, [KNNCallback(k=25)])


def test_the_last_epoch_is_measured_also_when_steps_end_it(tmp_path: Path) -> None:
    trainer = pl.Trainer(max_epochs=-1, max_steps=8, accelerator="cpu", default_root_dir=tmp_path, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, callbacks=[KNNCallback(10, k=1)])  # fmt: skip
    trainer.fit(tiny_model(), Labelled())
    assert trainer.callback_metrics["val/knn"] == 1.0
