"""What goes into the engine and what comes out of it: integers, floats and names, no text and no tensors.

Plain dataclasses, so that the engine runs where only torch is installed; `link.py` knows how they travel.
A `Request` asks one hosted model for up to `n` sampled continuations of one prompt, or for a score or an embedding of
it. The engine answers with a stream of `Output`s, one per choice and step in which something happened to that choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Role = Literal["policy", "reference", "reward", "value", "embedding"]
Want = Literal["tokens", "logprobs", "prompt_logprobs", "score", "values", "embedding"]
LogprobsMode = Literal["raw", "processed"]
Gives = Literal["text", "scores", "embeddings", "values"]
PoolingMode = Literal["last", "mean", "cls"]
Normalization = Literal["none", "checkpoint", "bias", "mean_std"]  # of rewards: where their mean and std come from
ScorePoolingMode = Literal["last", "last_non_pad", "first_eos", "before_first_pad", "mean", "token_id"]
Finish = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["invalid", "not_found", "conflict", "overloaded", "deadline", "unavailable", "internal"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Bounds are checked at the edge (`api`); the engine takes them as they are.

    Order: bias, grammar and allowed ids -> bad words -> repetition -> presence/frequency -> temperature -> top-k ->
    top-p -> min-p.
    """

    max_tokens: int
    seed: int  # 0 <= seed < 2**64; the client draws one where the user gave none
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0  # before that many tokens no end or stop id is drawn
    stop_ids: tuple[int, ...] = ()  # the request's own; the model's end ids come on top unless `ignore_eos`
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    grammar: str = ""  # the answer's, as `text.grammar` makes it; empty: none
    logprobs: int | None = None  # None: none; k: of the drawn token and the k most likely
    logprobs_mode: LogprobsMode = "raw"  # of the model as it is, or of what the tokens are drawn from
    policy_logprobs: bool = False  # beside those: of logits / temperature (greedy: of the logits), nothing else applied

    @property
    def penalises(self) -> bool:
        """Whether the sampler must know which tokens came before."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one model. `id` is unique within an engine; the link's client makes it."""

    id: int
    model: str
    token_ids: list[int]
    sampling: Sampling | None = None  # None: nothing is sampled (scores, prompt log-probabilities alone)
    want: frozenset[Want] = frozenset({"tokens"})
    n: int = 1  # choices; they share the prompt's pages
    prompt_logprobs: int | None = None  # k most likely beside each prompt token; None unless wanted
    first_needed_row: int | None = None  # earliest position that is needed; None: all for values, else the last one
    priority: int = 0  # lower goes first
    deadline: float | None = None  # time.monotonic() of this machine
    cache_salt: str = ""
    adapter: str = ""  # one of the model's; empty: none, unless `model` is the name of one
    temperature: float = 1.0  # the prompt's log-probabilities are those of logits / temperature; 0: of the logits
    group: int = 0  # an open `Group`, whose prompt `token_ids` continue; 0: none

    @property
    def needed_row(self) -> int:
        """Cached pages are reused only for positions strictly before this one."""
        last = len(self.token_ids) - 1
        return last if self.first_needed_row is None else min(self.first_needed_row, last)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt that stays computed while it is open, for members that continue it with tokens that are there already.

    A member is a `Request` with `group` set, whose `token_ids` (C of them) are the continuation, with neither sampling
    nor n, and under the group's priority, salt and adapter. Of what it wants, `prompt_logprobs` gives C entries, one
    per token of its own; `values` C + 1, the first before its first token, the last behind its last; `score` is read at
    its last token. `id` is unique among groups and requests.

    Prompt and members are computed once each: P + sum of C tokens. The prompt again after new weights, and where other
    requests took its pages while the group had no unfinished member.
    """

    id: int
    model: str
    token_ids: list[int]
    longest: int  # the most tokens that a member may have
    priority: int = 0
    deadline: float | None = None  # time.monotonic(); then it closes, and members that are not finished fail
    cache_salt: str = ""
    adapter: str = ""


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of a run of tokens, column by column; `top_*[i]` holds the k most likely at token i.

    `policy` is empty unless `Sampling.policy_logprobs` asked for it.
    """

    values: list[float] = field(default_factory=list[float])
    ranks: list[int] = field(default_factory=list[int])  # 1 is the most likely
    top_ids: list[list[int]] = field(default_factory=list[list[int]])
    top_values: list[list[float]] = field(default_factory=list[list[float]])
    policy: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class EngineError:
    """Why a request or a command got no answer. `api.errors` turns the kind into a status."""

    kind: ErrorKind
    message: str
    param: str | None = None
    retry_after: float | None = None  # seconds


