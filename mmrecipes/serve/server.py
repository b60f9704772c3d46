"""uvicorn around the app: listens, says so, and on SIGTERM or Ctrl-C lets running answers end and takes no new ones."""

import os
import socket
import sys
from pathlib import Path
from types import FrameType

from mmrecipes.errors import UserError, one_line, require
from mmrecipes.inference.exported import Exported, load_exported


def load(folder: str | Path, threads: int | None = None) -> Exported:
    """An export that can be served; UserError for others."""
    exported = load_exported(folder, threads)
    if not isinstance(exported, Exported):
        raise UserError(f"{folder}: a dual encoder, which compares and does not answer; give an exported VLM")
    if not exported.manifest.get("batches"):
        call = "mmrecipes.export.export(mmrecipes.load(MODEL), OUT, batches=True)"
        raise UserError(f"{folder}: exported for one conversation at a time; export it again with {call}")
    return exported


def api_key(variable: str | None) -> str | None:
    """The key that the environment variable holds; UserError where it holds none."""
    if variable and not os.environ.get(variable):
        raise UserError(f"--api-key-env {variable}: the variable is empty or not set; put the key there")
    return os.environ[variable] if variable else None


def serve(service, host: str, port: int) -> None:  # Service
    """Answer on `host`:`port` (0: any that is free) until SIGTERM or Ctrl-C, in the main thread; a second one ends it at once.
    UserError where the address cannot be had."""
    require("fastapi", "uvicorn", "prometheus_client", extra="serve")
    import uvicorn

    from mmrecipes.serve.app import create_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.draining:
                super().handle_exit(sig, frame)
                self.force_exit = True
            service.draining = True

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or (service.draining and not service.jobs)

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as e:
        raise UserError(f"{host}:{port}: cannot be listened on ({one_line(e, 80)}); give another --host or --port") from e
    if host not in ("127.0.0.1", "::1", "localhost") and not service.key:
        print(f"warning: {host} can be reached from outside, and no API key is asked for", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(create_app(service), http="h11", ws="none", log_level="warning", access_log=False)
    print(f"serving {service.name} on http://{shown}:{listening.getsockname()[1]}", flush=True)
    try:
        Server(config).run(sockets=[listening])
    finally:
        service.close()
