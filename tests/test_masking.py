"""M against BEiT's generator, written out for one image, and against what "each patch alike" means."""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from unimim import AttentiveMasking, BlockMasking, RandomMasking
from unimim.letters.masking import MAX_BLOCKS
from unimim.shapes import Grid

AGREE = 1e-6  # seeds are fixed; two samples of one distribution fall below this once in a million seeds
DIFFER = 1e-12  # what a wrong distribution must fall below, so that no seed could hide it
SAMPLES = 6000
SETTINGS = {"14x14": ((14, 14), 0.4, 78, 16), "7x7": ((7, 7), 0.4, 20, 4), "8x20": ((8, 20), 0.6, 96, 13)}
GRIDS = [(4, 4), (7, 7), (14, 14), (16, 16), (8, 14), (14, 8), (3, 20)]


def images(b: int) -> Tensor:
    """A masking reads nothing of them but their number and device."""
    return torch.empty(b, 3, 1, 1)


def draw(masking: torch.nn.Module, grid_size: Grid, b: int = SAMPLES) -> np.ndarray:
    """bool [b h w], in batches of 100: too small for torch's threads, which would wait for each other on busy cores."""
    return np.concatenate([masking(images(100), grid_size).tensor.numpy() for _ in range(b // 100)])


@functools.cache
def block_masks(setting: str) -> np.ndarray:
    """Drawn once, and compared with many."""
    grid_size, ratio, _, _ = SETTINGS[setting]
    torch.manual_seed(0)
    return draw(BlockMasking(ratio), grid_size)


# --- BEiT's generator ---------------------------------------------------------------------------------------------


def any_place(rng: random.Random, side: int, block: int) -> int:
    return rng.randint(0, side - block)


def random_fill(rng: random.Random, hidden: np.ndarray, missing: int) -> None:
    for row, column in rng.sample(list(zip(*np.nonzero(~hidden), strict=True)), missing):
        hidden[row, column] = True


def first_fill(rng: random.Random, hidden: np.ndarray, missing: int) -> None:
    """Wrong: the patches that complete the count lie anywhere, not where the grid begins."""
    hidden.flat[np.flatnonzero(~hidden)[:missing]] = True


@dataclass(frozen=True)
class Rules:
    """The choices of BEiT's generator (masking_generator.py, beit and beit2) that can be got wrong."""

    area: Callable[[random.Random, float, float], float] = random.Random.uniform  # (min_block, what is left), in any order
    aspect: Callable[[random.Random], float] = lambda rng: math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    side: Callable[[float], int] = round
    place: Callable[[random.Random, int, int], int] = any_place
    whole_rows: bool = False  # h < H and w < W are strict
    tries_in_all: bool = False  # each accepted block gets ten new tries
    too_many: int = 0  # a block may not exceed what is left to hide
    fill: Callable[[random.Random, np.ndarray, int], None] = random_fill


def beit_mask(rng: random.Random, grid_size: Grid, count: int, min_block: int, rules: Rules) -> tuple[np.ndarray, int]:
    """One image: bool [h w] with exactly `count` hidden, and how many blocks were searched for."""
    h, w = grid_size
    hidden = np.zeros((h, w), dtype=bool)
    searches = tries = 0
    while (left_to_hide := count - int(hidden.sum())) > 0:
        searches += 1
        if not rules.tries_in_all:
            tries = 0
        found = False
        while tries < 10 and not found:
            tries += 1
            area, aspect = rules.area(rng, min_block, left_to_hide), rules.aspect(rng)
            height, width = rules.side(math.sqrt(area * aspect)), rules.side(math.sqrt(area / aspect))
            if (height < h and width < w) or (rules.whole_rows and height <= h and width <= w):
                top, left = rules.place(rng, h, height), rules.place(rng, w, width)
                block = hidden[top : top + height, left : left + width]  # a view
                if 0 < height * width - block.sum() <= left_to_hide + rules.too_many:
                    block[:] = True
                    found = True
        if not found:
            break
    while hidden.sum() > count:  # only wrong rules come here
        hidden[tuple(rng.choice(np.argwhere(hidden)))] = False
    rules.fill(rng, hidden, count - int(hidden.sum()))
    return hidden, searches


def beit_masks(setting: str, seed: int, rules: Rules | None = None, b: int = SAMPLES) -> np.ndarray:
    grid_size, _, count, min_block = SETTINGS[setting]
    rng = random.Random(seed)
    return np.stack([beit_mask(rng, grid_size, count, min_block, rules or Rules())[0] for _ in range(b)])


# --- the comparison of two samples of masks -----------------------------------------------------------------------


def neighbour_pairs(masks: np.ndarray) -> np.ndarray:
    """How many pairs of patches that share a side are both hidden, in each mask [b h w]."""
    return (masks[:, 1:] & masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2))


def shapes(masks: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of each mask [b h w] that say how its hidden patches lie."""
    within_an_image = np.zeros((3, 3, 3), dtype=int)
    within_an_image[1] = ndimage.generate_binary_structure(2, 1)
    labels, n = ndimage.label(masks, within_an_image)
    found = ndimage.find_objects(labels)
    image_of_component = np.array([where[0].start for where in found])
    boxes = np.array([[axis.stop - axis.start for axis in where[1:]] for where in found])
    sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    b = len(masks)
    largest = np.zeros(b, dtype=int)
    np.maximum.at(largest, image_of_component, sizes)
    singles = np.bincount(image_of_component, weights=sizes == 1, minlength=b)
    tallest, widest = np.zeros(b, dtype=int), np.zeros(b, dtype=int)
    np.maximum.at(tallest, image_of_component, boxes[:, 0])
    np.maximum.at(widest, image_of_component, boxes[:, 1])
    border = masks.sum((1, 2)) - masks[:, 1:-1, 1:-1].sum((1, 2))
    return {
        "neighbour pairs": neighbour_pairs(masks),
        "components": np.bincount(image_of_component, minlength=b),
        "lone patches": singles,
        "largest component": largest,
        "tallest component": tallest,
        "widest component": widest,
        "fullest row": masks.sum(2).max(1),
        "fullest column": masks.sum(1).max(1),
        "on the border": border,
    }


def p_values(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How likely each difference is when both samples have one distribution; none is below its true value.

    The mean map is a two-sample z test at each patch, times the number of patches (Bonferroni). The shapes are compared
    by Kolmogorov and Smirnov, which is conservative for whole numbers.
    """
    covered, other = first.mean(0), second.mean(0)
    pooled = (covered * len(first) + other * len(second)) / (len(first) + len(second))
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / len(first) + 1 / len(second)))
    z = np.abs(covered - other) / np.maximum(deviation, 1e-12)
    found = {"coverage": min(1.0, float(2 * stats.norm.sf(z.max()) * z.size))}
    ours, theirs = shapes(first), shapes(second)
    return found | {name: float(stats.ks_2samp(ours[name], theirs[name], method="asymp").pvalue) for name in ours}


def test_shapes_of_a_drawn_mask() -> None:
    """The measure itself, on masks that can be counted by eye; two images never join into one component."""
    first = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=bool)
    second = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)
    found = {name: list(values) for name, values in shapes(np.stack([first, second])).items()}
    assert found == {
        "neighbour pairs": [2, 2],
        "components": [2, 2],
        "lone patches": [1, 1],
        "largest component": [3, 3],
        "tallest component": [2, 3],
        "widest component": [2, 1],
        "fullest row": [2, 1],
        "fullest column": [2, 3],
        "on the border": [4, 2],
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_block_masking_has_the_distribution_of_beits_generator(setting: str) -> None:
    assert (block_masks(setting).sum((1, 2)) == SETTINGS[setting][2]).all()
    assert min(p_values(block_masks(setting), beit_masks(setting, 1)).values()) > AGREE


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_comparison_accepts_two_seeds_of_the_reference(setting: str) -> None:
    """The tolerance is right: one distribution, drawn twice, agrees."""
    assert min(p_values(beit_masks(setting, 1), beit_masks(setting, 2)).values()) > AGREE


WRONG = {
    "reversed interval clamped": Rules(area=lambda rng, low, high: rng.uniform(min(low, high), high)),
    "area always what is left": Rules(area=lambda rng, low, high: high),
    "smallest block ignored": Rules(area=lambda rng, low, high: rng.uniform(1, high)),
    "aspect uniform": Rules(aspect=lambda rng: rng.uniform(0.3, 1 / 0.3)),
    "aspect log-uniform, but narrower": Rules(aspect=lambda rng: math.exp(rng.uniform(math.log(0.5), math.log(2)))),
    "sides rounded down": Rules(side=math.floor),
    "sides rounded up": Rules(side=math.ceil),
    "last place left out": Rules(place=lambda rng, side, block: rng.randint(0, max(0, side - block - 1))),
    "always in the corner": Rules(place=lambda rng, side, block: 0),
    "whole rows allowed": Rules(whole_rows=True),
    "ten tries in all": Rules(tries_in_all=True),
    "blocks may exceed what is left": Rules(too_many=8),
    "first patches complete the count": Rules(fill=first_fill),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_detects_a_wrong_generator(wrong: str) -> None:
    """Its power: every rule broken on purpose is found by the same numbers."""
    setting = "8x20" if wrong == "whole rows allowed" else "14x14"  # a block as long as 14 is hardly ever proposed
    assert min(p_values(block_masks(setting), beit_masks(setting, 1, WRONG[wrong])).values()) < DIFFER


def test_images_of_a_batch_do_not_depend_on_each_other() -> None:
    """How often two masks that were drawn side by side share a patch is what their mean map says."""
    masks = block_masks("14x14").astype(float)
    covered = masks.mean(0)
    shared = (masks[0::2] * masks[1::2]).sum((1, 2))
    error = shared.std() / math.sqrt(len(shared))
    assert abs(shared.mean() - (covered**2).sum()) < 5 * error
    same = (masks * masks).sum((1, 2))
    assert abs(same.mean() - (covered**2).sum()) > 50 * error  # what equal masks would give


def test_where_no_block_fits_all_is_random() -> None:
    """h < H leaves no block on a grid of one row: what completes the count hides each patch alike, and image by image."""
    masks = draw(BlockMasking(0.5), (1, 60))
    alone, together = unevenness(masks)
    assert alone < stats.norm.isf(AGREE / 120)
    assert together < stats.norm.isf(AGREE / 2)
    shared = (masks[0::2] & masks[1::2]).sum((1, 2))  # of two images: hypergeometric, 15 on average
    assert abs(shared.mean() - 15) < 5 * shared.std() / math.sqrt(len(shared))


def test_blocks_that_the_search_needs() -> None:
    """MAX_BLOCKS does not cut the search short: at the paper's 40 % one image needs 4 or 5, the most in 20,000 about 12.

    Blocks grow with the ratio: about 12 at 90 %.
    """
    rng = random.Random(0)
    searches = np.array([beit_mask(rng, (14, 14), 78, 16, Rules())[1] for _ in range(20_000)])
    assert 4 < searches.mean() < 6
    assert searches.max() <= 16 < MAX_BLOCKS
    crowded = np.array([beit_mask(rng, (14, 14), 176, 16, Rules())[1] for _ in range(2000)])
    assert crowded.mean() > 10  # the ratio does matter
    assert crowded.max() < MAX_BLOCKS


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BlockMasking, RandomMasking])
@pytest.mark.parametrize("grid_size", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_the_count_is_exact_in_every_image(kind: type, grid_size: Grid) -> None:
    h, w = grid_size
    for ratio in (0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95):
        expected = round(ratio * h * w)
        if 0 < expected < h * w:
            drawn = kind(ratio)(images(40), grid_size)
            mask = drawn.tensor
            assert drawn.count == expected
            assert mask.dtype == torch.bool
            assert mask.shape == (40, h, w)
            assert mask.sum((1, 2)).tolist() == [expected] * 40


@pytest.mark.parametrize("kind", [BlockMasking, RandomMasking])
@pytest.mark.parametrize("grid_size", [(14, 14), (4, 4)], ids=str)
def test_the_seed_decides(kind: type, grid_size: Grid) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return kind(0.4)(images(16), grid_size).tensor

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    masks = drawn(1)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 12  # images differ within a batch


@pytest.mark.parametrize("kind", [BlockMasking, RandomMasking])
@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, 40, math.nan, math.inf])
def test_a_ratio_is_a_share(kind: type, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^model\.masking\.ratio is {ratio}, but .* between 0 and 1$"):
        kind(ratio)


@pytest.mark.parametrize("kind", [BlockMasking, RandomMasking])
def test_a_ratio_fits_the_grid(kind: type) -> None:
    with pytest.raises(ValueError, match=r"^model\.masking\.ratio 0\.1 hides no patch of a grid of 4$"):
        kind(0.1)(images(2), (2, 2))
    with pytest.raises(ValueError, match=r"^model\.masking\.ratio 0\.9 hides every patch of a grid of 4$"):
        kind(0.9)(images(2), (2, 2))
    assert kind(0.1)(images(2), (4, 4)).tensor.sum() == 2 * 2  # the same ratio on a grid that it fits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_the_same_under_autocast(dtype: torch.dtype) -> None:
    """Their sums are whole numbers, of one row each, which 8 bits hold."""
    torch.manual_seed(0)
    plain = BlockMasking(0.9)(images(100), (32, 32)).tensor
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype):
        assert (torch.ones(1, 300) @ torch.ones(300, 1)).dtype == dtype
        assert torch.equal(BlockMasking(0.9)(images(100), (32, 32)).tensor, plain)


