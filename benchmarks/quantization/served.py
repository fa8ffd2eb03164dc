"""Two models of a running server, by what it tells: the most likely tokens of each prompt position, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import httpx

from ..bench.models import UsageError
from .quality import LanguageQuality, RewardQuality
from .texts import Example, Message, passages, rankings

Tick = Callable[[int], None]  # texts compared so far


class Server:
    """A Tandem server, to be used in a `with`. Raises UsageError with what it says where it refuses."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=600.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        return self._asked(lambda: self._http.get(path))

    def post(self, path: str, **body: Any) -> Any:
        return self._asked(lambda: self._http.post(path, json=body))

    def _asked(self, ask: Callable[[], httpx.Response]) -> Any:
        try:
            answer = ask()
            if answer.is_success:
                return answer.json()
            said: Any = answer.json()["error"]["message"]
        except httpx.HTTPError as error:
            raise UsageError(f"--url {self.url}: it does not answer: {error}") from None
        except (ValueError, KeyError, TypeError):
            said = f"status {answer.status_code}"
        raise UsageError(f"--url {self.url}: {said}")


class ServedModel:
    """One of its models. `top`: how many of the most likely tokens are asked for."""

    def __init__(self, server: Server, name: str, top: int) -> None:
        self.server, self.name, self.top = server, name, top
        known = {name: card for card in server.get("/v1/models")["data"] for name in (card["id"], *card["aliases"])}
        if name not in known:
            raise UsageError(f"--url {server.url}: it has no model {name}; there are {', '.join(known)}")
        self.card: Mapping[str, Any] = known[name]
        self.context: int = self.card["max_request_tokens"]

    def encode(self, text: str) -> list[int]:
        return self.server.post("/tokenize", model=self.name, prompt=text)["tokens"]

    def render(self, messages: Sequence[Message], tools: Sequence[Message], opens: bool) -> list[int]:
        body = {"messages": messages, "tools": tools, "add_generation_prompt": opens}
        return self.server.post("/tokenize", model=self.name, **body)["tokens"]

    def likely(self, ids: list[int]) -> list[dict[int, float]]:
        """Log-probabilities by token id at each position but the first: the most likely ones and the prompt's."""
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": self.top}
        (choice,) = self.server.post("/v1/completions", model=self.name, **body)["choices"]
        return [{int(token): entry["logprob"] for token, entry in at.items()} for at in choice["prompt_logprobs"][1:]]

    def scores(self, texts: Sequence[list[int]]) -> list[float]:
        data = self.server.post("/v1/rewards", model=self.name, input=texts)["data"]
        return [entry["raw_reward"] for entry in sorted(data, key=lambda entry: entry["index"])]


def compare(
    reference: ServedModel, candidate: ServedModel, examples: Sequence[Example], tick: Tick
) -> LanguageQuality | RewardQuality:
    """Raises UsageError where the two cannot be compared."""
    roles = [side.card["role"] for side in (reference, candidate)]
    reward = roles == ["reward", "reward"]
    if not reward and not set(roles) <= {"policy", "reference"}:
        raise UsageError(
            f"{reference.name} has role {roles[0]} and {candidate.name} {roles[1]}: they cannot be compared"
        )
    if reference.card.get("tokenizer_fingerprint") != candidate.card.get("tokenizer_fingerprint"):
        raise UsageError(
            f"{reference.name} and {candidate.name} make other tokens of a text: compare models of one tokenizer"
        )
    context = min(reference.context, candidate.context) - 1
    if reward:
        scored = RewardQuality()
        for number, group in enumerate(rankings(examples, reference, context), 1):
            scored.add(reference.scores(group), candidate.scores(group))
            tick(number)
        return scored
    found = LanguageQuality(exact=False)
    for number, passage in enumerate(passages(examples, reference, context), 1):
        sides = [side.likely(passage.token_ids)[passage.first - 1 :] for side in (reference, candidate)]
        for p, q, token in zip(*sides, passage.token_ids[passage.first :], strict=True):
            found.add_top(p, q, token)
        tick(number)
    return found
