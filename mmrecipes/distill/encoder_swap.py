"""Another vision encoder for a VLM: put in, then taught step by step to say to the language model what the old one said.

First its features through a linear map, which becomes the connector's; then the connector alone; then everything
(`distill.distill`). Built by hand in notebook 31. `mmrecipes.swapped` is the model that comes out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrecipes.distill import kd, losses
from mmrecipes.errors import UserError, one_line
from mmrecipes.mini import curriculum
from mmrecipes.models import modules
from mmrecipes.models.modules import clone
from mmrecipes.train.loop import TrainConfig, fit

ENCODERS = {  # name -> config of the backbone; MobileNetV2 keeps 8 x 8 positions to its end, as for segmentation
    "MobileNetV2 0.5": {"model_type": "mobilenet_v2", "depth_multiplier": 0.5, "output_stride": 16, "tf_padding": False},
    "MobileViT-S": {"model_type": "mobilevit"},
    "MobileViTV2-0.5": {"model_type": "mobilevitv2", "width_multiplier": 0.5},
    "EfficientFormer-L1": {"model_type": "efficientformer"},
    "ShuffleNetV2 1.0x": {"model_type": "shufflenet_v2"},
    "SwiftFormer-XS": {"model_type": "swiftformer"},
}


def swap_vision_encoder(
    model: nn.Module, tower: dict, start: nn.Module | None = None, seed: int = 0
) -> nn.Module:  # -> encoders.swapped.SwappedForConditionalGeneration
    """A copy of an Idefics3 with another vision encoder and a connector that fits it, both with random weights.

    `tower` is one of TOWERS or a dict like those; with `start`, a trained backbone of that kind, it has its weights. The language
    model is copied. Raises UserError for a model of another class, a connector that shuffles pixels, a tower that does not exist
    or gives no map of the model's grid, or weights that do not fit it.
    """
    from mmrecipes.distill.encoders import swapped

    if type(model).__name__ != "Idefics3ForConditionalGeneration" or model.config.scale_factor != 1:
        given = f"{type(model).__name__}, scale_factor {getattr(model.config, 'scale_factor', None)}"
        raise UserError(f"swap: {given}; expected an Idefics3ForConditionalGeneration with scale_factor 1, as mini-vlm is")
    own = model.config.vision_config
    torch.manual_seed(seed)
    try:
        eye = swapped.Tower(tower, own.image_size, own.image_size // own.patch_size).eval()
        with torch.no_grad():
            width = eye(torch.zeros(1, own.num_channels, own.image_size, own.image_size)).last_hidden_state.shape[-1]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        side = own.image_size // own.patch_size
        raise UserError(f"swap: {tower} makes no map of {side} x {side} places ({one_line(e)}); give one of TOWERS") from e
    if start is not None:
        try:
            eye.backbone.load_state_dict(start.state_dict())
        except RuntimeError as e:
            raise UserError(f"swap: the weights of {type(start).__name__} do not fit {tower} ({one_line(e)})") from e
    rest = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    config = swapped.SwappedConfig(**copy.deepcopy(rest), tower=dict(tower))
    config.vision_config.hidden_size = width
    student = swapped.SwappedForConditionalGeneration(config).to(model.device, model.dtype).eval()
    student.model.vision_model.load_state_dict(eye.state_dict())
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("model.vision_model.", "model.connector."))}
    student.load_state_dict(kept, strict=False)
    student.generation_config, student.processor = copy.deepcopy(model.generation_config), model.processor
    return student


class EncoderWithMap(nn.Module):
    """A vision encoder with a linear map from its tokens (B, N, C) to the old encoder's (B, N, D)."""

    def __init__(self, tower: nn.Module, width: int, wanted: int):
        super().__init__()
        self.tower, self.maps = tower, nn.Linear(width, wanted, bias=False)  # the connector has no bias to fold one into
        self.maps.use_adamw = True

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(self.tower(images).last_hidden_state)


@torch.no_grad()
def least_squares_map(student: nn.Module, teacher: nn.Module, pictures: Tensor, batch: int = 64) -> Tensor:
    """The linear map (D, C) from the features of `student`'s encoder to `teacher`'s that errs least on `pictures` (N, 3, H, W).

    Least squares in float64, by `distill.ridge`. Raises UserError without pictures.
    """
    if not len(pictures):
        raise UserError("best_map: no pictures; give some hundred like those to come")
    own, old = (modules.parts(m)["vision"] for m in (student, teacher))
    moments = products = 0.0
    for some in pictures.split(batch):
        x, y = (eye(some).last_hidden_state.flatten(0, 1).double() for eye in (own, old))
        moments, products = moments + x.T @ x, products + x.T @ y
    return losses.ridge(moments, products).float()


@torch.no_grad()
def fold_map_(student: nn.Module, teacher: nn.Module, linear: Tensor) -> None:
    """Make `linear` (D, C), a map to `teacher`'s features, part of `student`'s connector: two matrices in a row are one."""
    old, new = (modules.parts(m)["connector"].modality_projection.proj.weight for m in (teacher, student))
    new.copy_(old @ linear.to(old))


def match_features(
    student: nn.Module, teacher: nn.Module, course: TrainConfig, work: Path | None = None, pictures: Tensor | None = None
) -> nn.Module:
    """Step one: a copy of `student` whose encoder gives `teacher`'s features through a linear map, now part of its connector.

    On the house model's pictures, without labels, as `match_vision_encoder`. An encoder that was trained before begins with the
    `least_squares_map` on `pictures`, others with a random one. Raises UserError as `fit` does.
    """
    student, old = clone(student).requires_grad_(True), clone(teacher).requires_grad_(False)
    widths = [modules.config_of(m, "vision").hidden_size for m in (student, old)]
    torch.manual_seed(0)
    matched, seen = EncoderWithMap(modules.parts(student)["vision"], *widths), modules.parts(old)["vision"]
    if pictures is not None:
        matched.maps.weight.data.copy_(least_squares_map(student, old, pictures))

    def loss(own: EncoderWithMap, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted = seen.to(batch[0].device)(batch[0]).last_hidden_state
        far = losses.feature_loss(own(batch[0]), wanted)
        return far, {"features": far.item()}

    at = student.device  # the training may move it to a GPU
    with channels_last(matched.tower):
        fit(matched, curriculum.image_batches("encoder-swap", course), loss, course, work)
    student.to(at)
    fold_map_(student, old.to(at), matched.maps.weight)
    return student.eval()


def align_connector(student: nn.Module, teacher: nn.Module, course: TrainConfig, work: Path | None = None) -> nn.Module:
    """Step two: a copy of `student` whose connector alone learned what to say, by right answers and `teacher`'s logits.

    On the house model's lessons, as `distill.distill`. Raises UserError as `fit` does.
    """
    student, old = clone(student).requires_grad_(False), clone(teacher).requires_grad_(False)
    modules.parts(student)["connector"].requires_grad_(True)
    pupil, aims = kd.StudentWithProjections(student, old), kd.LossWeights(hidden=0, vision=0)
    pupil.vision_maps.requires_grad_(False)
    pupil.hidden_maps.requires_grad_(False)
    batches = curriculum.chat_batches("connector", course, student.processor.tokenizer)
    at = student.device
    fit(pupil, batches, kd.distillation_loss(old, aims, batches.answer_loss), course, work)
    return student.to(at).eval()


@contextlib.contextmanager
def channels_last(tower: nn.Module) -> Iterator[None]:
    """Convolutions train faster on a CPU when the channels of a place lie side by side. Weights go back to the usual order."""
    tower.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        tower.to(memory_format=torch.contiguous_format)
