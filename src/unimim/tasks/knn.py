"""k-NN: an image gets the label that most of its nearest neighbours have, by the features of a frozen encoder."""

import torch
from einops import rearrange
from torch import Tensor, distributed
from torch.nn import functional as F

from unimim.errors import UserError


def knn(
    features: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 20, temperature: float = 0.07, chunk: int = 2048
) -> Tensor:
    """Predicts labels [n] of features [n d] by the votes of their k nearest in a bank [N d] with labels [N].

    Nearest by cosine; a vote weighs exp(cosine / temperature), as in DINO (Caron et al., 2021; k 20, temperature 0.07).

    Cosines and votes are computed in float64. Chunk, threads, processes and device change them by rounding only (about 1e-15),
    so they change a label only where two neighbours are equally near, as copies of an image are, or two classes have equal
    votes: which of these wins is not defined.

    Args:
        features, bank: finite; the bank may be on another device, its chunks are moved to the device of the features.
        chunk: rows of features and of the bank that are compared at a time. Memory beyond features, bank and answer is at
            most 8 chunk (chunk + 5 d + 10 k + classes) bytes, whatever n and N: 116 MB for 768 channels and 1000 classes.

    Raises:
        ValueError: k is larger than the bank, a feature is NaN or infinite, or the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"k-NN's temperature is {temperature}, but it is above 0")
    if k < 1:
        raise UserError(f"k-NN asks {k} neighbours, but at least 1 votes")
    if k > len(bank):
        raise UserError(f"k-NN asks {k} neighbours, but only {len(bank)} images have labels")
    device = features.device
    if device.type == "mps":  # it has no float64
        features, bank = features.cpu(), bank.cpu()
    labels = bank_labels.to(features.device)
    classes = int(labels.max()) + 1
    chunks = features.split(chunk)
    return torch.cat([vote(*neighbours(rows, bank, k, chunk), labels, classes, temperature) for rows in chunks]).to(device)


def vote(similarity: Tensor, nearest: Tensor, bank_labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Finds the label [b] with most votes, by cosines and indices [b k] of the nearest, the nearest first, and labels [N]."""
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    return weights.new_zeros(len(weights), classes).scatter_add_(1, bank_labels[nearest], weights).argmax(1)


def neighbours(rows: Tensor, bank: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Finds the k nearest in a bank [N d] to each of rows [b d]: cosines and indices [b k], the nearest first.

    Raises:
        ValueError: a feature is NaN or infinite.
    """
    queries = F.normalize(rows.double())
    similarity, index = queries.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
    for start in range(0, len(bank), chunk):
        others = F.normalize(bank[start : start + chunk].to(rows.device).double())
        found, columns = (queries @ others.T).topk(min(k, len(others)))
        similarity, index = torch.cat([similarity, found], 1), torch.cat([index, columns + start], 1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]))
        index = index.gather(1, order)
    if similarity[:, 0].isnan().any():  # topk takes NaN for the largest
        raise UserError("k-NN needs finite features, but some are NaN or infinite: did the encoder diverge?")
    return similarity, index


def gather_shards(shard: Tensor, total: int) -> Tensor:
    """Gathers the rows [n ...] of each process -> all [total ...] on every process, in the order of one process alone.

    For the shards of `DistributedSampler(dataset, shuffle=False)`: process r of w has the rows r, r + w, r + 2 w, ..., and
    the last shards are filled with rows from the start, which are dropped here. For a moment a process has all rows twice.

    Without `torch.distributed` the only shard is everything.

    Raises:
        ValueError: the shards are not of one length, or not of `total` rows together (plus what fills the last).
    """
    several = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if several else 1
    lengths = [len(shard)] * processes
    if several:
        distributed.all_gather_object(lengths, len(shard))
    if len(set(lengths)) > 1 or not 0 <= sum(lengths) - total < processes:
        raise UserError(
            f"shards of {lengths} rows are none of DistributedSampler's of {total}: it has to have drop_last=False, and the "
            f"loader too"
        )
    if not several:
        return shard
    shards = shard.new_empty(processes, *shard.shape)
    distributed.all_gather(list(shards.unbind()), shard.contiguous())
    return rearrange(shards, "w n ... -> (n w) ...")[:total]
