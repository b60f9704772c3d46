"""Weights that are mapped, loaded in parts and dropped: the peak of a fresh process stays within a budget that others miss."""

import sys

import pytest
from transformers import Idefics3ForConditionalGeneration

from mmrecipes.mini import model as mini_model
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_schedule

MARGIN_MB = 40  # of allocators and libraries; what is compared differs by more than twice as much


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What each way took, for a model of 305 MB: vision encoder and connector 179, language model 126."""
    config = mini_model.make_model(mini_model.make_tokenizer(), 768, 6, 6).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("model")
    Idefics3ForConditionalGeneration._from_config(config).save_pretrained(folder)
    return {way: memory_schedule.fresh(f"one({str(folder)!r}, {way!r}, 1)") for way in memory_schedule.WAYS}


def test_all_ways_give_the_same_tokens(rows):
    assert len({tuple(row["tokens"]) for row in rows.values()}) == 1


def test_a_mapped_model_is_no_memory_of_the_process(rows):
    assert rows["read, then copied"]["anon_mb"] > rows["mapped"]["anon_mb"] + 305 - MARGIN_MB
    assert rows["mapped"]["file_mb"] > rows["read, then copied"]["file_mb"] + 280 - MARGIN_MB


def test_what_is_dropped_makes_room(rows):
    stages = rows["mapped in parts"]["stages"]
    assert stages["images"]["file"] - stages["vision dropped"]["file"] > 170 - MARGIN_MB
    assert rows["mapped in parts"]["peak_mb"] < rows["mapped"]["peak_mb"] - 120 + MARGIN_MB
    grown = {
        way: rows[way]["stages"]["decode"]["all"] - rows[way]["stages"]["vision dropped"]["all"] for way in rows if " in " in way
    }
    assert grown["mapped in layers"] < grown["mapped in parts"] - 100 + MARGIN_MB


def test_a_budget_that_whole_models_exceed_is_met(rows):
    budget = rows["mapped"]["stages"]["imports"]["all"] + 305 - MARGIN_MB
    assert rows["mapped in parts"]["peak_mb"] < budget < min(rows[way]["peak_mb"] for way in ("mapped", "from_pretrained"))
