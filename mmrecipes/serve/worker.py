"""The engine in a thread of its own: requests come in by a queue, and each step's news go out by a function call."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mmrecipes.inference.batching import Answer, Engine


@dataclass(frozen=True)
class Update:
    """An answer after a step: all of its text so far, how many tokens, and why it ended."""

    text: str
    tokens: int
    finish_reason: str | None


Tell = Callable[[Update], None]


class Worker:
    """`submit` from any thread; `tell` is called in the worker's, after each step that changed the answer, and last with a
    `finish_reason`. `after_step` is called there, too."""

    def __init__(self, engine: Engine, after_step: Callable[[], None] = lambda: None):
        self.engine, self.after_step, self.failure = engine, after_step, None
        self._inbox: queue.SimpleQueue[tuple[Answer, Tell] | None] = queue.SimpleQueue()
        self._open: dict[Answer, Tell] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer, tell: Tell) -> None:
        self._inbox.put((answer, tell))

    def close(self) -> None:
        """End the thread; what is unfinished ends as cancelled."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take():
            if self.failure:
                continue
            try:
                changed = self.engine.step()
            except Exception as e:  # the engine is broken: nobody shall wait for it
                self.failure = e
                self._end_all("error", e)
                continue
            self.after_step()
            for answer in changed:
                self._tell(answer)
        self._end_all("cancelled", None)

    def _take(self) -> bool:
        """Hand what has come to the engine, wait for it where there is nothing to do; False for the end."""
        wait = self.failure is not None or not self.engine.busy
        while wait or not self._inbox.empty():
            wait, item = False, self._inbox.get()
            if item is None:
                return False
            answer, self._open[answer] = item[0], item[1]
            try:
                if self.failure:
                    raise self.failure
                self.engine.add(answer)
            except Exception as e:
                answer.finish_reason, answer.error = "error", e
                self._tell(answer)
        return True

    def _tell(self, answer: Answer) -> None:
        tell = self._open.pop(answer) if answer.finish_reason else self._open[answer]
        tell(Update(answer.text, len(answer.tokens), answer.finish_reason))

    def _end_all(self, reason: str, error: Exception | None) -> None:
        for answer in list(self._open):
            answer.finish_reason, answer.error = reason, error
            self._tell(answer)
