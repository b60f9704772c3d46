"""A directory that `export.export` wrote, answering from its runtime: no PyTorch model, no code of the source."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecipes import families
from mmrecipes.errors import ParityError, UserError, one_line, require
from mmrecipes.inference import dual
from mmrecipes.inference.backends import GRAPHS, PACKAGES, PARTS, load_graphs, runtimes
from mmrecipes.models.messages import conversation
from mmrecipes.models.processors import load_processor

MANIFEST = "mmrecipes_export.json"
IMAGE_TOKEN = "image_token.npy"  # its own embedding (1, D): a model may generate the placeholder, and no image is there then
FORMAT = 4  # of the manifest; a newer one is refused. 4: a runtime for each part
# format 1 was called like transformers' own manifest, and had other names for these
OLD_MANIFEST, OLD_KEYS = "export.json", {"stop": "eos_token_ids", "longest": "max_length"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `export` noted about the model in `folder`, by today's keys. UserError where it is absent, foreign or unreadable."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give the one that was exported to")
    path = next((folder / name for name in (MANIFEST, OLD_MANIFEST) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no {MANIFEST}, so not an exported model; make one with mmrecipes.export.export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "export_format" in manifest:
            raise UserError(f"{path}: written by transformers' own exporter; for ours use mmrecipes.export.export")
        if manifest["format"] > FORMAT:
            raise UserError(f"{folder}: exported by a newer mmrecipes (format {manifest['format']}); upgrade, or export it again")
        manifest = {OLD_KEYS.get(key, key): value for key, value in manifest.items()}
        _ = [manifest["precision"][part] for part in PARTS], manifest["sha256"].items()
        _ = [manifest[key] for key in (dual.KEYS if "kind" in manifest else ("image_token_id", "eos_token_ids", "max_length"))]
        # format 2 and older: models whose images are tiles of one size
        manifest = {"family": "idefics3" if "Idefics3" in manifest["class"] else "tiles", "settings": {}} | manifest
        if manifest["family"] not in families.BY_NAME:
            raise UserError(f"{folder}: of a family {manifest['family']!r} that is not known here; upgrade mmrecipes")
        if not set(runtimes(manifest["runtime"]).values()) <= set(GRAPHS):
            raise UserError(f"{folder}: exported for {manifest['runtime']!r}; expected one of {', '.join(GRAPHS)}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not readable ({one_line(e, 80)}); export the model again") from e
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def generation_rules(config: Any) -> dict[str, object]:
    """What `config` asks of each token, as the exported model applies it: a repetition penalty, tokens that never come."""
    never = {ids[0] for ids in config.bad_words_ids or () if len(ids) == 1} | set(config.suppress_tokens or ())
    rules = {"repetition_penalty": config.repetition_penalty, "suppress_tokens": sorted(never)}
    return {name: rule for name, rule in rules.items() if rule not in (None, 1.0, [])}


class Exported:
    """Answers like the model it came from, greedily. `generate` and `stream` take images and a text or messages."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None, graphs: Callable[..., Any] | None = None):
        """`graphs` makes what runs the files, where they are not in our own layout."""
        packages = list(dict.fromkeys(PACKAGES[runtime] for runtime in runtimes(manifest["runtime"]).values()))
        require(*packages)
        self.folder, self.manifest = folder, manifest
        self.family, self.settings = families.BY_NAME[manifest["family"]], manifest["settings"]
        self.processor, self.reader = load_processor(folder), None  # the Chat whose turns the cache holds
        try:
            made = graphs(folder, manifest["precision"], threads) if graphs else load_graphs(folder, manifest, threads)
            self.graphs = made
        except UserError:
            raise
        except Exception as e:  # the runtimes' own kinds, without a common parent
            raise UserError(f"{folder}: {' and '.join(packages)} cannot load it ({one_line(e)}); export the model again") from e
        if (folder / IMAGE_TOKEN).is_file():  # of DeepStack's further layers: nothing
            row = np.load(folder / IMAGE_TOKEN)
            self.graphs.no_image[:, : row.shape[1]] = row

    def generate(self, images: Any, text: str | Sequence[dict], max_new_tokens: int = 64) -> str:
        """The answer. `images`: None, an image (PIL, path) or a list; `text`: a question, or messages for a chat template."""
        return "".join(self.stream(images, text, max_new_tokens)).strip()

    def stream(self, images: Any, text: str | Sequence[dict], max_new_tokens: int = 64) -> Iterator[str]:
        """The answer, piece by piece as its tokens are generated."""
        ids, answer, sent = [], "", 0
        for token in self.tokens(self.inputs(images, text), max_new_tokens):
            ids.append(token)
            answer = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            if not answer.endswith("\ufffd"):  # a character may need more than one token
                yield answer[sent:]
                sent = len(answer)
        if len(answer) > sent:  # it stopped in the middle of a character
            yield answer[sent:]

    def tokens(self, inputs: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[int]:
        """Token ids, the likeliest each time, until the model stops, `max_new_tokens` are generated or the cache is full."""
        logits, ids = self.prefill(inputs), inputs["input_ids"][0].tolist()
        room = self.manifest["max_length"] - len(ids) + 1  # the last token generated needs no place
        for remaining in reversed(range(min(max_new_tokens, room))):
            token = self.likeliest(logits, ids)
            if token in self.manifest["eos_token_ids"]:
                return
            yield token
            ids.append(token)
            if remaining:
                logits = self.graphs.step(np.array([[token]]))

    def likeliest(self, logits: np.ndarray, ids: list[int]) -> int:
        """The likeliest token after `ids`, by logits (V) and what the model's generation_config.json asks for."""
        return int(self.scores(logits, ids).argmax())

    def scores(self, logits: np.ndarray, ids: list[int]) -> np.ndarray:
        """Logits (V) of the token after `ids`, changed as the model's generation_config.json asks for; ParityError for a NaN."""
        if not np.isfinite(logits).all():
            raise ParityError("the model's logits are not finite: it is broken, not lossy; export it again")
        rules, logits = self.manifest.get("generation", {}), np.array(logits)
        if penalty := rules.get("repetition_penalty"):
            seen = np.unique(ids)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        logits[rules.get("suppress_tokens", [])] = -np.inf
        return logits

    def generate_batch(self, conversations: Sequence[tuple[Any, str | Sequence[dict]]], max_new_tokens: int = 64) -> list[str]:
        """Answers to several (images, text), the same as of `generate`, in less time: each new token of all rows is one step.
        Prompts are read one by one: that is bound by compute, so together they would take as long, and nothing is padded.
        Raises UserError for an export without batches.
        """
        if not self.manifest.get("batches"):
            raise UserError(f"{self.folder}: exported for one conversation at a time; export it with batches=True")
        rows = [self.inputs(images, text) for images, text in conversations]
        ids, first, caches, following = [row["input_ids"][0].tolist() for row in rows], [], [], []
        starts, stop = [len(row) for row in ids], set(self.manifest["eos_token_ids"])
        for row in rows:
            first.append(self.prefill(row))
            caches.append(self.graphs.cache())
            following.append(int(self.graphs.places.next[0]))
        self.graphs.batch(caches, starts, following)
        unfinished, logits = set(range(len(rows))), np.stack(first)
        for remaining in reversed(range(min(max_new_tokens, self.manifest["max_length"] - max(starts) + 1))):
            for i in sorted(unfinished):
                token = self.likeliest(logits[i], ids[i])
                unfinished -= {i} if token in stop else set()
                ids[i] += [token]
            if not unfinished or not remaining:
                break
            logits = self.graphs.step(np.array([[row[-1]] for row in ids])).reshape(len(rows), -1)
        decode = self.processor.tokenizer.decode
        return [decode(row[start:], skip_special_tokens=True).strip() for row, start in zip(ids, starts, strict=True)]

    def prefill(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (V) of the first new token; the cache then holds the prompt."""
        self.graphs.reset()
        self.reader = None
        return self.read(inputs, self.encode_images(inputs) if "pixel_values" in inputs else None)

    def read(self, inputs: dict[str, np.ndarray], features: np.ndarray | None, held: int = 0) -> np.ndarray:
        """Logits (V) of the first new token after a prompt with the visual tokens `features` (N, D), of which the cache holds the
        first `held` tokens already; then it holds all. UserError where images are missing or too many."""
        ids = inputs["input_ids"]
        is_image = self.image_places(ids, features)
        positions = self.family.positions and self.family.positions(inputs, self.settings)
        size, rows = self.family.piece or ids.shape[1], np.concatenate([[0], is_image.cumsum()])
        for start in range(held, ids.shape[1], size):
            end = min(start + size, ids.shape[1])
            shown = features[rows[start] : rows[end]] if rows[end] > rows[start] else None
            at = None if positions is None else positions[..., start:end]
            logits = self.graphs.step(ids[:, start:end], shown, at)
        return logits

    def image_places(self, ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        """Which tokens of `ids` (1, T) stand for the visual tokens (N, D); UserError where images are missing or too many."""
        is_image, given = ids[0] == self.manifest["image_token_id"], 0 if features is None else len(features)
        if (places := is_image.sum()) != given:
            raise UserError(f"{places} places for visual tokens in the text, {given} given: an image is missing or too many")
        return is_image

    def encode_images(
        self, inputs: dict[str, np.ndarray] | np.ndarray, known: dict[bytes, np.ndarray] | None = None
    ) -> np.ndarray:
        """Visual tokens (T, D) that stand for the placeholders of one conversation, from what the processor made of its images
        (or from pixels (..., 3, H, W) alone). An image or tile that is `known`, by its content, is not encoded again."""
        inputs = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
        runs, tokens = [*self.family.images(inputs, self.settings)], []
        known, alone = {} if known is None else known, known is None and len(runs) == 1
        for run in runs:
            # one image can equal no other; a small encoder takes hardly longer than its hash
            content = b"" if alone else b"".join(str(x.shape).encode() + x.tobytes() for x in run.values())
            key = hashlib.sha256(content).digest()
            features = known.get(key)
            if features is None:
                made = self.graphs.encode(run)
                features = known[key] = made.reshape(-1, made.shape[-1])
            tokens.append(features)
        return self.family.merge(tokens, inputs, self.settings)

    def inputs(self, images: Any, text: str | Sequence[dict]) -> dict[str, np.ndarray]:
        """What the processor makes of one conversation: input_ids (1, T), pixel_values, ...; UserError where it does not fit."""
        inputs = self.prompt(images, text)
        length, most = inputs["input_ids"].shape[1], self.manifest["max_length"]
        if length >= most:
            raise UserError(f"the prompt has {length} tokens, and the model takes {most}: shorten it")
        return inputs

    def prompt(self, images: Any, text: str | Sequence[dict]) -> dict[str, np.ndarray]:
        """As `inputs`, however long it is."""
        inputs = dict(conversation(self.processor, images, text))
        if self.family.name == "idefics3" and not np.asarray(inputs.get("pixel_attention_mask", 1)).all():
            raise UserError("an image is padded, and the vision encoder takes whole ones of its own size: resize the image to it")
        return inputs


def load_exported(folder: str | Path, threads: int | None = None, check: bool = True) -> Exported | dual.ExportedDual:
    """The model that `export` wrote to `folder`, ready to answer, or to compare where it is a dual encoder.
    `threads` of the runtime: by default all physical cores. With `check`, the files must be those that were exported (SHA-256).
    Raises UserError for anything else.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    for name, digest in manifest["sha256"].items() if check else ():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, though the manifest names it; export the model again")
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: not the file that was exported (truncated or changed); export the model again")
    return (dual.ExportedDual if manifest.get("kind") == "dual" else Exported)(folder, manifest, threads)
