"""Eviction keeps as many tokens as it may, and whatever is protected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrecipes import prune
from mmrecipes.errors import UserError


@settings(derandomize=True, max_examples=200, deadline=None)
@given(data=st.data(), length=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_a_protected_image_token_is_never_dropped(data, length, seed):
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, length, generator=noise).round(decimals=data.draw(st.integers(0, 3)))  # ties, too
    scores[0, : data.draw(st.integers(0, length))] = torch.inf
    is_image = torch.rand(length, generator=noise) < data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    newest = data.draw(st.integers(0, length))
    must = is_image | (torch.arange(length) >= length - newest)
    budget = data.draw(st.integers(int(must.sum()), length))
    kept = prune.kept_positions(scores, budget, newest, is_image)
    assert kept.shape == (3, budget)
    for own, row in zip(kept, scores, strict=True):
        assert (own.diff() > 0).all()  # ascending, and none twice
        assert torch.isin(must.nonzero()[:, 0], own).all()
        gone = torch.ones(length, dtype=torch.bool).scatter(0, own, False)
        others = own[~must[own]]
        assert not gone.any() or not len(others) or row[gone].max() <= row[others].min()


def test_without_protection_the_image_goes():
    scores = torch.arange(10.0)
    assert prune.kept_positions(scores, 4).tolist() == [6, 7, 8, 9]
    assert prune.kept_positions(scores, 4, protected=torch.arange(10) < 3).tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize(("budget", "newest"), [(3, 4), (11, 1)])
def test_a_budget_that_cannot_be_met_is_refused(budget, newest):
    with pytest.raises(UserError, match=f"budget {budget}"):
        prune.kept_positions(torch.zeros(10), budget, newest)
