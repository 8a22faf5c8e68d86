"""k-NN against a loop in float64 and scikit-learn; bounded memory; several processes as one."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from sklearn.neighbors import KNeighborsClassifier
from test_probing import blobs, tiny_backbone
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from unimim.tasks.knn import gather_shards, knn, neighbours
from unimim.tasks.probing import extract_features
from unimim.weights.models import create_backbone


def brute_force(features: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float = 0.07) -> list[int]:
    """One query and one neighbour at a time, in float64 and with sums that are rounded once."""
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
    nearest = (F.normalize(features) @ F.normalize(bank).T).argmax(1)
    assert torch.equal(knn(features, bank, bank_labels, k=1), bank_labels[nearest])
    with pytest.raises(ValueError, match="asks 20 neighbours, but only 5 images have labels"):
        knn(features, bank[:5], bank_labels[:5])


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("offset", [0.0, 5.0, 50.0])
def test_knn_is_scikit_learn(k: int, offset: float) -> None:
    """With an offset, as features of an encoder have one, all cosines are near 1, and float32 mistakes the nearest."""
    labels = torch.arange(3000) % 10
    bank, features = offset + blobs(3000, 64, 10)[0], offset + 1.2 * torch.randn(400, 64)
    votes = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
    expected = votes.fit(bank.double().numpy(), labels.numpy()).predict(features.double().numpy())
    assert knn(features, bank, labels, k, chunk=512).tolist() == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_neighbours_are_the_nearest_first(chunk: int) -> None:
    rows, bank = torch.randn(9, 33), torch.randn(50, 33)
    rows[:, 0] *= 100  # a channel of very large numbers, as CLIP has
    bank[:, 0] *= 100
    bank[7] = 0
    expected, order = (F.normalize(rows.double()) @ F.normalize(bank.double()).T).sort(1, descending=True)
    for k in (1, 5, 50):
        similarity, index = neighbours(rows, bank, k, chunk)
        torch.testing.assert_close(similarity, expected[:, :k], rtol=0, atol=1e-14)
        assert torch.equal(index, order[:, :k])


@pytest.mark.parametrize("gap", [1e-5, 1e-7, 1e-9, 1e-11])
def test_almost_equally_near_neighbours_are_told_apart(gap: float) -> None:
    """Far below what float32 tells apart: ten copies of each image, each turned a little further."""
    bank = torch.randn(12, 16, dtype=torch.float64).repeat(10, 1)
    bank[:, 0] += gap * torch.randperm(120)
    labels, features = torch.randint(6, (120,)), torch.randn(30, 16, dtype=torch.float64)
    for k in (1, 4, 15):
        expected = brute_force(features, bank, labels, k)
        assert all(knn(features, bank, labels, k, chunk=chunk).tolist() == expected for chunk in (7, 64, 2048))


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
    bound = 8 * chunk * (chunk + 5 * width + 10 * k + classes) + 8 * n
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
