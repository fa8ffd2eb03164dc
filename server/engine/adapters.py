"""The adapters of one hosted model: by name, with the number under which the model's tensors know each, and how they
come and go between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...model.adapters import Adapter
from ...model.lora import read_adapter
from ...model.model import Model
from .null_runner import NullModel
from .plan import Executor
from .request import AdapterCard, EngineError
from .scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Loaded:
    card: AdapterCard
    digest: str  # of its files
    key: str  # of this load alone: requests carry it, so that no page which other weights computed is theirs
    slot: int


class LoadedAdapters:
    """At most `count`, in slots 1 … count; slot 0 is the model alone.

    The one without a name is the model's own: what names no adapter is for it.
    One that is unloaded takes no new requests and keeps its slot until those it has are done. `slots`: of every key
    that a request may carry.
    """

    def __init__(self, model: str, count: int) -> None:
        self.slots: dict[str, int] = {"": 0}
        self.count, self._model = count, model
        self._named: dict[str, Loaded] = {}
        self._leaving: set[str] = set()  # keys
        self._loads = 0

    @property
    def cards(self) -> tuple[AdapterCard, ...]:
        return tuple(loaded.card for name, loaded in self._named.items() if name)

    @property
    def sources(self) -> tuple[tuple[str, str, str], ...]:
        """(name, path, digest) of each."""
        return tuple((name, loaded.card.path, loaded.digest) for name, loaded in self._named.items() if name)

    def key(self, name: str) -> str | EngineError:
        """What a request for the adapter carries; nothing where there is none to name."""
        loaded = self._named.get(name)
        if loaded is None:
            return self._unknown(name) if name else ""
        return loaded.key

    def room(self, name: str, replace: bool, in_use: Callable[[str], bool]) -> int | EngineError:
        """The slot that an adapter of that name would get: its own, where it is to be replaced, or a free one.

        `in_use`: whether a request that carries the key is not finished, or a group of it open.
        """
        if not self.count:
            message = f"model {self._model} has no room for adapters; policies get it by --enable-lora"
            return EngineError("invalid", message, "model")
        if (known := self._named.get(name)) is not None:
            if replace:
                return known.slot
            message = f"model {self._model} has an adapter {name!r} already; unload it first, or load it in place"
            return EngineError("invalid", message, "lora_name")
        for key in [key for key in self._leaving if not in_use(key)]:
            self._leaving.remove(key)
            del self.slots[key]
        taken = set(self.slots.values())
        if len(taken) <= self.count:
            return next(slot for slot in range(1, self.count + 1) if slot not in taken)
        message = f"model {self._model} has {len(self._named)} adapters and room for {self.count} (--max-loras)"
        if self._leaving:
            message += f"; {len(self._leaving)} more are unloaded, but requests still use them"
            return EngineError("overloaded", message, "lora_name", retry_after=1.0)
        return EngineError("invalid", f"{message}; unload one first", "lora_name")

    def put(self, name: str, adapter: Adapter, slot: int) -> tuple[str, str]:
        """The adapter lies in that slot now. Gives the key of the one that it replaces, empty if it does not, and its
        own."""
        before = self._named.get(name)
        self._loads += 1
        card = AdapterCard(name, str(adapter.path), adapter.rank, int(time.time()))
        loaded = Loaded(card, adapter.digest, f"{self._loads}:{name}", slot)
        self._named[name] = loaded
        self.slots[loaded.key] = slot
        if before is None:
            return "", loaded.key
        del self.slots[before.key]
        return before.key, loaded.key

    def unload(self, name: str) -> EngineError | None:
        loaded = self._named.pop(name, None)
        if loaded is None:
            return self._unknown(name, "lora_name")
        self._leaving.add(loaded.key)
        return None

    def _unknown(self, name: str, param: str = "model") -> EngineError:
        known = ", ".join(card.name for card in self.cards) or "none"
        return EngineError("not_found", f"model {self._model} has no adapter {name!r}; it has {known}", param)


class Adapters:
    """What is done with them. No step may be on its way meanwhile (`Engine.settle`), but for `read`."""

    def __init__(
        self, loaded: LoadedAdapters, model: Model | NullModel, scheduler: Scheduler, runner: Executor
    ) -> None:
        self.possible = loaded.count > 0
        self._loaded, self._model, self._scheduler, self._runner = loaded, model, scheduler, runner

    @property
    def cards(self) -> tuple[AdapterCard, ...]:
        return self._loaded.cards

    @property
    def sources(self) -> tuple[tuple[str, str, str], ...]:
        return self._loaded.sources

    def key(self, name: str) -> str | EngineError:
        """What a request for the adapter of that name carries."""
        return self._loaded.key(name)

    def refusal(self, name: str, replace: bool = False) -> EngineError | None:
        """Why no adapter of that name can be loaded now."""
        room = self._room(name, replace)
        return room if isinstance(room, EngineError) else None

    def read(self, path: str) -> Adapter:
        """Reads and checks one; in any thread. Raises CheckpointError."""
        model = self._model
        assert isinstance(model, Model) and model.adapters is not None
        return read_adapter(Path(path), model.decoder, model.adapters)

    def load(self, name: str, adapter: Adapter, replace: bool = False) -> EngineError | None:
        """Makes it the model's under that name. Requests that decode with one that is replaced go on, with the keys and
        values they have."""
        slot = self._room(name, replace)
        if isinstance(slot, EngineError):
            return slot
        before, now = self._put(name, adapter, slot)
        if before:
            self._scheduler.set_adapter(before, now)
        return None

    def unload(self, name: str) -> EngineError | None:
        """New requests do not find it any more. Those that it has go on, and its room is free after the last."""
        return self._loaded.unload(name)

    def adopt(self, adapter: Adapter) -> EngineError | None:
        """Makes it the model's own, in place of the one before: what names no adapter is for it from now on.

        The version is the caller's to change. Without one before, what runs is computed again.
        """
        slot = self._room("", replace=True)
        if isinstance(slot, EngineError):
            return slot
        before, now = self._put("", adapter, slot)
        self._scheduler.set_adapter(before, now, keep=bool(before))
        return None

    def disown(self) -> None:
        """The model's own adapter, where it has one, is no longer used: other weights take over."""
        key = self._loaded.key("")
        if key and not self._loaded.unload(""):
            self._scheduler.set_adapter(str(key), "", keep=False)

    def _room(self, name: str, replace: bool) -> int | EngineError:
        return self._loaded.room(name, replace, self._scheduler.uses)

    def _put(self, name: str, adapter: Adapter, slot: int) -> tuple[str, str]:
        assert isinstance(self._model, Model) and self._model.adapters is not None
        self._runner.write(partial(self._model.adapters.write, slot, adapter))
        return self._loaded.put(name, adapter, slot)
