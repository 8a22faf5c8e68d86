"""H, the head: from the student's tokens to predictions at the selected patches."""

from abc import abstractmethod
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange, repeat
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.initialization import OfHead, check_init, initialize_head
from unimim.interfaces import Head, Student, TargetGenerator, check_positive
from unimim.positions import sincos_positions
from unimim.selection import count_of, inverse, pick, places, put, rows


class LinearHead(Head):
    """One fully connected layer: the head of BEiT, MaskFeat and both public re-implementations of MaskDistill.

    Args:
        student: gives d, the width of the tokens.
        target: gives c, the channels to predict.
        init: how the weights begin, by its name in `unimim.initialization`; "student" is the student's way.

    Raises:
        ValueError: on use, hidden patches are to be predicted from the tokens of the visible ones.
    """

    def __init__(self, student: Student, target: TargetGenerator, init: OfHead = "student") -> None:
        super().__init__(student, target)
        self.num_prefix_tokens = student.num_prefix_tokens
        self.linear = nn.Linear(student.embed_dim, target.dim)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        begin(self, student, init)

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        """[b h w d], or [b prefix+visible d], bool [b h w], bool [b h w] -> [m c]"""
        prediction: Tensor = self.linear(tokens_at(tokens, mask, selected, self.num_prefix_tokens))
        return prediction


class PrototypeHead(Head):
    """The projection head of DINO and iBOT (Zhou et al., 2022): an MLP of three layers, then cosines with prototypes.

    Args:
        student: gives d, the width of the tokens.
        target: gives c, the number of prototypes.
        hidden: width of the MLP's first two layers (iBOT: 2048).
        bottleneck: width of its last layer, and of a prototype (iBOT: 256).
        init: how the weights begin, by its name in `unimim.initialization`; "student" is the student's way.

    Raises:
        ValueError: as `LinearHead`.
    """

    def __init__(
        self,
        student: Student,
        target: TargetGenerator,
        hidden: int = 2048,
        bottleneck: int = 256,
        init: OfHead = "student",
    ) -> None:
        super().__init__(student, target)
        check_positive("model.head", hidden=hidden, bottleneck=bottleneck)
        self.num_prefix_tokens = student.num_prefix_tokens
        widths = (student.embed_dim, hidden, hidden, bottleneck)
        layers = [nn.Linear(width, following) for width, following in pairwise(widths)]
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(target.dim, bottleneck))
        nn.init.normal_(self.prototypes)
        begin(self, student, init)

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        """[b h w d], or [b prefix+visible d], bool [b h w], bool [b h w] -> cosines [m c]"""
        projected = self.mlp(tokens_at(tokens, mask, selected, self.num_prefix_tokens))
        return F.linear(F.normalize(projected, dim=-1), F.normalize(self.prototypes, dim=-1))


