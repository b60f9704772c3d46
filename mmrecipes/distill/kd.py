"""Knowledge distillation of a VLM (Hinton et al. 2015, arXiv:1503.02531): a student learns what its teacher does.

Built by hand in notebook 30. `recover` is the same after a cut (Minitron, arXiv:2407.14679): notebooks 20 and 21.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.losses import feature_loss, kl_loss, relation_loss, ridge
from mmrecipes.errors import UserError
from mmrecipes.models.modules import VisionWithConnector, clone, config_of, layers, linears, parts
from mmrecipes.quantize.qat import convert_qat_
from mmrecipes.train.hooks import captured, layer_pairs
from mmrecipes.train.loop import Loss, TrainConfig, fit, mean_over_processes, shard


@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss; 0 leaves it out. All but `answers` need a teacher."""

    answers: float = 1.0  # cross-entropy of the right ones
    logits: float = 1.0  # KL divergence from the teacher's at `temperature`, or `reverse`
    hidden: float = 1.0  # hidden states, layer by layer, through linear projections that are thrown away
    vision: float = 1.0  # visual features, in the same way (FitNets, arXiv:1412.6550)
    attention: float = 0.0  # relations in the last layer of the vision encoder and of the language model
    temperature: float = 1.0
    reverse: bool = False

    @property
    def need_teacher(self) -> bool:
        return bool(self.logits or self.hidden or self.vision or self.attention)


LABELS_ONLY = LossWeights(logits=0, hidden=0, vision=0)


class StudentWithProjections(nn.Module):
    """A student with linear projections of its features to its teacher's width, or, unless `learned`, with none."""

    def __init__(self, student: nn.Module, teacher: nn.Module, learned: bool = True):
        super().__init__()
        self.student = student
        depth = len(layers(student, ("language",))["language"])
        if learned:
            sizes = {p: [config_of(m, p).hidden_size for m in (student, teacher)] for p in ("vision", "language")}
            self.vision_projection = nn.Linear(*sizes["vision"])
            self.hidden_projections = nn.ModuleList(nn.Linear(*sizes["language"]) for _ in range(depth))
            self.vision_projection.use_adamw = self.hidden_projections.use_adamw = True
        else:
            self.vision_projection, self.hidden_projections = nn.Identity(), nn.ModuleList(nn.Identity() for _ in range(depth))

    @torch.no_grad()
    def fit_projections_(self, teacher: nn.Module, answer_loss: Callable[[nn.Module, Any], tuple], batch: Any) -> None:
        """Make them the least-squares projections for one batch, so that training need not begin with that."""
        with captured(self.student) as own, captured(teacher) as wanted:
            answer_loss(self.student, batch)
            answer_loss(teacher, batch)
        hidden = zip(self.hidden_projections, layer_pairs(own["hidden"], wanted["hidden"]), strict=True)
        vision = [(self.vision_projection, (own["vision"], wanted["vision"]))] if "vision" in own else []
        for projection, features in (*hidden, *vision):
            x, y = (f.flatten(0, -2).double() for f in features)
            x_mean, y_mean = x.mean(0), y.mean(0)
            weight = ridge((x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean))
            projection.weight.copy_(weight)
            projection.bias.copy_(y_mean - weight @ x_mean)


