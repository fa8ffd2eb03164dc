"""The words of `tandem quantize`, and what it writes, prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from servers import Server
from typer.testing import CliRunner

from tandem.benchmarks.quantization.cli import app
from tandem.server import cli


def quantize(*words: object, status: int = 0) -> str:
    """What the command says: on stdout, or, where it fails, on stderr."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == status, found.output
    return found.stderr if status else found.stdout


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "reward", "llama-reward", pad_token_id=0)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": question}], "answers": [f"{number} it is.", "A cat.", "The dog ran."]}
        for number, question in enumerate(("What is true?", "Where is the cat?", "How many are there?", "猫在哪里?"))
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "texts.jsonl"


def test_a_checkpoint_is_written(tmp_path: Path, llama: Path) -> None:
    said = quantize(llama, tmp_path / "out", "--scheme", "int8", "--shard-size", "100k")
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert f"14 matrices in int8, 0.4 MB became 0.2 MB in {files} files" in said and files > 1


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_what_is_written_serves_like_what_is_quantized_at_the_start(tmp_path: Path, llama: Path, scheme: str) -> None:
    quantize(llama, tmp_path / "out", "--scheme", scheme)
    file = tmp_path / "figures.json"
    quantize("--evaluate", f"{llama},quantization={scheme}", f"{tmp_path / 'out'},lm_head=int8", "--json", file)
    figures = json.loads(file.read_text())["figures"]
    assert figures["kl_mean"] == 0 and figures["perplexity_change"] == 0 and figures["top1_agreement"] == 1


def test_smoothquant_takes_text(tmp_path: Path, llama: Path, texts: Path) -> None:
    said = quantize(llama, tmp_path / "out", "--scheme", "w8a8", "--smooth-quant", 0.5, "--text", texts)
    assert "14 matrices in w8a8" in said


def test_language_models_are_compared(tmp_path: Path, llama: Path, texts: Path) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "cdf.png"
    words = ("--evaluate", llama, f"{llama},quantization=int8,kv_dtype=int8", "--text", texts)
    said = quantize(*words, "--json", file, "--plot", picture)
    found = json.loads(file.read_text())
    assert found["exact"] and found["reference"] == str(llama) and "commit" in found
    assert 0 < found["figures"]["kl_mean"] < 0.05 < 1 - found["figures"]["top1_agreement"] + 0.05
    assert f"{found['figures']['top1_agreement']:.2%}" in said and "KL divergence, p99" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_reward_models_are_compared(tmp_path: Path, reward: Path, texts: Path) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "scores.png"
    words = ("--evaluate", reward, f"{reward},quantization=w8a8", "--text", texts)
    said = quantize(*words, "--json", file, "--plot", picture)
    figures = json.loads(file.read_text())["figures"]
    assert (figures["texts"], figures["pairs"]) == (12, 12)
    assert 0.9 < figures["pearson"] < 1 and 0 < figures["largest_difference"] < 0.5
    assert "ranking agreement" in said and picture.read_bytes().startswith(b"\x89PNG")


def test_models_of_a_server_are_compared(tmp_path: Path, llama: Path, reward: Path, texts: Path) -> None:
    specs = [f"{llama},dtype=float32", f"{llama},dtype=float32,quantization=int8"]
    scored = [f"{reward},dtype=float32", f"{reward},dtype=float32,quantization=int8"]
    names = ("a", "b,role=reference", "r", "s")
    served = [
        f"{name.partition(',')[0]}={spec}{''.join(name.partition(',')[1:])}"
        for name, spec in zip(names, [*specs, *scored], strict=True)
    ]
    file = tmp_path / "figures.json"

    def figures(*words: object) -> dict[str, float]:
        said = quantize("--evaluate", *words, "--text", texts, "--json", file)
        assert ("lower bounds" in said) == ("a" in words)
        return json.loads(file.read_text())["figures"]

    with Server(tmp_path, *served) as server:
        asked = figures("a", "b", "--url", server.base_url)
        ranked = figures("r", "s", "--url", server.base_url)
        assert "it has no model c; there are a, b, r, s" in quantize(
            "--evaluate", "a", "c", "--url", server.base_url, status=2
        )
        assert "cannot be compared" in quantize("--evaluate", "a", "r", "--url", server.base_url, status=2)
    exact, scores = figures(*specs), figures(*scored)
    assert asked["tokens"] == exact["tokens"] and asked["top1_agreement"] == exact["top1_agreement"]
    for name in ("perplexity_reference", "perplexity_candidate"):
        assert asked[name] == pytest.approx(exact[name], rel=1e-3)
    assert 0 < asked["kl_mean"] <= exact["kl_mean"] * 1.01
    assert ranked["pearson"] == pytest.approx(scores["pearson"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scheme", "int4"), "--scheme int4: one of int8, w8a8"),
        ((), "--scheme is missing: one of int8, w8a8"),
        (("--scheme", "int8", "--smooth-quant", "0.5"), "--smooth-quant 0.5: a number from 0 to 1, with --scheme w8a8"),
        (("--scheme", "w8a8", "--smooth-quant", "2"), "--smooth-quant 2.0: a number from 0 to 1"),
        (("--scheme", "int8", "--text", "x"), "--text is for --smooth-quant and --evaluate"),
        (("--scheme", "int8", "--plot", "x.png"), "--plot is for --evaluate"),
        (("--evaluate", "--scheme", "int8"), "--scheme is for writing a checkpoint"),
        (("--scheme", "int8", "--shard-size", "big"), "--shard-size big: a whole number above 0 is needed"),
        (("--scheme", "int8", "--device", "gpu"), "device is gpu: auto, cpu, cuda or cuda:N"),
    ],
)
def test_wrong_words_are_answered_in_a_sentence(tmp_path: Path, llama: Path, words: tuple[str, ...], said: str) -> None:
    answer = quantize(llama, tmp_path / "out", *words, status=2)
    assert answer.startswith(f"tandem quantize: {said}") and answer.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_or_compared_is_said(tmp_path: Path, llama: Path, reward: Path) -> None:
    quantize(llama, tmp_path / "out", "--scheme", "w8a8")
    for words, said in (
        ((llama, tmp_path / "out", "--scheme", "int8"), "exists and is not an empty directory"),
        ((tmp_path / "out", tmp_path / "more", "--scheme", "int8"), "is quantized already"),
        (("--evaluate", llama, llama, "--device", "cuda:7"), "finds"),
        ((f"{llama},dtype=float32", tmp_path / "more", "--scheme", "int8"), "a directory or a hub id alone is needed"),
        ((tmp_path / "no", tmp_path / "more", "--scheme", "int8"), "there is no directory"),
        (("--evaluate", llama, reward), "cannot be compared: a language model of 320 tokens and a reward model"),
        (("--evaluate", llama, "null"), "with weights of its own, is compared"),
        (("--evaluate", "a", "b", "--url", "http://127.0.0.1:9"), "it does not answer"),
    ):
        assert said in quantize(*words, status=2)


def test_tandem_hands_the_words_over(tmp_path: Path, llama: Path) -> None:
    found = CliRunner().invoke(cli.app, ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "int8"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "config.json").is_file()
