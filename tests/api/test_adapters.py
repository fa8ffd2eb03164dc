"""An adapter is asked for by its name, like a model."""

from __future__ import annotations

from typing import Any

import httpx


async def written(http: httpx.AsyncClient, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "The cat", "max_tokens": 8, "temperature": 0}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_completions_by_the_adapters_name(narrow_http: httpx.AsyncClient) -> None:
    poet, policy = await written(narrow_http, "poet"), await written(narrow_http, "policy")
    assert (poet["model"], policy["model"]) == ("poet", "policy")
    assert poet["choices"][0]["text"] != policy["choices"][0]["text"]


async def test_chat_with_the_models_template(narrow_http: httpx.AsyncClient) -> None:
    body = {"model": "poet", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = await narrow_http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["model"] == "poet"


async def test_it_is_listed_behind_its_model(narrow_http: httpx.AsyncClient) -> None:
    listed = (await narrow_http.get("/v1/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("policy", None), ("poet", "policy")]
    one = (await narrow_http.get("/v1/models/poet")).json()
    assert one["parent"] == "policy" and one["max_model_len"] == listed[0]["max_model_len"]
    answer = await narrow_http.post("/v1/completions", json={"model": "painter", "prompt": "x"})
    assert answer.status_code == 404 and "there are: poet, policy" in answer.json()["error"]["message"]
