"""Bodies of the routes under /v1/rlhf, in the manner of `protocol`."""

# ruff: noqa: RUF012  # pydantic copies defaults
# JSON of any shape is taken apart here:
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..protocol import (
    INT64,
    MAX_CHOICES,
    MAX_LABEL,
    MAX_MESSAGES,
    MAX_PROMPTS,
    Body,
    Common,
    Ids,
    Message,
    Prompt,
    Scale,
    Size,
    conversations_of,
    message_of,
    prompts_of,
    refuse,
)
from .arrays import Encoding
from .evaluation import KlEstimator

# With these, and log-probabilities of finite logits, token rewards are float32.
MOST_KL_COEF = 1e3
MOST_REWARD = 1e30

Name = Annotated[str, Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[Ids, Field(min_length=1)]
OneMessage = Annotated[Message, BeforeValidator(message_of)]
Messages = Annotated[list[OneMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
Want = Literal["policy_logprobs", "ref_logprobs", "values", "reward", "kl", "token_rewards"]


def clip_of(value: object) -> tuple[float, float]:
    """5 is [-5, 5]."""
    ends: list[Any] = [value] if not isinstance(value, list) else value
    if len(ends) not in (1, 2) or not all(type(end) in (int, float) and abs(end) <= MOST_REWARD for end in ends):
        refuse(f"it must be a number above 0, or a list of the lowest and the highest reward, up to {MOST_REWARD:g}")
    low, high = -float(ends[0]) if len(ends) == 1 else float(ends[0]), float(ends[-1])
    if not low < high:
        refuse(f"its lowest reward, {low:g}, must be below its highest, {high:g}")
    return low, high


def chats_of(value: object) -> list[list[Message]]:
    """One conversation or many -> a list of them."""
    return conversations_of([value] if isinstance(value, list) and value and isinstance(value[0], dict) else value)


class Completion(Body):
    """Exactly one of them."""

    token_ids: TokenIds | None = None
    text: Text | None = None
    message: OneMessage | None = None


class ScoreGroupBody(Common):
    prompt: Text | None = None
    prompt_token_ids: TokenIds | None = None
    messages: Messages | None = None
    completions: Annotated[list[Completion], Field(min_length=1, max_length=MAX_PROMPTS)]
    normalize: bool = False
    pairwise: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class Models(Body):
    policy: Name | None = None
    reference: Name | None = None
    reward: Name | None = None
    value: Name | None = None


class EvaluationBody(Common):
    """What `evaluate` and `rollout` share."""

    models: Models = Models()
    want: list[Want] = []
    kl_coef: Annotated[float, Field(ge=-MOST_KL_COEF, le=MOST_KL_COEF)] | None = None
    kl_estimator: KlEstimator = "k1"
    reward_clip: Annotated[tuple[float, float], BeforeValidator(clip_of)] | None = None
    missing_eos_penalty: Annotated[float, Field(ge=0, le=MOST_REWARD)] = 0.0
    bootstrap_value: bool = True
    normalize: bool = False
    encoding: Encoding = "json"
    chat_template_kwargs: dict[str, Any] = {}


class Sequence(Body):
    """A finished completion. `finish_reason` None: stop if it ends with an end-of-text token, else length."""

    token_ids: TokenIds
    finish_reason: Literal["stop", "length"] | None = None


class SequenceGroup(Body):
    """Token ids may stand beside prompt or messages, which then are for a reward model with another tokenizer."""

    prompt: Text | None = None
    prompt_token_ids: TokenIds | None = None
    messages: Messages | None = None
    completions: Annotated[list[Sequence], Field(min_length=1, max_length=MAX_PROMPTS)]


class EvaluateBody(EvaluationBody):
    groups: Annotated[list[SequenceGroup], Field(min_length=1, max_length=MAX_PROMPTS)]
    temperature: Scale = 1.0


class RolloutBody(EvaluationBody):
    prompts: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    messages: Annotated[list[list[Message]], BeforeValidator(chats_of)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    sampling: dict[str, Any] = {}
    stream: bool = False


class Demonstration(Body):
    """A prompt and its completion; without one, `prompt`, `prompt_token_ids` or `messages` are all of it."""

    prompt: Text | None = None
    prompt_token_ids: TokenIds | None = None
    messages: Messages | None = None
    completion: Completion | None = None


class NormalizeBody(Common):
    demonstrations: Annotated[list[Demonstration], Field(max_length=MAX_PROMPTS)] = []
    mode: Literal["bias", "mean_std", "none"] = "bias"
    persist: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class IpcHandle(Body):
    """A contiguous tensor in another process's GPU memory: what `torch.UntypedStorage._share_cuda_` gives there, bytes
    in base64. `offset` counts elements from the storage's start."""

    name: Name
    dtype: Name
    shape: list[Size]
    device: Size
    handle: str
    storage_bytes: Size
    storage_offset: Size = 0
    counter: str
    counter_offset: Size = 0
    event: str
    event_sync: bool = True
    offset: Size = 0


class WeightsBody(Body):
    """`path`: on disk, or the name of shared memory, of which `size` bytes count. `adapter`: a LoRA adapter gets that
    name beside the model; without one it becomes the model's own. `version`: the trainer's name for it. `also`: other
    models whose weights these are, too."""

    model: Name | None = None
    source: Literal["disk", "lora", "shm", "cuda_ipc"]
    path: Name | None = None
    adapter: Name | None = None
    size: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    handles: Annotated[list[IpcHandle], Field(min_length=1)] | None = None
    version: Annotated[str, Field(min_length=1, max_length=MAX_LABEL)] | None = None
    in_flight: Literal["keep", "abort", "wait"] = "keep"
    partial: bool = False
    also: list[Name] = []


class PreferenceBody(Body):
    prompt: Text | None = None
    messages: Messages | None = None
    completions: Annotated[list[Text | OneMessage], Field(min_length=2, max_length=MAX_PROMPTS)]
    ranking: Annotated[list[int | list[int]], Field(min_length=1)]
    scores: list[float | None] | None = None
    model: Name | None = None
    metadata: dict[str, Any] = {}
