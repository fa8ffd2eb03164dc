"""What `tandem bench serve` sends to whom: options, prompts of every round, requests in each server's words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import datasets
from .arrivals import Arrivals, schedule
from .client import Load
from .metrics import Selection
from .models import UsageError, path_of, tokenizer_of
from .stream import reason_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

ASK_SECONDS = 10.0  # for the list of models, and for one token
REFUSALS = (400, 415, 422, 500)  # what servers say to a field or a kind of prompt that they do not know
READY_SECONDS = 0.2  # between two questions whether a server is ready
ROUNDS_APART = 1000  # between the seeds of two rounds
WARMUPS_APART = 500


class ServeError(Exception):
    """The measurement cannot be made. One sentence for the user."""


@dataclass(frozen=True)
class Side:
    """A server."""

    name: str
    url: str  # without the endpoint
    pid: int | None = None  # the root of its processes; None: looked for


@dataclass(frozen=True)
class Dataset:
    name: str = "random"
    path: Path | None = None
    count: int = 1000
    input_len: int = 1024
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int = 0
    vocab_size: int | None = None


@dataclass(frozen=True)
class ServeOptions:
    sides: tuple[Side, ...]
    endpoint: str = "/v1/completions"
    model: str | None = None  # None: the first that the server lists
    tokenizer: str | None = None
    dataset: Dataset = Dataset()
    arrivals: Arrivals = field(default_factory=Arrivals)
    max_concurrency: int | None = None
    runs: int = 1
    num_warmups: int = 0
    seed: int = 0
    as_text: bool = False  # prompts whose token ids are known, too
    ignore_eos: bool | None = None  # None: for random prompts, as vLLM's tool does
    body: Mapping[str, Any] = field(default_factory=dict)  # None as a value takes a field out
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 600.0  # seconds for one answer
    ready_timeout: float = 0.0  # seconds; 0: servers are taken to be ready
    insecure: bool = False
    selection: Selection = field(default_factory=Selection)

    @property
    def is_chat(self) -> bool:
        return "chat" in self.endpoint

    @property
    def on_time(self) -> bool:
        """Every request has a moment of its own, and nothing but the client keeps it from being sent then."""
        return self.max_concurrency is None and self.arrivals != Arrivals()


class Prompts:
    """The items of every round."""

    def __init__(self, options: ServeOptions, tokenizer: Tokenizer | None) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._file: list[datasets.Item] = []
        self.repeated = False  # later rounds ask what earlier ones have asked
        if options.dataset.path is not None:
            count = options.dataset.count
            for wanted in (count * options.runs, count):
                with suppress(datasets.DatasetError):
                    self._file = self._load(wanted, options.seed)
                    break
            else:
                self._load(count, options.seed)  # says what is wrong
            self.repeated = len(self._file) < count * options.runs
        # Not one of those that are measured: a server may keep what it has computed for it.
        self.first = self._file[0] if self._file else self._load(1, options.seed + WARMUPS_APART - 1)[0]

    def of(self, number: int, again: int = 0) -> list[datasets.Item]:
        """Of a round; `again`: how many sides with the same address were asked before in it."""
        count = self._options.dataset.count
        if self._file:
            begin = 0 if self.repeated else number * count
            return self._file[begin : begin + count]
        return self._load(count, self._options.seed + ROUNDS_APART * number + again)

    def warmups(self, number: int) -> list[datasets.Item]:
        """Other prompts than those that are measured, or, with a file, its first."""
        count = self._options.num_warmups
        if not count:
            return []
        if self._file:
            return self._file[:1] * count
        return self._load(count, self._options.seed + ROUNDS_APART * number + WARMUPS_APART)

    @property
    def have_ids(self) -> bool:
        return self.first.token_ids is not None and not self._options.is_chat and not self._options.as_text

    @property
    def have_text(self) -> bool:
        return self.first.text is not None

    def text(self, item: datasets.Item) -> str:
        if item.text is None:
            raise UsageError(f"{self._options.endpoint} wants text, and the prompts are token ids: --tokenizer DIR")
        return item.text

    def _load(self, count: int, seed: int) -> list[datasets.Item]:
        given = self._options.dataset
        return datasets.load(
            given.name,
            given.path,
            count=count,
            input_len=given.input_len,
            output_len=given.output_len,
            range_ratio=given.range_ratio,
            prefix_len=given.prefix_len,
            seed=seed,
            tokenizer=self._tokenizer,
            vocab_size=given.vocab_size,
        )


class Bodies:
    """Items as requests."""

    def __init__(self, options: ServeOptions, models: Mapping[str, str], prompts: Prompts) -> None:
        self._options, self._models, self.prompts = options, models, prompts
        self.with_ids = prompts.have_ids
        self.fields: dict[str, Any] = {"stream_options": {"include_usage": True}}  # that not every server knows
        if options.ignore_eos or (options.ignore_eos is None and options.dataset.name == "random"):
            self.fields["ignore_eos"] = True
        self.left_out: list[str] = []  # of the fields, because a server refused them

    def of(self, side: Side, item: datasets.Item) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {"model": self._models[side.name]}
        if options.is_chat:
            body["messages"] = item.messages or [{"role": "user", "content": self.prompts.text(item)}]
        elif item.messages is not None:
            raise UsageError(f"--dataset-name {options.dataset.name} holds conversations: --backend openai-chat")
        else:
            body["prompt"] = item.token_ids if self.with_ids and item.token_ids else self.prompts.text(item)
        body |= {"max_tokens": item.output_len, "stream": True, **self.fields}
        return {name: value for name, value in {**body, **options.body}.items() if value is not None}

    def load(self, side: Side, number: int) -> tuple[Load, list[int]]:
        """What to send in this round, and the prompts' lengths as far as we know them."""
        options = self._options
        same = [other.name for other in options.sides if other.url == side.url]
        items = self.prompts.of(number, same.index(side.name))
        load = Load(
            url=side.url + options.endpoint,
            bodies=[json.dumps(self.of(side, item)) for item in items],
            moments=schedule(options.arrivals, len(items), options.seed + number),
            headers=dict(options.headers),
            max_concurrency=options.max_concurrency,
            warmups=[json.dumps(self.of(side, item)) for item in self.prompts.warmups(number)],
            timeout=options.timeout,
            insecure=options.insecure,
        )
        return load, [len(item.token_ids or ()) for item in items]


