"""Models in and out: load and save them, name their parts, put images and questions to them."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "images": "MAX_PIXELS SUFFIXES load_image load_images",
        "loading": "DTYPES HOUSE HUB_FILES as_dtype data_dir load",
        "modules": (
            "CONNECTOR FFN HELPERS LANGUAGE OUT TOWERS VISION VisionWithConnector attention block_of "
            "checkpoint_with_config clone config_of ffn head_dim layers linears nested_parts part_of parts"
        ),
        "preflight": "check_memory free_memory read_json weight_bytes",
        "prompts": "ask chat teacher_forced",
        "saving": "check_replaceable holds_only_a_model save take_place write_json written_aside",
    },
)
