"""The shape letters, and the few types that every part of the package shares.

The letters are used everywhere and explained only here: `b` images, `H W` pixels, `h w` patch grid, `m` selected patches of the
whole batch, `n` patches that have tokens, `p` prefix tokens (CLS and registers), `d` student width, `c` target channels.
"""

Grid = tuple[int, int]
"""(h, w) of a patch grid, or (H, W) of an image in pixels."""
RGB = tuple[float, float, float]
"""One number a colour channel, for pixels in [0, 1]."""
IGNORED = 255
"""The label of a pixel that counts neither in the loss nor in a metric of segmentation."""
