"""POST /tokenize and /detokenize, and what a server says of itself."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tandem.server.text.text import Text

MESSAGES = [{"role": "user", "content": "Hi, 猫"}, {"role": "assistant", "content": "So"}]


def ask(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text(http: httpx.Client, text: Text, context: int) -> None:
    ids = text.encode("The cat")
    assert ask(http, "/tokenize", prompt="The cat") == {
        "count": len(ids),
        "max_model_len": context,
        "tokens": ids,
        "token_strs": None,
    }
    assert ask(http, "/tokenize", prompt="The cat", add_special_tokens=False)["tokens"] == ids[1:]
    assert ask(http, "/tokenize", prompt="")["tokens"] == text.encode("")
    written = ask(http, "/tokenize", model="reward", prompt=" cat", return_token_strs=True)["token_strs"]
    assert written[0] == "<s>" and "".join(written[1:]) == "Ġcat"


@pytest.mark.parametrize(
    "more",
    [{}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"add_special_tokens": True}],
)
def test_a_conversation_is_what_chat_makes_of_it(http: httpx.Client, more: dict[str, Any]) -> None:
    chat = {"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True, **more}
    used = ask(http, "/v1/chat/completions", **chat)["prompt_token_ids"]
    assert ask(http, "/tokenize", messages=MESSAGES, **more)["tokens"] == used


def test_back_again(http: httpx.Client) -> None:
    ids = ask(http, "/tokenize", prompt="The 猫")["tokens"]
    assert ask(http, "/detokenize", tokens=ids) == {"prompt": "<s>The 猫"}
    assert ask(http, "/detokenize", tokens=ids, skip_special_tokens=True) == {"prompt": "The 猫"}
    assert ask(http, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt", "either"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "a string"),
        ("/tokenize", {"prompt": "a", "return_token_str": True}, "return_token_str", "return_token_strs"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template", "never run"),
        ("/tokenize", {"messages": []}, "messages", "at least 1"),
        ("/detokenize", {"tokens": [5, 320]}, "tokens", "0 to 319"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "0 to 319"),
        ("/detokenize", {"tokens": ["5"]}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": [5] * (2**20 + 1)}, "tokens", "1048576"),
        ("/detokenize", {}, "tokens", "missing"),
    ],
)
def test_refusals(http: httpx.Client, path: str, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error
    missing = http.post(path, json={"prompt": "a", "tokens": [5], "model": "nobody"} if body else {"model": "x"})
    assert missing.status_code in (400, 404)


def test_server_info(http: httpx.Client, context: int) -> None:
    about = http.get("/server_info").json()
    assert about["version"] == http.get("/version").json()["version"] and about["state"] == "ready"
    assert [model["id"] for model in about["models"]] == ["policy", "reward", "embed"]
    now = about["models"][0]["now"]
    assert now["running"] == now["waiting"] == now["pages_used"] == 0 < now["pages"]
    assert about["models"][0]["max_model_len"] == context
    assert about["options"]["engine"]["max_num_seqs"] == 256 and about["options"]["api_workers"] == 1


async def test_keys_are_not_shown(narrow_http: httpx.AsyncClient) -> None:
    answer = await narrow_http.get("/server_info")
    assert answer.status_code == 200 and "second-key" not in answer.text and "api_keys" not in answer.text
