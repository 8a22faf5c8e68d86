"""The initial weights of the official codes, by name: what `init` of a student or a head means.

Each scheme was read in these files:

- "beit": microsoft/unilm@768a3c87, beit/modeling_pretrain.py and beit2/modeling_pretrain.py; facebookresearch/data2vec_vision
  @af9a3634, beit/modeling_cyclical.py; baaivision/EVA@5623d08b, EVA-01/eva/modeling_pretrain.py. All draw from a normal
  distribution of 0.02 that is cut at 1 standard deviation, which leaves 0.0108 of it.
- "simmim_vit": microsoft/SimMIM@d3e29bca, models/simmim.py and models/vision_transformer.py; SwinTransformer/
  Feature-Distillation@2115145a, models/feature_distillation.py and models/vision_transformer.py.
- "simmim_swin": microsoft/SimMIM@d3e29bca, models/simmim.py and models/swin_transformer.py.
- "mae": facebookresearch/mae@efb2a806, models_mae.py; zejiangh/MILAN@7dcfe0ff, models_milan.py; liuxingbin/dbot@db3b15ec,
  models_mae.py; OpenDriveLab/maskalign@250d018a, models_pretrain.py.
- "maskfeat": facebookresearch/SlowFast@287ec007, slowfast/models/video_model_builder.py, masked.py and head_helper.py. The
  biases of its blocks begin at 0.02, those of their layer norms too.
- "ibot": bytedance/ibot@da316d82, models/vision_transformer.py and models/head.py. Its mask token begins at 0.

Whether tokens and positions get weight decay is an argument of its own, `decayed`: the code of BEiT, BEiT v2, data2vec, EVA,
SimMIM (ViT) and feature distillation lets the mask token decay; MAE's, MILAN's, dBOT's and MaskAlign's CLS and mask token;
MaskFeat's and iBOT's positions, CLS and mask token; SimMIM's on Swin the bias tables, and not the mask token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from timm.layers import trunc_normal_
from torch import Tensor, nn

from unimim.errors import UserError
from unimim.letters.positions import sincos_positions

Init = Literal["timm", "beit", "simmim_vit", "simmim_swin", "mae", "maskfeat", "ibot"]
"""The known schemes."""
OfHead = Literal["student", Init]
"""Those of a head: its student's, or one of its own."""
Token = Literal["cls_token", "mask_token", "pos_embed", "relative_position_bias_table"]
"""The parameters that only some official codes give weight decay."""
Fill = Callable[[Tensor], Any]
Layer = Callable[[Tensor, Tensor | None], None]


def layer_of(fill: Fill, bias: float = 0.0) -> Layer:
    """How a layer begins: `fill` for its weight [out in], a constant for its bias [out]."""

    def fill_layer(weight: Tensor, offset: Tensor | None) -> None:
        fill(weight)
        if offset is not None:
            nn.init.constant_(offset, bias)

    return fill_layer


def torch_default(weight: Tensor, bias: Tensor | None) -> None:
    """What torch gives a linear or convolutional layer: uniform, weight [out in] and bias [out], up to 1 / sqrt(in)."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def with_default_bias(fill: Fill) -> Layer:
    """How a patch embedding begins whose weight alone is drawn again: `fill` for the weight [d 3*p*p], torch's bias [d]."""

    def fill_layer(weight: Tensor, bias: Tensor | None) -> None:
        torch_default(weight, bias)
        fill(weight)

    return fill_layer


# Cut at 2, which is 100 standard deviations. (timm's function gives one value in 2 ** 24 that limit itself, -2, by erfinv(-1).)
NORMAL: Fill = partial(nn.init.trunc_normal_, std=0.02)
# Cut at 1 standard deviation, which leaves 0.0108 of it. (torch's function draws again what falls outside, which takes long.)
CUT: Fill = partial(trunc_normal_, std=0.02, a=-0.02, b=0.02)
XAVIER: Fill = nn.init.xavier_uniform_


@dataclass(frozen=True)
class Scheme:
    """How one official code begins, a rule for each kind of parameter.

    What is not named stays as timm makes it, which is as in these codes: layer scales, bias tables, biases of q and v.

    Attributes:
        linear: the linear layers of the backbone.
        patches: the patch embedding, its weight as [d 3*p*p].
        tokens: CLS and registers.
        positions: absolute positions, where the backbone has them; None for MAE's sine-cosine table.
        mask_token: the student's or a decoder's.
        head: the linear layers of the head.
        norm_bias: of the layer norms within the blocks.
        rescaled: whether attn.proj and mlp.fc2 of block l (from 1) are divided by sqrt(2 l).
    """

    linear: Layer
    patches: Layer
    tokens: Fill
    positions: Fill | None
    mask_token: Fill
    head: Layer
    norm_bias: float = 0.0
    rescaled: bool = False


BEIT = Scheme(layer_of(CUT), layer_of(CUT), CUT, CUT, CUT, layer_of(CUT), rescaled=True)


