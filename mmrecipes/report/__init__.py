"""Tables, pages, the tour, and the doctor who looks before anything is compressed."""

from mmrecipes.lazy import lazy_exports

_names = {"comparison": "COLUMNS Comparison check_parity compare", "doctor": "", "page": "hardware", "tour": ""}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _names)
