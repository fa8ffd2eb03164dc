"""What becomes of every field of a dialect: honoured ones are parsed, the others have a reason."""

from __future__ import annotations

from itertools import chain

import pytest
from pydantic import BaseModel

from tandem.server.api.fields import Field
from tandem.server.api.protocol import Common, GenerationBody
from tandem.server.compat import (
    adapters,
    llama_factory,
    openrlhf,
    sglang_control,
    sglang_generate,
    sglang_scoring,
    slime,
    trl_legacy,
    trl_scoring,
    vllm_control,
    vllm_generate,
    vllm_pooling,
    vllm_scoring,
)

Pair = tuple[type[BaseModel], dict[str, Field]]
TABLES: list[Pair] = [
    (vllm_pooling.ClassifyBody, vllm_pooling.CLASSIFY),
    (vllm_pooling.PoolingBody, vllm_pooling.POOLING),
    (vllm_scoring.ScoreBody, vllm_scoring.SCORE),
    (vllm_scoring.RerankBody, vllm_scoring.RERANK),
    (sglang_scoring.ClassifyBody, sglang_scoring.CLASSIFY),
    (openrlhf.RewardQuery, openrlhf.GET_REWARD),
    (slime.Rollout, slime.RM),
    (llama_factory.Evaluation, llama_factory.EVALUATION),
    (vllm_generate.GenerateBody, vllm_generate.GENERATE),
    (sglang_generate.GenerateBody, sglang_generate.GENERATE),
    (trl_legacy.GenerateBody, trl_legacy.GENERATE),
    (trl_legacy.ChatBody, trl_legacy.CHAT),
    (trl_scoring.SequencesBody, trl_scoring.SEQUENCES),
    (vllm_control.AbortBody, vllm_control.ABORT),
    (vllm_control.InitBody, vllm_control.INIT),
    (vllm_control.UpdateBody, vllm_control.UPDATE),
    (vllm_control.FinishBody, vllm_control.FINISH),
    (vllm_control.VersionBody, vllm_control.VERSION),
    (sglang_control.PauseBody, sglang_control.PAUSE),
    (sglang_control.AbortBody, sglang_control.ABORT),
    (sglang_control.DiskBody, sglang_control.DISK),
    (sglang_control.GroupBody, sglang_control.GROUP),
    (sglang_control.BroadcastBody, sglang_control.BROADCAST),
    (sglang_control.LeaveBody, sglang_control.LEAVE),
    (adapters.LoadBody, adapters.LOAD),
    (adapters.UnloadBody, adapters.UNLOAD),
]
NESTED: list[Pair] = [
    (vllm_generate.SamplingParams, vllm_generate.SAMPLING),
    (sglang_generate.SamplingParams, sglang_generate.SAMPLING),
]


def names(body: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in body.model_fields.items()}


@pytest.mark.parametrize(("body", "table"), TABLES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_every_field_has_a_fate(body: type[BaseModel], table: dict[str, Field]) -> None:
    """Not all dialects have all of `Common`."""
    honoured = {name for name, field in table.items() if field.fate == "honoured"}
    assert honoured <= names(body)
    assert names(body) - honoured <= set(Common.model_fields)
    assert all(field.reason for field in table.values() if field.fate != "honoured")


@pytest.mark.parametrize(("body", "table"), NESTED)
def test_sampling_parameters_are_those_of_completions(body: type[BaseModel], table: dict[str, Field]) -> None:
    honoured = {name for name, field in table.items() if field.fate == "honoured"}
    assert honoured <= names(body)
    assert names(body) - honoured <= names(GenerationBody)
    assert all(field.reason for field in chain(table.values()) if field.fate != "honoured")