def distillation_loss(teacher: nn.Module | None, weights: LossWeights, answer_loss: Callable[[nn.Module, Any], tuple]) -> Loss:
    """The loss of a StudentWithProjections on a batch, for `train.fit`. `answer_loss(model, batch)` is that of the batches."""

    def loss(projected: StudentWithProjections, batch: Any) -> tuple[Tensor, dict[str, float]]:
        with captured(projected.student, bool(weights.attention)) as own:
            right, tokens, logs = answer_loss(projected.student, batch)
        terms = {"answers": right}
        if weights.need_teacher:
            with captured(teacher.to(own["logits"].device), bool(weights.attention)) as wanted, torch.no_grad():
                answer_loss(teacher, batch)
        if weights.logits:
            terms["logits"] = kl_loss(own["logits"], wanted["logits"], weights.temperature, weights.reverse)
        if weights.hidden:
            pairs = zip(projected.hidden_projections, layer_pairs(own["hidden"], wanted["hidden"]), strict=True)
            terms["hidden"] = torch.stack([feature_loss(projection(h), w) for projection, (h, w) in pairs]).mean()
        if weights.vision and "vision" in own:  # text alone never reaches the vision encoder
            terms["vision"] = feature_loss(projected.vision_projection(own["vision"]), wanted["vision"])
        if weights.attention:
            shared = [k for k in wanted["attention"] if k in own["attention"]]  # a convolutional encoder has none
            terms["attention"] = torch.stack([relation_loss(own["attention"][k], wanted["attention"][k]) for k in shared]).mean()
        share = tokens / mean_over_processes(tokens)  # a mean over all processes' tokens, not a mean of their means
        scaled = {k: v * share if k in ("answers", "logits") else v for k, v in terms.items()}
        return sum(getattr(weights, k) * v for k, v in scaled.items()), logs | {k: v.item() for k, v in terms.items()}

    return loss


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[Any],
    config: TrainConfig,
    weights: LossWeights | None = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained copy of `student`; without a teacher it learns from the right answers alone.
    `batches` bring their own `answer_loss`, as `train.RowBatches` do for any VLM. With a folder `work` it is resumable. Raises
    UserError for weights that need a teacher where none is given, and as `train.fit` does.
    """
    weights = weights or (LABELS_ONLY if teacher is None else LossWeights())
    if weights.need_teacher and teacher is None:
        raise UserError(f"distill: {weights} needs a teacher; give one, or weights=LABELS_ONLY")
    projected = StudentWithProjections(clone(student).requires_grad_(True), teacher or student, learned=weights.need_teacher)
    device = student.device  # the training may move it to a GPU
    if teacher is not None:  # frozen, or its vision encoder would compute gradients that nobody wants
        teacher = clone(teacher).requires_grad_(False).to(device)
    if weights.hidden or weights.vision:
        projected.fit_projections_(teacher, batches.answer_loss, shard(batches[0], 0, 1, device))
    config = replace(config, about=f"{config.about} {weights!r}".strip())
    fit(projected, batches, distillation_loss(teacher, weights, batches.answer_loss), config, work)
    return projected.student.to(device).eval()


def recover(
    model: nn.Module, batches: Sequence[Any], config: TrainConfig, teacher: nn.Module | None = None, work: Path | None = None
) -> nn.Module:
    """A trained copy of `model`, which was cut from `teacher`; without one it learns from the right answers alone.
    Zeros of linear layers stay zeros, so that a pruned model stays pruned. Features are compared where no width was cut.
    `batches` and `work` are as for `distill`. Raises UserError as `train.fit` does.
    """
    student, weights = clone(model).requires_grad_(True), LABELS_ONLY
    if teacher is not None:  # frozen: it only shows, and computes no gradients
        teacher = clone(teacher).requires_grad_(False)
        same = {p: config_of(student, p).hidden_size == config_of(teacher, p).hidden_size for p in ("vision", "language")}
        weights = LossWeights(hidden=float(same["language"]), vision=float(same["vision"]))
    masks = {layer.weight: layer.weight != 0 for _, layer in linears(student) if (layer.weight == 0).any()}
    hooks = [weight.register_hook(lambda grad, weight=weight: grad * masks[weight].to(grad.device)) for weight in masks]

    @torch.no_grad()
    def keep_zeros() -> None:  # masked gradients are not enough: Muon's orthogonal updates would bring the weights back
        for weight, mask in masks.items():
            weight.mul_(mask.to(weight.device))

    projected = StudentWithProjections(student, teacher or student, learned=False)
    loss = distillation_loss(teacher, weights, batches.answer_loss)
    fit(projected, batches, loss, replace(config, about=f"{config.about} {weights!r}".strip()), work, after_step=keep_zeros)
    for hook in hooks:
        hook.remove()
    return student.to(model.device).eval()


def qat(
    prepared: nn.Module,
    batches: Sequence[Any],
    config: TrainConfig,
    teacher: nn.Module | None = None,
    weights: LossWeights | None = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained and converted copy of a model that `quantize.prepare_qat_` made ready: its weights are on their levels.
    It learns from the right answers, or with a teacher (the model before rounding) from that one's logits and features, too.
    `batches` and `work` are as for `distill`. Raises UserError as `train.fit` does.
    """
    student, weights = clone(prepared), weights or (LABELS_ONLY if teacher is None else LossWeights())
    if teacher is not None:
        teacher = clone(teacher).requires_grad_(False)
    projected = StudentWithProjections(student, teacher or student, learned=False)
    loss = distillation_loss(teacher, weights, batches.answer_loss)
    fit(projected, batches, loss, replace(config, about=f"{config.about} {weights!r}"), work)
    return convert_qat_(student.to(prepared.device).eval())


def match_vision_encoder(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None = None
) -> nn.Module:
    """A copy of `student` whose vision encoder and connector give the visual tokens that the teacher's give: before any text.
    `batches[i][0]` are pixels (B, 3, H, W). UserError unless both language models read tokens of one width, and as `train.fit`.
    """
    sizes = [config_of(m, "language").hidden_size for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(f"match_vision_encoder: visual tokens of {sizes[0]} and {sizes[1]} channels; slice the teacher as well")
    if "grid_thw" in inspect.signature(parts(student)["vision"].forward).parameters:  # Qwen-VL's
        raise UserError(f"match_vision_encoder: {type(student).__name__} takes images of many shapes; use distill instead")
    device, student = student.device, clone(student).requires_grad_(True)
    fit_outputs(VisionWithConnector(student), VisionWithConnector(clone(teacher)), batches, config, work)
    return student.to(device).eval()


def fit_outputs(student: nn.Module, teacher: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None) -> None:
    """Train a part of a model, in place, to give the features (B, N, D) that `teacher`'s part gives of the images `batch[0]`."""
    teacher.requires_grad_(False)

    def loss(part: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted = teacher.to(batch[0].device)(batch[0])
        distance = feature_loss(part(batch[0]), wanted)
        return distance, {"features": distance.item()}

    fit(student, batches, loss, config, work)
