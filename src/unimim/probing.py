"""What a frozen encoder knows: k-NN and a linear probe on its mean-pooled patch tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def extract_features(backbone: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features [n d] and labels [n] of all batches of (images [b 3 H W] in [0, 1], labels [b]), in eval mode.

    Pixels are normalized by the `mean` and `std` of `backbone.pretrained_cfg`, on the backbone's device; a feature is the
    mean of the patch tokens behind the final norm.
    """
    training = backbone.training
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(backbone.pretrained_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    backbone.eval()
    features, labels = [], []
    for images, batch_labels in batches:
        tokens = backbone.forward_features((images.to(device) - mean) / std)
        features.append(mean_patch_token(backbone, tokens).float())
        labels.append(batch_labels.to(device))
    backbone.train(training)
    return torch.cat(features), torch.cat(labels)


def mean_patch_token(backbone: Any, tokens: Tensor) -> Tensor:
    """Tokens of a timm model, [b n d] or [b h w d] -> [b d], without CLS and registers."""
    if tokens.ndim == 4:
        return reduce(tokens, "b h w d -> b d", "mean")
    return reduce(tokens[:, backbone.num_prefix_tokens :], "b n d -> b d", "mean")


def knn(
    features: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Labels [n] of features [n d] by the votes of their k nearest in a bank [N d] with labels [N].

    Nearest by cosine; a vote weighs exp(cosine / temperature), as in DINO (Caron et al., 2021; k 20, temperature 0.07).
    Memory beyond the bank: `chunk` rows of N similarities at a time.

    Raises:
        ValueError: k is larger than the bank.
    """
    if k > len(bank):
        raise ValueError(f"k-NN asks {k} neighbours, but only {len(bank)} images have labels")
    bank = F.normalize(bank, dim=-1)
    classes = int(bank_labels.max()) + 1
    predicted = []
    for rows in F.normalize(features, dim=-1).split(chunk):
        similarity, nearest = (rows @ bank.T).topk(k, dim=1)  # [chunk k]
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[nearest], torch.exp((similarity - 1) / temperature))
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, penalty: float = 1e-3, steps: int = 200) -> Tensor:
    """Labels of test features [n d] by multinomial logistic regression on features [N d] with labels [N].

    Each channel is standardized by the training features; the cross-entropy, with `penalty / 2` times the squared weights,
    is minimized by L-BFGS from zero, so the result has no seed.
    """
    std, mean = torch.std_mean(features, dim=0)
    standardized, test_standardized = ((x - mean) / (std + 1e-6) for x in (features, test_features))
    linear = nn.Linear(features.shape[1], int(labels.max()) + 1, device=features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(standardized), labels) + penalty / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    predicted: Tensor = linear(test_standardized).argmax(1)
    return predicted


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of predictions [n] that equal the labels [n]."""
    return float((predicted == labels).float().mean())
