"""Each family's directory is loaded, its image tokens are as many as its visual tokens, and it answers on all shapes."""

import pytest
import torch
from PIL import Image

from mmrecipes.models import ask
from mmrecipes.models.prompts import chat
from tests.families import CHATS, FAMILIES

SHAPES = {"landscape": (96, 48), "portrait": (40, 100), "square": (64, 64), "tiny": (9, 7)}


@pytest.mark.parametrize("name", CHATS)
def test_answers_on_all_shapes(name):
    model = FAMILIES[name]()
    for seed, size in enumerate(SHAPES.values()):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        image = Image.fromarray(noise.numpy())
        inputs = chat(model, image, "What is there?")
        with torch.inference_mode():
            assert torch.isfinite(model(**inputs).logits).all()
        assert isinstance(ask(model, image, "What is there?"), str)
