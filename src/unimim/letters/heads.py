"""H, the head: from the student's tokens to predictions at the selected patches."""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import repeat
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.initialization import OfHead, check_init, initialize_head
from unimim.letters.interfaces import Head, Student, TargetGenerator, check_positive
from unimim.letters.mask import Mask, Selection
from unimim.letters.positions import sincos_positions
from unimim.letters.tokens import Tokens


class LinearHead(Head):
    """One fully connected layer: the head of BEiT, MaskFeat and both public re-implementations of MaskDistill.

    Args:
        student: gives d, the width of the tokens.
        target: gives c, the channels to predict.
        init: how the weights begin, by its name in `unimim.letters.initialization`; "student" is the student's way.

    Raises:
        ValueError: on use, hidden patches are to be predicted from the tokens of the visible ones.
    """

    def __init__(self, student: Student, target: TargetGenerator, init: OfHead = "student") -> None:
        super().__init__(student, target)
        self.linear = nn.Linear(student.embed_dim, target.dim)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        begin(self, student, init)

    def forward(self, tokens: Tokens, mask: Mask, selected: Selection) -> Tensor:
        """Tokens [b p+n d], hidden patches, selected ones -> [m c]; of the whole image, from CLS, [b c]"""
        prediction: Tensor = self.linear(tokens.of(selected))
        return prediction


