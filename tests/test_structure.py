"""The shape of the repository, as ARCHITECTURE.md states it: who imports whom, what is packaged, how long a file is."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("server", "kernels", "model", "benchmarks")
FILES = sorted(
    file for top in TOPS for file in (ROOT / top).rglob("*.py") if "demo" not in file.relative_to(ROOT).parts
)
MAX_LINES = 450

# The first layer whose path prefixes a file is the file's.
LAYERS = (
    "server/engine",
    "server/text",
    "server/api",
    "server/compat",
    "server",
    "model",
    "kernels/triton",
    "kernels",
    "benchmarks",
)
WORKER = ("server/api", "server/compat", "server/text")  # what an API worker is made of
INTEGERS = {
    f"server/engine/{name}.py"
    for name in (
        "request",
        "arena",
        "arena_layout",
        "pages",
        "plan",
        "counts",
        "meter",
        "sequence",
        "columns",
        "prefixes",
        "running",
        "waiting",
        "groups",
        "line",
        "jobs",
        "scheduler",
    )
}
CLIENT_SIDE = {
    f"server/engine/{name}.py" for name in ("request", "commands", "counts", "stream", "link", "options", "control")
}
# Of the engine's files these alone may import libraries that a bare CUDA image lacks.
LINK = {f"server/engine/{name}.py" for name in ("link", "link_server", "messages")}
COMPOSER = "server/engine_process.py"  # hands the engine what it must not import, so it knows both
EDGE_LIBRARIES = {
    *("msgspec", "zmq", "typer", "rich", "httpx", "yaml", "jinja2", "llguidance", "huggingface_hub"),
    *("prometheus_client", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "sse_starlette"),
}
HEAVY = {"torch", "triton", "numpy", "safetensors"}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name or repository path, whether it lies in the repository) of every import, lazy ones too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if base.with_suffix(".py").exists():
                yield relative(base.with_suffix(".py")), True
            else:
                for alias in node.names:
                    target = base / alias.name
                    yield relative(target.with_suffix(".py") if target.with_suffix(".py").exists() else target), True


def layer(path: str) -> str:
    for name in LAYERS:
        if path == name or path.startswith(name + "/"):
            return name
    return path


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_stay_in_their_layer(file: Path) -> None:
    here, name = layer(relative(file)), relative(file)
    for target, inside in imports(file):
        if not inside:
            library = target.split(".")[0]
            assert library != "tandem" or here == "benchmarks", f"{name}: import relatively inside the packages"
            if here in (*WORKER, "server") or name in INTEGERS:
                assert library not in HEAVY, f"{name} imports {library}"
            if here in ("server/engine", "model", "kernels", "kernels/triton") and name not in LINK:
                assert library not in EDGE_LIBRARIES, f"{name} imports {library}: a bare CUDA image has none"
            assert library != "transformers" or here == "benchmarks", f"{name} imports transformers"
            assert library != "triton" or here in ("kernels/triton", "benchmarks"), f"{name} imports triton"
            assert not target.startswith("tandem.kernels.triton"), f"{name} imports {target}: call the operation"
            continue
        there = layer(target)
        if here == "kernels":
            assert there == "kernels", f"{name} imports {target}"
        elif here == "kernels/triton":
            assert there in ("kernels", "kernels/triton"), f"{name} imports {target}"
        elif here == "model":
            assert there in ("model", "kernels"), f"{name} imports {target}"
        elif name in INTEGERS:
            assert target in INTEGERS, f"{name} imports {target}"
        elif here == "server/engine":
            assert there in ("server/engine", "model", "kernels"), f"{name} imports {target}"
        elif here in (*WORKER, "server"):
            assert there not in ("model", "kernels"), f"{name} imports {target}"
            assert there != "server/compat" or here == there or name == "server/api/app.py", f"{name} imports {target}"
            known = target in CLIENT_SIDE or (name == COMPOSER and target == "server/engine/process.py")
            assert there != "server/engine" or known, f"{name} imports {target}: the engine's inside"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_files_stay_readable(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; split it by what it holds"


def test_every_package_is_listed_in_pyproject() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {".".join(["tandem", *file.parent.relative_to(ROOT).parts]) for file in FILES}


def test_every_cpp_file_is_built_from() -> None:
    """What is missing here is in no source distribution, and nothing is built again when it changes."""
    extension = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    for key, pattern in (("sources", "*.cpp"), ("depends", "*.h")):
        there = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "kernels" / "cpu").glob(pattern))
        assert extension[key] == there, key


@pytest.mark.parametrize("top", TOPS)
def test_top_level_directories_are_no_packages(top: str) -> None:
    """Hugging Face ships a package named `kernels`; a directory without __init__.py never shadows it."""
    assert not (ROOT / top / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_what_the_project_promises_is_there() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run"):
        assert (ROOT / name).stat().st_size > 0, name
