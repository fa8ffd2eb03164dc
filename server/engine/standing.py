"""What an engine that is started again must come to before it may serve in the place of the one before it."""

from __future__ import annotations

import logging
from dataclasses import replace

from ...model.adapters import Adapter
from ...model.errors import CheckpointError
from ...model.incoming import digest_of, from_disk
from ...model.model import Model
from ...model.update import Update
from .control import ADAPTED, Change, ModelState, Standing
from .engine import Engine
from .hub import Hub

log = logging.getLogger(__name__)


class WeightsLost(Exception):
    """A restarted engine cannot serve what the one before it served."""


def restore(hub: Hub, standing: Standing) -> None:
    """Brings a hub that was just loaded to the versions of weights that were committed last. Raises WeightsLost."""
    versions = {state.name: state.version for state in standing.models}
    replaced = {change.models[0] for change in standing.changes if not change.partial}
    states = {state.name: state for state in standing.models}
    for engine in hub.engines:
        state = states.get(engine.card.name)
        if state is None or (state.digest != engine.digest and state.name not in replaced):
            raise WeightsLost(
                f"weights lost: the files of model {engine.card.name} in {engine.card.path} "
                "have changed since they were loaded; restart the server to serve them as they are now"
            )
    for change in standing.changes:
        name = change.models[0]
        if not change.files:
            raise WeightsLost(
                f"weights lost: version {versions[name]} came by {change.came}; restart the server and "
                f"send the weights of model {name} again"
            )
        try:
            _apply(hub, change)
        except (CheckpointError, OSError) as error:
            raise WeightsLost(f"weights lost: version {versions[name]} of model {name}: {error}") from error
    for engine in hub.engines:
        state = states[engine.card.name]
        engine.restore(state)
        _load_adapters(engine, state)
    hub.resume_from(standing.changes)


def _apply(hub: Hub, change: Change) -> None:
    engine = hub.engine(change.models[0])
    assert engine is not None and isinstance(engine.model, Model)
    if change.came == ADAPTED:
        engine.adapters.adopt(_adapter(engine, *change.files[0]))
        return
    engine.adapters.disown()
    update = Update(engine.model)
    for path, digest in change.files:
        if digest_of(path) != digest:
            raise CheckpointError(f"the files of {path} have changed since it was read")
        update.stage(from_disk(path, engine.model.config.labels > 0).tensors)
    update.complete(change.partial)
    update.commit()


def _load_adapters(engine: Engine, state: ModelState) -> None:
    """Those that are still what they were; requests for another one are told that there is none."""
    for name, path, digest in state.adapters:
        try:
            engine.adapters.load(name, _adapter(engine, path, digest), replace=True)
        except (CheckpointError, OSError) as error:
            engine.adapters.unload(name)
            log.warning("adapter %s of model %s is lost: %s", name, engine.card.name, error)
    engine.card = replace(engine.card, adapters=engine.adapters.cards)


def _adapter(engine: Engine, path: str, digest: str) -> Adapter:
    adapter = engine.adapters.read(path)
    if adapter.digest != digest:
        raise CheckpointError(f"the files of {path} have changed since it was read")
    return adapter
