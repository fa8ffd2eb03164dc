"""vLLM's own answers on the bundled models, kept as fixtures.

    python -m tandem.benchmarks.trainers.record_vllm tests/compat/fixtures

Needs `.venvs/peers/vllm` (`make peer-vllm`). Requests whose answer is no draw say so: their numbers are compared, too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from ..bench.engines import environment, peer_interpreter
from ..bench.served import Served
from ..bench.servers import free_port
from ..clients.environments import ROOT
from ..peers.setup import VLLM
from .recorder import json_of, save

DEMO = ROOT / "model" / "demo"
POLICY, REWARD = "tandem-demo", "tandem-demo-reward"
READ = {  # of /server_info, which has thousands of lines: what clients read
    "model_config": ("dtype", "max_model_len", "served_model_name"),
    "parallel_config": ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "world_size"),
}
Request = tuple[str, str, dict[str, Any] | None, bool]  # method, path, body, whether the answer is no draw


def policy_requests(ids: list[int], others: list[int]) -> Iterator[Request]:
    complete, generate = "/v1/completions", "/inference/v1/generate"
    greedy = {"max_tokens": 5, "temperature": 0}
    as_ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    trl = {"n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    trl["logprobs"] = 0
    yield "GET", "/v1/models", None, False
    yield (
        "POST",
        complete,
        {"model": POLICY, "prompt": [ids, others], "max_tokens": 4, "logprobs": 0, **trl, **as_ids},
        False,
    )
    yield "POST", complete, {"model": POLICY, "prompt": ids, "logprobs": 2, "stop": [" the"], **greedy, **as_ids}, True
    areal = {"prompt": ids, "top_k": 100_000_000, "logprobs": 0, "use_beam_search": False, "stop_token_ids": None}
    yield "POST", complete, {**areal, **greedy, "return_tokens_as_token_ids": True, "stream": False}, True
    areal = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1, "echo": True}
    yield "POST", complete, areal, True
    teacher = {"model": POLICY, "prompt": [ids, others], "max_tokens": 1, "temperature": 2.0, "prompt_logprobs": 3}
    yield "POST", complete, teacher, False
    params: dict[str, Any] = {**greedy, "logprobs": 3}
    yield "POST", generate, {"model": POLICY, "request_id": "a", "token_ids": ids, "sampling_params": params}, True
    prime = {"max_tokens": 1, "temperature": 1, "top_p": 1, "prompt_logprobs": 1, "seed": 1}
    yield (
        "POST",
        generate,
        {"model": POLICY, "token_ids": ids, "sampling_params": prime, "return_token_ids": True},
        False,
    )
    yield "POST", generate, {"token_ids": ids, "sampling_params": params, "output_mode": "text"}, True
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"model": POLICY, "messages": messages, "logprobs": True, "top_logprobs": 0, **greedy, **as_ids}
    yield "POST", "/v1/chat/completions", chat, True
    yield "GET", "/get_world_size", None, True
    yield "GET", "/server_info?config_format=json", None, False
    yield "GET", "/is_paused", None, True
    yield "POST", "/pause?mode=keep", None, True
    yield "GET", "/is_paused", None, True
    yield "POST", "/resume", None, True
    yield "POST", "/reset_prefix_cache", None, True
    yield "POST", "/abort_requests", {}, True
    yield "POST", "/update_weight_version", {"new_version": "7"}, True
    yield "GET", "/weight_info", None, True


def reward_requests(ids: list[int], others: list[int]) -> Iterator[Request]:
    text, pair = "What is 12 + 7?\n19", ["12 + 7 is 19.", "12 + 7 is a cat."]
    messages = [{"role": "user", "content": "What is 12 + 7?"}, {"role": "assistant", "content": "19"}]
    raw = {"model": REWARD, "use_activation": False}
    yield "POST", "/classify", {"input": text, **raw}, True
    yield "POST", "/classify", {"input": [ids, others], **raw}, True
    yield "POST", "/classify", {"messages": messages, **raw}, True
    yield "POST", "/pooling", {"input": [text, *pair], **raw}, True
    for path in ("/score", "/v1/score"):
        yield "POST", path, {"text_1": "What is 12 + 7?", "text_2": pair, **raw}, True
    yield "POST", "/score", {"queries": pair, "documents": pair, **raw}, True
    for path in ("/rerank", "/v1/rerank"):
        yield "POST", path, {"query": "What is 12 + 7?", "documents": pair, "top_n": 1, **raw}, True


def serving(directory: Path, name: str, *arguments: str) -> Served:
    port = free_port()
    vllm = str(peer_interpreter("vllm").with_name("vllm"))
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--dtype", "float32"]
    command = [vllm, "serve", str(directory), *place, "--enforce-eager", *arguments]

    def find(said: str) -> str | None:
        return f"http://127.0.0.1:{port}" if re.search(r"Application startup complete", said) else None

    return Served(command, find, 300)


def ask(url: str, requests: Iterator[Request]) -> Iterator[dict[str, Any]]:
    """An exchange for each."""
    with httpx.Client(base_url=url, timeout=120) as client:
        for method, target, body, fixed in requests:
            answer = client.request(method, target, json=body)
            path, _, query = target.partition("?")
            found = json_of(answer.content)
            if path == "/server_info":
                config = found["vllm_config"]
                kept = {part: {name: config[part][name] for name in names} for part, names in READ.items()}
                found = {"vllm_config": {**kept, "weight_transfer_config": config["weight_transfer_config"]}}
            print(f"{method} {target}: {answer.status_code}", flush=True)
            request = {"method": method, "path": path, "query": query, "body": body}
            yield {"request": request, "response": {"status": answer.status_code, "body": found}, "fixed": fixed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "policy")
    ids, others = (tokenizer(text)["input_ids"] for text in ("The capital of France is", "Two and two"))
    os.environ.update(environment("vllm", 2) | {"VLLM_SERVER_DEV_MODE": "1"})
    for model, name, requests, arguments in (
        (
            "policy",
            POLICY,
            policy_requests(ids, others),
            ("--enable-scale-out", "--weight-transfer-config", '{"backend": "nccl"}'),
        ),
        ("reward", REWARD, reward_requests(ids, others), ("--runner", "pooling")),
    ):
        with serving(DEMO / model, name, *arguments) as server:
            exchanges = list(ask(server.url, requests))
        print("wrote", save(options.directory / f"vllm-{VLLM}-{model}.json", "vLLM", VLLM, exchanges))
    return 0


if __name__ == "__main__":
    sys.exit(main())
