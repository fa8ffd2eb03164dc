"""The adapters of one hosted model: by name, with the number under which the model's tensors know each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .request import AdapterCard, EngineError


@dataclass(frozen=True, slots=True)
class Loaded:
    card: AdapterCard
    key: str  # of this load alone: requests carry it, so that no page which other weights computed is theirs
    slot: int


class LoadedAdapters:
    """At most `count`, in slots 1 … count; slot 0 is the model alone.

    The one without a name is the model's own: what names no adapter is for it.
    One that is unloaded takes no new requests and keeps its slot until those it has are done, which `in_use(key)`
    knows. `slots`: of every key that a request may carry.
    """

    def __init__(self, model: str, count: int, in_use: Callable[[str], bool]) -> None:
        self.slots: dict[str, int] = {"": 0}
        self.count, self._model, self._in_use = count, model, in_use
        self._named: dict[str, Loaded] = {}
        self._leaving: set[str] = set()  # keys
        self._loads = 0

    @property
    def cards(self) -> tuple[AdapterCard, ...]:
        return tuple(loaded.card for name, loaded in self._named.items() if name)

    def key(self, name: str) -> str | EngineError:
        """What a request for the adapter carries; nothing where there is none to name."""
        loaded = self._named.get(name)
        if loaded is None:
            return self._unknown(name) if name else ""
        return loaded.key

    def room(self, name: str, replace: bool) -> int | EngineError:
        """The slot that an adapter of that name would get: its own, where it is to be replaced, or a free one."""
        if not self.count:
            return EngineError("invalid", f"model {self._model} was started without room for adapters: --enable-lora")
        if (known := self._named.get(name)) is not None:
            if replace:
                return known.slot
            message = f"model {self._model} has an adapter {name!r} already; unload it first, or load it in place"
            return EngineError("invalid", message, "lora_name")
        for key in [key for key in self._leaving if not self._in_use(key)]:
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

    def put(self, name: str, path: str, rank: int, slot: int) -> tuple[str, str]:
        """The adapter lies in that slot now. Gives the key of the one that it replaces, empty if it does not, and its
        own."""
        before = self._named.get(name)
        self._loads += 1
        loaded = Loaded(AdapterCard(name, path, rank, int(time.time())), f"{self._loads}:{name}", slot)
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
