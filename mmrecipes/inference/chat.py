"""A chat with an exported model: each image is encoded once, and the KV cache is kept from turn to turn.

Each turn is the chat template's prompt of the whole chat, so answers are those of a fresh prompt. What the cache holds of it
already, the longest common prefix, is not read again; a template may rewrite what came before. Built by hand in notebook 43.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmrecipes.errors import UserError
from mmrecipes.inference.exported import Exported
from mmrecipes.models.images import load_image


@dataclass(frozen=True)
class Turn:
    """A question, the images that came with it, and its answer; None where it is still to come."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str | None = None


def messages(turns: Sequence[Turn], forgotten: int = 0) -> list[dict]:
    """`turns` for a chat template, without the first `forgotten`: their images go to the first question that is left.
    >>> messages([Turn((), "What?", "A cat."), Turn((), "Where?")], forgotten=1)
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Where?'}]}]
    """
    found, images = [], [image for turn in turns[:forgotten] for image in turn.images]
    for turn in turns[forgotten:]:
        shown = [{"type": "image", "image": image} for image in (*images, *turn.images)]
        found.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            found.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        images = []
    return found


class Chat:
    """`say` answers as `exported.generate` does when it is given the whole chat. `turns` are those so far, `tokens_read` how many
    tokens the last prompt had that the cache did not hold.

    With a `budget`, prompt and answer have at most so many tokens: as many of the oldest turns as it takes are left out of the
    prompt (`forgotten`), never an image. Without, a chat that has become too long for the model is refused.
    Several chats may share one `exported`; each reads its prompt again when another has answered in between. Where layers have
    states of fixed size (Qwen3.5, MiniCPM-V 4.6), the cache is kept if the prompt goes on behind all of it; where a prompt sees
    itself both ways (PaliGemma), never. Exports that round activations by the range of a whole step ("int8" for ONNX) may answer
    differently where two answers are about as likely.
    """

    def __init__(self, exported: Exported, budget: int | None = None):
        if not isinstance(exported, Exported):
            raise UserError(f"Chat: given a {type(exported).__name__}; expected a generating model from inference.load_exported")
        self.exported, self.budget = exported, budget
        self.turns: list[Turn] = []
        self.forgotten = self.tokens_read = 0
        self._known: dict[bytes, np.ndarray] = {}  # visual tokens, by the content of images
        self._held, self._seen = np.zeros(0, np.int64), None  # what the cache holds: token ids (T,), visual tokens (N, D)

    def say(self, text: str, images: Any = None, max_new_tokens: int = 64) -> str:
        """The answer to `text` about all images so far, and `images` (None, PIL, a path or a list) that are new.
        Raises UserError where this turn does not fit, and leaves the chat as it was.
        """
        images = [] if images is None else [*images] if isinstance(images, list | tuple) else [images]
        turn = Turn(tuple(load_image(image) for image in images), text)
        forgotten, inputs = self._prompt(turn, max_new_tokens)
        answer = self._answer(inputs, max_new_tokens)
        self.turns.append(Turn(turn.images, text, answer))
        self.forgotten = forgotten
        return answer

    def _prompt(self, turn: Turn, max_new_tokens: int) -> tuple[int, dict[str, np.ndarray]]:
        """How many turns are forgotten, and the inputs of the others."""
        turns, longest = [*self.turns, turn], self.exported.manifest["max_length"]
        most = longest - 1 if self.budget is None else min(self.budget, longest) - max_new_tokens
        for forgotten in range(self.forgotten, len(turns)):
            inputs = self.exported.prompt(None, messages(turns, forgotten))
            length = inputs["input_ids"].shape[1]
            if length <= most:
                return forgotten, inputs
            if self.budget is None:
                raise UserError(f"the chat has {length} tokens, and the model takes {longest}: give Chat a budget, or begin anew")
        need = f"this turn needs {length} tokens, all images included, and {max_new_tokens} for its answer"
        cure = "shorten the question" + (", or raise the budget" if self.budget < longest else "")
        raise UserError(f"{need}; the budget is {self.budget}, and the model takes {longest}: {cure}")

    def _answer(self, inputs: dict[str, np.ndarray], max_new_tokens: int) -> str:
        exported, ids, answer = self.exported, inputs["input_ids"][0], []
        seen = exported.encode_images(inputs, self._known) if "pixel_values" in inputs else None
        kept = self._kept(ids, seen)
        exported.reader = None  # whatever fails from here on: the cache then counts as empty
        exported.graphs.crop(kept) if kept else exported.graphs.reset()
        logits = exported.read(inputs, seen, kept)
        for _ in range(min(max_new_tokens, exported.manifest["max_length"] - len(ids))):
            token = exported.likeliest(logits, [*ids, *answer])
            if token in exported.manifest["eos_token_ids"]:
                break
            answer.append(token)
            logits = exported.graphs.step(np.array([[token]]))  # the last one, too: the next turn finds it in the cache
        self._held, self._seen, self.tokens_read = np.array([*ids, *answer]), seen, len(ids) - kept
        exported.reader = self
        return exported.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _kept(self, ids: np.ndarray, seen: np.ndarray | None) -> int:
        """How many of the first tokens `ids` (T,) the cache holds: equal ids and, where they stand for an image, equal images."""
        if self.exported.reader is not self or self.exported.family.two_way:
            return 0
        is_image = np.append(ids == self.exported.manifest["image_token_id"], False)
        n = min(len(self._held), len(ids) - 1)  # the last token is always read: its logits are asked for
        n = _first(ids[:n] != self._held[:n])
        both = 0 if seen is None or self._seen is None else min(is_image[:n].sum(), len(self._seen))
        same = _first((seen[:both] != self._seen[:both]).any(axis=1)) if both else 0
        if same < is_image[:n].sum():
            n = int(np.flatnonzero(is_image)[same])
        while 0 < n < len(ids) and is_image[n - 1] and is_image[n]:  # an image is read in one step: its tokens may see each other
            n -= 1
        return 0 if self.exported.family.piece and n < len(self._held) else n


def _first(different: np.ndarray) -> int:
    """Where the first True is; the length where there is none."""
    return int(different.argmax()) if different.any() else len(different)
