"""Every client against one server of the bundled models: `make evidence-clients`.

The `openai` packages of Python and npm do the same checks; LangChain's agents answer held-out questions; lm-eval's
`local-completions` is compared with its `hf`. The server computes in float32, as lm-eval's `hf` does. The last line is
JSON; exit status 1 where a client did not pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..bench.served import tandem
from ..peers.setup import SetupError
from . import environments, langchain_agents, python_openai

AGENTS_BAR = 0.8  # of the questions
LM_EVAL = Path(__file__).with_name("lm_eval_local.py")
NAME = "tandem-demo"


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """A report of checks, with all that are in it and whether all passed."""
    names = [*report["passed"], *report["failed"]]
    for name, why in report["failed"].items():
        print(f"{report['client']}: {name}: {why}", flush=True)
    figure = f"{len(report['passed'])} of {len(names)} checks"
    return {**report, "figure": figure, "ok": not report["failed"]}


def langchain(url: str, count: int) -> dict[str, Any]:
    """How many questions each agent answered rightly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LangChain's, of its own imports
        report = langchain_agents.run(url, count, seed=0)
    kinds = list(langchain_agents.AGENTS)
    right = ", ".join(f"{kind} {report[kind]} of {count}" for kind in kinds)
    ok = all(report[kind] >= AGENTS_BAR * count for kind in kinds)
    versions = {"version": version("langchain-classic"), "langchain-openai": version("langchain-openai")}
    return {"client": "langchain", **versions, **report, "figure": right, "ok": ok}


def lm_eval(url: str) -> dict[str, Any]:
    """How far `local-completions` is from `hf`. Raises SetupError."""
    command = [str(environments.lm_eval()), str(LM_EVAL), "--url", url, "--name", NAME]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise SetupError(f"lm-eval ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    report = json.loads(last)
    largest = max(task["largest difference"] for task in report["tasks"].values())
    differing = sum(task["answers that differ"] for task in report["tasks"].values())
    found = {"largest_difference": largest, "answers_that_differ": differing}
    figure = f"log-probabilities within {largest:.1e} of hf's, {differing} answers differ"
    return {**report, **found, "figure": figure, "ok": report["passed"]}


def run(url: str, count: int) -> list[dict[str, Any]]:
    """A report per client, each with "client", "version", "figure" and "ok"; one that cannot run says why."""
    clients: dict[str, Callable[[], dict[str, Any]]] = {
        "openai": lambda: checked(python_openai.run(url)),
        "npm openai": lambda: checked(environments.npm_openai(url)),
        "langchain": lambda: langchain(url, count),
        "lm-eval": lambda: lm_eval(url),
    }
    reports: list[dict[str, Any]] = []
    for name, ask in clients.items():
        try:
            reports.append(ask())
        except SetupError as error:
            print(f"{name}: {error}", flush=True)
            reports.append({"client": name, "version": "", "figure": str(error).partition("\n")[0], "ok": False})
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="questions of each kind for LangChain's agents")
    options = parser.parse_args()
    with tandem("--dtype", "float32") as server:
        reports = run(server.url, options.count)
    for report in reports:
        state = "passed" if report["ok"] else "FAILED"
        print(f"{report['client']:12} {report['version']:10} {state}  {report['figure']}")
    print(json.dumps({"clients": {report["client"]: report for report in reports}}, ensure_ascii=False))
    return 0 if all(report["ok"] for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