SCHEMES: dict[str, Scheme] = {
    "beit": BEIT,
    "simmim_vit": replace(BEIT, head=torch_default),
    "simmim_swin": Scheme(layer_of(NORMAL), torch_default, NORMAL, NORMAL, NORMAL, torch_default),
    "mae": Scheme(
        linear=layer_of(XAVIER),
        patches=with_default_bias(XAVIER),
        tokens=partial(nn.init.normal_, std=0.02),
        positions=None,
        mask_token=partial(nn.init.normal_, std=0.02),
        head=layer_of(XAVIER),
    ),
    "maskfeat": Scheme(
        linear=layer_of(NORMAL, bias=0.02),
        patches=with_default_bias(NORMAL),
        tokens=NORMAL,
        positions=NORMAL,
        mask_token=NORMAL,
        head=layer_of(NORMAL),
        norm_bias=0.02,
    ),
    "ibot": Scheme(layer_of(NORMAL), torch_default, NORMAL, NORMAL, nn.init.zeros_, layer_of(NORMAL)),
}


def check_init(owner: str, init: str, known: Any = Init) -> None:
    """
    Raises:
        ValueError: there is no such scheme.
    """
    if init not in get_args(known):
        raise UserError(f"{owner} is {init!r}, known are {', '.join(map(repr, get_args(known)))}")


def initialize_backbone(backbone: Any, init: str) -> None:
    """Draws the weights of a timm backbone again, by the scheme; "timm" leaves them as they are.

    Raises:
        ValueError: the backbone does not start with a patch embedding, or the scheme rescales blocks by their depth, and it has
            no such blocks.
    """
    if init == "timm":
        return
    scheme = SCHEMES[init]
    proj = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if not isinstance(proj, nn.Conv2d):
        raise UserError(f"init {init!r} is for networks with a patch embedding, not {type(backbone).__name__}: use init 'timm'")
    blocks = blocks_of(backbone, init) if scheme.rescaled else []
    within_blocks = {id(part) for name, part in backbone.named_modules() if name.startswith(("blocks.", "layers."))}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            scheme.linear(module.weight.detach(), detached(module.bias))
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, scheme.norm_bias if id(module) in within_blocks else 0.0)
    scheme.patches(proj.weight.detach().flatten(1), detached(proj.bias))
    for token in (getattr(backbone, name, None) for name in ("cls_token", "reg_token")):
        if token is not None:
            scheme.tokens(token)
    fill_positions(backbone, scheme.positions)
    for number, block in enumerate(blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.detach().div_(math.sqrt(2 * number))


def fill_positions(backbone: Any, fill: Fill | None) -> None:
    """Absolute positions [1 prefix+h*w d] of a timm backbone, where it has a table of them; None: sine and cosine."""
    table = getattr(backbone, "pos_embed", None)
    if table is None:
        return
    if fill is not None:
        fill(table)
        return
    h, w = backbone.patch_embed.grid_size
    table.detach().copy_(sincos_positions(table.shape[-1], (h, w), table.shape[1] - h * w))


def blocks_of(backbone: Any, init: str) -> list[Any]:
    """
    Raises:
        ValueError: the backbone is no plain row of blocks with attn.proj and mlp.fc2.
    """
    blocks = list(getattr(backbone, "blocks", []))
    plain = [hasattr(getattr(block, "attn", None), "proj") and hasattr(getattr(block, "mlp", None), "fc2") for block in blocks]
    if not blocks or not all(plain):
        raise UserError(
            f"init {init!r} rescales the blocks of a ViT, BEiT or EVA by their depth, which {type(backbone).__name__} does not "
            f"have: use init 'timm', or 'simmim_swin' for a Swin"
        )
    return blocks


def initialize_head(head: nn.Module, init: str) -> None:
    """Draws the weights of a head's linear layers again, by the scheme; "timm" leaves them as they are.

    The queries of a `MultiheadAttention` count as one layer, its keys and values as another, as in MILAN's decoder. Prototypes
    begin as torch's linear layers, as in DINO's and iBOT's heads. A decoder's mask token follows too.
    """
    if init == "timm":
        return
    scheme = SCHEMES[init]
    for module in head.modules():
        if isinstance(module, nn.Linear):
            scheme.head(module.weight.detach(), detached(module.bias))
        elif isinstance(module, nn.MultiheadAttention):
            weight, bias, width = module.in_proj_weight.detach(), module.in_proj_bias.detach(), module.embed_dim
            scheme.head(weight[:width], bias[:width])
            scheme.head(weight[width:], bias[width:])
    for name, parameter in head.named_parameters():
        if name == "mask_token":
            scheme.mask_token(parameter)
        elif name == "prototypes":
            torch_default(parameter.detach(), None)


def detached(parameter: Tensor | None) -> Tensor | None:
    """The values of a parameter, where there is one: writing to them is no step of a graph."""
    return None if parameter is None else parameter.detach()