class PrototypeHead(Head):
    """The projection head of DINO and iBOT (Zhou et al., 2022): an MLP of three layers, then cosines with prototypes.

    Args:
        student: gives d, the width of the tokens.
        target: gives c, the number of prototypes.
        hidden: width of the MLP's first two layers (iBOT: 2048).
        bottleneck: width of its last layer, and of a prototype (iBOT: 256).
        init: how the weights begin, by its name in `unimim.letters.initialization`; "student" is the student's way.

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
        widths = (student.embed_dim, hidden, hidden, bottleneck)
        layers = [nn.Linear(width, following) for width, following in pairwise(widths)]
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(target.dim, bottleneck))
        nn.init.normal_(self.prototypes)
        begin(self, student, init)

    def forward(self, tokens: Tokens, mask: Mask, selected: Selection) -> Tensor:
        """Tokens [b p+n d], hidden patches, selected ones -> cosines [m c]; of the whole image, from CLS, [b c]"""
        projected = self.mlp(tokens.of(selected))
        return F.linear(F.normalize(projected, dim=-1), F.normalize(self.prototypes, dim=-1))


class Decoder(Head):
    """What MAE's and MILAN's decoders share: narrow blocks with fixed positions, mask tokens in the places of hidden patches.

    Args:
        student: gives d, the grid and whether it drops patches; one that does not has mask tokens of its own.
        target: gives c, the channels to predict.
        width, depth, num_heads: of the decoder (MAE and MILAN: 512, 8, 16).
        init: how the weights begin, by its name in `unimim.letters.initialization`; "student" is the student's way. With "timm"
            they begin as in MAE's code.

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
        self.drops_patches = student.drops_patches
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
    def decode(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Through all blocks: [b prefix+n width], hidden patches -> [b prefix+n width]"""

    def forward(self, tokens: Tokens, mask: Mask, selected: Selection) -> Tensor:
        """Tokens [b p+n d], hidden patches, selected ones -> [m c]; of the whole image, from the decoder's CLS, [b c]"""
        count = self.num_prefix_tokens
        prefix, patches = tokens.prefix[:, :count], tokens.patches
        embedded = self.embed(torch.cat([prefix, patches], dim=1))
        if self.drops_patches:
            prefix, patches = embedded[:, :count], embedded[:, count:]
            hidden = repeat(self.mask_token.to(patches.dtype), "d -> b n d", b=len(patches), n=mask.cells)
            embedded = torch.cat([prefix, tokens.where.put(hidden, patches)], dim=1)
        decoded = self.decode(embedded + self.positions, mask)
        decoded = Tokens(decoded[:, :count], decoded[:, count:], mask.full()).of(selected)
        prediction: Tensor = self.predict(self.norm(decoded))
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
        init: how the weights begin, by its name in `unimim.letters.initialization`; "student" is the student's way.
    """

    def block(self, width: int, num_heads: int) -> nn.Module:
        """timm's, as in MAE's official code."""
        return Block(width, num_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))  # type: ignore[arg-type]

    def decode(self, tokens: Tensor, mask: Mask) -> Tensor:
        """[b prefix+n width], hidden patches -> [b prefix+n width]"""
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
        init: how the weights begin, by its name in `unimim.letters.initialization`; "student" is the student's way.

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

    def decode(self, tokens: Tensor, mask: Mask) -> Tensor:
        """[b prefix+n width], hidden patches -> [b prefix+n width]"""
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        asking = mask.take(patches)
        fixed = torch.cat([prefix, (~mask).take(patches)], dim=1)
        for block in self.blocks:
            asking = block(asking, fixed)
        return torch.cat([prefix, mask.put(patches, asking)], dim=1)


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


class PatchAggregationHead(Head):
    """BEiT v2's second head (Peng et al., 2022): a few blocks over the patches of an earlier block and the last CLS.

    The patches know only what the earlier block knew, so what the later blocks have learned of the image has to come through
    CLS. The blocks are like the backbone's own that follow the earlier one. Source: microsoft/unilm@80d673a,
    beit2/modeling_pretrain.py.

    Args:
        student: gives the blocks, whose layers begin as torch's, rescaled by depth, and its shared bias table.
        target: gives c, the channels to predict.
        block: index of the earlier block (BEiT v2 of 12 blocks: 8, the ninth).
        depth: how many blocks the head has (BEiT v2: 2).
        projection: the name of the earlier term whose head makes the prediction, behind the student's own norm (BEiT v2:
            "first"); None for a norm and a linear layer of its own.
        init: how a linear layer of its own begins, by its name in `unimim.letters.initialization`; "student" is the
            student's way.

    Raises:
        ValueError: the student has no CLS or no plain blocks, or there is no such block or no head of that name.
    """

    def __init__(
        self,
        student: Student,
        target: TargetGenerator,
        block: int = 8,
        depth: int = 2,
        projection: str | None = "first",
        init: OfHead = "student",
    ) -> None:
        super().__init__(student, target)
        check_positive("model.head", depth=depth)
        blocks = list(getattr(student.backbone, "blocks", []))
        plain = all(hasattr(getattr(one, "attn", None), "proj") and hasattr(getattr(one, "mlp", None), "fc2") for one in blocks)
        if not student.num_prefix_tokens or getattr(student.backbone, "rope", None) is not None or not blocks or not plain:
            raise UserError("model.head: PatchAggregationHead needs a student with CLS and plain blocks: a ViT or BEiT of timm")
        if not 0 <= block < len(blocks) - 1:
            raise UserError(
                f"model.head.block is {block}, but an earlier block of this student is one of 0 to {len(blocks) - 2}"
            )
        self.block, self.last = block, len(blocks) - 1
        self.student_blocks = block, self.last
        self.blocks = nn.ModuleList(
            new_block(blocks[min(block + number, self.last)], block + number + 1) for number in range(1, depth + 1)
        )
        self.projection = projection
        self.uses_student = projection is not None or getattr(student.backbone, "rel_pos_bias", None) is not None
        self.borrowed = Borrowed(student if self.uses_student else None)
        if projection is None:
            self.norm = copy.deepcopy(student.backbone.norm)
            self.linear = nn.Linear(student.embed_dim, target.dim)
            nn.init.trunc_normal_(self.linear.weight, std=0.02)
            nn.init.zeros_(self.linear.bias)
            check_init("model.head.init", init, OfHead)
            initialize_head(self.linear, student.init if init == "student" else init)

    def attach(self, heads: Mapping[str, Head]) -> None:
        """Takes the head that projects."""
        if self.projection is None:
            return
        if not heads:
            raise UserError(
                f"model.head.projection is {self.projection!r}, but no term is before this one: set it to null, for its own"
            )
        if self.projection not in heads:
            raise UserError(f"model.head.projection is {self.projection!r}, but the terms before it are {', '.join(heads)}")
        self.borrowed.head = heads[self.projection]

    def forward(self, tokens: Tokens, mask: Mask, selected: Selection) -> Tensor:
        """Tokens [b p+n d], hidden patches, selected ones -> [m c]; of the whole image, from CLS, [b c]"""
        early, last = tokens.blocks[self.block], tokens.blocks[self.last]
        count = last.prefix.shape[1]
        x = torch.cat([last.prefix, early.patches], dim=1)
        backbone: Any = getattr(self.borrowed.student, "backbone", None)
        bias = getattr(backbone, "rel_pos_bias", None)
        shared = {} if bias is None else {"shared_rel_pos_bias": bias()}
        for block in self.blocks:
            x = block(x, **shared)
        if self.borrowed.head is None:
            prediction: Tensor = self.linear(self.norm(Tokens(x[:, :count], x[:, count:], early.where).of(selected)))
            return prediction
        x = backbone.norm(x)
        projected: Tensor = self.borrowed.head(Tokens(x[:, :count], x[:, count:], early.where), mask, selected)
        return projected


class Borrowed:
    """Holds modules that others own. It is no `nn.Module`, so that they are registered once.

    Args:
        student: whose norm and bias table a head uses, if it uses any.
    """

    def __init__(self, student: Student | None) -> None:
        self.student: Any = student
        self.head: Head | None = None


def new_block(block: nn.Module, number: int) -> nn.Module:
    """Copies a block of a backbone, with weights that begin anew: torch's own, attn.proj and mlp.fc2 divided by sqrt(2 number).

    In BEiT v2's code these blocks are made after the weights of the others have been drawn, so that they keep torch's.
    """
    copied: Any = copy.deepcopy(block)
    for module in copied.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
    for layer in (copied.attn.proj, copied.mlp.fc2):
        layer.weight.detach().div_(math.sqrt(2 * number))
    return copied


def begin(head: Head, student: Student, init: OfHead) -> None:
    """Gives a head its first weights, those of `init`, which may be the student's.

    Raises:
        ValueError: there is no such scheme.
    """
    check_init("model.head.init", init, OfHead)
    initialize_head(head, student.init if init == "student" else init)


def norm(width: int) -> nn.LayerNorm:
    """The layer norm of MAE's decoder."""
    return nn.LayerNorm(width, eps=1e-6)


def xavier(module: nn.Module) -> None:
    """MAE's initialization of linear layers, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
