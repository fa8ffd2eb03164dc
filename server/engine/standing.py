"""What an engine that is started again must come to before it may serve in the place of the one before it."""

from __future__ import annotations

from ...model.errors import CheckpointError
from ...model.incoming import digest_of, from_disk
from ...model.model import Model
from ...model.update import Update
from .control import Change, Standing
from .hub import Hub


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
        engine.restore(states[engine.card.name])
    hub.resume_from(standing.changes)


def _apply(hub: Hub, change: Change) -> None:
    engine = hub.engine(change.models[0])
    assert engine is not None and isinstance(engine.model, Model)
    update = Update(engine.model)
    for path, digest in change.files:
        if digest_of(path) != digest:
            raise CheckpointError(f"the files of {path} have changed since it was read")
        update.stage(from_disk(path, engine.model.config.labels > 0).tensors)
    update.complete(change.partial)
    update.commit()
