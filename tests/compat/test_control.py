"""Between two training steps: pausing, ending what runs, naming weights, in the words of vLLM, SGLang and AReaL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checkpoints import write_checkpoint
from dialects import IDS, post
from servers import Server, eventually

from tandem.server import compat
from tandem.server.api.security import routes_of

MEETING = {"master_address": "localhost", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
NOTHING_OF_A = {"names": ["a"], "dtype_names": [], "shapes": []}
LONG = {"prompt": IDS, "max_tokens": 3000, "ignore_eos": True, "return_token_ids": True, "logprobs": 0}
GENERATED = {"input_ids": IDS, "return_logprob": True, "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Models of its own, since they are paused."""
    policy = write_checkpoint(tmp_path_factory.mktemp("policy"), "llama-gqa", max_position_embeddings=4096)
    reward = write_checkpoint(tmp_path_factory.mktemp("reward"), "llama-reward")
    with (
        Server(tmp_path_factory.mktemp("log"), f"policy={policy}", f"reward={reward}") as server,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        server.wait_ready()
        yield client


@contextlib.contextmanager
def meanwhile(http: httpx.Client, path: str, body: dict[str, Any], runs: bool = True) -> Iterator[Future[Any]]:
    """The answer to a request that is on its way inside; `runs`: until it has begun."""
    with ThreadPoolExecutor(1) as pool:
        before = running(http)
        answer = pool.submit(lambda: http.post(path, json=body).json())
        if runs:
            eventually(lambda: running(http) > before, 10)
        yield answer


def running(http: httpx.Client) -> int:
    return http.get("/v1/loads", params={"include": "core"}).json()["loads"][0]["num_running_reqs"]


@pytest.fixture(autouse=True)
def resumed(control: httpx.Client) -> Iterator[None]:
    yield
    control.post("/resume")


def test_keep_freezes_what_runs_and_queues_what_comes(control: httpx.Client) -> None:
    with meanwhile(control, "/v1/completions", LONG) as answer:
        assert post(control, "/pause?mode=keep&clear_cache=false") == {"status": "paused"}
        assert control.get("/is_paused").json() == {"is_paused": True}
        with meanwhile(control, "/v1/completions", {"prompt": "a", "max_tokens": 1}, runs=False) as late:
            assert not late.done() and not answer.done()
            assert post(control, "/resume") == {"status": "resumed"}
            assert late.result(60)["choices"][0]["finish_reason"] == "length"
        assert len(answer.result(60)["choices"][0]["token_ids"]) == 3000
    assert control.get("/is_paused").json() == {"is_paused": False}


def test_abort_ends_what_runs_and_refuses_what_comes(control: httpx.Client) -> None:
    """Who asks for ids, as AReaL does, is told `abort` and goes on from there; who does not gets OpenAI's words."""
    plain = {name: value for name, value in LONG.items() if name != "return_token_ids"}
    with meanwhile(control, "/v1/completions", LONG) as told, meanwhile(control, "/v1/completions", plain) as other:
        assert post(control, "/pause") == {"status": "paused"}
        choice = told.result(60)["choices"][0]
        assert choice["finish_reason"] == "abort" and choice["stop_reason"] == "abort"
        assert 0 < len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) < 3000
        choice = other.result(60)["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "abort")
    refused = control.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert refused.status_code == 503 and "paused" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("pause", "resume"), [("pause_generation", "continue_generation"),
                                               ("areal_pause_generation", "areal_continue_generation")])  # fmt: skip
