"""T as discrete tokens: the nearest code of each patch (BEiT v2's VQ-KD, or a codebook fitted by k-means)."""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.interfaces import Frozen, TargetGenerator, check_positive
from unimim.shapes import Grid
from unimim.weights.files import load_strictly, read_file, read_state_dict
from unimim.weights.models import check_object, create_backbone, own_seed

ROWS_AT_ONCE = 8192
"""Vectors that are compared with all codes at a time, to bound the memory: 8192 x 8192 distances are 268 MB."""


class CodebookTarget(TargetGenerator):
    """The nearest code of another target's vectors, by Euclidean distance: a tokenizer for those who have none.

    Args:
        features: the target whose vectors are replaced by a code, such as a `FeatureTarget`.
        codes: size of the vocabulary (BEiT: 8192).
        codebook: a file of `torch.save` with a tensor [codes c], taken as it is; None fits one by k-means to the first
            training images of the first process, when training starts. It is part of the checkpoint.
        normalize: scale vectors and k-means' centres to length 1 (VQ-KD does): the codes then are directions.
        fit_images: how many images k-means sees.
        iterations: of k-means (BEiT v2's initialization: 10).

    Raises:
        ValueError: the features are a class, discrete themselves or follow the student (an EMA); a file that holds no such
            tensor; when fitting, fewer distinct vectors than codes; on use, there is no codebook yet.
        FileNotFoundError: there is no file `codebook`.
    """

    codebook: nn.Parameter
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
        check_positive("model.teacher", codes=codes, fit_images=fit_images, iterations=iterations)
        check_object("model.teacher.features", features, TargetGenerator, "unimim.HOGTarget()")
        if features.follows_student:
            raise UserError(
                f"model.teacher.features: {type(features).__name__} follows the student, a codebook needs what stays"
            )
        self.features = features
        self.dim = codes
        self.normalize, self.fit_images, self.iterations = normalize, fit_images, iterations
        # A parameter that does not learn, because DDP would send a buffer in every step.
        self.codebook = nn.Parameter(torch.zeros(codes, features.dim), requires_grad=False)
        self.register_buffer("fitted", torch.tensor(codebook is not None))
        self.is_fitted = codebook is not None  # as `fitted`, without a look at the device
        if codebook is not None:
            content = read_file(codebook)
            shape = tuple(self.codebook.shape)
            if not isinstance(content, Tensor) or content.shape != shape:
                found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
                raise UserError(f"{codebook} holds {found}, but a codebook here is a tensor {shape}")
            if not content.is_floating_point() or not content.isfinite().all():
                raise UserError(
                    f"{codebook} holds a tensor of {content.dtype} that is no codebook: all numbers finite, of floating point"
                )
            self.codebook.data.copy_(content)

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
        some = vectors[torch.randperm(len(vectors))[: max(4 * self.dim, ROWS_AT_ONCE)].to(vectors.device)]
        distinct = torch.unique(some, dim=0)
        if len(distinct) < self.dim:
            raise UserError(
                f"k-means cannot fit {self.dim} codes to {len(distinct)} distinct patches of "
                f"{self.fit_images - images_left} images: lower model.teacher.codes"
                + (", or raise model.teacher.fit_images" if images_left <= 0 else ", or take more images than the data has")
            )
        start = distinct[torch.randperm(len(distinct))[: self.dim].to(vectors.device)]
        self.codebook.data.copy_(kmeans(vectors, start, self.iterations, self.normalize))
        used = nearest_code(vectors, self.codebook).unique().numel()
        rank_zero_info(f"k-means: {self.dim} codes for {len(vectors)} vectors of {vectors.shape[1]} channels, {used} in use")
        self.fitted.fill_(True)
        self.is_fitted = True

    @torch.no_grad()
    def vectors(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b h w c]

        Raises:
            ValueError: the features are discrete.
        """
        try:
            features = self.features(images, grid_size)
        except ValueError as error:  # the fields it names are one level deeper here
            raise UserError(str(error).replace("model.teacher.", "model.teacher.features.")) from error
        if features.dtype == torch.long:
            raise UserError(f"model.teacher.features: {type(self.features).__name__} is discrete already")
        return F.normalize(features, dim=-1) if self.normalize else features

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> long [b h w]"""
        if not self.is_fitted:
            self.is_fitted = bool(self.fitted)  # a checkpoint may have brought it
            if not self.is_fitted and images.any():  # blank images try how parts fit, before there is data
                raise UserError("CodebookTarget has no codebook yet: call prepare with images, or give model.teacher.codebook")
        return nearest_code(self.vectors(images, grid_size), self.codebook)


class VQKDTarget(TargetGenerator):
    """The tokens of BEiT v2's VQ-KD (Peng et al., 2022): a ViT's patches in a small normalized space, and their nearest code.

    Args:
        weights: the published file of the tokenizer (its name begins with `vqkd_encoder`), whose decoder is left aside; or
            "random" to try a recipe.
        codes: size of the vocabulary (published: 8192).
        code_dim: width of the small space (published: 32).
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
            raise UserError(
                "VQKDTarget needs the published file of BEiT v2's tokenizer: --model.teacher.weights PATH, or 'random' to try "
                "the recipe (--random_weights); CodebookTarget fits a tokenizer of your own"
            )
        check_positive("VQKDTarget", codes=codes, code_dim=code_dim)
        with own_seed():
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
            raise UserError(
                f"VQKDTarget gives {own_h}x{own_w} tokens, but the student's grid is {h}x{w}: set data.image_size and img_size "
                f"in model.student.model_args to {own_h} times the student's patch"
            )
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
    return nearest(vectors.flatten(0, -2), codebook)[0].view(vectors.shape[:-1])


def nearest(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code, and the squared distance to it: [n c], [codes c] -> [n], [n]"""
    rows, codes = rows.float(), codebook.float()
    lengths = codes.square().sum(1) / 2
    with torch.autocast(rows.device.type, enabled=False):
        best = [(some @ codes.T - lengths).max(1) for some in rows.split(ROWS_AT_ONCE)]
    scores = torch.cat([scores for scores, _ in best])
    return torch.cat([indices for _, indices in best]), rows.square().sum(1) - 2 * scores


def kmeans(vectors: Tensor, centers: Tensor, iterations: int, normalize: bool = False) -> Tensor:
    """Lloyd's algorithm from the given centers: [n c], [codes c] -> [codes c].

    A center that loses all its vectors moves to one of those that are farthest from theirs. With `normalize` the centers
    have length 1 (spherical k-means).
    """
    vectors = vectors.float()
    for _ in range(iterations):
        indices, distances = nearest(vectors, centers)
        counts = torch.bincount(indices, minlength=len(centers))[:, None]
        sums = torch.zeros_like(centers, dtype=vectors.dtype).index_add_(0, indices, vectors)
        centers = sums / counts.clamp(min=1)
        empty = torch.nonzero(counts[:, 0] == 0)[:, 0]
        centers[empty] = vectors[distances.topk(len(empty)).indices]
        if normalize:
            centers = F.normalize(centers, dim=-1)
    return centers
