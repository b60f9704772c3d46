"""Rows of a batch that differ in length: which tokens are real, where they stand, and their KV caches."""

from collections.abc import Mapping, Sequence

import numpy as np

Cache = Sequence[np.ndarray]  # of one conversation: keys and values of each layer, or another state


class Places:
    """What a language graph asks about its tokens besides their ids, counted from step to step: position_ids, on from the largest
    of the prompt, (B, T) or (3, B, T) with M-RoPE; attention_mask (B, S), zero where a row of a batch is padded."""

    def __init__(self, ranks: Mapping[str, int]):
        self.ranks = ranks  # of the graph's inputs, by name
        self.reset()

    def reset(self) -> None:
        self.next, self.mask = np.zeros(1, np.int64), np.ones((1, 0), np.int64)

    def begin(self, lengths: Sequence[int], following: Sequence[int]) -> None:
        """Rows of a batch, whose caches hold so many tokens, padded on the left, and which positions follow them."""
        self.next = np.array(following)
        self.mask = (np.arange(max(lengths))[None] >= max(lengths) - np.array(lengths)[:, None]).astype(np.int64)

    def of(self, ids: np.ndarray, positions: np.ndarray | None) -> dict[str, np.ndarray]:
        """The inputs for tokens (B, T) at `positions`, else at those that come next."""
        if positions is None:
            positions = self.next[:, None] + np.arange(ids.shape[1])
        self.next = positions.reshape(-1, *ids.shape).max(axis=(0, 2)) + 1
        self.mask = np.concatenate([self.mask, np.ones_like(ids, np.int64)], axis=1)
        if self.ranks.get("position_ids") == 3:
            positions = np.broadcast_to(positions, (3, *ids.shape))
        known = {"position_ids": np.ascontiguousarray(positions, np.int64), "attention_mask": self.mask}
        return {name: value for name, value in known.items() if name in self.ranks}


def left_padded(caches: Sequence[Cache]) -> list[np.ndarray]:
    """Caches of several rows, a list of (1, heads, T, head_dim) each, as one of (rows, heads, longest T, head_dim); states of
    fixed size are as long in all rows."""
    joined = []
    for layer in zip(*caches, strict=True):
        missing = [max(x.shape[2] for x in layer) - x.shape[2] for x in layer]
        pads = [((0, 0), (0, 0), (n, 0), (0, 0))[: x.ndim] for n, x in zip(missing, layer, strict=True)]
        joined.append(np.concatenate([np.pad(x, pad) for x, pad in zip(layer, pads, strict=True)]))
    return joined


def without_padding(layers: Cache, mask: np.ndarray, grows: Sequence[bool], rows: Sequence[int]) -> list[Cache]:
    """`left_padded` undone, for some rows: `mask` (rows, T) is 0 where one is padded; layers that do not grow are not."""
    pads = {i: int((mask[i] == 0).sum()) for i in rows}
    return [[x[i : i + 1, :, n:] if g else x[i : i + 1] for x, g in zip(layers, grows, strict=True)] for i, n in pads.items()]