def test_sglangs_pause_ends_what_runs_and_lets_what_comes_wait(control: httpx.Client, pause: str, resume: str) -> None:
    with meanwhile(control, "/generate", GENERATED) as answer:
        busy = control.get("/flush_cache")
        assert busy.status_code == 400 and "1 requests run or wait" in busy.json()["error"]["message"]
        assert post(control, f"/{pause}")["message"]
        meta = answer.result(60)["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert 0 < len(meta["output_token_logprobs"]) == meta["completion_tokens"] < 3000
    for ask in (control.get, control.post):
        assert ask("/flush_cache").status_code == 200
    late = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
    with meanwhile(control, "/generate", late, runs=False) as answer:
        assert not answer.done()
        assert post(control, f"/{resume}")["message"]
        assert answer.result(60)["meta_info"]["finish_reason"]["type"] == "length"


def test_everything_is_ended_without_a_pause(control: httpx.Client) -> None:
    with meanwhile(control, "/generate", GENERATED) as answer:
        assert post(control, "/abort_requests") == {"status": "aborted", "aborted": 1}
        assert answer.result(60)["meta_info"]["finish_reason"]["type"] == "abort"
    with meanwhile(control, "/inference/v1/generate", {
        "token_ids": IDS, "sampling_params": {"max_tokens": 3000, "ignore_eos": True}
    }) as answer:  # fmt: skip
        assert post(control, "/abort_request", abort_all=True)["aborted"] == 1
        assert answer.result(60)["choices"][0]["finish_reason"] == "abort"


def test_one_model_is_paused_alone(control: httpx.Client) -> None:
    post(control, "/pause?mode=keep&model=policy")
    assert control.get("/is_paused?model=reward").json() == {"is_paused": False}
    assert post(control, "/get_reward", query=["a"])["rewards"]
    assert control.post("/pause?mode=keep&model=judge").status_code == 404


def test_weights_have_the_trainers_name(control: httpx.Client) -> None:
    assert post(control, "/update_weight_version", new_version="step-7", abort_all_requests=False)["success"]
    for path in ("/weight_info", "/get_weight_version", "/model_info", "/get_model_info", "/server_info"):
        assert control.get(path).json()["weight_version"] == "step-7", path
    assert post(control, "/generate", text="a", sampling_params={"max_new_tokens": 1})["meta_info"][
        "weight_version"
    ] == "step-7"  # fmt: skip


def test_what_a_client_asks_before_it_trusts_a_server(control: httpx.Client) -> None:
    info = control.get("/server_info", params={"config_format": "json"}).json()
    assert info["vllm_config"]["model_config"]["dtype"] == "torch.float32"
    assert info["vllm_config"]["weight_transfer_config"] and info["options"] and len(info["models"]) == 2
    assert (info["tp_size"], info["pp_size"], info["disaggregation_mode"]) == (1, 1, "null")
    assert control.get("/get_world_size").json() == {"world_size": 1}
    assert control.get("/health_generate").status_code == 200
    assert post(control, "/reset_prefix_cache") == {"success": True}
    assert post(control, "/reset_prefix_cache/")["message"].endswith("True")


def test_what_changes_the_server_is_for_operators() -> None:
    paths = {path for _, path in routes_of(*compat.ADMINS)}
    assert {"/pause", "/update_weights", "/v1/load_lora_adapter", "/flush_cache", "/abort_request"} <= paths
    assert not {"/classify", "/generate", "/is_paused", "/v1/loads", "/server_info"} & paths
    assert {method for method, path in routes_of(*compat.ADMINS) if path == "/flush_cache"} == {"GET", "POST"}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/pause?mode=stop", None, "mode", "abort, wait or keep"),
        ("/pause_generation", {"mode": "stop"}, "mode", "'abort', 'retract' or 'in_place'"),
        ("/abort_requests", {"request_ids": ["a"]}, "request_ids", "connection is closed"),
        ("/abort_request", {"rid": "a"}, "abort_all", "connection is closed"),
        ("/update_weights", {}, "update_info", "either update_info"),
        (
            "/update_weights",
            {"update_info": {"names": ["a"], "dtype_names": [], "shapes": []}},
            "update_info",
            "1 names",
        ),
        ("/update_weight_version", {"new_version": ""}, "new_version", "not empty"),
        ("/init_weights_update_group", {"master_address": "a", "master_port": "x"}, "master_port", "1 to 65535"),
        ("/init_weight_transfer_engine", {"init_info": {}}, "init_info.master_address", "missing"),
        ("/update_weight_version", {"new_version": "a" * 257}, "new_version", "at most 256 characters"),
        ("/init_weights_update_group", MEETING | {"rank_offset": 2**63}, "rank_offset", "less than"),
        (
            "/init_weight_transfer_engine",
            {"init_info": MEETING | {"world_size": 2**63}},
            "init_info.world_size",
            "less than",
        ),
        (
            "/update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["float32"], "shapes": [[2**63]]},
            "shapes[0][0]",
            "less than",
        ),
        ("/update_weights_from_disk", {"model_path": "a", "load_format": "dummy"}, "load_format", "safetensors"),
    ],
)
def test_refusals(control: httpx.Client, path: str, body: dict[str, Any] | None, param: str, words: str) -> None:
    answer = control.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error
