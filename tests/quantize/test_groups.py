"""Packed weights: what a group of 32 keeps, in the layout that ONNX Runtime's kernels read."""

import pytest
import torch

from mmrecipes import quantize
from mmrecipes.errors import UserError
from mmrecipes.quantize import groups


def unpacked(q, scales, bits, wide):
    q = torch.from_numpy(q).int()
    q = torch.stack([(q >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(-2)
    return ((q - 2 ** (bits - 1)) * torch.from_numpy(scales).unsqueeze(-1)).flatten(1)[:, :wide]


def test_a_grid_that_is_there_already_is_kept():
    noise = torch.Generator().manual_seed(0)
    for top in (8, 7, 5, 3):  # whichever level is the largest that a group uses
        levels = torch.randint(-top, min(top, 7) + 1, (40, 4, 32), generator=noise).float()
        levels[:, :, 0] = -top
        weight = (levels * (0.01 + torch.rand(40, 4, 1, generator=noise))).flatten(1)
        assert torch.allclose(unpacked(*quantize.pack(weight, 4), 4, 128), weight, atol=1e-6)


def test_what_was_rounded_to_four_bits_is_told_from_the_rest():
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    rounded = quantize.search_round(weight, 4, 32)
    assert quantize.on_grid(rounded)
    assert torch.allclose(unpacked(*quantize.pack(rounded, 4), 4, 96), rounded, atol=1e-6)
    assert not quantize.on_grid(weight)
    assert not quantize.on_grid(quantize.search_round(weight, 6, 32))


@pytest.mark.parametrize(("bits", "wide"), [(2, 64), (2, 40), (4, 64), (4, 40), (8, 64), (8, 40)])
def test_the_error_is_no_larger_than_rounding_leaves(bits, wide):
    weight = torch.randn(24, wide, generator=torch.Generator().manual_seed(1))
    off = (unpacked(*quantize.pack(weight, bits), bits, wide) - weight).norm()
    padded = torch.nn.functional.pad(weight, (0, -wide % 32))
    assert off <= 1.001 * (quantize.round_to_nearest(padded, bits, "group", 32)[:, :wide] - weight).norm()
    if bits <= 4:
        assert off <= 1.001 * (quantize.search_round(padded, bits, 32)[:, :wide] - weight).norm()


def test_zeros_stay_zero_and_other_widths_are_refused():
    assert not unpacked(*quantize.pack(torch.zeros(3, 32), 4), 4, 32).any()
    with pytest.raises(UserError, match="have 2, 4 and 8"):
        quantize.pack(torch.zeros(3, 32), 3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pieces_of_a_large_matrix_give_what_the_whole_does(bits, monkeypatch):
    """Also where the last piece is smaller, and where a row alone is larger than a piece."""
    torch.manual_seed(0)
    weight, importance = torch.randn(70, 96), torch.rand(70, 96)
    found = []
    for at_once in (2**18, 96 * 16, 10):
        monkeypatch.setattr(groups, "AT_ONCE", at_once)
        numbers, scales = groups.pack(weight, bits)
        values = [torch.from_numpy(numbers), torch.from_numpy(scales), groups.packed_values(weight, bits)]
        values += [groups.best_scale(weight, bits, given) for given in (None, importance[0], importance)]
        found.append([*values, groups.group_scales(weight, bits), torch.tensor(groups.on_grid(values[2], bits))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