class Decoder(Head):
    """What MAE's and MILAN's decoders share: narrow blocks with fixed positions, mask tokens in the places of hidden patches.

    Args:
        student: gives d, the grid and whether it drops patches; one that does not has mask tokens of its own.
        target: gives c, the channels to predict.
        width, depth, num_heads: of the decoder (MAE and MILAN: 512, 8, 16).
        init: how the weights begin, by its name in `unimim.initialization`; "student" is the student's way. With "timm" they
            begin as in MAE's code.

    Raises:
        ValueError: the width is no multiple of 4 (positions) or of `num_heads`, or a number is below 1.
    """

    positions: Tensor

    def __init__(
        self,
        student: Student,
        target: TargetGenerator,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        init: OfHead = "student",
    ) -> None:
        super().__init__(student, target)
        check_positive("model.head", width=width, depth=depth, num_heads=num_heads)
        if width % num_heads:
            raise UserError(f"model.head: width {width} is no multiple of num_heads {num_heads}")
        self.num_prefix_tokens = student.num_prefix_tokens if student.drops_patches else 0
        self.embed = nn.Linear(student.embed_dim, width)
        positions = sincos_positions(width, student.grid_size, self.num_prefix_tokens)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(self.block(width, num_heads) for _ in range(depth))
        self.norm = norm(width)
        self.predict = nn.Linear(width, target.dim)
        self.apply(xavier)
        if student.drops_patches:
            self.mask_token = nn.Parameter(torch.zeros(width))
            nn.init.normal_(self.mask_token, std=0.02)
        self.decayed = student.decayed
        begin(self, student, init)

    @abstractmethod
    def block(self, width: int, num_heads: int) -> nn.Module:
        """One block."""

    @abstractmethod
    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Through all blocks: [b prefix+n width], bool [b h w] -> [b prefix+n width]"""

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        """[b prefix+visible d], or [b h w d], bool [b h w], bool [b h w] -> [m c]"""
        tokens = self.embed(tokens)
        if tokens.ndim == 4:
            tokens = rearrange(tokens, "b h w d -> b (h w) d")
        else:
            tokens = with_mask_tokens(tokens, mask, self.mask_token, self.num_prefix_tokens)
        tokens = self.decode(tokens + self.positions, mask)[:, self.num_prefix_tokens :]
        h, w = mask.shape[1:]
        tokens = pick(rearrange(tokens, "b (h w) d -> b h w d", h=h, w=w), selected)
        prediction: Tensor = self.predict(self.norm(tokens))
        return prediction


class DecoderHead(Decoder):
    """MAE's decoder (He et al., 2022): plain ViT blocks over all patches. It also works behind a student with mask tokens.

    From Python, with arguments: `head=functools.partial(DecoderHead, depth=4)`.

    Args:
        student: gives d, the width of its tokens.
        target: gives c, the channels of the target.
        width: of the decoder's tokens (MAE: 512).
        depth: its blocks (MAE: 8).
        num_heads: of their attention (MAE: 16).
        init: how the weights begin, by its name in `unimim.initialization`; "student" is the student's way.
    """

    def block(self, width: int, num_heads: int) -> nn.Module:
        """timm's, as in MAE's official code."""
        return Block(width, num_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))  # type: ignore[arg-type]

    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[b prefix+n width], bool [b h w] -> [b prefix+n width]"""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class PromptingDecoderHead(Decoder):
    """MILAN's prompting decoder (Hou et al., 2022): hidden patches ask, and only they are updated.

    The tokens of the visible patches and CLS stay as the encoder gave them (embedded, with positions) and are keys and
    values in every block, beside the hidden patches' own.

    Args:
        student: gives d, the width of its tokens.
        target: gives c, the channels of the target.
        width: of the decoder's tokens (MILAN: 512).
        depth: its blocks (MILAN: 8).
        num_heads: of their attention (MILAN: 16).
        init: how the weights begin, by its name in `unimim.initialization`; "student" is the student's way.

    Raises:
        ValueError: the student does not drop patches; and as `Decoder`.
    """

    def __init__(
        self,
        student: Student,
        target: TargetGenerator,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        init: OfHead = "student",
    ) -> None:
        if not student.drops_patches:
            raise UserError("model.head: PromptingDecoderHead needs a student that drops patches, VisibleStudent")
        super().__init__(student, target, width, depth, num_heads, init)

    def block(self, width: int, num_heads: int) -> nn.Module:
        """MILAN's."""
        return PromptingBlock(width, num_heads)

    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[b prefix+n width], bool [b h w] -> [b prefix+n width]"""
        prefix, (b, h, w) = self.num_prefix_tokens, mask.shape
        patches = rearrange(tokens[:, prefix:], "b (h w) d -> b h w d", h=h, w=w)
        asking, visible = (rearrange(pick(patches, of), "(b n) d -> b n d", b=b) for of in (mask, inverse(mask)))
        fixed = torch.cat([tokens[:, :prefix], visible], dim=1)
        for block in self.blocks:
            asking = block(asking, fixed)
        return put(tokens, rows(places(mask, asking.shape[1]), tokens.shape[1], prefix), asking)


class PromptingBlock(nn.Module):
    """One block of MILAN's decoder.

    Args:
        width: of the tokens.
        num_heads: of the attention.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, hidden: Tensor, fixed: Tensor) -> Tensor:
        """Tokens [b hidden width] and [b prefix+visible width] -> [b hidden width]; the fixed ones are not normalized."""
        queries = self.norm1(hidden)
        context = torch.cat([fixed, queries], dim=1)
        hidden = hidden + self.attention(queries, context, context, need_weights=False)[0]
        updated: Tensor = hidden + self.mlp(self.norm2(hidden))
        return updated


def begin(head: Head, student: Student, init: OfHead) -> None:
    """Gives a head its first weights, those of `init`, which may be the student's.

    Raises:
        ValueError: there is no such scheme.
    """
    check_init("model.head.init", init, OfHead)
    initialize_head(head, student.init if init == "student" else init)


def tokens_at(tokens: Tensor, mask: Tensor, selected: Tensor, num_prefix_tokens: int) -> Tensor:
    """The selected patches' own tokens: [b h w d], or [b prefix+visible d] -> [m d].

    Raises:
        ValueError: a hidden patch is selected, of which a student that drops patches has no token. (Looked for on a CPU, so
            at least when the model is built: elsewhere a look waits for the device.)
    """
    if tokens.ndim == 4:
        return pick(tokens, selected)
    if selected.device.type == "cpu" and (selected & mask).any():
        raise UserError(
            "the student drops the hidden patches, so a head without a decoder cannot predict them: set model.head to "
            "DecoderHead, or model.selection to visible"
        )
    visible = rearrange(tokens[:, num_prefix_tokens:], "b n d -> (b n) d")
    every = count_of(selected) == tokens.shape[1] - num_prefix_tokens  # what is selected is visible: these are all of them
    return visible if every else visible[selected[~mask]]


def with_mask_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor, num_prefix_tokens: int) -> Tensor:
    """[b prefix+visible d] -> [b prefix+n d] in the grid's order, the mask token at each hidden patch."""
    prefix, visible = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    everywhere = repeat(mask_token.to(tokens.dtype), "d -> b n d", b=len(tokens), n=mask[0].numel())
    at = rows(places(~mask, visible.shape[1]), mask[0].numel())
    return torch.cat([prefix, put(everywhere, at, visible)], dim=1)


def norm(width: int) -> nn.LayerNorm:
    """The layer norm of MAE's decoder."""
    return nn.LayerNorm(width, eps=1e-6)


def xavier(module: nn.Module) -> None:
    """MAE's initialization of linear layers, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
