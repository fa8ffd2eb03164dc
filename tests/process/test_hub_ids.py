"""`tandem serve org/name`: from a hub on this machine, from the cache, and what is said where it cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from checkpoints import write_checkpoint
from fake_hub import COMMIT, FakeHub
from servers import Server

from tandem.server.options import parse_model

PARSE = """
import json, sys
from tandem.server.engine.options import OptionsError
from tandem.server.options import parse_model
said = []
for word in sys.argv[1:]:
    try:
        spec = parse_model(word)
        said.append([spec.name, spec.path])
    except OptionsError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint, and what else repositories hold."""
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama-gqa")
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    others = ("pytorch_model.bin", "modeling_llama.py", "README.md", "onnx/config.json", "original/model.safetensors")
    return found | {name: b"not wanted" for name in (*others, "consolidated.safetensors")}


def environment(cache: Path, **more: str) -> dict[str, str]:
    """As a shell has it, but with a cache of its own and nobody's token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "2", **more}


def parse(variables: dict[str, str], *words: str) -> list[list[str] | str]:
    """[name, path] of each model, or what was said against it."""
    command = [sys.executable, "-c", PARSE, *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_of_the_hub_is_served_and_later_without_the_hub(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    with FakeHub({"org/tiny": files}) as hub:
        variables = environment(cache, HF_ENDPOINT=hub.url)
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with Server(tmp_path, "org/tiny") as server:
            models = httpx.get(f"{server.base_url}/v1/models").json()["data"]
            body = {"model": "org/tiny", "prompt": "a", "max_tokens": 2}
            answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)
        assert [model["id"] for model in models] == ["org/tiny"] and answer.status_code == 200
        assert set(hub.fetched) == {name for name in files if files[name] != b"not wanted"}
        before = len(hub.fetched)
        (again, dated, own) = parse(variables, "org/tiny", f"org/tiny,revision={COMMIT}", "mine=org/tiny,revision=v1")
        assert len(hub.fetched) == before  # what is cached is not fetched again
    snapshot = str(cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT)
    assert (again, dated, own) == (["org/tiny", snapshot], ["org/tiny", snapshot], ["mine", snapshot])
    offline = environment(cache, HF_HUB_OFFLINE="1")
    (cached, missing) = parse(offline, "org/tiny", "org/tiny,revision=v2")
    assert cached == ["org/tiny", snapshot]
    assert "HF_HUB_OFFLINE is set: unset it, or run `hf download org/tiny --revision v2`" in missing


def test_a_private_model_with_a_token(files: dict[str, bytes], tmp_path: Path) -> None:
    with FakeHub({"org/tiny": files}, token="hf_secret") as hub:
        variables = environment(tmp_path, HF_ENDPOINT=hub.url)
        (without,) = parse(variables, "org/tiny")
        (with_token,) = parse({**variables, "HF_TOKEN": "hf_secret"}, "org/tiny")
    assert "or it is private" in without and "HF_TOKEN" in without
    assert with_token[0] == "org/tiny"


def test_what_cannot_be_had_is_said_in_one_line(files: dict[str, bytes], tmp_path: Path) -> None:
    models = {
        "org/tiny": files,
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
        "org/data": {"train.json": b"{}"},
    }
    with FakeHub(models) as hub:
        words = ["gated/model", "nobody/model", "org/tiny,revision=v9", "org/pickled", "org/data", "m=broken/model"]
        said = parse(environment(tmp_path, HF_ENDPOINT=hub.url), *words)
    (gone,) = parse(environment(tmp_path, HF_ENDPOINT=hub.url), "org/other")
    wanted = [
        "model gated/model is gated: accept its terms",
        "model nobody/model: no such directory, and no such model on the Hugging Face hub",
        "model org/tiny has no revision v9",
        "org/pickled: has no safetensors",
        "org/data: has no config.json",
        "broken/model",
        "the hub cannot be reached",
    ]
    for message, words in zip([*said, gone], wanted, strict=True):
        assert isinstance(message, str) and words in message and "\n" not in message


def test_a_path_that_exists_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    spec = parse_model("org/name")
    assert (spec.name, spec.path) == ("name", str(tmp_path / "org" / "name"))
