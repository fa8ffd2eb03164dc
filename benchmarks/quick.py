"""The figures that a change may move, within three minutes: `make bench-quick`.

Every run adds one line to `benchmarks/results/history.jsonl` and shows it beside the last one of a machine like this.
Processor times and ratios compare best: seconds depend on what else the machine does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .bench import result

HISTORY = Path(__file__).resolve().parent / "results" / "history.jsonl"
Found = dict[str, Any]


class Part(NamedTuple):
    """A command whose result goes to the file that takes the place of FILE, and what of it is kept."""

    command: tuple[str, ...]
    figures: Callable[[Found], dict[str, float]]


def throughput(found: Found) -> dict[str, float]:
    own = found["engines"]["tandem"]
    return {
        "125m_output_tokens_per_second": own["output_tokens_per_second"]["median"],
        "125m_cpu_ms_per_output_token": 1e3 * own["cpu_seconds_per_output_token"]["median"],
        "125m_fraction_of_limit": own["fraction_of_limit"]["median"],
    }


def score(found: Found) -> dict[str, float]:
    return {
        "score_shared_over_unshared": found["ratios"]["shared / unshared"]["median"],
        "scores_per_second": found["sides"]["shared"]["scores_per_second"]["median"],
    }


def frontend(found: Found) -> dict[str, float]:
    (events,), (tokens,) = found["events"], found["tokens"]
    return {
        "api_us_per_event": events["cpu_us_per_event"]["tandem"]["median"],
        "api_to_sse_starlette": events["ratio_to_sse_starlette"]["median"],
        "http_tokens_per_second": tokens["tokens_per_second"]["median"],
    }


def scaling(found: Found) -> dict[str, float]:
    steady = {row["running"]: row["cpu_us_per_step"]["median"] for row in found["steady"]}
    return {"engine_us_per_step_256": steady[256], "waiting_4096_to_1": found["waiting_4096_to_1"]}


def startup(found: Found) -> dict[str, float]:
    first = found["medians"]["first_token"]
    return {"first_token_seconds": first, "first_token_beyond_import_torch": first - found["import_torch"]}


BENCH = "tandem.benchmarks.bench"
SERVER = ("tandem.server", "bench")
LOAD = ("--num-prompts", "16", "--input-len", "128", "--output-len", "32")
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "throughput": Part(
            (*SERVER, "throughput", "--model", "random:125m", *LOAD, "--runs", "3", "--output-json", "FILE"), throughput
        ),
        "score": Part((*SERVER, "score", "--groups", "4", "--runs", "3", "--output-json", "FILE"), score),
        "frontend": Part((f"{BENCH}.frontend", "--streams", "64", "--rounds", "3", "--save", "FILE"), frontend),
        "scaling": Part((f"{BENCH}.scaling", "--rounds", "3", "--save", "FILE"), scaling),
        "startup": Part((f"{BENCH}.startup", "--runs", "3"), startup),
    }
)


def measured(part: Part, directory: Path) -> dict[str, float]:
    """The part's figures. Raises CalledProcessError."""
    file = directory / "found.json"
    file.unlink(missing_ok=True)
    command = [str(file) if word == "FILE" else word for word in part.command]
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True)
    text = file.read_text() if file.exists() else done.stdout.strip().rpartition("\n")[2]
    return {name: round(value, 4) for name, value in part.figures(json.loads(text)).items()}


def last_like(machine: Found) -> Found | None:
    """The newest line of a machine with the same processor and as many cores."""
    lines = HISTORY.read_text().splitlines() if HISTORY.exists() else []
    known = [json.loads(line) for line in lines]
    alike = [one for one in known if all(one["machine"][key] == machine[key] for key in ("processor", "cores"))]
    return alike[-1] if alike else None


def main() -> int:
    began, figures = time.monotonic(), dict[str, float]()
    with tempfile.TemporaryDirectory() as directory:
        for name, part in PARTS.items():
            start = time.monotonic()
            figures |= measured(part, Path(directory))
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    line = {"benchmark": "quick", "seconds": round(time.monotonic() - began, 1), "figures": figures} | result.describe()
    before = last_like(line["machine"])
    result.append(HISTORY, line)
    print(f"\n{'':34}{'now':>12}{'before':>12}{'now / before':>14}")
    for name, value in figures.items():
        old = before["figures"].get(name) if before else None
        beside = f"{old:12.4g}{value / old:14.2f}" if old else ""
        print(f"{name:34}{value:12.4g}{beside}")
    print(f"{line['seconds']:.0f} s; one more line of {HISTORY.relative_to(HISTORY.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
