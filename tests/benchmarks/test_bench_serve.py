"""`tandem bench serve` as a command: words in, lines and files out, servers that behave and servers that do not."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import END, STREAM, ScriptedServer, Step, completion, document, part, tokens, usage

from tandem.benchmarks.bench import agreement
from tandem.benchmarks.bench.datasets import DatasetError
from tandem.benchmarks.bench.prompts import Dataset, Prompts, ServeOptions, Side
from tandem.benchmarks.bench.serve_cli import gathered, main
from tandem.server.options import bundled_models

SMALL = ["--num-prompts", "6", "--input-len", "4", "--output-len", "5", "--vocab-size", "100"]


def command(*words: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    return int(exit.value.code or 0)


def steady(gap: float) -> Any:
    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        count = body["max_tokens"]
        return tokens(count, 0.05, gap, usage(len(body["prompt"]), count, cached=2))

    return script


def test_one_server_gives_vllms_lines_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(steady(0.01)) as server:
        words = [
            "--base-url",
            server.url,
            "--max-concurrency",
            3,
            "--goodput",
            "ttft:1000",
            "tpot:5",
            "--num-warmups",
            1,
        ]
        words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--temperature", 0]
        words += ["--metadata", "tp=1", "who=me", "--result-dir", tmp_path, "--save-result", "--header", "X-A=b"]
        assert command(*SMALL, *words, "--extra-body", '{"min_tokens": 5, "stream_options": null}') == 0
        assert server.most_open == 3 and len(server.bodies) == 1 + 1 + 6  # a question what it takes, a warm-up, the run
        body = server.bodies[3]
        assert all("X-A: b" in head for head in server.headers)
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("scripted", 5, True, 0)
    assert body["min_tokens"] == 5 and "stream_options" not in body and body["stream"] is True
    assert len(body["prompt"]) == 4 and all(isinstance(token, int) for token in body["prompt"])
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 8  # no prompt comes twice

    shown = capsys.readouterr().out
    assert "============ Serving Benchmark Result ============\nSuccessful requests:                     6" in shown
    assert (
        "Total generated tokens:                  30" in shown
        and "Request goodput (req/s):                 0.00" in shown
    )
    assert "P99 E2EL (ms):" in shown and "Output tokens counted by:                usage" in shown
    assert "Prompt tokens from a prefix cache (%):   50.00" in shown

    (file,) = tmp_path.iterdir()
    assert file.name.startswith("openai-infqps-concurrency3-scripted-") and file.suffix == ".json"
    found = json.loads(file.read_text())
    assert found["tp"] == "1" and found["who"] == "me" and found["request_goodput"] == 0.0
    assert 50 < found["median_ttft_ms"] < 75 and found["p99_ttft_ms"] >= found["p50_ttft_ms"]
    assert 7 < found["median_tpot_ms"] < 14 and 7 < found["median_itl_ms"] < 14
    assert 90 < found["median_e2el_ms"] < 125
    assert 0.18 < found["duration"] < 0.4
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    assert not {"ttfts", "itls", "errors"} & set(found)
    assert found["tandem"]["server"]["cpu_seconds"] > 0  # found by the port: this very process
    assert {"date", "commit", "machine", "versions", "command"} <= set(found)


def test_the_flags_that_vllms_tool_takes_too_give_the_figures_that_are_compared(tmp_path: Path) -> None:
    with ScriptedServer(steady(0.01)) as server:
        load = {"num_prompts": 5, "request_rate": 50.0, "max_concurrency": 2, "input_len": 4, "output_len": 3}
        given = Namespace(url=server.url, model="scripted", tokenizer=bundled_models()[0].path, **load)
        assert command(*agreement.command([], given, seed=1, out=tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert all(found[name] > 0 for name in agreement.FIGURES) and found["total_output_tokens"] == 15
    assert found["max_concurrency"] == 2


def test_two_servers_take_turns_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def noted(name: str, gap: float) -> Any:
        def script(body: dict[str, Any], number: int) -> Iterable[Step]:
            order.append(name)
            return steady(gap)(body, number)

        return script

    with ScriptedServer(noted("slow", 0.02), "a") as slow, ScriptedServer(noted("fast", 0.01), "b") as fast:
        urls = ["--url", f"slow={slow.url}/v1", "--url", f"fast={fast.url}"]
        page = tmp_path / "page.html"
        words = [*urls, "--runs", 3, "--num-prompts", 2, "--result-dir", tmp_path, "--result-filename", "r.json"]
        assert command(*SMALL, *words, "--save-detailed", "--report", page) == 0
        assert sorted(body["prompt"] for body in slow.bodies) == sorted(body["prompt"] for body in fast.bodies)
        assert len({tuple(body["prompt"]) for body in slow.bodies}) == 1 + 6
    assert order == ["slow", "fast"] + ["slow"] * 2 + ["fast"] * 4 + ["slow"] * 4 + ["fast"] * 2
    found = json.loads((tmp_path / "r.json").read_text())
    about = found["ratios"]["slow / fast"]
    assert about["median_itl_ms"]["median"] == pytest.approx(2, rel=0.25) and about["median_itl_ms"]["samples"] == 3
    assert about["median_itl_ms"]["low"] <= about["median_itl_ms"]["median"] <= about["median_itl_ms"]["high"]
    assert about["output_throughput"]["median"] < 0.9
    assert [side["model_id"] for side in found["sides"].values()] == ["a", "b"]
    assert len(found["sides"]["slow"]["runs"]) == 3
    assert len(found["sides"]["slow"]["runs"][0]["itls"][0]) == 4  # --save-detailed
    shown = capsys.readouterr().out
    assert "slow: " in shown and "median of 3 runs" in shown and "slow / fast" in shown
    text = page.read_text()
    assert "median_itl_ms" in text and text.count("data:image/png;base64,") == 2 and "<script" not in text
    assert {file.name for file in tmp_path.iterdir()} >= {"page-latency.png", "page-concurrency.png"}


def test_what_a_server_does_not_know_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        for field in ("ignore_eos", "stream_options"):
            if field in body:
                return [document(422, {"detail": f"unexpected fields: {field}"})]
        if isinstance(body["prompt"], list):
            return [document(400, {"error": {"message": "prompt: a text is needed"}})]
        return tokens(body["max_tokens"], 0.0, 0.0)

    with ScriptedServer(script) as server:
        words = [
            "--base-url",
            server.url,
            "--tokenizer",
            "demo",
            "--num-prompts",
            3,
            "--input-len",
            6,
            "--output-len",
            2,
        ]
        assert command(*words, "--save-result", "--result-dir", tmp_path, "--result-filename", "r.json") == 0
        assert [type(body["prompt"]) for body in server.bodies] == [list] * 3 + [str] * 4
        assert command(*words, "--ignore-eos") == 1  # what was asked for is not left out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["prompts_sent_as"] == "text" and found["tandem"]["tokens_counted_by"] == "chunks"
    assert found["fields_left_out"] == ["ignore_eos", "stream_options"]
    shown = capsys.readouterr().out
    assert "a server refused ignore_eos" in shown and "failed     3x  HTTP 422: unexpected fields: ignore_eos" in shown


def test_conversations_go_to_the_chat_endpoint() -> None:
    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        assert "prompt" not in body and "ignore_eos" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        return tokens(2, 0.0, 0.0)

    with ScriptedServer(script) as server:
        assert command("--base-url", server.url, "--dataset", "chat", "--num-prompts", 2, "--input-len", 3) == 0
        assert all(head.startswith("POST /v1/chat/completions ") for head in server.headers)


def test_failures_are_counted_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        if number % 3 == 1:  # 0 is the question what the server takes
            return [document(429, {"error": {"message": "the queue is full"}})]
        if number % 3 == 2:
            return [STREAM, part(completion("a")), END]
        return steady(0.0)(body, number)

    with ScriptedServer(script) as server:
        assert command(*SMALL, "--base-url", server.url) == 0
    shown = capsys.readouterr().out
    assert (
        "Successful requests:                     2" in shown and "Failed requests:                         4" in shown
    )
    assert "failed     2x  HTTP 429: the queue is full" in shown and "failed     2x  the stream ended early" in shown
    assert "4 of 6 requests failed" in shown


def test_a_server_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(lambda body, number: []) as server:
        url = server.url
    assert command(*SMALL, "--base-url", url, "--model", "m") == 1
    shown = capsys.readouterr().out
    assert "Failed requests:                         6" in shown and "failed     6x  ClientConnectorError" in shown
    assert command(*SMALL, "--base-url", url) == 1
    assert "names no model to ask" in capsys.readouterr().err
    assert command(*SMALL, "--base-url", url, "--model", "m", "--ready-check-timeout-sec", 0.3) == 1
    assert "not ready within 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--request-rate", "0"], "--request-rate 0"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--goodput", "itl:5"], "--goodput itl:5"),
        (["--goodput", "ttft:soon"], "--goodput ttft:soon"),
        (["--percentile-metrics", "speed"], "--percentile-metrics speed"),
        (["--metric-percentiles", "101"], "--metric-percentiles 101"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--header", "none"], "KEY=VALUE"),
        (["--url", "localhost:8000"], "[NAME=]http://HOST:PORT"),
        (["--url", "http://a", "--url", "server1=http://b"], "a name of its own"),
        (["--pid", "other=1"], "there is no such --url"),
        (["--backend", "grpc"], "--backend grpc"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--nonsense"], "--nonsense"),
        (["--model", "m", "--dataset", "sharegpt"], "sharegpt"),
        (["--model", "m", "--dataset", "jsonl", "missing.jsonl"], "no such file"),
        (["--model", "m", "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_a_sentence_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = command(*words)
    shown = capsys.readouterr().err
    assert said in " ".join(shown.replace("│", " ").split()) and "Traceback" not in shown
    assert status == 2


def test_rounds_ask_other_prompts_while_the_file_has_any(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{number}", "output_len": 1}) + "\n" for number in range(5)))

    def asked(count: int, runs: int) -> tuple[list[list[str | None]], bool]:
        side = Side("server", "http://127.0.0.1:1")
        prompts = Prompts(ServeOptions((side,), dataset=Dataset("jsonl", file, count), runs=runs), None)
        return [[item.text for item in prompts.of(number)] for number in range(runs)], prompts.repeated

    assert asked(2, 2) == ([["p0", "p1"], ["p2", "p3"]], False)
    assert asked(3, 2) == ([["p0", "p1", "p2"]] * 2, True)
    with pytest.raises(DatasetError, match="has 5 usable"):
        asked(6, 1)


def test_prompts_that_were_asked_before_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        return tokens(1, 0.0, 0.0, usage(4, 1, cached=4))

    with ScriptedServer(script) as server:
        assert command(*SMALL, "--base-url", server.url) == 0
        assert command(*SMALL, "--base-url", server.url, "--prefix-len", 4) == 0
    assert capsys.readouterr().out.count("the server was asked them before") == 1


def test_flags_take_words_as_vllms_do() -> None:
    given = ["--goodput", "a:1", "b:2", "--insecure", "--dataset", "sharegpt", "f.json", "--port", "1"]
    expected = ["--goodput", "a:1", "--goodput", "b:2", "--insecure"]
    assert gathered(given) == [*expected, "--dataset-name", "sharegpt", "--dataset-path", "f.json", "--port", "1"]