@dataclass(slots=True)
class Output:
    """What one step made of one choice. `finish` set: the last one for this choice.

    An `error` finishes the whole request. The first output of a request carries `cached_tokens`, and the prompt's
    log-probabilities where they were wanted (entry i belongs to prompt token i + 1; the first token has none).
    """

    request_id: int
    choice: int = 0
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    stop_id: int | None = None  # the end or stop id that ended it, also the last of token_ids
    cached_tokens: int | None = None
    prompt_logprobs: Logprobs | None = None
    scores: list[float] | None = None  # one per label
    weight_version: int = 0  # of the weights that drew the last of `token_ids`, or gave the rest
    error: EngineError | None = None
    embedding: list[float] | None = None  # pooled, not normalised
    values: list[float] | None = None  # of the positions from the first needed row on; see `Group` for members
    pooled_index: int | None = None  # the position that `scores` were read at; None: all of them were pooled
    earlier_versions: list[tuple[int, int]] | None = None  # (version, tokens) of its first tokens, where that differs

    def runs(self) -> Iterator[tuple[int, int]]:
        """(version, tokens) of its tokens, in order."""
        told = 0
        for version, count in self.earlier_versions or ():
            yield version, count
            told += count
        yield self.weight_version, len(self.token_ids) - told


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token for each of many choices, and nothing else to say of any: outputs by column, one entry per choice."""

    request_ids: list[int]
    choices: list[int]
    token_ids: list[int]
    weight_version: int

    def __iter__(self) -> Iterator[Output]:
        for request_id, choice, token in zip(self.request_ids, self.choices, self.token_ids, strict=True):
            yield Output(request_id, choice, [token], weight_version=self.weight_version)


class Outputs:
    """What a step has to say: `tokens`, most of it, and an `Output` for each choice of which there is more to say.

    Iterated it gives all of it as `Output`s.
    """

    __slots__ = ("others", "tokens")

    def __init__(self, others: list[Output] | None = None) -> None:
        self.tokens: list[Tokens] = []
        self.others: list[Output] = [] if others is None else others

    def __iter__(self) -> Iterator[Output]:
        for tokens in self.tokens:
            yield from tokens
        yield from self.others

    def __len__(self) -> int:
        return sum(len(tokens.token_ids) for tokens in self.tokens) + len(self.others)

    def extend(self, more: Outputs) -> None:
        self.tokens += more.tokens
        self.others += more.others


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """A LoRA adapter that is loaded. Requests name it as they would a model."""

    name: str
    path: str  # its directory
    rank: int
    created: int  # when it was loaded, seconds since the epoch


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker must know of a hosted model, or of one with an adapter: then `name` is the adapter's."""

    name: str
    role: Role
    path: str  # checkpoint directory: tokenizer and template are read from it
    architecture: str
    dtype: str
    context: int  # tokens, prompt and continuation together
    vocab_size: int
    end_ids: tuple[int, ...]
    labels: int  # outputs of a head that gives scores or values
    weight_version: int
    created: int  # seconds since the epoch
    aliases: tuple[str, ...] = ()
    max_request_tokens: int = 0  # the most tokens that fit its KV cache at once; a longer request cannot run
    embedding_size: int = 0  # of an embedding model's answers; 0 for all others
    pooling: str = ""  # of embeddings and scores
    normalized: bool = True  # embeddings are meant to be divided by their length
    label_names: tuple[str, ...] = ()  # of a score head's outputs
    head: str = ""  # how a head that gives scores or values lay on disk
    reward_mean: float = 0.0  # a reward is (score - mean) / std, by the checkpoint or `commands.Normalize`;
    reward_std: float = 1.0  # scores of the engine are raw
    reward_normalization: Normalization = "none"
    fingerprint: str = ""  # of the tokenizer: ids mean the same where it is; empty: there is none
    shares: str = ""  # the model whose decoder it computes with; empty: it has its own
    adapters: tuple[AdapterCard, ...] = ()
    parent: str = ""  # the model that an adapter belongs to; empty for models
    weight_label: str = ""  # the trainer's name for the weights
    paused: bool = False
    quantization: str = "none"  # the scheme of its matrices
    lm_head: str = "none"  # that of a language model's head
    kv_dtype: str = ""  # what K and V are kept in; empty: dtype

    @property
    def gives(self) -> Gives:
        if self.embedding_size:
            return "embeddings"
        if not self.labels:
            return "text"
        return "values" if self.role == "value" else "scores"

    @property
    def precision(self) -> str:
        """What it computes in, and what is kept otherwise, in words."""
        text = self.gives == "text"
        if self.quantization == "none":
            weights = ", head int8" if text and self.lm_head == "int8" else ""
        else:
            weights = f", weights {self.quantization}" + (", head not" if text and self.lm_head == "none" else "")
        pages = "" if self.kv_dtype in ("", self.dtype) else f", KV {self.kv_dtype}"
        return f"{self.dtype}{weights}{pages}"

    def adapted(self, adapter: AdapterCard) -> ModelCard:
        """The model with one of its adapters."""
        changes = {"name": adapter.name, "parent": self.name, "created": adapter.created}
        return replace(self, aliases=(), adapters=(), **changes)


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every hosted model. `epoch` names the engine process, `version` grows with every change inside it."""

    epoch: int
    version: int
    models: tuple[ModelCard, ...]

    @property
    def listed(self) -> tuple[ModelCard, ...]:
        """All that a request may name: each model, and behind it the model with each of its adapters."""
        return tuple(one for card in self.models for one in (card, *map(card.adapted, card.adapters)))

    def find(self, name: str) -> ModelCard | None:
        """A model by its name or an alias, or one with the adapter of that name."""
        return next((card for card in self.listed if name == card.name or name in card.aliases), None)
