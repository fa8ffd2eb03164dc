"""Kernels compiled ahead of time, without a GPU: registers, stack, shared memory and instructions of each variant.

tests/kernels/test_triton_compiled.py runs this file in a child process per Triton version; by hand it prints a table:

    python tests/support/aot.py [FILE ...] [--archs 90]      files of tests/support/variants, by default all
    PYTHONPATH=.venvs/aot python tests/support/aot.py        the same with Triton 3.6.0 (`make .venvs/aot`)

Compiled kernels are kept in Triton's cache, so what did not change costs only its disassembly.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VARIANTS = Path(__file__).parent / "variants"
ARCHS = (80, 89, 90, 100)
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes that one program may use
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, and what must hold of it on every architecture in `archs`.

    `signature` names the arguments that exist at run time, in any order: "*bf16", "*i8", "i32", "i64", "fp32".
    `constexprs` has all others, absent tensors as None. `divisible` ones are multiples of 16 (of a pointer: bytes).
    Instructions are given as base and modifiers in any order: "LDG.128" finds LDG.E.EF.128.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)  # further ones of the launch
    archs: Sequence[int] = ARCHS
    max_registers: int = 255
    max_stack: int = 0
    sass: Sequence[str] = ()  # instructions that occur on every architecture
    sass_on: Mapping[int, Sequence[str]] = field(default_factory=dict)  # and on some
    absent: Sequence[str] = ()  # instructions that occur on none


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes: registers per thread, stack and local bytes per thread, shared bytes."""

    registers: int
    stack: int
    local: int
    shared: int
    sass: Mapping[str, int]  # instruction with its modifiers -> occurrences

    def count(self, instruction: str) -> int:
        base, *modifiers = instruction.split(".")
        return sum(
            times
            for name, times in self.sass.items()
            if (parts := name.split("."))[0] == base and set(modifiers) <= set(parts[1:])
        )


def compile(variant: Variant, arch: int) -> Resources:
    names = variant.kernel.arg_names
    unknown = {*variant.signature, *variant.constexprs, *variant.divisible} ^ set(names)
    assert not unknown, f"{variant.label}: {sorted(unknown)} are not what {variant.kernel.__name__} takes"
    kernel = triton.compile(
        ASTSource(
            fn=variant.kernel,
            signature={name: variant.signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
        | dict(variant.options),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run(
            [tool, "--dump-resource-usage", "--dump-sass", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = RESOURCES.search(said)
    assert found, said
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack, local, kernel.metadata.shared, dict(Counter(INSTRUCTION.findall(said))))


def problems(variant: Variant, arch: int, found: Resources) -> list[str]:
    """What a variant promises and does not keep."""
    limits = [
        ("registers", found.registers, variant.max_registers),
        ("bytes of stack", found.stack, variant.max_stack),
        ("bytes of local memory", found.local, 0),
        ("bytes of shared memory", found.shared, SHARED[arch]),
    ]
    wrong = [f"{value} {what}, at most {limit}" for what, value, limit in limits if value > limit]
    wrong += [f"no {name}" for name in (*variant.sass, *variant.sass_on.get(arch, ())) if not found.count(name)]
    return wrong + [f"{found.count(name)} {name}" for name in variant.absent if found.count(name)]


def _row(file: str, index: int, arch: int) -> dict[str, Any]:
    variant: Variant = importlib.import_module(f"variants.{file}").VARIANTS[index]
    row = {"file": file, "label": variant.label, "arch": arch}
    try:
        found = compile(variant, arch)
    except Exception as error:  # a variant that does not compile is one row's problem
        return row | {"problems": [f"{type(error).__name__}: {error}"]}
    return row | asdict(found) | {"problems": problems(variant, arch, found)}


def rows(files: Sequence[str], archs: Sequence[int] = ARCHS, processes: int = 2) -> list[dict[str, Any]]:
    """A row per variant of these files and architecture: file, label, arch, the fields of `Resources`, problems."""
    jobs = [
        (file, index, arch)
        for file in files
        for index, variant in enumerate(importlib.import_module(f"variants.{file}").VARIANTS)
        for arch in archs
        if arch in variant.archs
    ]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_row, *zip(*jobs, strict=True)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per variant: registers and KB of shared memory by architecture, and instructions on the newest."""
    archs = sorted({row["arch"] for row in rows})
    lines: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["file"], row["label"]), {})[row["arch"]] = row
    shown = [f"{'':44}" + "".join(f"{f'sm_{arch}':>12}" for arch in archs) + "   instructions (newest)"]
    for (file, label), by_arch in lines.items():
        cells = ""
        for arch in archs:
            row = by_arch.get(arch)
            cell = "-" if row is None else "fails" if "registers" not in row else f"{row['registers']} r"
            if row and row.get("shared", 0) >= 1024:
                cell += f" {row['shared'] / 1024:.0f}K"
            cells += f"{cell:>12}"
        sass = by_arch[max(by_arch)].get("sass", {})
        kinds = Counter[str]()
        for name, times in sass.items():
            base = name.split(".")[0]
            if re.search("MMA|^I2F$|^UTMA", base):
                kinds[base] += times
            elif base in ("LDG", "LDGSTS", "STG"):
                width = next((part for part in name.split(".") if part in ("64", "128", "256")), "32 or less")
                kinds[f"{base}.{width}"] += times
        shown.append(
            f"{f'{file}: {label}':44}{cells}   " + " ".join(f"{kind}×{n}" for kind, n in sorted(kinds.items()))
        )
    return "\n".join(shown)


def complaints(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['file']}: {row['label']} on sm_{row['arch']}: {', '.join(row['problems'])}"
        for row in rows
        if row["problems"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=sorted(file.stem for file in VARIANTS.glob("*.py")))
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)))
    parser.add_argument("--json", action="store_true", help="rows instead of the table")
    args = parser.parse_args()
    found = rows(args.files, [int(arch) for arch in args.archs.split(",")])
    if args.json:
        json.dump({"triton": triton.__version__, "rows": found}, sys.stdout)
        return 0
    wrong = complaints(found)
    print(f"Triton {triton.__version__}", table(found), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
