"""TRL's two clients of a vLLM server through all that they can ask: the trainer's of GRPO and AsyncGRPO's.

    python benchmarks/trainers/trl_clients.py URL MODEL_DIRECTORY

It runs where `environments.TRL` is installed. TRL broadcasts weights by NCCL, from a GPU; here the script is the
trainer's side of the same exchange over gloo. The last line is JSON: which checks passed, and why the others did not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # AsyncGRPO is experimental

import requests
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

# GRPO's client wants to import vLLM, for a name or two that it uses on a GPU.
STUB = {
    "vllm/__init__.py": '__version__ = "0.25.0"\nclass LLM: ...\nclass RequestOutput: ...\nclass SamplingParams: ...\n',
    "vllm/sampling_params.py": "class StructuredOutputsParams: ...\n",
    "vllm/utils/__init__.py": "",
    "vllm/utils/network_utils.py": "def get_ip(): ...\ndef get_open_port(): ...\n",
    "vllm/distributed/__init__.py": "",
    "vllm/distributed/weight_transfer/__init__.py": "",
    "vllm/distributed/weight_transfer/nccl_engine.py": "class NCCLTrainerSendWeightsArgs: ...\n"
    "class NCCLWeightTransferEngine: ...\n",
}
ADAPTER, VERSION = "trl-policy-v1", "trainer-step-7"
CLOSE = 1e-3  # log-probabilities


class Place(NamedTuple):
    url: str
    directory: str  # the policy's checkpoint
    clients: Any  # GRPO's client, AsyncGRPO's client
    scratch: Path


def expect(true: object, *seen: object) -> None:
    if not true:
        raise AssertionError(f"not so: {', '.join(map(repr, seen))}")


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def generate(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.directory)
    prompts = [tokenizer(text)["input_ids"] for text in ("What is 2 + 3?", "Hello")]
    found = place.clients[0].generate(prompts, n=2, max_tokens=5, logprobs=0)
    expect(found["prompt_ids"] == prompts and len(found["completion_ids"]) == 4, found)
    expect(found["logprob_token_ids"] == [[[token] for token in ids] for ids in found["completion_ids"]], found)
    texts = place.clients[0].generate(["Hello"], max_tokens=3, logprobs=None, structured_outputs_regex="[ab]{4}")
    expect(texts["logprobs"] is None and set(tokenizer.decode(texts["completion_ids"][0])) <= {"a", "b"}, texts)


def chat(place: Place) -> None:
    messages = [[{"role": "user", "content": "What is the capital of France?"}]] * 2
    found = place.clients[0].chat(messages, max_tokens=12, temperature=0.0, logprobs=2)
    tokenizer = AutoTokenizer.from_pretrained(place.directory)
    expect("Paris" in tokenizer.decode(found["completion_ids"][0]), found)
    expect(all(len(row) >= 2 for row in found["logprobs"][0]), found["logprobs"])


def sequence_logprobs(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.directory)
    model = AutoModelForCausalLM.from_pretrained(place.directory, dtype=torch.float32)
    ids = tokenizer("The capital of France is Paris.")["input_ids"]
    found = place.clients[0].get_sequence_logprobs([ids], [3], top_logprobs=5)
    rows = logits_of(model, ids).log_softmax(-1)
    for place_, (values, likely) in enumerate(zip(found["logprobs"][0], found["logprob_token_ids"][0], strict=True), 2):
        expect(torch.allclose(torch.tensor(values), rows[place_][likely], atol=CLOSE), values)


def state(place: Place) -> None:
    sync, later = place.clients
    later.wait_for_server_ready()
    expect(sync.model == requests.get(f"{place.url}/v1/models", timeout=30).json()["data"][0]["id"], sync.model)
    expect(later.get_max_model_len() > 0 and later.get_dtype() == "torch.float32", later.get_dtype())
    expect(sync.get_world_size() == later.get_world_size() == 1)
    info = later.get_server_info()
    expect(info["weight_transfer_config"] is not None, info)
    expect(info["parallel_config"]["data_parallel_size"] == 1, info)
    sync.reset_prefix_cache()


def communicator_needs_a_gpu(place: Place) -> None:
    """All that goes before it was answered as it wants."""
    try:
        place.clients[0].init_communicator(device="cpu")
    except NotImplementedError as error:
        expect("CUDA" in str(error), error)
    else:
        raise AssertionError("it went on without a GPU")


def pause_and_resume(place: Place) -> None:
    later = place.clients[1]
    later.pause()
    expect(requests.get(f"{place.url}/is_paused", timeout=30).json() == {"is_paused": True})
    told: list[Any] = []
    waits = threading.Thread(target=lambda: told.append(place.clients[0].generate([[5, 6]], max_tokens=2)))
    waits.start()
    waits.join(0.5)
    expect(not told, "a request was answered while generation was paused")
    later.resume()
    waits.join(60)
    expect(told and len(told[0]["completion_ids"][0]) == 2, told)


def adapters(place: Place) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(place.directory, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    path = place.scratch / ADAPTER
    tuned.save_pretrained(path)
    later = place.clients[1]
    config = later.get_server_info()["lora_config"]
    expect(config is not None and config["max_loras"] >= 2 and config["max_lora_rank"] >= 4, config)
    later.load_lora_adapter(ADAPTER, str(path))
    ids = AutoTokenizer.from_pretrained(place.directory)("The capital of France is")["input_ids"]
    body = {
        "model": ADAPTER,
        "prompt": ids,
        "max_tokens": 4,
        "n": 1,
        "logprobs": 0,
        "return_token_ids": True,
        "seed": 5,
    }
    choice = requests.post(f"{place.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    every = ids + choice["token_ids"]
    rows = logits_of(tuned, every).log_softmax(-1)
    own = [rows[len(ids) + i - 1, token].item() for i, token in enumerate(choice["token_ids"])]
    told = choice["logprobs"]["token_logprobs"]
    expect(max(abs(a - b) for a, b in zip(own, told, strict=True)) < CLOSE, own, told)
    later.unload_lora_adapter(ADAPTER)
    expect(requests.post(f"{place.url}/v1/completions", json=body, timeout=60).status_code == 404)


def weights(place: Place) -> None:
    """The whole exchange: a new policy is broadcast, the server answers with it, and says the trainer's name of it."""
    later = place.clients[1]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(place.directory, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    named = list(model.named_parameters())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = later.get_world_size() + 1

    def meet() -> None:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=world, timeout=timedelta(seconds=120))

    def send() -> None:
        for _, parameter in named:
            dist.broadcast(parameter.data.contiguous(), src=0)

    info = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": world}
    together(meet, lambda: later.init_weight_transfer_engine(info | {"backend": "gloo"}))
    later.pause()
    later.start_weight_update()
    update = {
        "names": [name for name, _ in named],
        "dtype_names": [str(parameter.dtype).removeprefix("torch.") for _, parameter in named],
        "shapes": [list(parameter.shape) for _, parameter in named],
    }
    together(send, lambda: later.update_weights(update))
    later.finish_weight_update()
    named_it = requests.post(f"{place.url}/update_weight_version", json={"new_version": VERSION}, timeout=60)
    expect(named_it.status_code == 200, named_it.text)
    later.resume()
    expect(requests.get(f"{place.url}/weight_info", timeout=30).json() == {"weight_version": VERSION})
    found = place.clients[0].generate([[5, 6, 7]], max_tokens=6)
    ids = found["completion_ids"][0]
    rows = logits_of(model, [5, 6, 7, *ids]).log_softmax(-1)
    own = [rows[2 + i, token].item() for i, token in enumerate(ids)]
    told = [row[0] for row in found["logprobs"][0]]
    expect(max(abs(a - b) for a, b in zip(own, told, strict=True)) < CLOSE, own, told)


def together(here: Callable[[], None], there: Callable[[], None]) -> None:
    """The trainer's half and the call that makes the server do its half."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            here()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    there()
    thread.join(120)
    if failed:
        raise failed[0]


CHECKS = (generate, chat, sequence_logprobs, state, communicator_needs_a_gpu, pause_and_resume, adapters, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("directory")
    options = parser.parse_args()
    passed: list[str] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in STUB.items():
            file = Path(scratch) / "stub" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        sys.path.insert(0, str(Path(scratch) / "stub"))
        PartialState()  # the clients log through accelerate
        from trl.experimental.async_grpo.vllm_client import VLLMClient as AsyncClient
        from trl.generation.vllm_client import VLLMClient

        clients = VLLMClient(base_url=options.url, connection_timeout=30), AsyncClient(options.url)
        place = Place(options.url, options.directory, clients, Path(scratch))
        for check in CHECKS:
            try:
                check(place)
                passed.append(check.__name__)
            except Exception as error:
                traceback.print_exc()
                failed[check.__name__] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"version": version("trl"), "passed": passed, "failed": failed}))


if __name__ == "__main__":
    main()
