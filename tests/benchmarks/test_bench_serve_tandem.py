"""`tandem bench serve` against a real `tandem serve`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from servers import Server

from tandem.benchmarks.bench.report import report
from tandem.benchmarks.bench.serve_cli import main


def command(*words: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    return int(exit.value.code or 0)


def test_a_real_server_under_an_open_loop(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        words = ["--url", f"tandem={server.base_url}", "--tokenizer", "demo", "--num-prompts", 12, "--request-rate", 30]
        words += ["--input-len", 16, "--output-len", 8, "--prefix-len", 32, "--append-result", "--save-detailed"]
        words += ["--result-dir", tmp_path, "--result-filename", "r.jsonl", "--ready-check-timeout-sec", 30]
        assert command(*words) == 0
        assert command(*words, "--as-text") == 0  # the same prompts again
        chat = ["--base-url", server.base_url, "--dataset", "chat", "--num-prompts", 4, "--max-concurrency", 2]
        chat += ["--input-len", 5, "--output-len", 6, "--ignore-eos", "--result-dir", tmp_path, "--save-result"]
        assert command(*chat, "--result-filename", "chat.json") == 0
        engine = server.children("tandem-engine")[0]
    talk = json.loads((tmp_path / "chat.json").read_text())
    assert (talk["completed"], talk["total_output_tokens"], talk["prompts_sent_as"]) == (4, 24, "messages")
    assert 0 < talk["median_itl_ms"] < talk["median_e2el_ms"] and talk["tandem"]["peak_open_requests"] == 2
    first, again = (json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert (first["completed"], first["failed"], first["total_output_tokens"]) == (12, 0, 96)
    assert first["output_lens"] == [8] * 12 and first["prompts_sent_as"] == "token ids"
    assert again["prompts_sent_as"] == "text" and again["total_input_tokens"] == first["total_input_tokens"]
    assert first["tandem"]["tokens_counted_by"] == "usage" and first["tandem"]["input_tokens_counted_by"] == "usage"
    assert 0 < first["median_ttft_ms"] < first["median_e2el_ms"]
    assert first["duration"] > 0.4  # 12 requests at 30 per second
    used = first["tandem"]["server"]
    assert engine in [process["pid"] for process in used["processes"]] and used["cpu_us_per_output_token"] > 0
    assert again["tandem"]["prefix_cache_share"] > first["tandem"]["prefix_cache_share"] > 0
    assert report([tmp_path / "r.jsonl"], tmp_path / "r.html").read_text().count("<img") == 2
