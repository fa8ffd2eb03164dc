"""Copies of the engine's integer modules with one deliberate mistake in one of them."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tandem.server.engine import counts, meter, plan, request, scheduler

# In order of import.
MUTATED = (
    *("arena", "pages", "prefixes", "sequence", "columns", "waiting", "running"),
    *("groups", "line", "jobs", "scheduler"),
)
# Types alone, and what only watches; the tests use the same ones.
SHARED = {"counts": counts, "meter": meter, "plan": plan, "request": request}
SOURCES = Path(str(scheduler.__file__)).parent


@dataclass(frozen=True)
class Mutant:
    """Replaces `old`, which must stand in the module exactly once, by `new`; `machine` has to notice."""

    name: str
    why: str
    module: str
    machine: str
    old: str
    new: str

    @classmethod
    def read(cls, path: Path) -> Mutant:
        return cls(name=path.stem, **tomllib.loads(path.read_text()))

    def source(self, module: str) -> str:
        text = (SOURCES / f"{module}.py").read_text()
        if module != self.module:
            return text
        assert text.count(self.old) == 1, f"mutant {self.name}: its place in {module}.py is gone"
        assert self.old != self.new
        return text.replace(self.old, self.new)

    @contextmanager
    def modules(self) -> Iterator[dict[str, ModuleType]]:
        """The modules by name, importing each other and not the real ones."""
        package = f"mutant_{self.name}"
        loaded = {package: ModuleType(package)}
        loaded[package].__path__ = []
        loaded |= {f"{package}.{name}": module for name, module in SHARED.items()}
        try:
            sys.modules.update(loaded)
            for name in MUTATED:
                module = ModuleType(f"{package}.{name}")
                sys.modules[module.__name__] = loaded[module.__name__] = module
                module.__package__ = package
                exec(compile(self.source(name), f"{package}/{name}.py", "exec"), module.__dict__)
            yield {name: loaded[f"{package}.{name}"] for name in MUTATED}
        finally:
            for name in loaded:
                sys.modules.pop(name, None)
