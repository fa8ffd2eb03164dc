"""Long work beside the engine's loop, in threads that give way to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

NICENESS = 10  # of such a thread and those that it starts: about a tenth of a core that the steps want, too

Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Runs it in a thread of its own, which does not keep the process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future
