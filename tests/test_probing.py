"""The probes against plain loops and scikit-learn, the k-NN callback against silence."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, TINY, tiny_model
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from unimim import FashionMNISTData, FineTuning, KNNCallback, load_backbone
from unimim.tasks.probing import AttentiveProbe, LinearProbe, Probe, accuracy, extract_features, linear_probe
from unimim.weights.models import create_backbone


def blobs(n: int, d: int = 16, classes: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centers[labels] + 1.2 * torch.randn(n, d), labels


def test_the_linear_probe_is_logistic_regression() -> None:
    """scikit-learn's objective is the sum of the losses + |w|^2 / (2 C); ours is their mean + penalty / 2 |w|^2."""
    (features, labels), (test_features, test_labels) = blobs(300), blobs(500)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=1 / (1e-3 * 300), tol=1e-8, max_iter=1000).fit(scaler.transform(features), labels)
    expected = torch.from_numpy(reference.predict(scaler.transform(test_features)))
    predicted = linear_probe(features, labels, test_features)
    assert (predicted == expected).float().mean() >= 0.99
    assert 0.5 < accuracy(predicted, test_labels) < 1.0


def test_the_linear_probe_reaches_scikit_learn_on_the_sample_set() -> None:
    """Features of 1000 garments; with as many, scikit-learn's default C of 1 is our penalty of 1e-3."""
    if not (ROOT / "data" / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST is not in data/ (make data)")
    data = FashionMNISTData(str(ROOT / "data"))
    data.setup()
    backbone = create_backbone("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 1, "global_pool": ""})
    (features, labels), (test_features, test_labels) = (
        extract_features(backbone, data.labelled_dataloader(split, count)) for split, count in (("train", 1000), ("test", 2000))
    )
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features, labels)
    expected = reference.score(test_features, test_labels)
    assert expected > 0.5
    assert accuracy(linear_probe(features, labels, test_features), test_labels) > expected - 0.01


def test_features_are_mean_patch_tokens_of_normalized_pixels() -> None:
    model = tiny_model()
    backbone = model.student.backbone.train()
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6)
    features, found = extract_features(backbone, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert torch.equal(found, labels)
    assert backbone.training
    tokens = backbone.eval().forward_features(model.student.normalize(images))
    torch.testing.assert_close(features, tokens[:, 1:].mean(1))
    features, _ = extract_features(backbone, [(images, labels)], feature="cls")
    torch.testing.assert_close(features, tokens[:, 0])


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


def test_k_larger_than_the_bank_fails_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asks 25 neighbours, but only 24 images have labels"):
        trained(tmp_path, [KNNCallback(k=25)])


def test_the_last_epoch_is_measured_also_when_steps_end_it(tmp_path: Path) -> None:
    trainer = pl.Trainer(max_epochs=-1, max_steps=8, accelerator="cpu", default_root_dir=tmp_path, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, callbacks=[KNNCallback(10, k=1)])  # fmt: skip
    trainer.fit(tiny_model(), Labelled())
    assert trainer.callback_metrics["val/knn"] == 1.0


# Probes as LightningModules


def tiny_backbone(kind: str = "vit") -> Any:
    """Noise in every parameter, dropout and drop path that would be seen in training mode."""
    name, model_args = TINY[kind]
    backbone = create_backbone(name, {**model_args, "num_classes": 0, "global_pool": "", "drop_path_rate": 0.5})
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 3


def fitted(probe: Probe, folder: Path, **options: Any) -> pl.Trainer:
    """Three epochs of six batches in a fixed order, validated on the first 11 images."""
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer.fit(probe, batches, DataLoader(TensorDataset(IMAGES[:11], LABELS[:11]), batch_size=4))
    return trainer


def probe_of(kind: str, lrs: tuple[float, ...], backbone: str = "vit") -> Probe:
    torch.manual_seed(5)
    if kind == "linear":
        return LinearProbe(tiny_backbone(backbone), 3, lrs, weight_decay=0.01, warmup_epochs=1)
    return AttentiveProbe(tiny_backbone(backbone), 3, lrs, num_heads=3, weight_decay=0.1, warmup_epochs=1)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_is_a_plain_loop(kind: str, tmp_path: Path) -> None:
    probe = probe_of(kind, (0.02,))
    backbone, head = copy.deepcopy(probe.backbone.network).eval(), copy.deepcopy(probe.heads[0])
    fitted(probe, tmp_path)

    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    decayed = [p for name, p in head.named_parameters() if p.ndim > 1]
    others = [p for name, p in head.named_parameters() if p.ndim == 1]
    if kind == "linear":
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    else:
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.999))
    for step in range(18):
        rate = 0.02 * (step / 6 if step < 6 else (1 + math.cos(math.pi * (step - 6) / 12)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = slice(step % 6 * 4, step % 6 * 4 + 4)
        with torch.no_grad():
            tokens = backbone.forward_features((IMAGES[batch] - mean) / std)[:, 1:]
        if kind == "linear":
            tokens = tokens.mean(1)
            tokens = (tokens - tokens.mean(0)) / (tokens.var(0, correction=0) + 1e-6).sqrt()
        optimizer.zero_grad()
        F.cross_entropy(head(tokens), LABELS[batch]).backward()
        optimizer.step()
    for found, expected in zip(probe.heads[0].parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_attentive_head_written_out() -> None:
    """One query, cross-attention of three heads, a residual MLP, a linear layer."""
    probe = probe_of("attentive", (0.1,))
    for parameter in probe.heads[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    pooling, linear = probe.heads[0]
    tokens = probe.inputs(probe.backbone.network.forward_features((IMAGES - probe.mean) / probe.std))
    query = pooling.q(pooling.latent[0]).view(3, 8)
    key, value = pooling.kv(tokens).view(24, 16, 2, 3, 8).unbind(2)
    attention = torch.softmax(torch.einsum("nd,btnd->bnt", query, key) / math.sqrt(8), -1)
    pooled = pooling.proj(torch.einsum("bnt,btnd->bnd", attention, value).flatten(1))
    pooled = pooled + pooling.mlp(F.layer_norm(pooled, (24,), pooling.norm.weight, pooling.norm.bias))
    torch.testing.assert_close(probe(IMAGES)[0], linear(pooled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_rate_learns_the_same_whatever_the_others_are(kind: str, tmp_path: Path) -> None:
    """Bit for bit, clipped, and beside a rate that diverges."""
    learned = []
    for lrs in ((0.05,), (1e30, 0.05), (0.05, 0.3, 0.01)):
        probe = probe_of(kind, lrs)
        fitted(probe, tmp_path, gradient_clip_val=0.1)
        learned.append(probe.heads[lrs.index(0.05)].state_dict())
        if 1e30 in lrs:
            assert not all(torch.isfinite(parameter).all() for parameter in probe.heads[0].parameters())
    assert all(torch.equal(learned[0][key], other[key]) for other in learned[1:] for key in learned[0])


@pytest.mark.parametrize("kind", ["linear", "attentive"])
@pytest.mark.parametrize("backbone", ["vit", "beit_shared_bias", "eva_rotary", "swin", "visible_vit_with_registers"])
def test_the_backbone_stays_as_it_was(kind: str, backbone: str, tmp_path: Path) -> None:
    probe = probe_of(kind, (0.1, 0.01), backbone)
    network = probe.backbone.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = []
    network.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    for module in network.modules():
        module.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    trainer = fitted(probe, tmp_path)
    assert modes
    assert not any(modes)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    learning = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert learning == {id(parameter) for parameter in probe.heads.parameters()} == {id(p) for p in probe.parameters()}
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} <= {"heads", "norm"}
    probe.double()
    assert next(network.parameters()).dtype == torch.float64  # it moves along, though it is not in the module tree


def test_the_best_rate_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = probe_of("linear", (1e-6, 0.3, 1e-5))
    trainer = fitted(probe, tmp_path)
    with torch.no_grad():
        logits = probe.eval()(IMAGES[:11])
    expected = [accuracy(each.argmax(1), LABELS[:11]) for each in logits]
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert [metrics[f"val/acc1_lr_{lr:g}"] for lr in probe.lrs] == pytest.approx(expected)
    assert expected[1] > max(expected[0], expected[2])
    assert metrics["val/acc1"] == pytest.approx(expected[1])
    assert metrics["val/best_lr"] == pytest.approx(0.3)
    assert metrics["train/loss"] == min(metrics[f"train/loss_lr_{lr:g}"] for lr in probe.lrs)
    printed = capsys.readouterr().out
    assert f"       0.3  {expected[1]:8.4f}  best\n" in printed
    assert printed.count("best") == 1
    again = LinearProbe.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, backbone=probe.backbone.network)
    assert again.lrs == probe.lrs
    (measured,) = trainer.validate(again, DataLoader(TensorDataset(IMAGES[:11], LABELS[:11]), batch_size=4), verbose=False)
    assert measured["val/acc1"] == pytest.approx(expected[1])


def test_features_of_the_linear_probe() -> None:
    """BatchNorm without affine on the mean of the patch tokens, or on CLS; registers are in neither."""
    for feature, chosen in (("mean", slice(3, None)), ("cls", slice(0, 1))):
        probe = LinearProbe(tiny_backbone("visible_vit_with_registers"), 3, (0.1,), feature=feature)
        probe.norm.running_mean.normal_()
        probe.norm.running_var.uniform_(0.5, 2)
        probe.eval()
        tokens = probe.backbone.network.forward_features((IMAGES - probe.mean) / probe.std)
        pooled = tokens[:, chosen].mean(1)
        expected = (pooled - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
        torch.testing.assert_close(probe.inputs(tokens), expected)
        assert not list(probe.norm.parameters())
        torch.testing.assert_close(probe(IMAGES)[0], F.linear(expected, probe.heads[0].weight))
        assert 0.005 < probe.heads[0].weight.std() < 0.02


def test_probes_refuse_what_they_cannot_do() -> None:
    for lrs in ((), (0.1, 0.1), (0.1, 0.0)):
        with pytest.raises(ValueError, match=r"model.lrs takes one or more different rates above 0"):
            LinearProbe(tiny_backbone(), 3, lrs)
    with pytest.raises(ValueError, match="model.num_classes has to be 2 or more"):
        LinearProbe(tiny_backbone(), 1)
    for kind in ("swin", "vit_without_cls"):
        with pytest.raises(ValueError, match=r"feature is 'cls', but this \w+ has mean only"):
            LinearProbe(tiny_backbone(kind), 3, feature="cls")
    with pytest.raises(ValueError, match="num_heads 7 does not divide the backbone's 24 channels"):
        AttentiveProbe(tiny_backbone(), 3, num_heads=7)
    trainer = SimpleNamespace(precision="16-mixed", datamodule=None)  # on a CPU, Lightning makes it bf16
    probe = LinearProbe(tiny_backbone(), 3, (0.1, 0.2))
    probe._trainer = trainer
    with pytest.raises(ValueError, match="16-mixed skips a step for all rates when one overflows"):
        probe.setup("fit")
    convolutional = create_backbone("convnext_atto", {"num_classes": 0})
    with pytest.raises(ValueError, match=r"ConvNeXt gives no tokens of 320 channels, but \(2, 320, 1, 1\)"):
        LinearProbe(convolutional, 3)(torch.rand(2, 3, 32, 32))
