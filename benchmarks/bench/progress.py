"""A progress bar on stderr that leaves the measured process alone: drawn at most twice a second, without a thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 0.5  # between two drawings


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `show(done, title)`, where `title` may be empty for the one before. Silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, title="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total)
        drawn = 0.0

        def show(done: int, title: str = "") -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < SECONDS and done < total and not title:
                return
            drawn = now
            bar.update(task, completed=done, description=title or None)
            bar.refresh()

        yield show
