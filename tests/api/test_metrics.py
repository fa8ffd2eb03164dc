"""/metrics, read with Prometheus' own parser, and the dashboard that is drawn from it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "server" / "web" / "grafana.json"
LONG = {"max_tokens": 6, "ignore_eos": True, "model": "policy"}
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(http: httpx.Client) -> Series:
    answer = http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.fixture
def grown(http: httpx.Client) -> Callable[..., float]:
    """By how much a series has grown since the test began; `model` None: a series of the API workers."""
    before = scrape(http)

    def growth(name: str, model: str | None = "policy", **labels: str) -> float:
        own = labels if model is None else {**labels, "model_name": model, "role": model}
        key = (f"tandem:{name}", tuple(sorted(own.items())))
        after = scrape(http)
        assert key in after, f"{key} is none of {sorted(name for name in after if name[0] == key[0])}"
        return after[key] - before.get(key, 0.0)

    return growth


def test_tokens_and_requests_are_counted(http: httpx.Client, grown) -> None:
    body = {**LONG, "prompt": list(range(10, 60)), "n": 3, "cache_salt": f"metrics-{time.time_ns()}"}
    for _ in range(2):
        assert http.post("/v1/completions", json=body).status_code == 200
    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == 100
    assert grown("prompt_tokens_cached_total") == grown("prefix_cache_hits_total") == 48
    assert grown("prompt_tokens_by_source_total", source="local_compute") == 52
    assert grown("shared_prefix_tokens_saved_total") == 2 * 2 * 50
    assert grown("generation_tokens_total") == grown("request_generation_tokens_sum") == 36
    assert grown("request_success_total", finished_reason="length") == 6
    assert grown("request_params_n_sum") == 6 and grown("request_params_max_tokens_sum") == 12
    assert grown("request_prompt_tokens_bucket", le="50.0") == 2 == grown("request_prompt_tokens_count")
    assert grown("request_max_num_generation_tokens_sum") == 12
    assert grown("request_prefill_kv_computed_tokens_sum") == 52
    assert grown("iteration_tokens_total_sum") == 52 + 36 - 6  # the last token of a choice is never computed
    assert grown("prompt_tokens_total", "reward") == 0


def test_times_add_up(http: httpx.Client, grown) -> None:
    began = time.perf_counter()
    for n in (1, 4):
        http.post("/v1/completions", json={**LONG, "prompt": "The cat", "n": n, "logprobs": 1 if n == 1 else None})
    seconds = time.perf_counter() - began
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 5 * 5
    assert grown("request_time_per_output_token_seconds_count") == 5
    whole, queued = grown("e2e_request_latency_seconds_sum"), grown("request_queue_time_seconds_sum")
    prefill, decode = grown("request_prefill_time_seconds_sum"), grown("request_decode_time_seconds_sum")
    assert min(prefill, decode) > 0 and queued >= 0 and whole < seconds
    assert queued + prefill + decode == pytest.approx(whole, abs=0.01)
    assert grown("request_inference_time_seconds_sum") == pytest.approx(prefill + decode, abs=0.01)
    assert grown("time_to_first_token_seconds_sum") == pytest.approx(queued + prefill, abs=0.01)
    # One choice of the first request and four of the second wait for each of their five further tokens.
    assert decode <= grown("inter_token_latency_seconds_sum") <= 4 * decode + 0.01


def test_how_answers_end(http: httpx.Client, grown) -> None:
    a = {**LONG, "prompt": "a", "allowed_token_ids": [70]}
    text = http.post("/v1/completions", json=a).json()["choices"][0]["text"][0]
    stopped = {**a, "stop": text, "max_tokens": 1900}  # six may be drawn before the worker's word comes
    assert http.post("/v1/completions", json=stopped).json()["choices"][0]["finish_reason"] == "stop"
    assert http.post("/v1/completions", json={**a, "stop_token_ids": [70]}).status_code == 200
    gone = {**LONG, "prompt": "a", "max_tokens": 1900, "timeout": 0.05}
    assert http.post("/v1/completions", json=gone).status_code == 504
    deadline = time.monotonic() + 10
    while grown("request_success_total", finished_reason="stop") < 2 and time.monotonic() < deadline:
        pass  # that word is on its way
    assert grown("request_success_total", finished_reason="stop") == 2
    assert grown("request_success_total", finished_reason="length") == 1
    assert grown("request_success_total", finished_reason="error") == 1
    assert grown("request_success_total", finished_reason="abort") == 0


def test_scores_are_told_by_size_and_group(http: httpx.Client, grown, hf_score) -> None:
    texts = [[1, 70, 71], [1, 80, 81, 82], [1, 90]]
    assert http.post("/v1/rewards", json={"input": texts}).status_code == 200
    assert grown("scores_total", "reward") == grown("score_bucket", "reward", le="+Inf") == 3
    scores = list(map(hf_score, texts))
    for bound in (-1.0, 0.0, 1.0):  # a sum that may fall is none for Prometheus, so there are buckets alone
        assert grown("score_bucket", "reward", le=str(bound)) == sum(score <= bound for score in scores)
    assert grown("score_group_size_bucket", "reward", le="5.0") == 1 == grown("score_group_size_count", "reward")
    assert grown("score_group_size_bucket", "reward", le="2.0") == 0


def test_http_requests_are_told_by_route(http: httpx.Client, grown) -> None:
    http.get("/v1/models/policy")
    http.get("/v1/models/nobody")
    http.get(f"/nothing-{time.time_ns()}")
    http.post("/v1/completions", json={**LONG, "prompt": "a", "stream": True})
    http.post("/v1/completions", json={**LONG, "prompt": "a", "temperature": 9})
    route = {"handler": "/v1/models/{name:path}", "method": "GET"}
    assert grown("http_requests_total", None, **route, status="200") == 1
    assert grown("http_requests_total", None, **route, status="404") == 1
    assert grown("http_requests_total", None, handler="none", method="GET", status="404") == 1
    completions = {"handler": "/v1/completions", "method": "POST"}
    assert grown("http_requests_total", None, **completions, status="400") == 1
    assert grown("http_request_duration_seconds_count", None, **completions) == 2
    assert grown("http_request_duration_seconds_sum", None, **completions) > 0


def test_gauges(http: httpx.Client) -> None:
    found = scrape(http)
    policy = (("model_name", "policy"), ("role", "policy"))
    assert found["tandem:engine_up", ()] == 1
    assert found["tandem:num_requests_running", policy] == found["tandem:num_requests_waiting", policy] == 0
    assert found["tandem:kv_cache_usage_perc", policy] == found["tandem:weight_version", policy] == 0
    assert any(name == "tandem:cache_config_info" and ("block_size", "16") in labels for name, labels in found)


def test_every_metric_says_what_it_is(http: httpx.Client) -> None:
    for family in text_string_to_metric_families(http.get("/metrics").text):
        assert family.name.startswith("tandem:") and family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_uses_what_there_is(http: httpx.Client) -> None:
    http.post("/v1/rewards", json={"input": "a"})  # worker's series appear with their first observation
    http.get("/metrics")
    samples = {name for name, _ in scrape(http)}
    dashboard = json.loads(DASHBOARD.read_text())
    used = expressions(dashboard["panels"])
    assert len(used) >= 12
    for expression in used:
        names = re.findall(r"tandem:[a-z_0-9]+", expression)
        assert names and set(names) <= samples, expression
    labels = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"model_name", "role"} <= labels
    query = json.dumps(dashboard["templating"])
    assert set(re.findall(r"tandem:[a-z_0-9]+", query)) <= samples
