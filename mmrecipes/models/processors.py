"""Processors in: a tokenizer and an image processor, the same ones with torchvision as without it: only videos need it."""

import json
import sys
from pathlib import Path

from mmrecipes.errors import UserError, one_line


def load_processor(path: Path, trust_remote_code: bool = False):  # -> transformers.ProcessorMixin
    """The processor of the model directory `path`; without torchvision, one that takes images and no videos.
    Images are resized by Pillow wherever transformers can do so: torchvision's pixels differ, and answers with them.
    It truncates nothing, whatever its files say: a shortened prompt has places for images that are not there.
    Raises UserError for missing or broken files.
    """
    import transformers

    if not any(any(path.glob(p)) for p in ("tokenizer.json", "*.model", "vocab.*", "tekken.json")):
        raise UserError(f"{path}: the tokenizer's files are missing (tokenizer.json); copy them from where the model came from")
    if not any((path / f).is_file() for f in ("processor_config.json", "preprocessor_config.json")):
        raise UserError(f"{path}: processor_config.json or preprocessor_config.json is missing; copy it from the original")
    try:
        try:
            processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (ImportError, ValueError) as e:
            if not any(word in str(e).lower() for word in ("torchvision", "video", "num2words")):
                raise
            processor = _without_video(path)
        if hasattr(transformers, f"{type(getattr(processor, 'image_processor', None)).__name__}Pil"):  # as without torchvision
            images = transformers.AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code)
            processor.image_processor = images
    except Exception as e:  # whatever a broken directory makes the library raise
        cure = "install that package" if isinstance(e, ImportError) else "copy the processor's and tokenizer's files again"
        cure = "read that code, then pass trust_remote_code=True" if "trust_remote_code" in str(e) else cure
        raise UserError(f"{path}: the processor cannot be made ({one_line(e)}); {cure}") from e
    for half in ("tokenizer", "image_processor"):
        if getattr(processor, half, None) is None:
            raise UserError(f"{path}: the processor has no {half}; copy the processor's files from the original")
    processor.chat_template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    if backend := getattr(processor.tokenizer, "backend_tokenizer", None):
        backend.no_truncation()
        for key in ("max_length", "stride", "truncation_strategy"):  # from tokenizer.json; processors ask with them again
            processor.tokenizer.init_kwargs.pop(key, None)
    return processor


def _without_video(path: Path):  # -> transformers.ProcessorMixin
    """The processor of `path` without its video half, which alone needs torchvision or num2words (Qwen-VL, SmolVLM2)."""
    from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor

    full = _processor_class(path)
    if full.__name__ == "SmolVLMProcessor":  # asks for its video half in every chat; without it, it is Idefics3's
        full = Idefics3Processor
    halves = {"tokenizer": AutoTokenizer.from_pretrained(path), "image_processor": AutoImageProcessor.from_pretrained(path)}

    class ImagesOnly(full):
        @classmethod
        def _get_arguments_from_pretrained(cls, *args, **kwargs):
            # the image half stands in for the other while the processor is made: some settings are read from it
            return [halves.get(name, halves["image_processor"]) for name in full.get_attributes()]

        def check_argument_for_proper_class(self, name, value):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, value)

        def save_pretrained(self, out, **kwargs):
            super().save_pretrained(out, **kwargs)
            for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
                if (path / name).is_file():  # whoever has torchvision gets the video half back
                    (Path(out) / name).write_bytes((path / name).read_bytes())

    ImagesOnly.__name__ = full.__name__  # the name that save_pretrained writes
    processor = ImagesOnly.from_pretrained(path)
    processor.__dict__.pop("video_processor", None)
    ImagesOnly.get_attributes = classmethod(lambda cls: [a for a in full.get_attributes() if a != "video_processor"])
    return processor


def _processor_class(path: Path) -> type:
    """The class that the processor's files name (of one architecture there can be several), else the architecture's."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        named = json.loads((path / file).read_text()).get("processor_class") if (path / file).is_file() else None
        if named == "PixtralProcessor":  # its module takes from torchvision's half only a function that the one for PIL has, too
            from transformers.models.pixtral import image_processing_pil_pixtral as pil

            sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", pil)
            from transformers.models.pixtral.processing_pixtral import PixtralProcessor

            return PixtralProcessor
        if named and hasattr(transformers, named):
            return getattr(transformers, named)
    return PROCESSOR_MAPPING[type(transformers.AutoConfig.from_pretrained(path))]