@pytest.mark.parametrize("min_block", [0, -1])
def test_a_block_has_a_patch(min_block: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.masking\.min_block is {min_block}, but"):
        BlockMasking(min_block=min_block)


def test_a_block_is_no_larger_than_what_is_hidden() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.masking\.min_block is 17, but ratio 0\.25 hides only 16 patches of the grid: lower it, or"
    ):
        BlockMasking(0.25, min_block=17)(images(2), (8, 8))
    assert BlockMasking(0.25, min_block=16)(images(2), (8, 8)).tensor.sum() == 2 * 16


@pytest.mark.parametrize("min_aspect", [0, -0.3, 1.1, math.nan])
def test_an_aspect_is_a_share(min_aspect: float) -> None:
    with pytest.raises(ValueError, match=rf"^model\.masking\.min_aspect is {min_aspect}, but"):
        BlockMasking(min_aspect=min_aspect)


@pytest.mark.parametrize(("grid_size", "min_block"), [((14, 14), 16), ((7, 7), 4), ((4, 4), 1), ((16, 16), 21), ((2, 3), 1)])
def test_the_smallest_block_scales_with_the_grid(grid_size: Grid, min_block: int) -> None:
    """With one seed, None draws the masks of the scaled value and of no other."""

    def drawn(smallest: int | None) -> Tensor:
        torch.manual_seed(0)
        return BlockMasking(0.4, min_block=smallest)(images(100), grid_size).tensor

    assert torch.equal(drawn(None), drawn(min_block))
    if grid_size != (2, 3):  # with 2 of 6 patches to hide, blocks of 1 and 2 cannot be told apart
        assert not torch.equal(drawn(None), drawn(min_block + 1))


