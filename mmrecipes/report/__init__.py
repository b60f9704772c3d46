"""Tables, pages, the tour, and the doctor who looks before anything is compressed."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "comparison": "COLUMNS Comparison check_parity compare",
        "doctor": "",
        "page": "STYLE hardware html_table html_wide image_tag png",
        "tour": "",
    },
)
