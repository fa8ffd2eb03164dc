"""More choices are drawn than are shown: the best are, by a reward model or by their own log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.request import ModelCard
from .choices import Choice
from .errors import invalid, unavailable
from .generation import Generation, Part
from .protocol import GenerationBody
from .rlhf.groups import PromptGroup, Terms, check_length, together
from .rlhf.prompts import Reader, Source
from .rlhf.roles import reward_model
from .rlhf.translation import Translation
from .service import Service, in_thread_if


def check(body: GenerationBody, max_tokens: int | None) -> None:
    """What no field alone can tell."""
    drawn, judged = body.best_of or 1, body.rank_by is not None
    if body.best_of is not None and drawn < body.n:
        raise invalid(f"best_of is {drawn}; it must be at least n, {body.n}", "best_of")
    name, value, must = ("rank_by", repr(body.rank_by), "left out") if judged else ("best_of", drawn, "1")
    if not judged and drawn == 1:
        return
    if body.stream:
        raise invalid(
            f"{name} is {value}; it must be {must} with stream: true, since the best is known at the end", name
        )
    if max_tokens == 0:
        raise invalid(f"{name} is {value}; it must be {must} where max_tokens is 0", name)


@dataclass(frozen=True, slots=True)
class Judge:
    """The reward model that `rank_by` names. `translation`: it has another tokenizer than the policy."""

    card: ModelCard
    translation: Translation | None

    @classmethod
    def of(cls, service: Service, body: GenerationBody, policy: ModelCard) -> Judge | None:
        """None: nothing is ranked by rewards. Raises ApiError."""
        if body.rank_by is None:
            return None
        card = reward_model(service, body.rank_by, "rank_by")
        if card.fingerprint == policy.fingerprint:
            return cls(card, None)
        if getattr(body, "continue_final_message", False):
            message = f"continue_final_message is true; {card.name!r} has another tokenizer, and reads whole messages"
            raise invalid(message, "continue_final_message")
        reader = Reader(card, service.texts(card), body.add_special_tokens)
        return cls(card, Translation(policy, service.texts(policy), reader))

    async def reward(
        self, service: Service, body: GenerationBody, request_id: str, generation: Generation, sources: Sequence[Source]
    ) -> None:
        """Gives every choice its reward: those of a prompt are one group. `sources`: the prompts as they were sent.

        The choices are finished and nothing of them has been taken. Raises ApiError.
        """
        service.traffic.scored(self.card, len(generation.choices))
        deadline = min(part.request.deadline or service.deadline(body) for part in generation.parts)
        terms = Terms(service.client, request_id, deadline, body.priority, body.cache_salt, goes_on=True)
        pairs = zip(generation.parts, sources, strict=True)
        await together(self._reward_part(part, source, terms) for part, source in pairs)

    async def _reward_part(self, part: Part, source: Source, terms: Terms) -> None:
        prompt, members = await self._group(part, source)
        for choice, member in zip(part.choices, members, strict=True):
            check_length(self.card, len(prompt), len(member), f"choice {choice.number}")
        group = PromptGroup(terms, self.card, prompt, max(map(len, members)))
        found = await together(group.run(member, "score") for member in members)
        for choice, one in zip(part.choices, found, strict=True):
            choice.reward = one.score

    async def _group(self, part: Part, source: Source) -> tuple[list[int], list[list[int]]]:
        if not all(choice.waiting.token_ids for choice in part.choices):
            raise unavailable("a choice was aborted before its first token, so there is nothing to rank")
        if self.translation is None:
            return part.request.token_ids, [choice.waiting.token_ids for choice in part.choices]
        translation = self.translation
        group = await in_thread_if(
            True, lambda: translation.group(source, [(c.waiting.token_ids, _ended(c)) for c in part.choices], "rank_by")
        )
        return group.prompt, group.members


def _ended(choice: Choice) -> bool:
    return choice.finish_reason != "length"
