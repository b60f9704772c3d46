"""Ctrl-C in a command: wherever it comes, what is half written goes, and the exit code is 130."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# in a finalizer, where Python prints a KeyboardInterrupt and goes on; SIG_DFL: tests started in the background ignore it
PROGRAM = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mmrecipes import interrupt
from mmrecipes.models import saving

here = pathlib.Path({here!r})

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # the handler runs between two instructions of Python

with interrupt.ends_the_process():
    {body}
print("went on")
"""
PARTS = """
    with saving.directory_aside(here / "model") as part, interrupt.temporary_directory(here) as folder:
        (part / "weights").touch(), (folder / "graph").touch()
        with saving.written_aside(here / "result.json") as aside:
            aside.touch()
            assert len(list(here.iterdir())) == 3
            Dying()
"""
BETWEEN = """
    class Part(type(here)):
        def rename(self, target):
            assert not target.exists()
            Dying()
    (here / "model").mkdir(), (here / "model" / "older").touch()
    saving.take_place(Part(here / "part"), here / "model")
"""

SILENCED = """
    from mmrecipes import quiet
    with quiet.native_stderr():
        Dying()
"""
CASES = {"parts": (PARTS, []), "between two moves": (BETWEEN, ["model", "model/older"]), "stderr held back": (SILENCED, [])}


@pytest.mark.parametrize(("body", "left"), CASES.values(), ids=CASES)
def test_half_written_files_go_and_an_older_model_stays(tmp_path, body, left):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(here=str(tmp_path), body=body)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == left


def test_child_processes_are_stopped(tmp_path):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=sys.stdout); Dying()"
    body = f"    child = {child}".strip()
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(here=str(tmp_path), body=body)], capture_output=True, timeout=300)
    assert done.returncode == 130  # and the child, which held the pipe open, is gone


def test_a_shell_that_ignores_it_in_the_background_is_obeyed(tmp_path):
    program = PROGRAM.replace("signal.default_int_handler", "signal.SIG_IGN").format(here=str(tmp_path), body="Dying()")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_the_handler_of_before_comes_back():
    from mmrecipes import interrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupt.ends_the_process():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
