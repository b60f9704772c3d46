"""The scenes, their questions and captions as datasets, and the seeds of every split."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "datasets": "TEST_FILE calibration encode_png image_rows majority_floor questions test_split",
        "families": "",
        "scenes": "",
        "splits": "BLOCKS SPLITS block",
    },
)
