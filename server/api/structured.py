"""What an answer shall look like, as a request says it -> the grammar that it will follow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ..text import grammar as grammars
from ..text.grammar import GrammarError
from .errors import invalid
from .protocol import GenerationBody, ResponseFormat, StructuredOutputs
from .service import Service

Wish = tuple[str, Callable[[], str]]  # the field that holds it, what makes it a grammar


async def grammar_of(service: Service, body: GenerationBody) -> str:
    """Checked, so that a model can follow it; empty where nothing is asked for."""
    wishes = [wish for wish in (_format(body.response_format), _structured(body.structured_outputs)) if wish]
    if not wishes:
        return ""
    if len(wishes) > 1:
        raise invalid("structured_outputs and response_format each say what the answer must be; send one",
                      "structured_outputs")  # fmt: skip
    if body.ignore_eos:
        message = "ignore_eos is true; an answer with response_format or structured_outputs ends with end-of-text"
        raise invalid(message, "ignore_eos")
    ((param, make),) = wishes

    def work() -> str:
        grammar = make()
        service.grammars.check(grammar)
        return grammar

    try:
        return await asyncio.to_thread(work)
    except GrammarError as error:
        raise invalid(str(error), param) from None


def _format(wanted: ResponseFormat | None) -> Wish | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return "response_format", grammars.json_object
    return "response_format.json_schema.schema", partial(grammars.of_schema, wanted.json_schema.schema_)


def _structured(wanted: StructuredOutputs | None) -> Wish | None:
    if wanted is None:
        return None
    if wanted.regex is not None:
        return "structured_outputs.regex", partial(grammars.of_regex, wanted.regex)
    if wanted.choice is not None:
        return "structured_outputs.choice", partial(grammars.of_choice, wanted.choice)
    if wanted.grammar is not None:
        return "structured_outputs.grammar", partial(grammars.of_lark, wanted.grammar)
    return "structured_outputs.json", partial(grammars.of_schema, wanted.json_)
