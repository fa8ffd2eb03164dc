"""Every trainer against one server of the bundled models: `make evidence-trainers`.

Each is the package as it is published, in an environment of its own, and its traffic passes a proxy that counts it;
`--record DIRECTORY` keeps it as fixtures. The server computes in float32, as the trainers do. The last line is JSON;
exit status 1 where a trainer did not pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bench.served import tandem
from ..clients.environments import ROOT
from ..peers.setup import SetupError
from . import areal_backends, environments, openrlhf_agent
from .recorder import Recorder, kept, recording, routes, save

HERE = Path(__file__).parent
POLICY, REWARD = "tandem-demo", "tandem-demo-reward"
DIRECTORY = ROOT / "model" / "demo" / "policy"
CLOSE = 1e-3  # of a token's log-probability
STEPS = 2


def last_line(command: list[str]) -> dict[str, Any]:
    """What a script reports. Raises SetupError."""
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise SetupError(f"{Path(command[1]).name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(last)


def grpo(url: str) -> dict[str, Any]:
    script = [str(environments.trl()), str(HERE / "trl_grpo.py"), url, str(DIRECTORY), POLICY, REWARD]
    report = last_line([*script, "--steps", str(STEPS)])
    difference = report["largest_logprob_difference"]
    ok = report["steps"] == STEPS and report["finite"] and difference < CLOSE and report["largest_weight_change"] > 0
    figure = f"{report['steps']} steps, {report['rewards']} rewards, log-probabilities within {difference:.1e}"
    return {**report, "figure": figure, "ok": ok}


def checked(report: dict[str, Any]) -> dict[str, Any]:
    for name, why in report["failed"].items():
        print(f"{name}: {why}", flush=True)
    count = len(report["passed"]) + len(report["failed"])
    return {**report, "figure": f"{len(report['passed'])} of {count} checks", "ok": not report["failed"]}


def trl_clients(url: str) -> dict[str, Any]:
    return checked(last_line([str(environments.trl()), str(HERE / "trl_clients.py"), url, str(DIRECTORY)]))


def openrlhf(url: str) -> dict[str, Any]:
    file = environments.unpacked(environments.OPENRLHF) / "openrlhf" / "utils" / "agent.py"
    report = openrlhf_agent.run(url, file, DIRECTORY, POLICY, REWARD)
    return checked({"version": environments.OPENRLHF.partition("==")[2], **report})


def areal(url: str) -> dict[str, Any]:
    report = areal_backends.run(url, environments.unpacked(environments.AREAL), DIRECTORY)
    return checked({"version": environments.AREAL.partition("==")[2], **report})


TRAINERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "TRL GRPOTrainer": grpo,
    "TRL clients": trl_clients,
    "OpenRLHF agent": openrlhf,
    "AReaL backends": areal,
}


def run(recorder: Recorder, directory: Path | None) -> list[dict[str, Any]]:
    """A report per trainer, each with "trainer", "version", "figure", "ok", "routes" and "seconds"."""
    reports: list[dict[str, Any]] = []
    for name, train in TRAINERS.items():
        began = time.monotonic()
        try:
            report = train(recorder.url)
        except SetupError as error:
            print(f"{name}: {error}", flush=True)
            report = {"version": "", "figure": str(error).partition("\n")[0], "ok": False}
        exchanges = recorder.take()
        if directory is not None and report["ok"]:
            file = directory / f"{name.lower().replace(' ', '-')}-{report['version']}.json"
            print(f"wrote {save(file, name, report['version'], kept(exchanges))}")
        took = {"routes": routes(exchanges), "seconds": round(time.monotonic() - began, 1)}
        reports.append({"trainer": name, **report, **took})
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="DIRECTORY", help="keep what the trainers sent and got")
    options = parser.parse_args()
    arguments = ["--dtype", "float32", "--max-logprobs", "100", "--enable-lora"]
    with tandem(*arguments) as server, recording(server.url) as recorder:
        reports = run(recorder, options.record)
    for report in reports:
        state = "passed" if report["ok"] else "FAILED"
        print(f"{report['trainer']:16} {report['version']:8} {state}  {report['figure']}")
    print(json.dumps({"trainers": {report["trainer"]: report for report in reports}}, ensure_ascii=False))
    return 0 if all(report["ok"] for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
