"""POST /v1/embeddings against transformers, through the openai client and as it is."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable

import httpx
import openai
import pytest
import torch

from tandem.server.text.text import Text

Embed = Callable[[list[int]], torch.Tensor]
TEXTS = ["The cat sat on the mat.", "a", "猫坐在垫子上", "One, two, three, four " * 20]


def normalised(vector: torch.Tensor) -> list[float]:
    return torch.nn.functional.normalize(vector, dim=-1).tolist()


def test_the_openai_client_gets_transformers_embeddings(client: openai.OpenAI, text: Text, hf_embed: Embed) -> None:
    """It asks for base64 unless told otherwise."""
    encoded = [text.encode(one) for one in TEXTS]
    packed = client.embeddings.create(model="embed", input=TEXTS)
    plain = client.embeddings.create(model="embed", input=TEXTS, encoding_format="float")
    by_ids = client.embeddings.create(model="embed", input=encoded, encoding_format="float")
    assert packed.object == "list" and packed.model == "embed"
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(map(len, encoded))
    for index, ids in enumerate(encoded):
        entry = packed.data[index]
        assert entry.index == index and entry.object == "embedding"
        assert entry.embedding == pytest.approx(normalised(hf_embed(ids)), abs=1e-5)
        assert sum(value * value for value in entry.embedding) == pytest.approx(1, abs=1e-6)
        assert plain.data[index].embedding == pytest.approx(entry.embedding, abs=1e-6)
        assert by_ids.data[index].embedding == pytest.approx(entry.embedding, abs=1e-6)
        alone = client.embeddings.create(model="embed", input=TEXTS[index]).data[0].embedding
        assert alone == pytest.approx(entry.embedding, abs=1e-6)


def test_fewer_dimensions_are_normalised_anew(client: openai.OpenAI, text: Text, hf_embed: Embed) -> None:
    found = client.embeddings.create(model="embed", input=TEXTS[0], dimensions=10).data[0].embedding
    assert found == pytest.approx(normalised(hf_embed(text.encode(TEXTS[0]))[:10]), abs=1e-5)


def embeddings(http: httpx.Client, **body: object) -> list:
    answer = http.post("/v1/embeddings", json={"model": "embed", **body})
    assert answer.status_code == 200, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


def test_unnormalised_cut_and_packed(http: httpx.Client, text: Text, hf_embed: Embed) -> None:
    ids = text.encode(TEXTS[3])
    (raw,) = embeddings(http, input=ids, normalize=False)
    assert raw == pytest.approx(hf_embed(ids).tolist(), abs=1e-4)
    (packed,) = embeddings(http, input=ids, normalize=False, encoding_format="base64")
    assert list(struct.unpack("<64f", base64.b64decode(packed))) == pytest.approx(raw, abs=1e-6)
    (cut,) = embeddings(http, input=ids, normalize=False, truncate_prompt_tokens=7)
    assert cut == pytest.approx(hf_embed(ids[-7:]).tolist(), abs=1e-4)
    (fits,) = embeddings(http, input=[5] * 2100, normalize=False, truncate_prompt_tokens=-1)
    assert fits == pytest.approx(hf_embed([5] * 2048).tolist(), abs=1e-4)
    bare, special = embeddings(http, input=["a"], add_special_tokens=False), embeddings(http, input=["a"])
    assert bare != special


def test_the_model_may_be_left_out(http: httpx.Client) -> None:
    assert http.post("/v1/embeddings", json={"input": "a"}).json()["model"] == "embed"
    (about,) = [one for one in http.get("/v1/models").json()["data"] if one["id"] == "embed"]
    assert (about["role"], about["embedding_size"], about["pooling"], about["normalized"]) == (
        *("embedding", 64, "mean"),
        True,
    )


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": "policy", "input": "a"}, "model", "is a policy model; what gives embeddings here: embed"),
        ({"model": "reward", "input": "a", "normalize": True}, "normalize", "is a reward model"),
        ({}, "input", "input is missing"),
        ({"input": ""}, "input", "input[0] is empty"),
        ({"input": ["a", ""]}, "input", "input[1] is empty"),
        ({"input": []}, "input", "at least one"),
        ({"input": [[]]}, "input", "not empty"),
        ({"input": [320]}, "input", "token id 320"),
        ({"input": ["a", 1]}, "input", "all strings"),
        ({"input": ["a"] * 1025}, "input", "at most 1024"),
        ({"input": [5] * 2049}, "input", "input[0] has 2049 tokens; 'embed' takes 1 to 2048"),
        ({"input": "a", "dimensions": 65}, "dimensions", "dimensions is 65; 'embed' gives 1 to 64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions is 0; it must be at least 1"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype", "float32"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
    ],
)
def test_refusals(http: httpx.Client, body: dict, param: str, words: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"].split("[")[0] == param and words in error["message"], error


def test_an_embedding_model_does_not_write(http: httpx.Client) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/rewards", {"input": "a"}),
    ):
        answer = http.post(path, json={"model": "embed", **body})
        assert answer.status_code == 400 and "is an embedding model" in answer.json()["error"]["message"]


def test_where_nothing_embeds(narrow_server: str) -> None:
    headers = {"Authorization": "Bearer first-key"}
    answer = httpx.post(f"{narrow_server}/v1/embeddings", json={"input": "a"}, headers=headers, timeout=60)
    assert answer.status_code == 400 and "no hosted model gives embeddings" in answer.json()["error"]["message"]
