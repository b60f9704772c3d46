"""Another vision encoder for a VLM: put in, then taught step by step to tell the language model what the old one told it.

First its features by a linear map, folded into the connector; then the connector; then everything (`distill`). Notebook 31.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.kd import LossWeights, StudentWithProjections, distillation_loss, fit_outputs
from mmrecipes.distill.losses import ridge
from mmrecipes.errors import UserError, one_line
from mmrecipes.models.modules import VisionWithConnector, clone, config_of, parts
from mmrecipes.train.loop import TrainConfig, fit

ENCODERS = {  # name -> config of the backbone; MobileNetV2 keeps 8 x 8 positions to its end, as for segmentation
    "MobileNetV2 0.5": {"model_type": "mobilenet_v2", "depth_multiplier": 0.5, "output_stride": 16, "tf_padding": False},
    "MobileViT-S": {"model_type": "mobilevit"},
    "MobileViTV2-0.5": {"model_type": "mobilevitv2", "width_multiplier": 0.5},
    "EfficientFormer-L1": {"model_type": "efficientformer"},
    "ShuffleNetV2 1.0x": {"model_type": "shufflenet_v2"},
    "SwiftFormer-XS": {"model_type": "swiftformer"},
}


def swap_vision_encoder(model: nn.Module, backbone: dict, start: nn.Module | None = None, seed: int = 0) -> nn.Module:
    """A copy of an Idefics3 with another vision encoder, and a connector that fits it, with random weights.
    `backbone` is one of ENCODERS or a dict like those; with `start`, a trained backbone of that kind, it has its weights. Raises
    UserError for another class, a backbone that gives no map of the model's grid, or weights that do not fit.
    """
    from mmrecipes.distill.encoders import swapped

    if (name := type(model).__name__) != "Idefics3ForConditionalGeneration":
        raise UserError(f"swap: {name}; expected an Idefics3ForConditionalGeneration, as mini-vlm and SmolVLM-256M are")
    old = model.config.vision_config
    grid = old.image_size // old.patch_size
    torch.manual_seed(seed)
    try:
        encoder = swapped.BackboneEncoder(backbone, old.image_size, grid).eval()
        with torch.no_grad():
            hidden_size = encoder(torch.zeros(1, old.num_channels, old.image_size, old.image_size)).last_hidden_state.shape[-1]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"swap: {backbone} makes no map of {grid} x {grid} places ({one_line(e)}); give one of ENCODERS") from e
    if start is not None:
        try:
            encoder.backbone.load_state_dict(start.state_dict())
        except RuntimeError as e:
            raise UserError(f"swap: the weights of {type(start).__name__} do not fit {backbone} ({one_line(e)})") from e
    rest = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    config = swapped.SwappedConfig(**copy.deepcopy(rest), vision_backbone=dict(backbone))
    config.vision_config.hidden_size = hidden_size
    student = swapped.SwappedForConditionalGeneration(config).to(model.device, model.dtype).eval()
    student.model.vision_model.load_state_dict(encoder.state_dict())
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("model.vision_model.", "model.connector."))}
    student.load_state_dict(kept, strict=False)
    student.generation_config, student.processor = copy.deepcopy(model.generation_config), model.processor
    return student


@torch.no_grad()
def least_squares_map(student: nn.Module, teacher: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """The `ridge` map (D, C) from `student`'s features to `teacher`'s on `images` (N, 3, H, W). UserError without images."""
    if not len(images):
        raise UserError("least_squares_map: no images; give some hundred like those to come")
    encoders = [parts(m)["vision"] for m in (student, teacher)]
    gram = cross = 0.0
    for part in images.split(batch):
        x, y = (encoder(part).last_hidden_state.flatten(0, 1).double() for encoder in encoders)
        gram, cross = gram + x.T @ x, cross + x.T @ y
    return ridge(gram, cross).float()


@torch.no_grad()
def fold_map_(student: nn.Module, teacher: nn.Module, linear: Tensor) -> None:
    """Make `linear` (D, C), a map to `teacher`'s features, part of `student`'s connector: two matrices in a row are one.
    Behind a pixel shuffle it acts on each of the features that lie side by side.
    """
    old, new = (parts(m)["connector"].modality_projection.proj.weight for m in (teacher, student))
    new.copy_((old.unflatten(1, (-1, len(linear))) @ linear.to(old)).flatten(1))


def match_features(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    config: TrainConfig,
    work: Path | None = None,
    images: Tensor | None = None,
) -> nn.Module:
    """Step one: a copy of `student` whose encoder gives `teacher`'s features through a linear map, now part of its connector.
    `batches[i][0]` are pixels (B, 3, H, W). It begins with the `least_squares_map` on `images` (N, 3, H, W), for an encoder that
    was trained before, or a random one. Raises UserError as `train.fit` does.
    """
    device, student, teacher = student.device, clone(student).requires_grad_(True), clone(teacher)
    torch.manual_seed(0)
    # without a bias: the connector has none to fold it into
    linear = nn.Linear(*(config_of(m, "vision").hidden_size for m in (student, teacher)), bias=False)
    linear.use_adamw = True
    if images is not None:
        linear.weight.data.copy_(least_squares_map(student, teacher, images))
    own, wanted = VisionWithConnector(student), VisionWithConnector(teacher)
    own.connector, wanted.connector = linear, nn.Identity()
    own.vision.to(memory_format=torch.channels_last)  # in which convolutions train faster on a CPU
    fit_outputs(own, wanted, batches, config, work)
    own.vision.to(memory_format=torch.contiguous_format)
    student.to(device)
    fold_map_(student, teacher.to(device), linear.weight.to(device))
    return student.eval()


def align_connector(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None = None
) -> nn.Module:
    """Step two: a copy of `student` whose connector alone learned what to say, by right answers and `teacher`'s logits.
    `batches` bring their own `answer_loss`, as for `distill.distill`. Raises UserError as `train.fit` does.
    """
    device, weights = student.device, LossWeights(hidden=0, vision=0)
    student, teacher = (clone(m).requires_grad_(False) for m in (student, teacher))
    parts(student)["connector"].requires_grad_(True)
    projected = StudentWithProjections(student, teacher, learned=False)
    fit(projected, batches, distillation_loss(teacher, weights, batches.answer_loss), replace(config, about=repr(weights)), work)
    return student.to(device).eval()
