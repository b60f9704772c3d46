"""What a server need not compute again: visual tokens of an image, and the KV cache of what a prompt begins with."""

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from mmrecipes.inference.exported import Exported
from mmrecipes.inference.padding import Cache


class FeatureCache:
    """Visual tokens by the content of their images, those used last, of at most `limit` bytes; for `encode_images(known=)`."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key]

    def __setitem__(self, key: bytes, features: np.ndarray) -> None:
        self._kept[key] = features
        self.bytes += features.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids (T), which of them stand for images (T), visual tokens (N, D) and, with M-RoPE, positions (3, 1, T)."""

    ids: np.ndarray
    is_image: np.ndarray
    features: np.ndarray
    positions: np.ndarray | None

    @classmethod
    def of(cls, exported: Exported, inputs: dict[str, np.ndarray], features: np.ndarray | None) -> "Prompt":
        """UserError where images are missing or too many."""
        is_image, family = exported.image_places(inputs["input_ids"], features), exported.family
        positions = family.positions and family.positions(inputs, exported.settings)
        return cls(inputs["input_ids"][0], is_image, np.zeros((0, 1), np.float32) if features is None else features, positions)

    def shared(self, other: "Prompt") -> int:
        """With how many equal tokens both begin; those of images are equal where their visual tokens are."""
        n = min(len(self.ids), len(other.ids))
        same = self.ids[:n] == other.ids[:n]
        if self.positions is not None:
            same &= (self.positions[..., :n] == other.positions[..., :n]).all(axis=(0, 1))
        n = n if same.all() else int(same.argmin())
        images = np.flatnonzero(self.is_image[:n])
        alike = (self.features[: len(images)] == other.features[: len(images)]).all(axis=1)
        return n if alike.all() else int(images[alike.argmin()])


class PrefixCache:
    """KV caches of the prompts read last, PROMPTS of them and of at most `limit` bytes (vLLM's automatic prefix caching, without
    its pages). Nothing is hashed: what two prompts begin with is compared itself, so no prompt is taken for another."""

    PROMPTS = 32

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._kept: deque[tuple[Prompt, Cache]] = deque()  # used last at the end

    def longest(self, prompt: Prompt) -> tuple[int, Cache | None]:
        """How many tokens of the beginning need not be read, all but the last at most, and their cache; 0 and None for none."""
        shared = ((prompt.shared(each[0]), each) for each in self._kept)
        n, found = max(shared, key=lambda pair: pair[0], default=(0, None))
        if not (n := min(n, len(prompt.ids) - 1)):
            return 0, None
        self._kept.remove(found)
        self._kept.append(found)
        return n, [layer[:, :, :n] for layer in found[1]]

    def add(self, prompt: Prompt, cache: Cache) -> None:
        """Keep a prompt that was read, in place of those that it begins with; not one that leaves no room for others."""
        if _bytes((prompt, cache)) > self.limit:
            return
        self._kept = deque(each for each in self._kept if prompt.shared(each[0]) < len(each[0].ids))
        self._kept.append((prompt, cache))
        while (size := sum(map(_bytes, self._kept))) > self.limit or len(self._kept) > self.PROMPTS:
            self._kept.popleft()
        self.bytes = size


def _bytes(kept: tuple[Prompt, Cache]) -> int:
    return kept[0].features.nbytes + sum(layer.nbytes for layer in kept[1])
