"""The words of `tandem serve`: what they become, and what is said where they are wrong. Nothing is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem.server import cli, options, supervisor
from tandem.server.engine.options import OptionsError
from tandem.server.options import ServeOptions, parse_model, parse_quantity
from tandem.server.supervisor import CRASH_SECONDS, CRASHES, CannotServe, Crashes, bind


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """The options of every server that would have been started."""
    seen: list[ServeOptions] = []

    class Started:
        def __init__(self, options: ServeOptions, sockets: list[socket.socket], on_serving: object) -> None:
            seen.append(options)

        def run(self) -> int:
            return 0

    class Listening:
        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", 8000

    monkeypatch.setattr(supervisor, "Supervisor", Started)
    monkeypatch.setattr(supervisor, "bind", lambda host, port: [Listening()])
    monkeypatch.setattr(cli, "log_to_stderr", lambda process, level: None)
    return seen


def serve(*words: object) -> Any:
    return CliRunner().invoke(cli.app, ["serve", *map(str, words)])


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("4G", 4 << 30), ("4GiB", 4 << 30)]
)
def test_quantities(text: str, value: int) -> None:
    assert parse_quantity(text, "--flag") == value


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "1e3", "1.5", "4 G", "4X", "Gi"])
def test_wrong_quantities_name_the_flag(text: str) -> None:
    with pytest.raises(OptionsError, match="--max-model-len"):
        parse_quantity(text, "--max-model-len")


def test_a_model_with_everything(model: Path) -> None:
    words = "role=reward,dtype=float32,kv=30%,alias=a|org/b,chat_template=plain,max_model_len=4K,weight=2.5"
    words += ",tool_call_parser=none,reasoning_parser=qwen3"
    spec = parse_model(f"judge={model},{words}")
    assert spec == options.ModelSpec(
        "judge", str(model), "reward", "float32", ("a", "org/b"), 0.3, 2.5, 4096, "plain", "none", "qwen3"
    )


def test_precision_of_one_model_and_of_all(model: Path, told: list[ServeOptions]) -> None:
    """What all are told is not for a model that says something else, nor for weights that are another one's."""
    words = f"a={model}", f"b={model},quantization=none,kv_dtype=auto,lm_head=fp16", "c=base-of:b"
    assert serve(*words, "--quantization", "w8a8", "--kv-cache-dtype", "int8").exit_code == 0
    found = [(spec.quantization, spec.lm_head, spec.kv_dtype) for spec in told[0].models]
    assert found == [("w8a8", "auto", "int8"), ("none", "fp16", "int8"), ("auto", "auto", "int8")]
    assert parse_model(f"{model},quantization=int8,kv_dtype=float16").kv_dtype == "float16"


def test_pooling_of_one_model_and_of_all(model: Path, told: list[ServeOptions]) -> None:
    assert serve(f"e={model},role=embedding,pooling=mean", "--pooling", "cls").exit_code == 0
    assert (told[0].models[0].pooling, told[0].engine.pooling) == ("mean", "cls")
    assert "pooling=max" in serve(f"e={model},pooling=max").output
    assert "--pooling max" in serve(model, "--pooling", "max").output


def test_a_model_is_called_as_its_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert (parse_model("model").name, parse_model("./model/").path) == ("model", str(model))


@pytest.mark.parametrize(
    ("words", "name", "milliseconds"), [("null", "null", 0), ("m=null", "m", 0), ("null:2.5", "null", 2.5)]
)
def test_the_null_model(words: str, name: str, milliseconds: float) -> None:
    spec = parse_model(words)
    assert (spec.name, spec.is_null, spec.step_seconds) == (name, True, milliseconds / 1000)
    assert (Path(spec.text_path) / "tokenizer.json").is_file()