def test_the_aspect_is_an_argument() -> None:
    """Blocks that must be squares give components that are as wide as high, and fewer neighbours than strips lose."""
    torch.manual_seed(0)
    square = shapes(draw(BlockMasking(0.4, min_aspect=1.0), (14, 14), 1000))
    beits = shapes(draw(BlockMasking(0.4), (14, 14), 1000))
    assert square["neighbour pairs"].mean() > beits["neighbour pairs"].mean() + 1
    one = draw(BlockMasking(9 / 196, min_block=9, min_aspect=1.0), (14, 14), 100)  # one block of nine patches
    assert (shapes(one)["tallest component"] == 3).all()
    assert (shapes(one)["widest component"] == 3).all()


# --- random masking -----------------------------------------------------------------------------------------------


def unevenness(masks: np.ndarray) -> tuple[float, float]:
    """|z| of the patch hidden most unusually often, and of the number of neighbours that are both hidden.

    Of n patches k are hidden: each with probability k/n, two given ones with k(k-1) / n(n-1).
    """
    b, h, w = masks.shape
    n, k = h * w, int(masks[0].sum())
    z = (masks.mean(0) - k / n) / math.sqrt(k / n * (1 - k / n) / b)
    pairs = neighbour_pairs(masks)
    expected = (h * (w - 1) + w * (h - 1)) * k * (k - 1) / (n * (n - 1))
    return float(np.abs(z).max()), float(abs(pairs.mean() - expected) / (pairs.std() / math.sqrt(b)))