def model_of(side: Side, options: ServeOptions, http: httpx.Client) -> dict[str, Any]:
    """The entry of the model in the server's list; only its name where that is given and the list is not to be had."""
    address = f"{side.url}/v1/models"
    try:
        answer = http.get(address)
        listed = answer.json().get("data") if answer.status_code == 200 else None
        failure = "" if listed else f"HTTP {answer.status_code}: {reason_of(answer.content)}"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
        listed, failure = None, str(error) or type(error).__name__
    entries = [entry for entry in listed or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if options.model is not None:
        return next((entry for entry in entries if entry["id"] == options.model), {"id": options.model})
    for entry in entries:
        if entry.get("role") not in ("reward", "value", "embedding"):
            return entry
    failure = failure or "none of them generates"
    raise ServeError(f"{address} names no model to ask ({failure}); start the server, or say --model NAME")


def tokenizer_for(options: ServeOptions, model: Mapping[str, Any]) -> Tokenizer | None:
    """The one that is named, else that of the served checkpoint, where the server says which and it lies here."""
    if options.tokenizer is not None:
        return tokenizer_of(path_of(options.tokenizer))
    if options.dataset.vocab_size is not None:
        return None
    for place in (model.get("root"), model["id"]):
        if isinstance(place, str) and all((Path(place) / name).is_file() for name in ("tokenizer.json", "config.json")):
            return tokenizer_of(place)
    if options.dataset.name in ("random", "sharegpt"):
        raise UsageError(
            f"--dataset-name {options.dataset.name} needs the model's vocabulary: --tokenizer DIR"
            + (" or --vocab-size N" if options.dataset.name == "random" else "")
        )
    return None


def first_answer(side: Side, options: ServeOptions, bodies: Bodies, http: httpx.Client) -> None:
    """Asks for one token; raises ServeError where nobody is there to answer or to refuse."""
    status, said = _ask(side, options, bodies, http)
    if status not in (200, *REFUSALS):
        raise ServeError(f"{side.url}{options.endpoint}: {said}")


def agree(options: ServeOptions, bodies: Bodies, http: httpx.Client) -> None:
    """Finds what every server takes, by asking for one token: token ids or text, with usage or without.

    All sides get the same: a field that one refuses is left out for all, unless the user asked for it. Where a server
    does not answer, or refuses something else, the run will say what is wrong.
    """
    for side in options.sides:
        while True:
            status, said = _ask(side, options, bodies, http)
            if status not in REFUSALS:
                break
            refused = next((name for name in bodies.fields if name in said), None)
            if refused is not None and not (refused == "ignore_eos" and options.ignore_eos):
                bodies.left_out.append(refused)
                del bodies.fields[refused]
            elif bodies.with_ids and bodies.prompts.have_text:
                bodies.with_ids = False
            else:
                break


def _ask(side: Side, options: ServeOptions, bodies: Bodies, http: httpx.Client) -> tuple[int, str]:
    """Status and reason of a request for one token; status 0 where no answer came."""
    body = bodies.of(side, bodies.prompts.first) | {"max_tokens": 1}
    try:
        answer = http.post(side.url + options.endpoint, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return 0, str(error) or type(error).__name__
    if answer.status_code == 200:
        return 200, ""
    return answer.status_code, f"HTTP {answer.status_code}: {reason_of(answer.content)}"


def patiently(work: Callable[[], T], seconds: float) -> T:
    """What `work` gives, tried again until it raises no ServeError; after so many seconds the last one is raised."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except ServeError as error:
            if time.monotonic() >= end:
                raise ServeError(f"not ready within {seconds:g} s: {error}" if seconds else str(error)) from None
        time.sleep(READY_SECONDS)
