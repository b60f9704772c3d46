"""Continuous batching over an exported model (Orca, Yu et al., OSDI 2022): each step gives every running answer one token.

The contract of `Engine`, which knows token ids and no network:

- At each step, rows that have ended or were cancelled leave, and waiting prompts take the free slots: a prompt is read alone
  (prefill), then its row joins the batch. Rows have lengths, images, limits and random numbers of their own.
- An answer is the one that `Exported.generate` gives alone, as far as the runtime computes a token alike beside any others. Float
  graphs do, up to rounding; those that scale activations by the range of a whole step (ONNX "int8") do not.
- What fails for one prompt, or makes the logits of one row not finite, ends that answer alone. A step that fails as a whole ends
  all rows of its batch, and the engine goes on with those that wait.
- The KV cache has room for at most twice slots x max_length tokens, and for as many again when rows join or leave; visual tokens
  of images seen before take at most `feature_bytes`, prompts read before `prefix_bytes`. Images are told apart by what the
  processor made of them; where two prompts begin alike, images included, the second one's beginning is not read again. Who asks
  can see that, by `cached` and by the time it takes: with `prefix_bytes=0` no prompt is kept.

One thread calls an engine, and nobody else its model meanwhile; only `Answer.cancel` is for any thread. By hand in notebook 51.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmrecipes.errors import UserError
from mmrecipes.inference.exported import Exported
from mmrecipes.inference.padding import Cache
from mmrecipes.inference.reuse import FeatureCache, PrefixCache, Prompt


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: the likeliest at temperature 0, else drawn from softmax(logits / temperature) with the answer's own
    generator, seeded by `seed`; until the model stops, a `stop` string appears, or `max_new_tokens` are generated. With
    `ignore_eos` the model does not stop: answers of one length, to measure by."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < np.inf or "" in self.stop:
            raise UserError(f"{self}: expected max_new_tokens of 1 or more, temperature of 0 or more, stop strings not empty")


@dataclass(eq=False)
class Answer:
    """One answer as it grows. `text` only ever gets longer: what may become a stop string, a character of which a token is
    missing, and white space at the end wait for the next token. `logprobs` are the model's, at temperature 1.
    `finish_reason` is None while it is unfinished, then "stop", "length", "cancelled" or "error" (with `error`). `cached` tokens
    of its prompt were not read again."""

    inputs: dict[str, np.ndarray]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None
    cancelled: bool = False
    cached: int = 0

    def cancel(self) -> None:
        """Give its slot up at the next step."""
        self.cancelled = True


@dataclass(eq=False)
class _Row:
    """A running answer: the token ids of prompt and answer, how many of them the cache holds, which position follows."""

    answer: Answer
    ids: list[int]
    generator: np.random.Generator
    most: int  # tokens of the answer
    following: int = 0

    @property
    def held(self) -> int:
        return len(self.ids) - 1  # all but the last token, which the next step reads


class Engine:
    """Answers many prompts together; see the contract above. UserError for an export without batches.
    >>> engine = Engine(load_exported(batched), slots=2)
    >>> answer = engine.submit(engine.exported.inputs(rows[0]["image"], rows[0]["question"]), Sampling(max_new_tokens=8))
    >>> engine.run()
    >>> answer.text == engine.exported.generate(rows[0]["image"], rows[0]["question"], max_new_tokens=8)
    True
    """

    def __init__(self, exported: Exported, slots: int = 8, feature_bytes: int = 64 * 2**20, prefix_bytes: int = 128 * 2**20):
        if not exported.manifest.get("batches"):
            raise UserError(f"{exported.folder}: exported for one conversation at a time; export it with batches=True")
        if slots < 1:
            raise UserError(f"slots={slots}: expected 1 or more")
        self.exported, self.graphs, self.slots = exported, exported.graphs, slots
        self.waiting: deque[Answer] = deque()
        self.rows: list[_Row] = []  # in the order of the batch
        self.stepped = 0  # rows that the last step gave a token
        self.features, self.prefixes = FeatureCache(feature_bytes), PrefixCache(prefix_bytes)
        self.graphs.reset()
        # a state of fixed size cannot go back, and tokens of an image that see each other are read together
        self.reuses = prefix_bytes > 0 and all(self.graphs.grows) and not exported.family.masks

    def submit(self, inputs: dict[str, np.ndarray], sampling: Sampling | None = None) -> Answer:
        """A prompt, as `Exported.inputs` makes it, waits for a slot. UserError where it is too long for the model."""
        answer = Answer(inputs, sampling or Sampling())
        self.add(answer)
        return answer

    def add(self, answer: Answer) -> None:
        """As `submit`, for an answer that was made before, perhaps by another thread."""
        length, most = answer.inputs["input_ids"].shape[1], self.exported.manifest["max_length"]
        if length >= most:
            raise UserError(f"the prompt has {length} tokens, and the model takes {most}: shorten it")
        self.waiting.append(answer)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows)

    def run(self) -> None:
        """Step until every answer is finished."""
        while self.busy:
            self.step()

    def step(self) -> list[Answer]:
        """One more token for every running answer, after rows have left and joined. Returns the answers that changed."""
        changed = self._leave_and_join()
        self.stepped = len(self.rows)
        if self.rows:
            try:
                logits = self.graphs.step(np.array([row.ids[-1:] for row in self.rows])).reshape(len(self.rows), -1)
            except Exception as e:  # whatever a runtime raises: the cache of this batch is lost
                for row in self.rows:
                    self._finish(row.answer, "error", e)
            else:
                for row, following, scores in zip(self.rows, self.graphs.places.next, logits, strict=True):
                    row.following = int(following)
                    self._extend(row, scores)
            changed += [row.answer for row in self.rows]
        if all(row.answer.finish_reason for row in self.rows):
            self.rows = []
            self.graphs.reset()
        return list(dict.fromkeys(changed))

    def _leave_and_join(self) -> list[Answer]:
        """Rows that ended or were cancelled leave, waiting prompts take their slots. Returns the answers that changed."""
        changed = [a for a in (*(row.answer for row in self.rows), *self.waiting) if a.cancelled and not a.finish_reason]
        for answer in changed:
            self._finish(answer, "cancelled")
        self.waiting = deque(answer for answer in self.waiting if not answer.finish_reason)
        staying = [row for row in self.rows if not row.answer.finish_reason]
        joining = min(self.slots - len(staying), len(self.waiting))
        if len(staying) == len(self.rows) and not joining:
            return changed
        caches = self.graphs.split([i for i, row in enumerate(self.rows) if row in staying])
        for _ in range(joining):
            answer = self.waiting.popleft()
            changed.append(answer)
            if found := self._prefill(answer):
                staying.append(found[0])
                caches.append(found[1])
        self.rows = staying
        self.graphs.reset()
        if staying:
            self.graphs.batch(caches, [row.held for row in staying], [row.following for row in staying])
        return changed

    def _prefill(self, answer: Answer) -> tuple[_Row, Cache] | None:
        """Read a prompt alone and choose its first token; None where that ends the answer."""
        exported, inputs = self.exported, answer.inputs
        answer.inputs = {"input_ids": inputs["input_ids"]}  # pixels are not needed again
        ids = inputs["input_ids"][0].tolist()
        room = exported.manifest["max_length"] - len(ids) + 1  # the last token generated needs no place
        generator = np.random.default_rng(answer.sampling.seed)
        row = _Row(answer, ids, generator, min(answer.sampling.max_new_tokens, room))
        self.graphs.reset()
        exported.reader = None
        try:
            features = exported.encode_images(inputs, self.features) if "pixel_values" in inputs else None
            prompt = Prompt.of(exported, inputs, features) if self.reuses else None
            answer.cached, begun = self.prefixes.longest(prompt) if prompt else (0, None)
            if begun:
                self.graphs.batch([begun], [answer.cached], [answer.cached])
            logits = exported.read(inputs, features, answer.cached)
            cache = self.graphs.cache()
        except Exception as e:  # an image that is missing, or whatever a runtime raises: this answer's alone
            self._finish(answer, "error", e)
            return None
        row.following = int(self.graphs.places.next[0])
        self._extend(row, logits)
        if prompt and answer.finish_reason != "error":  # what is not finite shall not spoil the prompts that begin alike
            self.prefixes.add(prompt, cache)
        return None if answer.finish_reason else (row, cache)

    def _extend(self, row: _Row, logits: np.ndarray) -> None:
        """Choose the next token of a row by its logits (V), and end its answer where that is due."""
        answer, sampling, manifest = row.answer, row.answer.sampling, self.exported.manifest
        try:
            scores = self.exported.scores(logits, row.ids).astype(np.float64)
        except UserError as e:
            self._finish(answer, "error", e)
            return
        token = int(scores.argmax())
        if sampling.temperature:
            token = int(row.generator.choice(len(scores), p=np.exp(log_softmax(scores / sampling.temperature))))
        if token in manifest["eos_token_ids"] and not sampling.ignore_eos:
            self._finish(answer, "stop")
            return
        row.ids.append(token)
        answer.tokens.append(token)
        answer.logprobs.append(float(log_softmax(scores)[token]))
        text = self._decode(answer)
        if any(stop in text for stop in sampling.stop):
            self._finish(answer, "stop")
        elif len(answer.tokens) == row.most:
            self._finish(answer, "length")
        else:
            answer.text = settled(text, sampling.stop)

    def _decode(self, answer: Answer) -> str:
        return self.exported.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).lstrip()

    def _finish(self, answer: Answer, reason: str, error: Exception | None = None) -> None:
        text = self._decode(answer)
        found = [text.index(stop) for stop in answer.sampling.stop if stop in text]
        answer.text, answer.error, answer.finish_reason = text[: min(found, default=None)].rstrip(), error, reason


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def settled(text: str, stop: Sequence[str]) -> str:
    """As much of the beginning of `text` as no later token can take back.
    >>> settled("A red circle. En", stop=("End",))
    'A red circle.'
    """
    text = text.rstrip("\ufffd")  # a character may need more than one token
    begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(begun, default=0)].rstrip()
