"""Models in and out: load and save them, name their parts, put images and questions to them.

The examples in docstrings run with `model = mmr.load("mini-vlm")`, `dual = mmr.load("mini-siglip")`,
`rows = mmr.data.test_split(4)`, the `inputs` of its first row, and an empty `folder`.
"""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "images": "load_image load_images",
        "loading": "HOUSE data_dir load",
        "modules": (
            "TOWERS VisionWithConnector attention block_of checkpoint_with_config clone config_of ffn head_dim layers linears "
            "part_of parts"
        ),
        "preflight": "free_memory",
        "prompts": "ask chat chat_prompts teacher_forced",
        "saving": "check_replaceable save write_json",
    },
)
