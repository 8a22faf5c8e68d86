"""T as discrete tokens: the nearest code of each patch (BEiT v2's VQ-KD, or a codebook fitted by k-means)."""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.backbones import create_backbone, load_strictly, read_file, read_state_dict
from unimim.interfaces import Frozen, Grid, TargetGenerator

ROWS_AT_ONCE = 8192
"""Vectors that are compared with all codes at a time, to bound the memory: 8192 x 8192 distances are 268 MB."""


class CodebookTarget(TargetGenerator):
    """The nearest code of another target's vectors, by Euclidean distance: a tokenizer for those who have none.

    Args:
        features: the target whose vectors are replaced by a code, such as a `FeatureTarget`.
        codes: size of the vocabulary (BEiT: 8192).
        codebook: a file of `torch.save` with a tensor [codes c]; None fits one by k-means to the first training images, when
            training starts. It is then part of the checkpoint.
        normalize: scale the vectors to length 1 first (VQ-KD does): the codes then are directions.
        fit_images: how many images of each process k-means sees.
        iterations: of k-means (BEiT v2's initialization: 10).

    Raises:
        ValueError: the features are discrete themselves or know their `dim` only later (an EMA); a file that holds no such
            tensor; when fitting, fewer vectors than codes.
        FileNotFoundError: there is no file `codebook`.
    """

    codebook: Tensor
    fitted: Tensor

    def __init__(
        self,
        features: TargetGenerator,
        codes: int = 8192,
        codebook: str | None = None,
        normalize: bool = False,
        fit_images: int = 1024,
        iterations: int = 10,
    ) -> None:
        super().__init__()
        if min(codes, fit_images, iterations) < 1:
            raise ValueError(
                f"model.teacher: codes {codes}, fit_images {fit_images} and iterations {iterations} have to be above 0"
            )
        channels = getattr(features, "dim", None)
        if channels is None:
            raise ValueError(f"model.teacher.features: {type(features).__name__} has no fixed dim, a codebook needs one")
        self.features = features
        self.dim = codes
        self.normalize, self.fit_images, self.iterations = normalize, fit_images, iterations
        self.register_buffer("codebook", torch.zeros(codes, channels))
        self.register_buffer("fitted", torch.tensor(codebook is not None))
        if codebook is not None:
            content = read_file(codebook)
            if not isinstance(content, Tensor) or content.shape != self.codebook.shape:
                found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
                raise ValueError(f"{codebook} holds {found}, but a codebook here is a tensor {tuple(self.codebook.shape)}")
            self.codebook.copy_(content)

    def prepare(self, batches: Iterable[Tensor], grid_size: Grid) -> None:
        """Fits the codebook to the first `fit_images` images, unless there is one."""
        self.features.prepare(batches, grid_size)
        if self.fitted:
            return
        found: list[Tensor] = []
        images_left = self.fit_images
        for images in batches:
            images = images[:images_left].to(self.codebook.device)
            found.append(rearrange(self.vectors(images, grid_size), "b h w c -> (b h w) c"))
            images_left -= len(images)
            if images_left <= 0:
                break
        vectors = torch.cat(found) if found else self.codebook[:0]
        if len(vectors) < self.dim:
            raise ValueError(
                f"k-means cannot fit {self.dim} codes to the {len(vectors)} patches of {self.fit_images - images_left} images: "
                f"lower model.teacher.codes, or raise model.teacher.fit_images"
            )
        rank_zero_info(f"k-means: {self.dim} codes for {len(vectors)} vectors of {vectors.shape[1]} channels")
        start = vectors[torch.randperm(len(vectors))[: self.dim].to(vectors.device)]
        self.codebook.copy_(kmeans(vectors, start, self.iterations))
        self.fitted.fill_(True)

    @torch.no_grad()
    def vectors(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b h w c]

        Raises:
            ValueError: the features are discrete.
        """
        features = self.features(images, grid_size)
        if features.dtype == torch.long:
            raise ValueError(f"model.teacher.features: {type(self.features).__name__} is discrete already")
        return F.normalize(features, dim=-1) if self.normalize else features

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> long [b h w]"""
        return nearest_code(self.vectors(images, grid_size), self.codebook)


