"""k-NN and the probes against brute force, plain loops and scikit-learn, the callback against silence."""

import copy
import math
from collections import defaultdict
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
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from unimim import FashionMNISTData, FineTuning, KNNCallback, load_backbone
from unimim.backbones import create_backbone
from unimim.probing import (
    AttentiveProbe,
    LinearProbe,
    Probe,
    accuracy,
    cosines,
    extract_features,
    fixed_point,
    gather_shards,
    knn,
    linear_probe,
)


def blobs(n: int, d: int = 16, classes: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centers[labels] + 1.2 * torch.randn(n, d), labels


def brute_force(features: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float = 0.07) -> list[int]:
    """One query and one neighbour at a time, in float64 and with sums that are rounded once; what is tied, ties exactly."""
    expected = []
    for query in features.double().tolist():
        cosines = []
        for other in bank.double().tolist():
            dot, *norms = (math.fsum(x * y for x, y in zip(a, b, strict=True)) for a, b in
                           ((query, other), (query, query), (other, other)))  # fmt: skip
            cosines.append(dot / math.sqrt(norms[0]) / math.sqrt(norms[1]))
        votes = defaultdict(list)
        for index in sorted(range(len(bank)), key=lambda i: (-cosines[i], i))[:k]:
            votes[int(labels[index])].append(math.exp((cosines[index] - max(cosines)) / temperature))
        expected.append(min(votes, key=lambda label: (-math.fsum(votes[label]), label)))
    return expected


def test_knn_is_brute_force() -> None:
    (bank, bank_labels), (features, _) = blobs(200), blobs(70)
    expected = brute_force(features, bank, bank_labels, 20)
    assert knn(features, bank, bank_labels).tolist() == expected
    for chunk in (1, 7, 64, 199):
        assert knn(features, bank, bank_labels, chunk=chunk).tolist() == expected
    nearest = (torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(bank).T).argmax(1)
    assert torch.equal(knn(features, bank, bank_labels, k=1), bank_labels[nearest])
    with pytest.raises(ValueError, match="asks 20 neighbours, but only 5 images have labels"):
        knn(features, bank[:5], bank_labels[:5])


@pytest.mark.parametrize("k", [1, 2, 5, 13])
def test_equally_near_neighbours_vote_by_lowest_index(k: int) -> None:
    """Every image of the bank six times, two of them twice as long, each with another label, in a shuffled order."""
    torch.manual_seed(k)
    bank = torch.randn(20, 11).repeat(6, 1) * torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 1.0]).repeat_interleave(20)[:, None]
    order = torch.randperm(120)
    bank, labels, features = bank[order], torch.randint(7, (120,)), torch.randn(40, 11)
    expected = brute_force(features, bank, labels, k)
    for chunk in (1, 3, 16, 50, 120, 2048):
        assert knn(features, bank, labels, k, chunk=chunk).tolist() == expected
    assert knn(features, bank.flip(0), labels.flip(0), k).tolist() != expected  # the order does matter here
    assert knn(features, bank[:1].expand(120, -1), labels, k=1).tolist() == [int(labels[0])] * 40


@pytest.mark.parametrize("gap", [1e-5, 1e-7, 1e-9, 1e-11])
def test_almost_equally_near_neighbours_are_told_apart(gap: float) -> None:
    """Far below what float32 tells apart: ten copies of each image, each turned a little further."""
    bank = torch.randn(12, 16, dtype=torch.float64).repeat(10, 1)
    bank[:, 0] += gap * torch.randperm(120)
    labels, features = torch.randint(6, (120,)), torch.randn(30, 16, dtype=torch.float64)
    for k in (1, 4, 15):
        expected = brute_force(features, bank, labels, k)
        assert all(knn(features, bank, labels, k, chunk=chunk).tolist() == expected for chunk in (7, 64, 2048))


def test_classes_with_equal_votes_go_to_the_lowest() -> None:
    """Two classes have the same eight cosines, each in an order of its own, in which floats add up to different sums."""
    sides = [(4, 3), (12, 5), (24, 7), (15, 8), (40, 9), (60, 11), (35, 12), (84, 13)]  # of a hypotenuse without a root
    near = torch.tensor(sides, dtype=torch.float64)
    weights = torch.exp((near[:, 0] / near.norm(dim=1) - near[:, 0].div(near.norm(dim=1)).max()) / 0.3)
    labels = torch.tensor([3] * 8 + [1] * 8)
    misled = 0
    for _ in range(40):
        high, low = torch.randperm(8), torch.randperm(8)
        misled += sum(weights[high].tolist()) > sum(weights[low].tolist())
        for chunk in (1, 5, 100):
            predicted = knn(torch.tensor([[1.0, 0.0]]), near[torch.cat([high, low])], labels, 16, temperature=0.3, chunk=chunk)
            assert predicted.tolist() == [1]
    assert misled > 5