def test_models_with_the_weights_of_another_one(model: Path, tmp_path: Path) -> None:
    reference = parse_model("reference=base-of:policy,kv=20%")
    assert (reference.name, reference.path, reference.base_of, reference.shares) == (
        "reference",
        "",
        "policy",
        "policy",
    )
    copied = parse_model("value,role=value,trunk=reward")
    assert (copied.name, copied.path, copied.role, copied.trunk, copied.base_of) == (
        "value",
        "",
        "value",
        "reward",
        None,
    )
    loaded = parse_model(f"value={tmp_path},trunk=reward")  # no checkpoint: it may hold a head alone
    assert (loaded.path, loaded.shares) == (str(tmp_path), "reward")
    assert parse_model(f"{model},trunk=reward").name == "model"
    assert options.parse_model(f"r={model},pooling=first_eos").pooling == "first_eos"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("base-of:policy", "NAME=PATH or PATH is needed"),
        ("r=base-of:", "base-of:OTHER names one hosted model"),
        ("r=base-of:policy,trunk=reward", "trunk= is for value models"),
        ("v={model}/nothing,trunk=reward", "there is no directory"),
        ("m=null:fast", "null:5 for steps of 5 milliseconds"),
        ("m={model},rolle=reward", "did you mean role="),
        (
            "m={model},colour=red",
            "there are role=, dtype=, kv=, alias=, chat_template=, max_model_len=, weight=, revision=",
        ),
        ("m={model},quantization=int4", "auto, none, int8, w8a8"),
        ("m={model},kv_dtype=fp8", "auto, int8, float32"),
        ("m={model},lm_head=bf16", "auto, int8, fp16"),
        ("m={model},role=judge", "policy, reference, reward"),
        ("m={model},dtype=int3", "bfloat16"),
        ("m={model},kv=0%", "kv=0%"),
        ("m={model},kv=0.5", "such as kv=60%"),
        ("m={model},weight=none", "weight=none"),
        ("m={model},role=reward,role=policy", "one value"),
        ("m={model},max_model_len=ten", "model m: max_model_len=ten: a whole"),
        ("m={model}/nothing", "there is no directory"),
        ("m={model}/..", "has no config.json"),
        ("m={model}/config.json", "is a file"),
        ("m={model},revision=main", "revision=main is for hub ids"),
        ("m={model},tool_call_parser=xml", "mistral, hermes, llama3_json, none"),
        ("m={model},reasoning_parser=gpt", "qwen3, deepseek_r1"),
        ("={model}", "NAME=PATH"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_in_one_line(
    words: str, said: str, model: Path, told: list[ServeOptions]
) -> None:
    result = serve(words.format(model=model))
    assert result.exit_code == 2 and not told
    assert said in result.stderr.splitlines()[-1] and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "int3"], "--dtype"),
        (["--quantization", "awq"], "--quantization awq: one of auto, none, int8, w8a8"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8: one of auto, int8"),
        (["--logprobs-mode", "cooked"], "--logprobs-mode"),
        (["--max-body", "huge"], "--max-body"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "--max-num-seqs"),
        (["--port", "70000"], "--port"),
        (["--api-key", ""], "--api-key"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--admin-key", "ключ"], "--admin-key"),
        (["--weights-root", "/nowhere"], "--weights-root"),
        (["--preferences", "/nowhere/file"], "--preferences"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (["--config", "/nowhere"], "--config"),
    ],
)
def test_a_wrong_flag_is_named_last(flags: list[str], said: str, model: Path, told: list[ServeOptions]) -> None:
    result = serve(model, *flags)
    assert result.exit_code == 2 and not told
    assert said in result.stderr.splitlines()[-1]


def test_names_belong_to_one_model(model: Path, told: list[ServeOptions]) -> None:
    names = ["--served-model-name", "first", "--served-model-name", "second"]
    assert serve(model, *names).exit_code == 0
    assert (told[0].models[0].name, told[0].models[0].aliases) == ("first", ("second",))
    assert "exactly one model" in serve(model, f"b={model}", *names).stderr


def test_no_more_sequences_run_than_a_step_has_tokens(model: Path, told: list[ServeOptions]) -> None:
    for flags, expected in (
        ((), 256),
        (("--max-num-batched-tokens", 64), 64),
        (("--max-num-batched-tokens", "4K"), 256),
    ):
        assert serve(f"m={model}", *flags).exit_code == 0
        assert told.pop().engine.max_num_seqs == expected


def test_flags_reach_the_engine_and_the_api(model: Path, told: list[ServeOptions], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("two\n\nthree\n")
    flags = "--max-model-len 4K --max-num-seqs 5 --max-waiting-requests 6 --kv-cache-memory-bytes 1G --max-body 1M"
    more = "--no-enable-prefix-caching --dtype float32 --chat-template plain --api-key one --ignore-unknown-fields"
    result = serve(
        f"a={model}", f"b={model},dtype=bfloat16", *flags.split(), *more.split(), "--api-key-file", tmp_path / "keys",
        "--admin-key", "root", "--weights-root", tmp_path, "--preferences", tmp_path / "kept",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    engine, api = told[0].engine, told[0].api
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_waiting_requests) == (4096, 5, 6)
    assert (engine.kv_cache_memory_bytes, engine.enable_prefix_caching) == (1 << 30, False)
    assert (api.max_body, api.api_keys, api.ignore_unknown_fields) == (1 << 20, ("one", "two", "three"), True)
    assert (api.admin_keys, api.weights_root, api.preferences) == (("root",), str(tmp_path), str(tmp_path / "kept"))
    assert not {"root", "one"} & set(str(told[0].shown()).split("'"))
    assert [(spec.dtype, spec.chat_template) for spec in told[0].models] == [
        ("float32", "plain"),
        ("bfloat16", "plain"),
    ]


def test_the_command_line_wins_over_the_file(model: Path, told: list[ServeOptions], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"models: [file={model}]\nport: 9001\nmax-num-seqs: 7\nenable-prefix-caching: false\napi-key: [a, b]\n"
    )
    assert serve("--config", file).exit_code == 0
    assert serve(f"line={model}", "--config", file, "--port", 9002, "--enable-prefix-caching").exit_code == 0
    first, second = told
    assert (first.models[0].name, first.port, first.engine.max_num_seqs) == ("file", 9001, 7)
    assert (first.engine.enable_prefix_caching, first.api.api_keys) == (False, ("a", "b"))
    assert (second.models[0].name, second.port, second.engine.max_num_seqs) == ("line", 9002, 7)
    assert second.engine.enable_prefix_caching


@pytest.mark.parametrize(
    ("content", "said"), [("ports: 1", "did you mean port"), ("[1]", "keys and values"), ("a: [", "serve.yaml")]
)
def test_a_wrong_file_is_named(content: str, said: str, told: list[ServeOptions], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    result = serve("--config", file)
    assert result.exit_code == 2 and said in result.stderr.splitlines()[-1]


def test_listening_on_every_address_of_a_name() -> None:
    sockets = bind("localhost", 0)
    assert len({listener.getsockname()[1] for listener in sockets}) == 1
    with pytest.raises(CannotServe, match=r"in use.*--port"):
        bind("localhost", sockets[0].getsockname()[1])
    for listener in sockets:
        listener.close()
    with pytest.raises(CannotServe, match="no-such-host"):
        bind("no-such-host.invalid", 0)


def test_crashes_are_forgiven_with_time() -> None:
    crashes = Crashes()
    pauses = [crashes.add(float(second)) for second in range(CRASHES)]
    assert pauses == [0.1 * 2**i for i in range(CRASHES)]
    assert crashes.add(CRASH_SECONDS - 1) is None
    assert crashes.add(3 * CRASH_SECONDS) == 0.1


def test_room_for_adapters(model: Path, told: list[ServeOptions], tmp_path: Path) -> None:
    """Off unless asked for; one flag is enough."""
    (tmp_path / "poet").mkdir()
    module = f"poet={tmp_path / 'poet'}"
    words = [[], ["--enable-lora"], ["--max-loras", 3, "--max-lora-rank", 64], ["--lora-modules", module]]
    for given in words:
        assert serve(model, *given).exit_code == 0
    found = [(one.engine.max_loras, one.engine.max_lora_rank, one.engine.lora_modules) for one in told]
    assert found == [(0, 16, ()), (8, 16, ()), (3, 64, ()), (8, 16, (("poet", str(tmp_path / "poet")),))]
    for given, said in (
        (["--max-lora-rank", 8], "--max-lora-rank 8 is for --enable-lora"),
        (["--enable-lora", "--max-lora-rank", 0], "--max-lora-rank 0: at least 0, and 1 to 512"),
        (["--lora-modules", "poet"], "--lora-modules poet: NAME=PATH"),
        (["--lora-modules", module, "--lora-modules", f"x{module}", "--max-loras", 1], "--max-loras is 1, but"),
    ):
        answer = serve(model, *given)
        assert answer.exit_code == 2 and said in " ".join(answer.output.split())
