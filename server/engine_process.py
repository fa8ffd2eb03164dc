"""The engine process as it is composed: what the engine must not import is handed to it here.

Started by the supervisor as `python -m tandem.server.engine_process DESCRIPTOR PARENT`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .engine.process import main

if TYPE_CHECKING:
    from .engine.request import ModelCard
    from .text.matching import LoadedGrammars, LoadedMatcher


class LateGrammars:
    """A model's grammars; the library is imported with the first of them, so that no start waits for it."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._loaded: LoadedGrammars | None = None

    def known(self, grammar: str) -> bool:
        return self._loaded is not None and self._loaded.known(grammar)

    def matcher(self, grammar: str) -> LoadedMatcher:
        if self._loaded is None:
            from .text.matching import load_grammars

            self._loaded = load_grammars(self._card)
        return self._loaded.matcher(grammar)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), LateGrammars))
