"""The committed lists of request fields against the installed SDK and against the bodies that are parsed."""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel
from sdk_fields import sdk_fields

from tandem.server.api import fields, openai_fields
from tandem.server.api.protocol import ChatBody, CompletionBody, EmbeddingBody, GenerationBody, RewardBody
from tandem.server.api.rlhf import bodies as rlhf
from tandem.server.api.rlhf import fields as rlhf_fields

RLHF: list[tuple[type[BaseModel], dict[str, fields.Field]]] = [
    (rlhf.ScoreGroupBody, rlhf_fields.SCORE_GROUP),
    (rlhf.EvaluateBody, rlhf_fields.EVALUATE),
    (rlhf.RolloutBody, rlhf_fields.ROLLOUT),
    (rlhf.NormalizeBody, rlhf_fields.NORMALIZE),
    (rlhf.WeightsBody, rlhf_fields.WEIGHTS),
    (rlhf.PreferenceBody, rlhf_fields.PREFERENCES),
]
TABLES: list[tuple[type[BaseModel], dict[str, fields.Field]]] = [
    (ChatBody, fields.CHAT),
    (CompletionBody, fields.COMPLETIONS),
    (RewardBody, fields.REWARDS),
    (EmbeddingBody, fields.EMBEDDINGS),
    *RLHF,
]


def test_the_generated_list_is_the_installed_sdks() -> None:
    hint = "run: python tests/support/sdk_fields.py, and say in server/api/fields.py what becomes of new ones"
    for name, installed in sdk_fields().items():
        committed = set(getattr(openai_fields, name))
        if openai.__version__ == openai_fields.VERSION:
            assert set(installed) == committed, hint
        else:  # another release than the list was made from may have fewer fields, or a few that it added
            known = {"model", "input"} if name == "EMBEDDINGS" else {"model", "temperature", "stream"}
            assert known <= set(installed) & committed


def test_every_field_of_the_sdk_has_a_fate() -> None:
    assert set(openai_fields.CHAT) <= set(fields.CHAT)
    assert set(openai_fields.COMPLETIONS) <= set(fields.COMPLETIONS)
    assert set(openai_fields.EMBEDDINGS) <= set(fields.EMBEDDINGS)


@pytest.mark.parametrize(("body", "table"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_honoured_is_parsed_and_the_rest_has_a_reason(
    body: type[BaseModel], table: dict[str, fields.Field]
) -> None:
    assert {name for name, field in table.items() if field.fate == "honoured"} == set(body.model_fields)
    assert all(field.reason for field in table.values() if field.fate != "honoured")


def test_sampling_of_a_rollout_is_that_of_completions() -> None:
    honoured = {name for name, field in rlhf_fields.SAMPLING.items() if field.fate == "honoured"}
    outer = set(rlhf.RolloutBody.model_fields) - {"stream"}
    assert honoured < set(GenerationBody.model_fields) and not honoured & outer


def test_a_neutral_value_of_a_refused_field_passes() -> None:
    penalty = fields.CHAT["length_penalty"]
    assert penalty.lets_pass(1) and penalty.lets_pass(1.0) and penalty.lets_pass(None)
    assert not penalty.lets_pass(2) and not penalty.lets_pass(True)
