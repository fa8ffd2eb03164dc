"""Questions to a server of which the answer is a refusal."""

from __future__ import annotations

from typing import Any

import httpx


def refused(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None, words: str, status: int = 400
) -> None:
    """The refusal names `param`, and says `words`."""
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"], error
