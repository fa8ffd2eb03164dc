"""From what shall be hosted to models: checkpoints are read, and weights are shared where a spec says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...model.checkpoint import read_checkpoint
from ...model.config import HeadKind, ModelConfig
from ...model.errors import CheckpointError
from ...model.load import load_model
from ...model.model import Model
from ...model.pooling import is_embedding_model
from ...model.trunk import value_model
from .null_runner import NullModel
from .options import EngineOptions, ModelSpec, OptionsError, owner_of
from .request import Role

Progress = Callable[[str, int, int], None]  # model, bytes done, bytes in all
Models = Mapping[str, Model | NullModel]

HEADS: Mapping[Role, HeadKind] = {
    "policy": "lm",
    "reference": "lm",
    "reward": "score",
    "value": "value",
    "embedding": "embed",
}
ROLES: Mapping[HeadKind, Role] = {"lm": "policy", "score": "reward", "value": "value", "embed": "embedding"}


def load_models(
    specs: Sequence[ModelSpec], options: EngineOptions, on_progress: Progress | None
) -> list[Model | NullModel]:
    """In the order of `specs`. Raises CheckpointError and OptionsError, naming the model."""
    for spec in specs:
        if spec.shares:
            _check_owner(spec, specs)
    own = {spec.name: _load(spec, options, on_progress) for spec in specs if not spec.shares}
    return [_share(spec, own[spec.shares]) if spec.shares else own[spec.name] for spec in specs]


def role_of(spec: ModelSpec, config: ModelConfig) -> Role:
    """The role a model was given, or the one its head says. Raises OptionsError where its head cannot have it."""
    found = ROLES[config.kind]
    role = spec.role or ("reference" if spec.base_of else found)
    if spec.pooling is not None and found not in ("embedding", "reward"):
        raise OptionsError(f"model {spec.name}: pooling={spec.pooling} is for roles embedding and reward, not {role}")
    if HEADS[role] != config.kind:
        heads = {"embed": "no head", "lm": "a language model head", "value": "a value head"}
        head = heads.get(config.kind, f"a score head with {config.labels} outputs")
        raise OptionsError(f"model {spec.name}: its checkpoint has {head}, so its role cannot be {role}")
    return role


def _load(spec: ModelSpec, options: EngineOptions, on_progress: Progress | None) -> Model | NullModel:
    def progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(spec.name, done, total)

    try:
        if spec.is_null:
            if spec.quantization not in ("auto", "none") or spec.lm_head != "auto":
                raise OptionsError(f"model {spec.name}: the null model has no weights to quantize")
            null = NullModel(spec.text_path, spec.step_seconds)
            role_of(spec, null.config)
            return null
        if spec.role is None and is_embedding_model(Path(spec.path)):
            head = "embed"
        else:
            head = None if spec.role is None else HEADS[spec.role]
        checkpoint = read_checkpoint(spec.path, head=head, pooling=spec.pooling)
        if checkpoint.config.kind == "embed" and spec.pooling is None and options.pooling is not None:
            checkpoint = read_checkpoint(spec.path, head=head, pooling=options.pooling)
        role = role_of(spec, checkpoint.config)
        model = load_model(
            checkpoint,
            dtype=spec.dtype,
            device=options.device,
            deterministic=options.deterministic,
            context=spec.max_model_len or options.max_model_len,
            quantization=spec.quantization,
            lm_head=spec.lm_head,
            on_progress=progress,
        )
        if options.max_loras and role == "policy":
            model.make_room(options.max_loras, options.max_lora_rank)
        return model
    except CheckpointError as error:
        raise CheckpointError(f"model {spec.name}: {error}") from error


def _check_owner(spec: ModelSpec, specs: Sequence[ModelSpec]) -> None:
    """That there is a model with weights of its own to share, and nothing of the spec contradicts that."""
    said = f"model {spec.name}: " + (f"base-of:{spec.base_of}" if spec.base_of else f"trunk={spec.trunk}")
    owner = owner_of(spec, specs)
    if owner is spec:
        named = ", ".join(other.name for other in specs if other is not spec) or "none"
        raise OptionsError(f"{said}: no other model of that name is hosted here; there are: {named}")
    if owner.shares:
        raise OptionsError(f"{said}: {owner.name} has no weights of its own; name {owner.shares}")
    if owner.is_null:
        raise OptionsError(f"{said}: the null model has no weights to share")
    if spec.dtype not in ("auto", owner.dtype):
        raise OptionsError(f"{said}: dtype is {spec.dtype}, but the weights are {owner.name}'s: {owner.dtype}")
    for key, given, kept in (
        ("quantization", spec.quantization, owner.quantization),
        ("lm_head", spec.lm_head, owner.lm_head),
    ):
        if given not in ("auto", kept):
            raise OptionsError(f"{said}: {key} is {given}, but the weights are {owner.name}'s: {kept}")
    wanted: Role = "reference" if spec.base_of else "value"
    if spec.role not in (None, wanted):
        raise OptionsError(f"{said}: its role is {wanted}, not {spec.role}")


def _share(spec: ModelSpec, owner: Model | NullModel) -> Model:
    """A model on the weights of another one."""
    assert isinstance(owner, Model)
    try:
        model = value_model(owner, spec.path or None) if spec.trunk else owner.sharing(owner.config, owner.digest)
    except CheckpointError as error:
        raise CheckpointError(f"model {spec.name}: {error}") from error
    role_of(spec, model.config)
    return model
