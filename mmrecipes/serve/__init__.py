"""An exported model behind OpenAI's chat API: FastAPI and uvicorn around `inference.batching`. Notebook 51.

`schema` says what a request may hold, `images` brings its images in, `service` admits it and counts, `worker` runs the engine in
a thread of its own, `app` has the routes, `server` listens and shuts down.
"""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "app": "create_app",
        "images": "",
        "metrics": "Metrics",
        "refusals": "Refused",
        "schema": "",
        "server": "serve",
        "service": "Limits Service",
        "worker": "Worker",
    },
)
