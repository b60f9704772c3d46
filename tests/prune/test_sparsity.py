"""Pruning: bounds on any tensor, that each method does what it is there for, and that zeros outlive what comes after."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from mmrecipes import data, evaluate, export, inference, models, prune, quantize
from mmrecipes.errors import UserError

SEEDS, SHARES = st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 0.5, 0.75, "1:4", "2:4", "4:8"])
METHODS = {
    "magnitude": lambda w, h, s: prune.magnitude_prune(w, s),
    "wanda": prune.wanda_prune,
    "sparsegpt": prune.sparsegpt_prune,
}
FOREIGN = pytest.mark.parametrize("make", [tiny.house, tiny.llava], ids=["idefics3", "llava"])


def share_of(sparsity: float | str) -> float:
    if isinstance(sparsity, float):
        return sparsity
    keep, of = map(int, sparsity.split(":"))
    return 1 - keep / of


def few_causes(seed: int, outputs: int = 12, inputs: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs that eight hidden causes explain for the most part: the rest can make up for much."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=g) @ torch.randn(8, inputs, generator=g) + 0.3 * torch.randn(400, inputs, generator=g)
    return torch.randn(outputs, inputs, generator=g), x.T @ x / len(x)


def language(model) -> list[str]:
    part_of = models.part_of(model)
    return [n for n, _ in models.linears(model) if part_of[f"{n}.weight"] == "language"]


# ---- one weight


@given(SEEDS, SHARES, st.sampled_from(sorted(METHODS)))
def test_every_method_leaves_the_zeros_asked_for(seed, sparsity, method):
    w, h = tiny.weight_and_hessian(seed)
    thin = METHODS[method](w, h, sparsity)
    assert thin.shape == w.shape and thin.dtype == w.dtype and torch.isfinite(thin).all()
    assert (thin == 0).float().mean().item() == pytest.approx(share_of(sparsity), abs=0.01)
    if isinstance(sparsity, str):
        keep, of = map(int, sparsity.split(":"))
        assert ((thin != 0).view(-1, of).sum(1) == keep).all()
    if method != "sparsegpt":  # the others leave what remains as it was
        assert torch.equal(thin[thin != 0], w[thin != 0])
    if method == "wanda" and isinstance(sparsity, float):
        assert len((thin == 0).sum(1).unique()) == 1


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_what_looks_at_data_beats_what_does_not_on_the_output(sparsity):
    """As a rule, not on each matrix: of 25, the one in the middle."""
    wanda, sparsegpt = [], []
    for seed in range(25):
        w, h = tiny.weight_and_hessian(seed)  # inputs of very different size
        by_size, by_wanda = prune.magnitude_prune(w, sparsity), prune.wanda_prune(w, h, sparsity)
        wanda.append(quantize.output_error(w, by_wanda, h) / quantize.output_error(w, by_size, h))
        w, h = few_causes(seed)
        by_wanda, made_up = prune.wanda_prune(w, h, sparsity), prune.sparsegpt_prune(w, h, sparsity)
        sparsegpt.append(quantize.output_error(w, made_up, h) / quantize.output_error(w, by_wanda, h))
    assert median(wanda) < 0.3
    assert median(sparsegpt) < 0.7


@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_lies_between_the_exact_values_and_the_untouched_ones(seed):
    w, h = few_causes(seed)
    thin = prune.sparsegpt_prune(w, h, 0.5)
    exact = torch.zeros_like(w)
    for row, here in enumerate(thin != 0):
        exact[row, here] = torch.linalg.solve(h[here][:, here].double(), h[here].double() @ w[row].double()).float()
    best, untouched = (quantize.output_error(w, q, h) for q in (exact, w.masked_fill(thin == 0, 0)))
    assert best <= quantize.output_error(w, thin, h) * 1.001 < untouched / 2


def test_magnitude_and_torch_agree():
    from torch.nn.utils import prune as torch_prune

    layer = torch.nn.Linear(32, 12)
    want = prune.magnitude_prune(layer.weight.detach(), 0.4)
    torch_prune.l1_unstructured(layer, "weight", amount=0.4)
    assert torch.equal(layer.weight.detach(), want)


def test_torchao_ranks_by_the_squared_norm_where_the_paper_has_the_norm():
    from torchao.sparsity import WandaSparsifier

    torch.manual_seed(0)
    x, layer = torch.randn(200, 32) * torch.logspace(-1, 1, 32), torch.nn.Linear(32, 12, bias=False)
    weight, h = layer.weight.detach().clone(), x.T @ x / len(x)
    alone = torch.nn.Sequential(layer)
    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(alone, [{"tensor_fqn": "0.weight"}])
    alone(x)
    sparsifier.step()
    sparsifier.squash_mask()
    found = alone[0].weight.detach()
    assert torch.equal(found, weight.masked_fill(prune.smallest(weight.abs() * h.diagonal(), "2:4"), 0))
    ours = prune.wanda_prune(weight, h, "2:4")
    assert quantize.output_error(weight, ours, h) <= quantize.output_error(weight, found, h)


def test_sparsegpt_without_pruning_or_with_inputs_that_do_not_hang_together_moves_nothing_else():
    w, h = tiny.weight_and_hessian(3)
    assert torch.equal(prune.sparsegpt_prune(w, h, 0.0), w)
    thin = prune.sparsegpt_prune(w, torch.eye(32), 0.5)
    assert torch.allclose(thin[thin != 0], w[thin != 0])
    assert torch.equal(thin == 0, prune.magnitude_prune(w, 0.5) == 0)


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_and_ties(method):
    h = torch.zeros(32, 32)
    h[0, 0] = 1.0
    thin = METHODS[method](torch.full((4, 32), 0.7), h, 0.5)
    assert torch.isfinite(thin).all()
    assert (thin == 0).float().mean() == 0.5
    if method != "magnitude":  # all weights are alike: only the inputs tell that the first one counts
        assert (thin[:, 0] != 0).all()


@pytest.mark.parametrize(
    ("sparsity", "says"),
    [
        (1.1, "sparsity is 1.1"),
        (-0.1, "sparsity is -0.1"),
        ("2", "the pattern is '2'"),
        ("4:4", "the pattern is '4:4'"),
        ("0:4", "the pattern is '0:4'"),
        ("2:5", "32 inputs do not divide into groups of 5"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_requests_say_what_to_do(method, sparsity, says):
    w, h = tiny.weight_and_hessian(0)
    with pytest.raises(UserError, match=says):
        METHODS[method](w, h, sparsity)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_hessians_of_another_layer_or_broken_ones_are_refused(method):
    w, _ = tiny.weight_and_hessian(0)
    for h in (torch.eye(16), torch.full((32, 32), float("nan"))):
        with pytest.raises(UserError, match="the Hessian is"):
            METHODS[method](w, h, 0.5)


# ---- with rounding


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_rounding_after_pruning_keeps_zeros_and_compensates_its_errors(sparsity):
    off = torch.zeros(2)
    for seed in range(10):
        w, h = few_causes(seed)
        thin = prune.sparsegpt_prune(w, h, sparsity)
        rounded, nearest = prune.round_rest(thin, h, 4, 32), quantize.search_round(thin, 4, 32)
        assert (rounded[thin == 0] == 0).all()
        assert quantize.on_grid(rounded)
        off += torch.tensor([quantize.output_error(thin, q, h) for q in (rounded, nearest)])
    assert off[0] < 0.8 * off[1]


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("seed", range(10))
def test_pruning_after_rounding_keeps_the_levels_and_still_compensates(seed, sparsity):
    w, h = few_causes(seed)
    rounded = quantize.gptq_round(w, h, 4, 32)
    thin = prune.sparsegpt_prune(rounded, h, sparsity, bits=4)
    scale = quantize.group_scales(rounded, 4)
    assert quantize.on_grid(thin)
    assert torch.allclose((thin / scale).round() * scale, thin, atol=1e-5)
    assert (thin == 0).float().mean() >= share_of(sparsity) - 0.01
    assert not quantize.on_grid(prune.sparsegpt_prune(rounded, h, sparsity))  # else the test would prove nothing
    untouched = rounded.masked_fill(thin == 0, 0)
    assert quantize.output_error(w, thin, h) < 0.9 * quantize.output_error(w, untouched, h)


def test_rounding_in_groups_that_do_not_divide_is_refused():
    w, h = tiny.weight_and_hessian(0)
    with pytest.raises(UserError, match="32 inputs do not divide into groups of 20"):
        prune.round_rest(w, h, 4, 20)


# ---- whole models


@FOREIGN
def test_a_pruned_copy_of_any_vlm_has_its_zeros_everywhere_and_leaves_the_original_alone(make):
    model, rows = make(), data.calibration(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for thin in (
        prune.magnitude(model, 0.5),
        prune.wanda(model, rows, 0.5),
        prune.sparsegpt(model, rows, 0.5),
        prune.sparsegpt(model, rows, "2:4", balance=True),
    ):
        assert all(z == pytest.approx(0.5, abs=0.02) for z in prune.sparsity_of(thin).values())
        assert torch.isfinite(evaluate.answer_logits(thin, rows)[0]).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@FOREIGN
def test_only_the_modules_named_are_pruned(make):
    model, rows = make(), data.calibration(4)
    chosen = {language(model)[0]: 0.5, language(model)[1]: "2:4"}
    for thin in (prune.magnitude(model, chosen), prune.wanda(model, rows, chosen), prune.sparsegpt(model, rows, chosen)):
        found = prune.sparsity_of(thin)
        assert all((z > 0.4) == (n in chosen) for n, z in found.items())
    with pytest.raises(UserError, match="'lm_hat' is no linear layer"):
        prune.magnitude(model, {"lm_hat": 0.5})
    with pytest.raises(UserError, match="sparsity is 1, which leaves nothing"):
        prune.wanda(model, rows, 1)


@FOREIGN
def test_calibration_rows_of_one_modality(make):
    model, rows = make(), data.calibration(4).select([2, 0, 1])
    assert prune.only(rows, "both") is rows
    assert "image" not in prune.only(rows, "text").column_names
    alone = prune.only(rows, "picture")
    assert alone["question"][:] == [""] * 3 and alone["answer"][:] == [""] * 3
    assert [i.tobytes() for i in alone["image"]] == [i.tobytes() for i in rows["image"]]
    names = language(model)
    thin = {w: prune.sparsegpt(model, prune.only(rows, w), dict.fromkeys(names, 0.5)) for w in ("text", "picture", "both")}
    weights = [m.get_submodule(names[-1]).weight for m in thin.values()]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    with pytest.raises(UserError, match="nothing flowed through"):
        prune.wanda(model, prune.only(rows, "text"), 0.5)
    with pytest.raises(UserError, match="'images'; expected"):
        prune.only(rows, "images")


@FOREIGN
def test_one_ranking_for_the_model_takes_the_smallest_wherever_they_are(make):
    model = make()
    small, large = language(model)[:2]
    with torch.no_grad():
        model.get_submodule(small).weight.mul_(1e-3)
        model.get_submodule(large).weight.mul_(1e3)
    shares = prune.global_shares(model, 0.3)
    assert shares[small] == 1.0 and shares[large] < 0.01
    numel = {n: layer.weight.numel() for n, layer in models.linears(model)}
    assert sum(shares[n] * numel[n] for n in numel) == pytest.approx(0.3 * sum(numel.values()), abs=1)
    thin = prune.magnitude(model, shares)
    assert prune.sparsity_of(thin) == pytest.approx(shares, abs=1e-6)
    hessians = quantize.input_hessians(model, data.calibration(4), list(numel))
    assert prune.global_shares(model, 0.3, hessians)[small] > 0.9


# ---- what zeros go through afterwards


@FOREIGN
def test_zeros_outlive_saving_and_loading(make, tmp_path):
    thin = prune.magnitude(make(), "2:4")
    again = models.load(models.save(thin, thin.processor, tmp_path / "thin", dtype="auto"))
    assert prune.sparsity_of(again) == prune.sparsity_of(thin)
    rows = data.calibration(2)
    assert torch.allclose(evaluate.answer_logits(again, rows)[0], evaluate.answer_logits(thin, rows)[0], atol=1e-5)


@FOREIGN
def test_zeros_outlive_int8(make):
    thin = prune.magnitude(make(), 0.5)
    small = quantize.dynamic_int8(thin)
    for name, layer in models.linears(thin):
        stored = small.get_submodule(name).weight()
        assert stored.dtype == torch.qint8
        assert (stored.dequantize()[layer.weight == 0] == 0).all(), name


def test_zeros_outlive_an_export(tmp_path):
    import onnx
    from onnx import numpy_helper

    thin = prune.sparsegpt(tiny.house(), data.calibration(4), 0.5)
    out = export.export(thin, tmp_path / "thin", "onnx", "fp32")
    export.parity(thin, inference.load_exported(out), export.TOLERANCE["fp32"])  # raises where answers differ
    shares = []
    for graph in out.glob("*.onnx"):
        for t in onnx.load(graph).graph.initializer:
            array = numpy_helper.to_array(t)
            if array.ndim == 2 and array.dtype.kind == "f":
                shares.append((array == 0).mean())
    assert sum(abs(s - 0.5) < 0.02 for s in shares) >= 4


# ---- bytes


def test_sparse_bytes_are_those_of_a_bitmap_and_the_rest():
    import numpy as np

    model = tiny.house()
    thin = prune.magnitude(model, 0.5)
    want = 0
    for p in thin.parameters():
        pruned = any(p is layer.weight for _, layer in models.linears(thin))
        there = (p != 0).detach()
        stored = np.packbits(there.numpy()).nbytes + p.detach()[there].bfloat16().view(torch.uint8).numel()
        want += stored if pruned else 2 * p.numel()
    assert prune.sparse_bytes(thin) == want
    assert prune.sparse_bytes(model) == quantize.packed_bytes(model, 16)  # nothing to win: stays dense
    assert prune.sparse_bytes(thin, 4) < prune.sparse_bytes(thin)


def test_zip_finds_zeros():
    model = tiny.house()
    sizes = [prune.zipped_bytes(prune.magnitude(model, s)) for s in (0.0, 0.5, 0.9)]
    assert quantize.packed_bytes(model, 16) > sizes[0] > sizes[1] > sizes[2]


# ---- the house model


def test_sparsegpt_loses_at_most_half_of_what_magnitude_loses():
    model, rows = models.load("mini-vlm"), data.test_split(210)
    seen = data.calibration(16)
    base, by_size, made_up = (
        evaluate.vqa(m, rows) for m in (model, prune.magnitude(model, 0.5), prune.sparsegpt(model, seen, 0.5))
    )
    lost = [100 * (base.overall.value - r.overall.value) for r in (by_size, made_up)]
    print(lost)
    assert lost[0] > 5 and lost[1] <= lost[0] / 2
