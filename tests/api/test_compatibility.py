"""docs/compatibility.md: every request field has a row, and every test it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from tandem.server.api.protocol import (
    ChatBody,
    Common,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    GenerationBody,
    RewardBody,
    StreamOptions,
    TokenizeBody,
)

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
TEXT = PAGE.read_text()
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)#(\w+)\)", TEXT)))


def rows(section: str) -> list[str]:
    return re.findall(r"^\| `([\w.]+)` \| \[", SECTIONS[section], re.MULTILINE)  # whose cell begins with a link


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize(("path", "name"), LINKS, ids=lambda value: value)
def test_a_linked_test_exists(path: str, name: str) -> None:
    assert name in functions((PAGE.parent / path).resolve())


def own(body: type[BaseModel], *bases: type[BaseModel]) -> list[str]:
    return sorted(set(body.model_fields).difference(*(base.model_fields for base in bases)))


def test_every_field_has_a_row() -> None:
    assert sorted(rows("Chat and completions")) == own(GenerationBody)
    assert sorted(rows("Chat alone")) == own(ChatBody, GenerationBody)
    assert sorted(rows("Completions alone")) == own(CompletionBody, GenerationBody)
    others = rows("Rewards, embeddings and tokens")
    expected = [f"reward.{name}" for name in own(RewardBody, Common)]
    expected += [f"embedding.{name}" for name in own(EmbeddingBody, Common)]
    expected += [f"tokenize.{name}" for name in own(TokenizeBody) if name != "model"]
    expected += [f"detokenize.{name}" for name in own(DetokenizeBody) if name != "model"]
    assert sorted(others) == sorted(expected)
    assert all(f"`{name}`" in SECTIONS["Chat and completions"] for name in StreamOptions.model_fields)
    assert len(LINKS) > 40
