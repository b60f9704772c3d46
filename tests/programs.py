"""Python programs, each in a process of its own, that share one import of the large libraries.

Importing torch and transformers takes longer than what most of these programs do. `run` keeps one process that has imported
them, and each program starts as a fork of it: its own working directory, environment, arguments, output and exit code, and
nothing of what another program did. Executed as a script, this file is that process.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def run(program: list, cwd: Path, env: dict[str, str], blocked: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `program` (`["-m", module, *arguments]` or `[path, *arguments]`) in `cwd` with exactly `env`.

    With `blocked` it cannot import the module of that name.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        request = {"program": [str(word) for word in program], "cwd": str(cwd), "env": env, "blocked": blocked}
        process = _process()
        process.stdin.write(json.dumps(request | {"stdout": str(out), "stderr": str(err)}) + "\n")
        process.stdin.flush()
        code = json.loads(process.stdout.readline())
        return subprocess.CompletedProcess(program, code, out.read_text(), err.read_text())


@functools.cache
def _process() -> subprocess.Popen:
    """The process that is forked: one for each test worker, ended with it."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.stdin.close)
    return process


def _start(request: dict) -> None:
    """In the fork: become the program, which a hang ends after ten minutes."""
    signal.alarm(600)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(request[name], os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["blocked"]:
        sys.modules[request["blocked"]] = None
    program = request["program"]
    sys.path[0] = request["cwd"] if program[0] == "-m" else os.path.dirname(program[0])
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def _serve() -> dict | None:
    """Fork for each request on stdin and answer with the exit code; returns the request in the fork, None at the end."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    import torch  # noqa: F401
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401
    from transformers.models.idefics3 import modeling_idefics3, processing_idefics3  # noqa: F401

    gc.collect()
    gc.freeze()  # a fork that ends goes through its own objects alone: a second less, of two
    request = _serve()
    if request:
        _start(request)
