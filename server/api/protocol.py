"""Request bodies: names, types and the bounds that hold for every model. What depends on one is checked in `sampling`.

Types are strict: no text is taken for a number and no boolean for an integer. Fields that are null have been taken out
before. The defaults here are the ones in force.
"""

# JSON of any shape is taken apart here:
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..engine.request import LogprobsMode

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_IDS = 1024  # stop ids; also the tokens of all bad words
MAX_BIASES = 65536
MAX_BODY_IDS = 1 << 20  # token ids to decode
MAX_BAD_WORDS = 128
INT64 = 2**63
MAX_LABEL = 256  # characters of a trainer's name for a version

Prompt = str | list[int]
Message = dict[str, Any]


def refuse(message: str) -> NoReturn:
    raise PydanticCustomError("refusal", "{message}", {"message": message})


def stops_of(value: object) -> list[str]:
    stops: list[Any] = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if (not stops and not isinstance(value, list)) or not all(isinstance(stop, str) for stop in stops):
        refuse("it must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        refuse(f"it may have at most {MAX_STOPS} strings")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            refuse(f"each string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}")
    return stops


def prompts_of(value: object) -> list[Prompt]:
    """One prompt or many, as text or as token ids -> a list of them."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        refuse("it must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        refuse("it must hold at least one prompt or token id")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if len(value) > MAX_PROMPTS:
        refuse(f"it may have at most {MAX_PROMPTS} prompts")
    if kinds == {str}:
        return value
    if kinds == {list}:
        for index, ids in enumerate(value):
            if set(map(type, ids)) != {int}:
                refuse(f"entry {index} must be a list of token ids, and not empty")
        return value
    refuse("its entries must be all strings, all integers, or all lists of integers")


def message_of(value: object) -> Message:
    """Only what `text` cannot tell: it checks roles, parts and tool calls, and passes other keys to the template."""
    if not isinstance(value, dict):
        refuse("a message must be an object with role and content")
    message: Message = value
    role = message.get("role")
    if message.get("content") is None and role != "assistant":
        refuse(f"a message of role {str(role)[:80]!r} needs content")
    return message


def bias_of(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        refuse("it must be an object from token id to bias")
    if len(value) > MAX_BIASES:
        refuse(f"it may have at most {MAX_BIASES} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            refuse(f"{key[:80]!r} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            refuse(f"the bias of token {key} is {bias!r}; it must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def ids_of(value: object) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        refuse("it must be a list of token ids")
    return value


def conversations_of(value: object) -> list[list[Message]]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPTS:
        refuse(f"it must be a list of 1 to {MAX_PROMPTS} conversations")
    for conversation in value:
        if not isinstance(conversation, list) or not 0 < len(conversation) <= MAX_MESSAGES:
            refuse(f"a conversation must be a list of 1 to {MAX_MESSAGES} messages")
    return [[message_of(message) for message in conversation] for conversation in value]


Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=0, lt=INT64)]
Size = Annotated[int, Field(ge=0, lt=INT64)]
Scale = Annotated[float, Field(ge=1e-5, le=100)]  # a temperature that logits are divided by; lower ones are greedy
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Ids = Annotated[list[int], BeforeValidator(ids_of)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage on every chunk
    include_obfuscation: bool = False  # accepted; chunks are never padded

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class JsonSchema(Body):
    """`strict` changes nothing: an answer always keeps to the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            refuse("type json_schema needs json_schema with name and schema")
        if self.type != "json_schema" and self.json_schema is not None:
            refuse(f"type {self.type} takes no json_schema")
        return self


class StructuredOutputs(Body):
    """Exactly one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            refuse(f"it must hold one of json, regex, choice and grammar, not {len(given)}")
        return self


class Common(Body):
    """What every route that asks an engine takes."""

    model: Annotated[str, Field(min_length=1)] | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] = ""
    timeout: Annotated[float, Field(gt=0)] | None = None
    add_special_tokens: bool | None = None


class GenerationBody(Common):
    """What chat and completions share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(stops_of)] = []
    seed: Annotated[int, Field(ge=-INT64, lt=2 * INT64)] | None = None
    max_tokens: Tokens | None = None
    min_tokens: Tokens = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(bias_of)] = {}
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_IDS)] = []
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Tokens | None = None
    logprobs_mode: LogprobsMode | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_weight_spans: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    rank_by: Annotated[str, Field(min_length=1)] | None = None


class ChatBody(GenerationBody):
    messages: Annotated[
        list[Annotated[Message, BeforeValidator(message_of)]], Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: Tokens | None = None
    tools: list[dict[str, Any]] = []  # what is in them, `tools` checks
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class CompletionBody(GenerationBody):
    prompt: Annotated[list[Prompt], BeforeValidator(prompts_of)]
    logprobs: Tokens | None = None
    echo: bool = False


class TokenizeBody(Body):
    model: Annotated[str, Field(min_length=1)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Annotated[Message, BeforeValidator(message_of)]], Field(min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    tools: list[dict[str, Any]] = []
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: Annotated[str, Field(min_length=1)] | None = None
    tokens: Annotated[Ids, Field(max_length=MAX_BODY_IDS)]
    skip_special_tokens: bool = False


class RewardBody(Common):
    input: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    conversations: Annotated[list[list[Message]], BeforeValidator(conversations_of)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    normalize: bool = False


class EmbeddingBody(Common):
    input: Annotated[list[Prompt], BeforeValidator(prompts_of)]
    dimensions: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
