"""`mmrecipes shrink`: a user's own model made smaller, checked, and written with a report."""

from mmrecipes.lazy import lazy_exports

_modules = ("artifact", "candidates", "fidelity", "folders", "report", "source")
__getattr__, __dir__, __all__ = lazy_exports(__name__, dict.fromkeys(_modules, "") | {"pipeline": "Request run"})
