"""One command that measures Tandem on a bare CUDA machine: python3, torch, triton, numpy, safetensors, tokenizers.

    python benchmarks/gpu_suite.py --out DIR                      all sections, under 8 minutes
    python benchmarks/gpu_suite.py --out DIR --sections kernels   one of them, with all the time to itself
    python benchmarks/gpu_suite.py --out DIR --resume             what has not ended yet

Nothing is installed: the checkout itself is imported. Every section runs in a process of its own, so that a fault of
the device, a hang or an exception ends that section and no other; what it had measured is kept. DIR gets one JSON per
section and `gpu_suite.json` with machine, versions, commit, command, date and all rows; the table goes to stdout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Section -> its share of the time that is left, beside those still to come. `limits` are the others' denominators.
SECTIONS = {
    "limits": 20,
    "correctness": 80,
    "kernels": 70,
    "decode": 70,
    "prefill": 30,
    "scoring": 35,
    "throughput": 55,
    "roles": 25,
    "start": 50,
    "peers": 50,
    "decisions": 10,
}
SECONDS = 470.0  # of the whole; `--seconds` gives another
STOPPING = 3.0  # seconds between asking a section to end and ending it


def make_importable() -> None:
    """`tandem` is this checkout, whether or not one is installed."""
    if "tandem" not in sys.modules:
        package = types.ModuleType("tandem")
        package.__path__ = [str(ROOT)]
        sys.modules["tandem"] = package


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; made if missing")
    parser.add_argument("--sections", help=f"comma-separated, of {', '.join(SECTIONS)}; all without it")
    parser.add_argument("--resume", action="store_true", help="keep the sections that have ended in --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of a moment, to test the suite; nothing is judged")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole (%(default)s)")
    parser.add_argument("--commit", help="what was measured, where git does not say it")
    parser.add_argument("--fa3", type=Path, help="FlashAttention-3 as vLLM ships it: _vllm_fa3_C.abi3.so")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a section's own process, and the seconds that it has
    parser.add_argument("--limit", type=float, default=SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.sections.split(",") if options.sections else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    make_importable()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        return measure(options)
    if options.device == "cuda" and not cuda():
        print("torch sees no CUDA device here: run this on a CUDA machine, or with --device cpu --tiny", flush=True)
        return 2
    return supervise(options, [name for name in SECTIONS if name in names or name == "limits"])


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(options: argparse.Namespace) -> int:
    """One section, in its own process. Its rows go to a file as they come; exit status 1 if it ended early."""
    import torch

    from tandem.benchmarks.gpu.rows import Report
    from tandem.benchmarks.gpu.setting import Setting

    name = options.only
    ends = time.monotonic() + options.limit
    setting = Setting(torch.device(options.device), options.out, options.tiny, options.fa3, ends)
    report = Report(name, options.out / f"{name}.rows", options.device, options.tiny)
    torch.manual_seed(0)
    try:
        import_module(f"tandem.benchmarks.gpu.{name}").run(setting, report)
    except Exception as error:
        with report.case(f"rest of {name}"):
            raise error
        return 1
    return 0


def supervise(options: argparse.Namespace, names: list[str]) -> int:
    """Section by section, each in a process with a time limit. Exit status: 0 if all ended by themselves."""
    from tandem.benchmarks.gpu import machine
    from tandem.benchmarks.gpu.goals import GOALS
    from tandem.benchmarks.gpu.rows import Row, read_rows, table

    began = time.monotonic()
    described = {
        "benchmark": "gpu_suite",
        "command": shlex.join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]),
        "date": now(),
        "commit": options.commit or machine.commit(ROOT),
        "machine": machine.describe(options.device),
        "versions": machine.versions(),
        "tiny": options.tiny,
        "goals": {name: str(goal) for name, goal in GOALS.items()},
    }
    kept = [name for name in SECTIONS if options.resume and ended(options.out, name) == "complete"]
    todo = [name for name in names if name not in kept]
    for index, name in enumerate(todo):
        left = options.seconds - (time.monotonic() - began)
        limit = left * SECTIONS[name] / sum(SECTIONS[later] for later in todo[index:])
        lines = options.out / f"{name}.rows"
        for old in (options.out / f"{name}.json", lines):
            old.unlink(missing_ok=True)
        start = time.monotonic()
        how = run_section(options, name, limit)
        taken = {"seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1), "ended": how}
        rows = [asdict(row) for row in read_rows(lines)]
        result = {"section": name, "commit": described["commit"], "date": now(), **taken, "rows": rows}
        (options.out / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        lines.unlink(missing_ok=True)
    names = [name for name in SECTIONS if name in todo or name in kept]
    results = [json.loads((options.out / f"{name}.json").read_text()) for name in names]
    whole = described | {
        "seconds": round(time.monotonic() - began, 1),
        "sections": {r["section"]: {key: value for key, value in r.items() if key != "rows"} for r in results},
        "rows": [row for r in results for row in r["rows"]],
    }
    (options.out / "gpu_suite.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    rows = [Row(**row) for r in results for row in r["rows"]]
    print("\n" + table(rows))
    print(f"\n{'section':12} {'seconds':>8} {'limit':>6}  ended")
    for r in results:
        print(f"{r['section']:12} {r['seconds']:8.1f} {r['limit']:6.0f}  {r['ended']}")
    counts = Counter(row.verdict for row in rows if row.goal or row.verdict == "failed")
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("met", "missed", "not judged", "failed"))
    print(f"{time.monotonic() - began:.0f} s; goals: {verdicts}")
    print(f"results: {options.out / 'gpu_suite.json'}")
    return 0 if all(r["ended"] == "complete" for r in results) else 1


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def ended(out: Path, name: str) -> str | None:
    """How a section of an earlier command ended; None where it has not."""
    file = out / f"{name}.json"
    return json.loads(file.read_text())["ended"] if file.exists() else None


def run_section(options: argparse.Namespace, name: str, limit: float) -> str:
    """How it ended: complete, failed (exit status), or stopped at its limit. Its output goes to DIR/name.log."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--only", name]
    command += ["--limit", f"{limit:.1f}", "--device", options.device, *(["--tiny"] if options.tiny else [])]
    command += ["--fa3", str(options.fa3)] if options.fa3 else []
    print(f"{name}: at most {limit:.0f} s", flush=True)
    with (options.out / f"{name}.log").open("w") as log:
        section = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = section.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(section.pid, signal.SIGTERM)
            try:
                section.wait(timeout=STOPPING)
            except subprocess.TimeoutExpired:
                os.killpg(section.pid, signal.SIGKILL)
                section.wait()
            return f"stopped at its limit of {limit:.0f} s"
        except BaseException:
            os.killpg(section.pid, signal.SIGKILL)
            raise
    return "complete" if status == 0 else f"failed with exit status {status}; see {name}.log"


if __name__ == "__main__":
    sys.exit(main())
