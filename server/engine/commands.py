"""Commands: what operators and trainers tell the engine beside requests, and what it answers.

Plain values, like those of `request`. A command is carried out between two steps (`administration.py`) and answered
once every API worker knows what it changed. `reply` names the type of a command's answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from .request import EngineError, Normalization

InFlight = Literal["keep", "abort", "wait"]
Source = Literal["disk", "lora", "shm", "cuda_ipc", "distributed"]
Backend = Literal["gloo", "nccl"]

Reply = TypeVar("Reply", covariant=True)


class Command(Protocol[Reply]):
    @property
    def reply(self) -> type[Reply]: ...


class Refused(Exception):
    """A command that was not carried out; nothing has changed."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.error = error


# Replies --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paused:
    models: tuple[str, ...]
    aborted: int  # requests
    frozen: int  # requests that go on after a `Resume`


@dataclass(frozen=True, slots=True)
class Resumed:
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aborted:
    requests: int


@dataclass(frozen=True, slots=True)
class CacheReset:
    pages: int  # whose contents are forgotten
    requests: int  # that run or wait meanwhile; they keep the pages that they have


@dataclass(frozen=True, slots=True)
class Normalized:
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Adapters:
    """All of the model's."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    version: int
    label: str


@dataclass(frozen=True, slots=True)
class UpdateStarted:
    model: str


@dataclass(frozen=True, slots=True)
class Updated:
    """The weights were replaced, or, not `committed`, staged for `FinishUpdate`. Counts and times are of all that is
    staged."""

    models: tuple[str, ...]
    committed: bool
    version: int  # of the first of them
    label: str
    tensors: int
    bytes: int  # as they came
    stage_seconds: float  # while the old weights serve
    commit_seconds: float = 0.0  # while no step ran
    kv_invalidated: int = 0  # pages whose contents are forgotten


@dataclass(frozen=True, slots=True)
class TransferReady:
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class TransferClosed:
    group: str


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pause:
    """No step is taken for the model (None: for any) until `Resume`.

    `keep`: its requests freeze, new ones queue. `abort`: they end with what they have. `wait`: answered when they have
    all finished. After `abort` and `wait` new requests are refused. Deadlines expire as ever.
    """

    reply = Paused
    model: str | None = None
    mode: InFlight = "keep"
    clear_cache: bool = False  # as by `ResetPrefixCache`


@dataclass(frozen=True, slots=True)
class Resume:
    reply = Resumed
    model: str | None = None


@dataclass(frozen=True, slots=True)
class AbortAll:
    """Ends all requests of the model (None: of all) with the tokens that they have."""

    reply = Aborted
    model: str | None = None


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    reply = CacheReset
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Normalize:
    """The model's card says from now on that a reward is (score - mean) / std, and what they come from. Scores
    themselves stay raw."""

    reply = Normalized
    model: str
    mean: float
    std: float
    normalization: Normalization = "mean_std"


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """The directory's LoRA adapter, read and checked while others serve, is one of the model's: requests name it
    instead of the model.

    `replace`: it takes the place of one of that name, if there is one. Decodes of that one go on with the new weights
    and the keys and values that they have; what is computed anew shares no page with what the old ones computed.
    """

    reply = Adapters
    model: str
    name: str
    path: str
    replace: bool = False


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """No new request finds it. Those that it has go on with it, and its room is free after the last of them."""

    reply = Adapters
    model: str
    name: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that comes by broadcast. `dtype` is named as torch does: bfloat16."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IpcTensor:
    """A contiguous tensor in the memory of another process's GPU.

    `storage` is what `torch.UntypedStorage._share_cuda_` gives there, in its order: device, handle, bytes of the
    storage, offset of the storage in the handle's memory, reference counter's handle and offset, event's handle,
    whether to wait for the event. `offset` counts elements from the storage's start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: tuple[int, bytes, int, int, bytes, int, bytes, bool]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StartUpdate:
    """What `UpdateWeights` brings for the model from now on is staged until `FinishUpdate`. Forgets what an update
    that was started before has staged."""

    reply = UpdateStarted
    model: str


@dataclass(frozen=True, slots=True)
class UpdateWeights:
    """New weights: staged while the old ones serve, then committed between two steps, unless an update is started.
    `alone`: committed in any case; an update that somebody started and did not finish is given up.

    `disk`: `path` is a checkpoint directory or one safetensors file. `lora`: `path` is a LoRA adapter's directory, and
    that adapter becomes the model's own until other weights come: what names no adapter is for it, the base stays as it
    is. `shm`: safetensors bytes, the first `size` of the POSIX shared memory named `path` (0: all). `cuda_ipc`:
    `handles`. `distributed`: `tensors`, in the order in which rank 0 of transfer group `group` broadcasts them: one by
    one, or `packed` as bytes one behind the other in chunks that are closed once they exceed `chunk_bytes`.

    `partial`: tensors that do not come stay what they are. `also`: other models whose weights these are, too; all that
    share a tensor with the model must be named. `in_flight` is as `Pause.mode`; requests that are kept go on with the
    new weights. A model that is paused stays so. `label`: the trainer's name for the version.
    """

    reply = Updated
    model: str
    source: Source
    path: str = ""
    size: int = 0
    handles: tuple[IpcTensor, ...] = ()
    tensors: tuple[TensorSpec, ...] = ()
    group: str = ""
    packed: bool | None = False  # None: as the group was initialised
    chunk_bytes: int = 1 << 30
    partial: bool = False
    also: tuple[str, ...] = ()
    in_flight: InFlight = "keep"
    label: str = ""
    alone: bool = False


@dataclass(frozen=True, slots=True)
class FinishUpdate:
    """Commits what was staged since `StartUpdate`. Fields as in `UpdateWeights`."""

    reply = Updated
    model: str
    partial: bool = False
    also: tuple[str, ...] = ()
    in_flight: InFlight = "keep"
    label: str = ""


@dataclass(frozen=True, slots=True)
class LabelWeights:
    """The trainer's name for the weights that are served now."""

    reply = Labelled
    model: str
    label: str


@dataclass(frozen=True, slots=True)
class InitTransfer:
    """The engine joins a group of processes, in which rank 0, the trainer, broadcasts weights; its own rank is
    `rank_offset`. Answered when all are there. A group of that name is left first."""

    reply = TransferReady
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    backend: Backend = "gloo"
    group: str = ""
    packed: bool = False  # of broadcasts that do not say it themselves
    seconds: float = 300.0  # the longest wait, for the others and for each broadcast


@dataclass(frozen=True, slots=True)
class DestroyTransfer:
    reply = TransferClosed
    group: str = ""


AnyCommand = (
    Pause
    | Resume
    | AbortAll
    | ResetPrefixCache
    | Normalize
    | LoadAdapter
    | UnloadAdapter
    | StartUpdate
    | UpdateWeights
    | FinishUpdate
    | LabelWeights
    | InitTransfer
    | DestroyTransfer
)
