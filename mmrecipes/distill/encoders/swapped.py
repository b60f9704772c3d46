"""An Idefics3 that sees through another vision encoder: any backbone that makes maps, where its config can only name a ViT.

This file is saved beside the weights (transformers' custom code), so that a swapped model loads without mmrecipes:
`AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Idefics3Config, Idefics3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .efficientformer import EfficientFormer
from .shufflenet import ShuffleNetV2

# kind -> a backbone that transformers lacks, by the side of its images in px
OWN = {"shufflenet_v2": lambda size: ShuffleNetV2(), "efficientformer": lambda size: EfficientFormer(size=size)}


class BackboneEncoder(nn.Module):
    """Images (B, 3, H, W) to features (B, N, C), one for each place of the last map of `grid` x `grid` places.

    `backbone` is a config of transformers as a dict with its "model_type", or one of OWN's. Where it goes on to coarser maps,
    the last of them is stretched to that grid and stands beside the finer one. `size` is the side of the images in px.
    """

    def __init__(self, backbone: dict, size: int, grid: int):
        super().__init__()
        kind, self.grid = backbone["model_type"], grid
        self.backbone = OWN[kind](size) if kind in OWN else AutoModel.from_config(AutoConfig.for_model(**backbone))
        for head in {"classes", "distilled"} & set(dir(self.backbone)):  # nobody asks for ImageNet's classes here
            setattr(self.backbone, head, nn.Identity())
        for norm in [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.momentum = 0.1  # MobileNetV2 took TensorFlow's 0.997, which here means: the last batch alone

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """All maps (B, C, h, w) of the backbone, in their order."""
        if hasattr(self.backbone, "features"):
            return self.backbone.features(pixel_values)
        out = self.backbone(pixel_values, output_hidden_states=True)
        return [*out.hidden_states, out.last_hidden_state]

    def forward(self, pixel_values: Tensor, **unused) -> BaseModelOutputWithPooling:
        maps = self.maps(pixel_values)
        features = [m for m in maps if m.shape[-1] == self.grid][-1]
        if maps[-1].shape[-1] < self.grid:
            features = torch.cat([features, F.interpolate(maps[-1], size=features.shape[-2:])], 1)
        # contiguous: a connector with pixel shuffle takes views of it
        return BaseModelOutputWithPooling(last_hidden_state=features.flatten(2).transpose(1, 2).contiguous())


class SwappedConfig(Idefics3Config):
    """`vision_backbone`: as for `BackboneEncoder`. `vision_config` still says how large an image and a place are (`image_size`,
    `patch_size`), and how many channels the connector reads (`hidden_size`)."""

    model_type = "idefics3_swapped"
    vision_backbone: dict | None = None


class SwappedForConditionalGeneration(Idefics3ForConditionalGeneration):
    """Idefics3 with `config.vision_backbone` in the place of its vision model."""

    config_class = SwappedConfig
    config: SwappedConfig

    def __init__(self, config: SwappedConfig):
        super().__init__(config)
        own = config.vision_config
        self.model.vision_model = BackboneEncoder(config.vision_backbone, own.image_size, own.image_size // own.patch_size)
        self.post_init()


SwappedConfig.register_for_auto_class()
SwappedForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
