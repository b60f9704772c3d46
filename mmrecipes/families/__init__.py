"""What is special about each family of vision-language models, one file each: how an image reaches the vision encoder, how its
visual tokens are laid out, which positions and masks the decoder needs. Exports are traced and answered by these.

Nothing here imports PyTorch: the runtimes need the NumPy half alone, and `encode` and `masks` only call what they are given.
"""

from mmrecipes.families import idefics2, llava_next, minicpm_v, pixtral, qwen_vl, resampler, tiles
from mmrecipes.families.family import Family

# a new family is a file, and a row here
TABLE: tuple[Family, ...] = (
    *tiles.FAMILIES,
    *llava_next.FAMILIES,
    *qwen_vl.FAMILIES,
    *pixtral.FAMILIES,
    idefics2.FAMILY,
    minicpm_v.FAMILY,
    resampler.FAMILY,
)
NOT_YET = {  # model classes that transformers knows and no runtime here runs, and why
    "Lfm2VlForConditionalGeneration": "its image processor needs torchvision, so no recipe for it could be checked",
    "Blip2ForConditionalGeneration": "its Q-Former stands between the vision encoder and the language model",
    "Florence2ForConditionalGeneration": "its language model is an encoder-decoder with two caches",
}
BY_NAME = {family.name: family for family in TABLE}


def family_of(class_name: str) -> Family | None:
    """The family of a model class of transformers, by its name; None for one that is not known."""
    return next((family for family in TABLE if class_name in family.models), None)
