"""What real clients sent and real servers answered, sent again: the answers have the recorded ones' shape, and their
numbers where nothing is drawn. `benchmarks/trainers` says how each file was made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Server

FIXTURES, ROOT = Path(__file__).parent / "fixtures", Path(__file__).parents[2]
RECORDS = {
    file.stem: json.loads(file.read_text().replace("$ROOT", str(ROOT))) for file in sorted(FIXTURES.glob("*.json"))
}
CLOSE = 2e-3  # log-probabilities and scores of two engines in float32
OWN = {  # changes on every call, or is the server's own
    *(
        "id",
        "request_id",
        "created",
        "model",
        "weight_version",
        "version",
        "usage",
        "max_model_len",
        "weight_transfer_config",
    ),
    "text_offset",  # vLLM counts the characters of "token_id:70", Tandem those of the text
}
UNSAID = {"permission", "system_fingerprint"}  # of OpenAI's accounts and machines
# A second party takes part in these: a trainer that broadcasts, a file that it wrote.
TWO_SIDED = {
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The models that were recorded."""
    options = ["--dtype", "float32", "--max-logprobs", 100, "--enable-lora", "--weights-root", ROOT]
    with (
        Server(tmp_path_factory.mktemp("log"), *options) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        server.wait_ready()
        yield client


def exchanges() -> Iterator[Any]:
    for name, record in RECORDS.items():
        for index, exchange in enumerate(record["exchanges"]):
            request = exchange["request"]
            adapted = isinstance(request["body"], dict) and str(request["body"].get("model")).startswith("trl-policy")
            if request["path"] not in TWO_SIDED and not adapted:
                yield pytest.param(exchange, id=f"{name}-{index}-{request['path']}")


def test_every_recorded_client_is_named_with_its_version() -> None:
    assert RECORDS and all(record["client"] and record["version"] in name for name, record in RECORDS.items())


@pytest.mark.parametrize("exchange", list(exchanges()))
def test_the_answer_has_the_recorded_shape(demo: httpx.Client, exchange: dict[str, Any]) -> None:
    request, recorded = exchange["request"], exchange["response"]
    target = request["path"] + (f"?{request['query']}" if request["query"] else "")
    answer = demo.request(request["method"], target, json=request["body"])
    assert answer.status_code == recorded["status"], answer.text
    if answer.status_code == 200 and recorded["body"] is not None:
        compare(recorded["body"], answer.json(), "", exchange.get("fixed", False))


def compare(recorded: Any, found: Any, where: str, fixed: bool) -> None:
    """All that was recorded is there, of its type; `fixed`: with its value. What was null may hold something."""
    if recorded is None:
        return
    if isinstance(recorded, dict):
        assert isinstance(found, dict), where
        if where.endswith(".prompt_logprobs[]") or where.endswith(".top_logprobs[]"):  # by token
            found_, recorded_ = list(found.values()), list(recorded.values())
            return compare(recorded_[:1], found_[:1], where, fixed)
        for name, value in recorded.items():
            if value is not None and name not in UNSAID:
                assert name in found, f"{where}.{name} is missing"
                compare(value, found[name], f"{where}.{name}", fixed and name not in OWN)
    elif isinstance(recorded, list):
        assert isinstance(found, list), where
        if fixed:
            assert len(found) == len(recorded), where
        for one, other in zip(recorded, found, strict=False):
            compare(one, other, f"{where}[]", fixed)
    elif isinstance(recorded, float) or (isinstance(recorded, int) and not isinstance(recorded, bool)):
        assert type(found) in (int, float), f"{where} is {found!r}"
        assert not fixed or math.isclose(found, recorded, abs_tol=CLOSE), f"{where} is {found}, not {recorded}"
    else:
        assert type(found) is type(recorded), f"{where} is {found!r}, not {recorded!r}"
        assert not fixed or found == recorded, f"{where} is {found!r}, not {recorded!r}"