@pytest.mark.parametrize("width", [1, 3, 16, 768, 1025])
def test_cosines_are_those_of_float64_and_have_no_order(width: int) -> None:
    a, b = torch.randn(30, width), torch.randn(50, width)
    a[:, 0] *= 100  # a channel of very large numbers, as CLIP has
    b[:, 0] *= 100
    b[7] = 0
    found = cosines(fixed_point(a), fixed_point(b))
    expected = F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-13)
    order = torch.randperm(width)
    assert torch.equal(found, cosines(fixed_point(a[:, order]), fixed_point(b[:, order])))
    assert torch.equal(found[3:4, 9:11], cosines(fixed_point(a[3:4]), fixed_point(b[9:11])))


def test_features_that_are_not_finite_are_refused() -> None:
    for wrong in (math.nan, math.inf):
        bank = torch.randn(4, 3)
        bank[2, 1] = wrong
        for features, others in ((torch.randn(4, 3), bank), (bank, torch.randn(4, 3))):
            with pytest.raises(ValueError, match="finite features"):
                knn(features, others, torch.arange(4), k=1)


@pytest.mark.parametrize(
    ("n", "bank", "width", "k", "classes", "chunk"),
    [
        (150, 1200, 256, 20, 10, 64),
        (300, 1200, 16, 20, 10, 128),
        (300, 1200, 16, 100, 10, 128),
        (300, 1200, 16, 20, 4000, 128),
    ],
)
def test_memory_beyond_the_bank_is_bounded(n: int, bank: int, width: int, k: int, classes: int, chunk: int) -> None:
    """The most that torch had allocated at once; a bank twice as large takes no more."""
    bound = 8 * chunk * (4 * chunk + 5 * width + 8 * k + classes) + 8 * n
    peaks = []
    for size in (bank, 2 * bank):
        labels = torch.arange(size) % classes
        labels[0] = classes - 1
        features, others = torch.randn(n, width), torch.randn(size, width)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            knn(features, others, labels, k, chunk=chunk)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        peaks.append(int(changes.cumsum(0).max()))
    assert peaks[0] > bound / 4, "nothing was measured"
    assert peaks[1] <= bound
    assert peaks[1] <= 1.05 * peaks[0]


def knn_of_process(rank: int, processes: int, folder: str) -> None:
    """k-NN as each of several processes does it: its own shard through the backbone, then the gathered bank."""
    torch.set_num_threads(1)  # also of the one that is alone, so that sums are taken in one order
    if processes > 1:
        distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    backbone = create_backbone(TINY["vit"][0], {**TINY["vit"][1], "num_classes": 0, "global_pool": ""})
    backbone.load_state_dict(torch.load(f"{folder}/backbone.pt"))
    results = []
    for split in ("bank", "queries"):
        images, labels = torch.load(f"{folder}/{split}.pt")
        dataset = TensorDataset(images, labels)
        sampler = DistributedSampler(dataset, processes, rank, shuffle=False)
        shard = extract_features(backbone, DataLoader(dataset, batch_size=4, sampler=sampler))
        results += [gather_shards(part, len(dataset)) for part in shard]
    bank, bank_labels, features, labels = results
    torch.save([bank, bank_labels, labels, knn(features, bank, bank_labels, k=5)], f"{folder}/{rank}_of_{processes}.pt")
    if processes > 1:
        with pytest.raises(ValueError, match=r"shards of \[18, 19\] rows are none"):
            gather_shards(torch.zeros(18 + rank), 37)
        with pytest.raises(ValueError, match="drop_last=False"):
            gather_shards(torch.zeros(18), 37)
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 and 21 images: the second process has one that the sampler repeats."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.save(tiny_backbone().state_dict(), tmp_path / "backbone.pt")
    torch.save((torch.rand(37, 3, 32, 32), torch.arange(37) % 5), tmp_path / "bank.pt")
    torch.save((torch.rand(21, 3, 32, 32), torch.arange(21)), tmp_path / "queries.pt")
    for processes in (2, 1):
        torch.multiprocessing.spawn(knn_of_process, (processes, str(tmp_path)), nprocs=processes)
    alone = torch.load(tmp_path / "0_of_1.pt")
    assert torch.equal(alone[2], torch.arange(21))
    for rank in (0, 1):
        bank, *answers = torch.load(tmp_path / f"{rank}_of_2.pt")
        torch.testing.assert_close(bank, alone[0])
        assert all(torch.equal(found, expected) for found, expected in zip(answers, alone[1:], strict=True))


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
