"""An export for OpenVINO GenAI, answering many requests together: continuous batching over a KV cache in pages."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecipes import families
from mmrecipes.errors import UserError, one_line, require
from mmrecipes.inference.exported import read_manifest
from mmrecipes.models.messages import conversation
from mmrecipes.models.processors import load_processor

NAME = "openvino-genai"
TAG = "<image>"  # what the pipeline for LLaVA takes for the place of an image, whatever the model calls it


class Scheduled:
    """Answers like the model it came from, greedily, many requests at a time; `together` is the most that one step computed."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None, cache_gb: int):
        require("openvino", "openvino_genai", "openvino_tokenizers", extra="genai")
        import openvino_genai

        self.genai, self.folder, self.manifest = openvino_genai, folder, manifest
        self.family, self.processor = families.BY_NAME[manifest["family"]], load_processor(folder)
        self.numbers, self.together = itertools.count(), 0
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        # as the export was checked: by default a CPU computes in bf16 where it can, and keeps this cache in 8 bits
        settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
        except RuntimeError as e:
            raise UserError(f"{folder}: openvino_genai cannot load it ({one_line(e)}); export the model again") from e

    def generate(self, images: Any, text: str | Sequence[dict], max_new_tokens: int = 64) -> str:
        """The answer. `images`: None, an image (PIL, path) or a list; `text`: a question, or messages for a chat template."""
        return self.generate_batch([(images, text)], max_new_tokens)[0]

    def generate_batch(self, conversations: Sequence[tuple[Any, str | Sequence[dict]]], max_new_tokens: int = 64) -> list[str]:
        """The answers to several (images, text), scheduled together."""
        decode = self.processor.tokenizer.decode
        return [decode(ids, skip_special_tokens=True).strip() for ids in self.tokens(conversations, max_new_tokens)]

    def tokens(self, conversations: Sequence[tuple[Any, str | Sequence[dict]]], max_new_tokens: int = 64) -> list[list[int]]:
        """Token ids of each answer, without what ends it. Raises UserError for a request that does not fit."""
        requests, handles = [self.request(*each) for each in conversations], []
        for prompt, images, room in requests:
            config = self.genai.GenerationConfig()
            config.max_new_tokens, config.apply_chat_template = min(max_new_tokens, room), False
            config.stop_token_ids = set(self.manifest["eos_token_ids"])
            handles.append(self.pipeline.add_request(next(self.numbers), prompt, images, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            self.together = max(self.together, self.pipeline.get_metrics().scheduled_requests)
        if any(handle.get_status() == self.genai.GenerationStatus.IGNORED for handle in handles):
            raise UserError(f"{self.folder}: a request does not fit into the KV cache; load it with a larger cache_gb")
        found = [handle.read_all()[0].generated_ids for handle in handles]
        return [ids[:-1] if ids and ids[-1] in self.manifest["eos_token_ids"] else ids for ids in found]

    def request(self, images: Any, text: str | Sequence[dict]) -> tuple[str, list[Any], int]:
        """What the pipeline takes of one conversation: the prompt with a TAG an image or tile, those as pixels of 8 bits
        (H, W, 3), and how many tokens the answer may have. UserError where the text would be read differently."""
        import openvino as ov

        inputs = conversation(self.processor, images, text)
        ids, tokenizer = inputs["input_ids"][0], self.processor.tokenizer
        room = self.manifest["max_length"] - len(ids) + 1
        if room < 2:
            raise UserError(f"the prompt has {len(ids)} tokens, and the model takes {self.manifest['max_length']}: shorten it")
        runs = self.family.images(inputs, self.manifest["settings"]) if "pixel_values" in inputs else []
        is_image = ids == self.manifest["image_token_id"]
        length = is_image.sum() // len(runs) if runs else 1  # tiles are all of one size
        first = is_image & ((is_image.cumsum() - 1) % length == 0)
        if (first[1:] & is_image[:-1]).any():
            raise UserError("two images without text between them, which GenAI takes for one; write some, or use load_exported")
        kept = ids[~is_image | first]
        added = self.pipeline.get_tokenizer().encode("").input_ids.data.reshape(-1)  # BOS, where the pipeline adds it itself
        if len(added) and (kept[: len(added)] == added).all():
            kept = kept[len(added) :]
        prompt = tokenizer.decode(kept).replace(tokenizer.convert_ids_to_tokens(self.manifest["image_token_id"]), TAG)
        read = self.pipeline.get_tokenizer().encode(prompt.replace(TAG, TAG * length + "\n")).input_ids.data[0]
        if read.tolist() != ids.tolist():
            raise UserError(f"{self.folder}: GenAI's tokenizer reads this text differently; use load_exported for it")
        shown = self.processor.image_processor
        mean, std = (np.array(values)[:, None, None] for values in (shown.image_mean, shown.image_std))
        levels = [np.rint((run["pixel_values"][0] * std + mean) * 255).clip(0, 255).astype(np.uint8) for run in runs]
        return prompt, [ov.Tensor(np.ascontiguousarray(each.transpose(1, 2, 0))) for each in levels], room


def load_genai(folder: str | Path, threads: int | None = None, cache_gb: int = 1) -> Scheduled:
    """The model that `export(..., runtime="openvino-genai")` wrote to `folder`, with so many GB for the KV cache of all requests.
    Raises UserError for another directory; ImportError where a package is missing.
    >>> load_genai(folder).generate_batch([("a.png", "What is left?"), ("b.png", "How many?")])
    ['star', '2']
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if manifest["runtime"] != NAME:
        raise UserError(f"{folder}: exported for {manifest['runtime']}; use load_exported, or export it for {NAME}")
    return Scheduled(folder, manifest, threads, cache_gb)
