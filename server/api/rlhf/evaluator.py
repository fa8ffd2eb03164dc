"""Finished sequences before all the models that judge them, at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...engine.request import ModelCard
from ..errors import invalid
from ..service import Service, check_ids, in_thread_if
from .bodies import EvaluationBody, Want
from .groups import Found, PromptGroup, Terms, Wanted, check_length, limit_of, together
from .judgement import Judgement, judged
from .prompts import Reader, Source, shared
from .roles import Part, cards_of, hosted_as
from .translation import Translation

NEEDS: Mapping[Want, tuple[Part, ...]] = {  # token_rewards also need a kl, unless its coefficient is 0
    "policy_logprobs": ("policy",),
    "ref_logprobs": ("reference",),
    "values": ("value",),
    "reward": ("reward",),
    "kl": ("policy", "reference"),
    "token_rewards": ("reward",),
}
READS: Mapping[Part, Wanted] = {
    "policy": "prompt_logprobs",
    "reference": "prompt_logprobs",
    "reward": "score",
    "value": "values",
}

MEMBER_STEP = 256  # tokens; a group holds pages for its longest member, which is known to so many of them


class Evaluator:
    """Of one HTTP request. Token ids are the policy's, or another model's where no policy takes part."""

    def __init__(
        self, service: Service, body: EvaluationBody, terms: Terms, temperature: float, also: Part | None = None
    ) -> None:
        """`temperature`: of the log-probabilities. `also`: takes part whatever is wanted.

        Raises ApiError: there are no such models, or fields do not go together.
        """
        self.body, self.terms = body, terms
        self.needs = needs_of(body, also)
        self.cards = cards_of(service, named_parts(body), self.needs)
        self.owner = owner_of(service, self.cards)
        self.reader = self._reader(service, self.owner)  # of prompts as the token ids' owner is given them
        self.translation: Translation | None = None  # for a reward model with another tokenizer
        others: list[Part] = [part for part in self.needs if self.cards[part].fingerprint != self.owner.fingerprint]
        if others:
            self._check(others)
            reader = self._reader(service, self.cards["reward"])
            self.translation = Translation(self.owner, service.texts(self.owner), reader)
        self.prefilled = self.prefilled_unshared = 0  # tokens
        self._temperature = temperature
        self._seconds: dict[Part, tuple[float, float]] = {}  # first question, last answer

    async def prompt(self, source: Source, token_ids: list[int], longest: int) -> JudgedPrompt:
        """`token_ids`: the source as the owner reads it. `longest`: the most tokens that a completion may have.

        Raises ApiError, also where the prompt leaves no room for any.
        """
        prompt = JudgedPrompt(self)
        for part in self.needs:
            card = self.cards[part]
            if part == "reward" and self.translation is not None:
                continue
            check_length(card, len(token_ids), 1, source.path("completions"))
            room = limit_of(card) - len(token_ids)
            prompt.groups[part] = PromptGroup(self.terms, card, token_ids, min(longest, room))
        if self.translation is not None:
            translation, source = self.translation, self.translation.source(source)
            ids = await in_thread_if(True, lambda: translation.reader.prompt(source))
            prompt.translated = Translated(translation, source, ids, self.terms)
        return prompt

    async def ask(self, part: Part, group: PromptGroup, token_ids: list[int]) -> Found:
        began = time.perf_counter()
        found = await group.run(token_ids, READS[part], self._temperature)
        first, _ = self._seconds.get(part, (began, began))
        self._seconds[part] = min(first, began), time.perf_counter()
        return found

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
        """`prefill_tokens` are those that all models computed; `prefill_tokens_unshared` would be without groups."""
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prefill_tokens": self.prefilled,
            "prefill_tokens_unshared": self.prefilled_unshared,
        }

    def milliseconds(self) -> dict[str, float]:
        """That each part took, from the first question to the last answer."""
        return {part: round(1000 * (end - start), 3) for part, (start, end) in self._seconds.items()}

    def _reader(self, service: Service, card: ModelCard) -> Reader:
        return Reader(card, service.texts(card), self.body.add_special_tokens, self.body.chat_template_kwargs)

    def _check(self, others: Sequence[Part]) -> None:
        """Across tokenizers there is a reward, and nothing that belongs to a token."""
        if list(others) == ["reward"] and "token_rewards" not in self.body.want:
            return
        names = " and ".join(sorted({repr(self.cards[part].name) for part in others}))
        raise invalid(
            f"{names} and {self.owner.name!r}, whose the token ids are, have different tokenizers: across them "
            "want can only be reward",
            "want",
        )


@dataclass(slots=True)
class JudgedPrompt:
    """A prompt before all models, which compute it once for the sequences that are judged at the same time."""

    evaluator: Evaluator
    groups: dict[Part, PromptGroup] = field(default_factory=dict[Part, PromptGroup])
    translated: Translated | None = None
    _counted: set[int] = field(default_factory=set[int])  # groups whose prompt is counted

    async def judge(
        self, token_ids: list[int], finish_reason: str | None, where: str, policy: Found | None = None
    ) -> Judgement:
        """`finish_reason` None: by the last token. `policy`: what the policy would say, where it is known.

        Raises ApiError.
        """
        evaluator = self.evaluator
        body, owner = evaluator.body, evaluator.owner
        check_ids(token_ids, owner, where)
        has_end = token_ids[-1] in owner.end_ids
        cut = not has_end if finish_reason is None else finish_reason != "stop"
        found: dict[Part, Found] = {} if policy is None else {"policy": policy}
        asked = self._asked(token_ids, found)
        if self.translated is not None:
            asked["reward"] = await self.translated.place(token_ids, not cut, where)
        for group, member in asked.values():
            check_length(group.card, len(group.prompt), len(member), where)
        for group, member in asked.values():
            self._count(group, member)
        works = [evaluator.ask(part, group, member) for part, (group, member) in asked.items()]
        found.update(zip(asked, await together(works), strict=True))
        penalty = 0.0 if has_end else body.missing_eos_penalty
        judgement = judged(body, evaluator.cards, found, tokens=len(token_ids), cut=cut, penalty=penalty)
        judgement.retokenized = self.translated is not None
        return judgement

    def _asked(self, token_ids: list[int], found: Mapping[Part, Found]) -> dict[Part, tuple[PromptGroup, list[int]]]:
        """What is not found yet: in which group, and the member of it."""
        return {part: (group, token_ids) for part, group in self.groups.items() if part not in found}

    def _count(self, group: PromptGroup, member: list[int]) -> None:
        evaluator = self.evaluator
        evaluator.prefilled_unshared += len(group.prompt) + len(member)
        evaluator.prefilled += len(member)
        if not group.shares or id(group) not in self._counted:
            self._counted.add(id(group))
            evaluator.prefilled += len(group.prompt)


@dataclass(slots=True)
class Translated:
    """A prompt before a reward model with another tokenizer, where a completion may change the prompt's last tokens."""

    translation: Translation
    source: Source
    prompt: list[int]
    terms: Terms
    # By the length of what is shared, and of the longest member.
    groups: dict[tuple[int, int], PromptGroup] = field(default_factory=dict[tuple[int, int], PromptGroup])

    async def place(self, token_ids: list[int], ended: bool, where: str) -> tuple[PromptGroup, list[int]]:
        """The group, and the member of it that the completion is. Raises ApiError."""
        whole = await in_thread_if(True, lambda: self.translation.whole(self.source, token_ids, ended, where))
        card, cut = self.translation.reader.card, shared(self.prompt, [whole])
        length, (member,) = len(cut.prompt), cut.members
        longest = min(limit_of(card) - length, -(-len(member) // MEMBER_STEP) * MEMBER_STEP)
        group = self.groups.get((length, longest))
        if group is None:
            group = self.groups[length, longest] = PromptGroup(self.terms, card, cut.prompt, longest)
        return group, member


def needs_of(body: EvaluationBody, also: Part | None) -> list[Part]:
    """The parts that take part, the one that does anyway first. Raises ApiError."""
    parts: dict[Part, None] = {} if also is None else {also: None}
    for want in body.want:
        parts |= dict.fromkeys(NEEDS[want])
    if "token_rewards" in body.want:
        if body.kl_coef is None:
            raise invalid("kl_coef is missing: token_rewards are -kl_coef · kl, and the reward at the end", "kl_coef")
        if body.kl_coef:
            parts |= dict.fromkeys(NEEDS["kl"])
    return list(parts)


def named_parts(body: EvaluationBody) -> dict[Part, str | None]:
    """`model` is another way to name the policy. Raises ApiError."""
    models = body.models
    if body.model is not None and models.policy not in (None, body.model):
        raise invalid(f"model is {body.model!r} and models.policy {models.policy!r}: name one policy", "model")
    return {
        "policy": models.policy or body.model,
        "reference": models.reference,
        "reward": models.reward,
        "value": models.value,
    }


def owner_of(service: Service, cards: Mapping[Part, ModelCard]) -> ModelCard:
    """Whose token ids the request's are: the policy's, also where it is not asked and the only one."""
    if "policy" in cards:
        return cards["policy"]
    policies = hosted_as(service, "policy")
    return policies[0] if len(policies) == 1 else next(iter(cards.values()))
