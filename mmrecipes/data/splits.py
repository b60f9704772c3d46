"""The one table of seeds: which scenes each split, and each training inside the training split, may draw.

`tests/data/test_splits.py` records what they do draw, and that no two of them draw one scene.
"""

from mmrecipes.errors import UserError

SPLITS = {
    "train": range(0, 10**9),
    "calibration": range(10**9, 10**9 + 10**6),
    "validation": range(2 * 10**9, 2 * 10**9 + 10**6),
    "test": range(3 * 10**9, 3 * 10**9 + 10**6),
}
BLOCK_SIZE = 10**7
BLOCKS = (  # training/what it draws; the blocks of the training split, in its order: append, never insert
    # the first: what the committed models and their tokenizer were trained on; `data.questions("train")` begins here, too
    *("seen", "mini-vlm/vision", "mini-vlm/reading", "mini-vlm/align", "mini-vlm/joint", "mini-siglip/images"),
    *("mini-siglip/captions", "mini-cnn/images", "student/images", "student/chat", "student/captions", "recovery/chat"),
    *("recovery/captions", "lora/chat", "connector/chat", "encoder-swap/images", "encoder-swap/chat"),
    *("mini-resampler/chat", "qat/chat"),
)


def block(name: str) -> range:
    """The seeds of one of `BLOCKS`. Raises UserError for a name that is none.
    >>> block("seen")
    range(0, 10000000)
    """
    if name not in BLOCKS:
        raise UserError(f"no block {name!r} of training scenes; there are {', '.join(BLOCKS)}")
    first = SPLITS["train"].start + BLOCKS.index(name) * BLOCK_SIZE
    return range(first, first + BLOCK_SIZE)


def slot(seeds: range, i: int, size: int) -> range:
    """The seeds of batch `i`, if every batch may draw from `size` of them. Raises UserError where the block ends before."""
    if (i + 1) * size > len(seeds):
        most = len(seeds) // size
        raise UserError(f"batch {i} lies outside its block of scenes, which has room for {most} of this size; train shorter")
    return seeds[i * size : (i + 1) * size]
