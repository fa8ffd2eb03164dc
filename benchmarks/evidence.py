"""Run what is too heavy for CI and keep the proof: `docs/evidence/<area>.json`.

`python -m tandem.benchmarks.evidence run startup` runs the area's command, shows its output, and records command,
commit, date, machine, versions, the figures (the last line of stdout that is a JSON object) and a digest of the log.
`… status` says, per area, which files that it is about have changed since the recorded commit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence"


@dataclass(frozen=True)
class Area:
    """A command (run at the repository's root with the environment's Python) and the paths its figures depend on."""

    command: tuple[str, ...]
    paths: tuple[str, ...]


AREAS = {
    "startup": Area(
        ("-m", "tandem.benchmarks.bench.startup", "--runs", "5"),
        ("server", "model", "kernels", "benchmarks/bench/startup.py"),
    ),
    "peers": Area(
        ("-m", "tandem.benchmarks.peers.compare"),
        ("server", "model", "kernels", "benchmarks/bench", "benchmarks/peers"),
    ),
    "clients": Area(("-m", "tandem.benchmarks.clients.matrix"), ("server", "model", "kernels", "benchmarks/clients")),
    "trainers": Area(
        ("-m", "tandem.benchmarks.trainers.matrix"),
        ("server", "model", "kernels", "benchmarks/trainers"),
    ),
    "rlhf": Area(("-m", "tandem.benchmarks.rlhf.proof"), ("server", "model", "kernels", "benchmarks/rlhf")),
    "demo": Area(("examples/rlhf/evaluate.py", "--count", "150"), ("model", "examples/rlhf")),
    "ppo": Area(
        ("examples/rlhf/ppo.py", "--seed", "1", "2", "3", "--threads", "1", "--plot", "docs/ppo.png"),
        ("server", "model", "kernels", "examples/rlhf"),
    ),
}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """The processor's name, or where Linux does not say it, its architecture."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def figures_of(log: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def run(name: str) -> int:
    area = AREAS[name]
    changed = git("status", "--porcelain", "--", *area.paths)
    if changed:
        print(f"commit first: evidence names a commit, and these differ from it:\n{changed}")
        return 1
    process = subprocess.Popen([sys.executable, *area.command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code, log = process.wait(), "".join(lines)
    figures = figures_of(log)
    if code != 0 or figures is None:
        print(f"{name}: exit status {code}, {'no' if figures is None else 'with'} figures; nothing is recorded")
        return code or 1
    record = {
        "area": name,
        "command": shlex.join(("python", *area.command)),
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "figures": figures,
        "log_sha256": hashlib.sha256(log.encode()).hexdigest(),
    }
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    (EVIDENCE / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def status() -> int:
    """Print one line per area; the exit status is the number of areas without evidence or older than their code."""
    stale = 0
    for name, area in AREAS.items():
        file = EVIDENCE / f"{name}.json"
        if not file.exists():
            print(f"{name:10} none: make evidence-{name}")
            stale += 1
            continue
        record = json.loads(file.read_text())
        changed = git("diff", "--name-only", record["commit"], "--", *area.paths).splitlines()
        stale += bool(changed)
        age = f"older than {len(changed)} files" if changed else "current"
        print(f"{name:10} {record['date']} {record['commit'][:10]} {age}")
        for path in changed[:5]:
            print(f"{'':10} changed since: {path}")
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "status"))
    parser.add_argument("area", nargs="?", choices=sorted(AREAS))
    options = parser.parse_args()
    if options.what == "run" and options.area is None:
        parser.error(f"which area? {', '.join(sorted(AREAS))}")
    sys.exit(status() if options.what == "status" else run(options.area))


if __name__ == "__main__":
    main()