@pytest.mark.parametrize(("grid_size", "ratio"), [((14, 14), 0.75), ((14, 14), 0.4), ((7, 7), 0.6), ((4, 6), 0.3)])
def test_random_masking_hides_each_patch_alike(grid_size: Grid, ratio: float) -> None:
    alone, together = unevenness(draw(RandomMasking(ratio), grid_size, 20_000))
    assert alone < stats.norm.isf(AGREE / (2 * grid_size[0] * grid_size[1]))
    assert together < stats.norm.isf(AGREE / 2)


def test_unevenness_is_seen() -> None:
    """The same numbers tell block-wise masks apart, and a random masking in which one patch is favoured."""
    alone, together = unevenness(block_masks("14x14"))
    assert alone > 20
    assert together > 20
    favoured = draw(RandomMasking(0.4), (14, 14), 20_000)
    favoured[-2000:, 3, 5] = True
    assert unevenness(favoured)[0] > 10


@pytest.mark.parametrize("kind", [BlockMasking, RandomMasking])
def test_a_pair_of_ratios_draws_one_for_each_batch(kind: type) -> None:
    """iBOT's U(0.1, 0.5): one count in a batch, uniform over batches."""
    masking = kind((0.1, 0.5))
    counts = []
    for _ in range(300):
        hidden = masking(images(3), (14, 14)).tensor.flatten(1).sum(1)
        assert (hidden == hidden[0]).all()
        counts.append(int(hidden[0]))
    assert 20 <= min(counts) < 28
    assert 90 < max(counts) <= 98
    assert abs(sum(counts) / 300 - 0.3 * 196) < 5 * 0.4 / 12**0.5 * 196 / 300**0.5  # five standard errors of the mean


@pytest.mark.parametrize("ratio", [(0.0, 0.5), (0.5, 0.1), (0.5, 1.0), (0.1,), (0.1, 0.2, 0.3)])
def test_pairs_that_are_no_shares(ratio: tuple[float, float]) -> None:
    for kind in (BlockMasking, RandomMasking, AttentiveMasking):
        with pytest.raises(ValueError, match="lies between 0 and 1, or is two of them, the lower one first$"):
            kind(ratio)


def test_an_interval_is_judged_by_its_ends_and_not_by_a_lucky_draw() -> None:
    for _ in range(20):
        with pytest.raises(ValueError, match=r"model\.masking\.ratio \(0\.01, 0\.5\) hides no patch of a grid of 16"):
            RandomMasking((0.01, 0.5))(images(1), (4, 4))
        with pytest.raises(ValueError, match=r"min_block is 16, but ratio \(0\.05, 0\.5\) hides only 10 patches"):
            BlockMasking((0.05, 0.5), min_block=16)(images(1), (14, 14))
