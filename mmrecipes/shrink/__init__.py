"""`mmrecipes shrink`: a user's own model made smaller, checked, and written with a report."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "artifact": "",
        "candidates": "",
        "fidelity": "",
        "folders": "",
        "pipeline": "run",
        "report": "",
        "request": "Request",
        "source": "",
    },
)