class VQKDTarget(TargetGenerator):
    """The tokens of BEiT v2's VQ-KD (Peng et al., 2022): a ViT's patches in a small normalized space, and their nearest code.

    Args:
        weights: the published file of the tokenizer (its name begins with `vqkd_encoder`), whose decoder is left aside; or
            "random" to try a recipe.
        codes, code_dim: size of the vocabulary and width of the small space (published: 8192 and 32).
        model_args: further arguments of the encoder, timm's `beit_base_patch16_224`.

    Raises:
        ValueError: no weights are given, or they do not fit; on use, the student's grid is not the tokenizer's (14x14).
        FileNotFoundError: there is no file at `weights`.
    """

    def __init__(
        self, weights: str | None = None, codes: int = 8192, code_dim: int = 32, model_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(
                "VQKDTarget needs the published file of BEiT v2's tokenizer: --model.teacher.weights PATH, or 'random' to try "
                "the recipe (--random_weights); CodebookTarget fits a tokenizer of your own"
            )
        tokenizer = VQKD(codes, code_dim, model_args or {})
        if weights != "random":
            aside = ("decoder.", "decode_task_layer.", "quantize.", "teacher", "scaling", "loss")
            published = read_state_dict(weights)
            kept = {key: value for key, value in published.items() if not key.startswith(aside)}
            if "quantize.embedding.weight" in published:
                kept["codebook"] = published["quantize.embedding.weight"]
            load_strictly(tokenizer, kept, weights)
        self.dim = codes
        self.frozen = Frozen(tokenizer)

    @torch.no_grad()
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> long [b h w]"""
        tokenizer = self.frozen.network
        if grid_size != tokenizer.grid_size:
            (h, w), (own_h, own_w) = grid_size, tokenizer.grid_size
            raise ValueError(f"VQKDTarget gives {own_h}x{own_w} tokens, but the student's grid is {h}x{w}")
        vectors = tokenizer(self.resize(images, tokenizer.image_size))
        return nearest_code(vectors, tokenizer.codebook)


class VQKD(nn.Module):
    """The encoder's side of BEiT v2's tokenizer, with the names of its official code.

    Args:
        codes, code_dim: size of the vocabulary, width of the codes.
        model_args: of timm's `beit_base_patch16_224`.
    """

    codebook: Tensor

    def __init__(self, codes: int, code_dim: int, model_args: dict[str, Any]) -> None:
        super().__init__()
        given = {
            "use_abs_pos_emb": True,
            "use_rel_pos_bias": False,
            "init_values": 0,
            "global_pool": "avg",
            "num_classes": 0,
        }
        self.encoder = create_backbone("beit_base_patch16_224", {**given, **model_args})
        width = self.encoder.num_features
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.register_buffer("codebook", F.normalize(torch.randn(codes, code_dim), dim=-1))

    @property
    def image_size(self) -> Grid:
        """(H, W) in pixels."""
        height, width = self.encoder.patch_embed.img_size
        return height, width

    @property
    def grid_size(self) -> Grid:
        """(h, w) in patches."""
        h, w = self.encoder.patch_embed.grid_size
        return h, w

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> vectors of length 1 [b h w c]"""
        tokens = self.encoder.forward_features(images * 2 - 1)[:, self.encoder.num_prefix_tokens :]
        tokens = self.encoder.fc_norm(tokens)
        with torch.autocast(images.device.type, enabled=False):
            vectors = F.normalize(self.encode_task_layer(tokens.to(self.codebook.dtype)), dim=-1)
        return rearrange(vectors, "b (h w) c -> b h w c", h=self.grid_size[0])


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code at the least Euclidean distance: [... c], [codes c] -> long [...]"""
    rows, codes = vectors.flatten(0, -2).float(), codebook.float()
    lengths = codes.square().sum(1) / 2
    with torch.autocast(rows.device.type, enabled=False):
        found = [(some @ codes.T - lengths).argmax(1) for some in rows.split(ROWS_AT_ONCE)]
    return torch.cat(found).view(vectors.shape[:-1])


def kmeans(vectors: Tensor, centers: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm from the given centers: [n c], [codes c] -> [codes c]. A center that loses all its vectors stays."""
    for _ in range(iterations):
        nearest = nearest_code(vectors, centers)
        counts = torch.bincount(nearest, minlength=len(centers))[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return centers
