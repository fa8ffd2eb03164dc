"""What a section finds out, row by row, written as it is measured, so that a section that is killed keeps its rows."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .goals import GOALS
from .timing import Timing

Verdict = Literal["met", "missed", "not judged", "failed", ""]


class Absent(Exception):
    """What a case needs is not on this machine or not in this version. The message says what."""


@dataclass(slots=True)
class Row:
    """One figure. `limit` is what the hardware allows, in the figure's unit; `share` how much of it was reached.

    Verdict: "" where no goal is set, "failed" where an exception came instead of the figure, "not judged" where what
    the goal needs is missing; `reason` says why.
    """

    section: str
    name: str
    figure: float | None = None
    unit: str = ""
    low: float | None = None  # of the middle 80 % of the samples
    high: float | None = None
    samples: int = 0
    limit: float | None = None
    share: float | None = None
    goal: str | None = None  # key of GOALS
    verdict: Verdict = ""
    reason: str = ""
    detail: dict[str, Any] = field(default_factory=dict[str, Any])


class Report:
    """The rows of one section. `device` is what it runs on: goals are set for CUDA, elsewhere nothing is judged."""

    def __init__(self, section: str, file: Path | None, device: str, tiny: bool = False) -> None:
        self.section, self.rows = section, list[Row]()
        self._file, self._judges = file, device == "cuda" and not tiny

    def add(
        self,
        name: str,
        figure: float | Timing | None,
        unit: str = "",
        *,
        scale: float = 1.0,
        limit: float | None = None,
        share: float | None = None,
        goal: str | None = None,
        reason: str = "",
        **detail: Any,
    ) -> Row:
        """A row. A Timing is in seconds and gives the spread; `scale` turns seconds into the unit."""
        row = Row(self.section, name, None, unit, limit=limit, share=share, goal=goal, reason=reason, detail=detail)
        if isinstance(figure, Timing):
            row.figure, row.low, row.high = (scale * t for t in (figure.median, figure.low, figure.high))
            row.samples = figure.samples
        elif figure is not None:
            row.figure = scale * figure
        if goal is not None:
            row.verdict = self._judge(row, goal)
        elif figure is None:
            row.verdict = "not judged"
        return self._keep(row)

    def absent(self, name: str, reason: str, goal: str | None = None) -> Row:
        """What could not be measured here, and why."""
        return self._keep(Row(self.section, name, goal=goal, verdict="not judged", reason=f"absent: {reason}"))

    @contextmanager
    def case(self, name: str, goal: str | None = None) -> Iterator[None]:
        """What raises inside becomes a row with the exception; the section goes on."""
        began = time.perf_counter()
        try:
            yield
        except Absent as error:
            self.absent(name, str(error), goal)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            text = f"{type(error).__name__}: {str(error).strip()[:600]} ({where})"
            print(f"{name}: {text}", flush=True)
            traceback.print_exc()
            self._keep(Row(self.section, name, goal=goal, verdict="failed", reason=text))
        else:
            print(f"  {name}: {time.perf_counter() - began:.1f} s", flush=True)

    def _judge(self, row: Row, goal: str) -> Verdict:
        wanted = GOALS[goal]
        value = row.figure if wanted.measure == "figure" else row.share
        if value is None or not math.isfinite(value):
            row.reason = row.reason or "the figure is missing"
            return "not judged"
        if not self._judges:
            return "not judged"
        return "met" if wanted.met(value) else "missed"

    def _keep(self, row: Row) -> Row:
        self.rows.append(row)
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        return row


def read_rows(file: Path) -> list[Row]:
    """The rows written so far; a last line that was cut is passed over."""
    rows: list[Row] = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            continue
    return rows


def number(value: float | None) -> str:
    """Four digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if value != value or math.isinf(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: list[Row]) -> str:
    """One line per row: what, figure with spread, limit, share, goal, verdict."""
    head = ("section", "what", "figure", "unit", "10..90 %", "limit", "share", "goal", "verdict")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        spread = f"{number(row.low)}..{number(row.high)}" if row.samples > 1 else ""
        share = "" if row.share is None else f"{row.share:.1%}"
        limit = "" if row.limit is None else number(row.limit)
        goal = str(GOALS[row.goal]) if row.goal else ""
        figure = number(row.figure)
        if row.unit == "%" and row.figure is not None:
            figure, limit = f"{100 * row.figure:.2f}", limit and f"{100 * (row.limit or 0):.2f}"
        lines.append((row.section, row.name, figure, row.unit, spread, limit, share, goal, row.verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts: list[str] = []
    for index, line in enumerate(lines):
        cells = [
            c.rjust(w) if i in (2, 5, 6) else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
        if index and rows[index - 1].reason:
            texts.append("    " + " ".join(rows[index - 1].reason.split())[:200])
    return "\n".join(texts)
