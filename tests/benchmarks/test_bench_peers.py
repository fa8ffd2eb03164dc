"""How engines are held in processes of their own, and the checkpoints that all of them read. No peer's environment is
needed: a scripted child misbehaves in every way, Tandem's and transformers' adapters are run for real."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
import transformers
from paging import PagedRun
from safetensors.torch import load_file
from servers import alive, child_processes, eventually
from tokenizers import Tokenizer

from tandem.benchmarks.bench import engines
from tandem.benchmarks.bench.protocol import Child, ChildError
from tandem.benchmarks.bench.servers import ServerError
from tandem.benchmarks.bench.servers import start as start_server
from tandem.benchmarks.peers import setup
from tandem.benchmarks.peers.checkpoint import EOS_ID, FIRST_WORD, SHAPES, checkpoint, words
from tandem.model.load import load_model

PROMPTS = [[300 + 7 * i + j for j in range(3 + 5 * i)] for i in range(4)]
LENGTHS = [6, 2, 8, 5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("random:tiny", tmp_path_factory.mktemp("cache"))


# The protocol, against a child that does as it is told ---------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
print("starting up", file=sys.stderr, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    how = asked.get("model", "")
    if how == "dies":
        print("out of cheese", file=sys.stderr, flush=True)
        os._exit(7)
    if how == "is killed":
        os.kill(os.getpid(), 9)
    if how == "hangs":
        time.sleep(600)
    if how == "prints garbage":
        print("Loading weights: 100%", flush=True)
    elif how == "answers a list":
        print("[1, 2]", flush=True)
    elif how == "refuses":
        print(json.dumps({"error": "ValueError: no such dtype"}), flush=True)
    elif asked["do"] == "generate":
        lens = asked["output_lens"]
        print(json.dumps({"ok": {"output_tokens": lens[:-1] + [lens[-1] - (asked["seed"] == 1)]}}), flush=True)
    else:
        print(json.dumps({"ok": {"got": len(line), "options": asked.get("options")}}), flush=True)
"""


@pytest.fixture
def scripted() -> Iterator[Child]:
    with Child("stub", [sys.executable, "-c", SCRIPT], timeout=20) as child:
        yield child


def test_child_that_dies_says_so_with_the_end_of_its_log(scripted: Child) -> None:
    with pytest.raises(ChildError, match=r"(?s)stub ended with status 7 during load.*starting up\nout of cheese"):
        scripted.load("dies")
    with pytest.raises(ChildError, match="stub ended with status"):
        scripted.load("fine")


def test_child_killed_from_outside_is_named_with_the_signal(scripted: Child) -> None:
    with pytest.raises(ChildError, match="stub died of signal 9 during load"):
        scripted.load("is killed")


def test_child_that_hangs_is_ended_at_the_time_out(scripted: Child) -> None:
    scripted.timeout = 0.5
    began = time.monotonic()
    with pytest.raises(ChildError, match=r"stub gave no answer to load within 0\.5 s"):
        scripted.load("hangs")
    assert 0.5 <= time.monotonic() - began < 5
    assert not alive(scripted.pid)


@pytest.mark.parametrize(("how", "shown"), [("prints garbage", "Loading weights"), ("answers a list", r"\[1, 2\]")])
def test_answer_that_is_none_ends_the_child(scripted: Child, how: str, shown: str) -> None:
    with pytest.raises(ChildError, match=f"stub answered load with what is no answer: .*{shown}"):
        scripted.load(how)
    assert not alive(scripted.pid)


def test_child_that_refuses_can_be_asked_on(scripted: Child) -> None:
    with pytest.raises(ChildError, match="stub could not load: ValueError: no such dtype"):
        scripted.load("refuses")
    assert scripted.load("fine", {"threads": 2})["options"] == {"threads": 2}


def test_requests_larger_than_a_pipe_arrive(scripted: Child) -> None:
    assert scripted.score([[7] * 100_000] * 4)["got"] > 1_000_000


def test_answer_of_another_length_is_no_result(scripted: Child) -> None:
    assert scripted.generate([[1], [2]], [4, 5])["output_tokens"] == [4, 5]
    with pytest.raises(ChildError, match=r"asked for \[4, 5\] tokens and gave \[4, 4\]"):
        scripted.generate([[1], [2]], [4, 5], seed=1)


def test_closing_ends_the_whole_group() -> None:
    nested = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    child = Child("nest", [sys.executable, "-c", nested], timeout=20)
    with pytest.raises(ChildError, match=r"b'\d+'") as caught:
        child.load("")
    grandchild = int(str(caught.value).partition("b'")[2].partition("'")[0])
    child.close()
    child.close()
    eventually(lambda: not alive(child.pid) and not alive(grandchild), 5)


BUSY = """
import subprocess, sys
from child import serve
class Busy:
    def load(self, model, options):
        self.started = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        return {"pid": self.started.pid}
    def generate(self, token_ids, output_lens, seed):
        return {}
    def score(self, token_ids):
        return {"state": open(f"/proc/{self.started.pid}/stat").read().rpartition(")")[2].split()[0]}
serve(Busy())
"""


def test_what_an_engine_started_rests_between_requests(tmp_path: Path) -> None:
    """It must not take time from the engine that is measured meanwhile; while its own is asked, it runs."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    with Child("busy", [sys.executable, str(script)], {"PYTHONPATH": str(engines.PEERS)}, timeout=20) as child:
        started = child.load("")["pid"]
        eventually(lambda: state(started) == "T", 5)
        assert child.score([])["state"] != "T"
        eventually(lambda: state(started) == "T", 5)
    eventually(lambda: not alive(started), 5)


def state(pid: int) -> str:
    """T: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_program_that_is_not_there() -> None:
    with pytest.raises(ChildError, match="ghost cannot be started"):
        Child("ghost", ["/nowhere/python"])


# Names ---------------------------------------------------------------------------------------------------------------


def test_engines_are_named_with_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "VENVS", tmp_path)
    assert engines.parse("tandem, transformers") == ["tandem", "transformers"]
    with pytest.raises(engines.EngineError, match=r"vllm is not set up here; run: .*peers\.setup vllm"):
        engines.parse("tandem,vllm")
    with pytest.raises(engines.EngineError, match="there is no engine tgi; there are tandem, transformers, vllm"):
        engines.parse("tgi")
    with pytest.raises(engines.EngineError, match="names no engine"):
        engines.parse(" ,")


# Servers --------------------------------------------------------------------------------------------------------------


def test_server_is_ready_with_its_first_token_and_leaves_nothing(tiny: Path) -> None:
    with start_server("tandem", tiny, threads=1, timeout=60) as server:
        models = httpx.get(f"{server.base_url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == [server.model]
        assert 0.3 < server.health_seconds <= server.ready_seconds < 60
        processes = [server.pid, *child_processes(server.pid)]
        assert len(processes) > 2
    eventually(lambda: not any(map(alive, processes)), 5)


def test_server_that_does_not_start_says_why(tiny: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"(?s)tandem ended with status 2; its log:.*--no-such-flag"),
        start_server("tandem", tiny, threads=1, arguments=["--no-such-flag"], timeout=60),
    ):
        raise AssertionError("it started")


def test_server_of_an_engine_that_has_none(tiny: Path) -> None:
    with pytest.raises(ServerError, match="ctranslate2 has no server"):
        start_server("ctranslate2", tiny)


# Setting peers up ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A peer called `small`, and the commands that would be run for it."""
    commands: list[list[str]] = []

    def step(say: Any, what: str, command: list[str]) -> str:
        commands.append(command)
        (tmp_path / "small").mkdir(exist_ok=True)
        if "broken" in command:
            raise setup.SetupError(f"{what} failed with status 1:\nno matching distribution")
        return "warning\n1.2.3\n"

    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "VENVS", tmp_path)
    monkeypatch.setattr(setup, "step", step)
    monkeypatch.setattr(setup, "RECIPES", {"small": setup.Recipe((("one",), ("two",)), "check", removes=("three",))})
    return commands


def test_set_up_runs_its_steps_in_order_and_once(recipe: list[list[str]]) -> None:
    said: list[str] = []
    setup.set_up("small", say=said.append)
    assert [command[-1] for command in recipe] == [str(setup.VENVS / "small"), "one", "two", "three", "check"]
    assert said[-1].startswith("small 1.2.3 is set up in small")
    setup.set_up("small", say=said.append)
    assert len(recipe) == 5 and "nothing to do" in said[-1]
    setup.set_up("small", again=True, say=said.append)
    assert len(recipe) == 10


def test_set_up_that_failed_is_not_taken_for_done(recipe: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "RECIPES", {"small": setup.Recipe((("broken",),), "check")})
    for _ in range(2):
        with pytest.raises(setup.SetupError, match="installing broken failed with status 1:\nno matching"):
            setup.set_up("small", say=lambda line: None)
    assert len(recipe) == 4


def test_a_changed_recipe_is_set_up_anew(recipe: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    setup.set_up("small", say=lambda line: None)
    monkeypatch.setattr(setup, "RECIPES", {"small": setup.Recipe((("one==2",),), "check")})
    setup.set_up("small", say=lambda line: None)
    assert recipe[-2][-1] == "one==2"


def test_a_failing_command_is_a_sentence_with_the_end_of_what_it_printed() -> None:
    failing = [sys.executable, "-c", "import sys; print('line one'); sys.exit('no space left')"]
    with pytest.raises(setup.SetupError, match=r"(?s)copying failed with status 1:\nline one\nno space left"):
        setup.step(lambda line: None, "copying", failing)


# The checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoint_is_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    again = checkpoint("random:tiny", tmp_path)
    names = sorted(file.name for file in tiny.iterdir())
    assert names == sorted(file.name for file in again.iterdir()) and len(names) == 5
    for name in names:
        assert (tiny / name).read_bytes() == (again / name).read_bytes(), name
    stamp = (again / "model.safetensors").stat().st_mtime_ns
    assert checkpoint("random:tiny", tmp_path) == again
    assert (again / "model.safetensors").stat().st_mtime_ns == stamp, "written once"


def test_unknown_checkpoint_says_which_there_are(tmp_path: Path) -> None:
    for name in ("random:7b", "tiny"):
        with pytest.raises(ValueError, match=f"no model {name}; there are random:125m"):
            checkpoint(name, tmp_path)


def test_large_checkpoint_is_the_125m_llama() -> None:
    shape = SHAPES["125m"]
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * shape.kv_heads * shape.head_size + 3 * shape.hidden * shape.inner
    matrices = 2 * shape.vocab_size * shape.hidden + shape.layers * layer
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads) == (12, 768, 12, 4)
    assert 124e6 < matrices < 126e6
    assert len(set(words(shape.vocab_size - FIRST_WORD))) == shape.vocab_size - FIRST_WORD


def test_any_words_are_the_encoding_of_their_text(tiny: Path) -> None:
    """In tokenizers itself and as transformers reads the directory."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tiny)
    size = SHAPES["tiny"].vocab_size
    assert tokenizer.get_vocab_size() == len(theirs) == size
    ids = random.Random(0).choices(range(FIRST_WORD, size), k=500) + list(range(FIRST_WORD, size))
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids
    assert theirs.encode(theirs.decode(ids)) == ids
    assert theirs.eos_token_id == EOS_ID
    text = "Was kostet das? 12 €, 猫\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == theirs.decode(theirs.encode(text)) == text
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|user|>hi</s><|assistant|>"


@torch.inference_mode()
def test_tandem_and_transformers_read_the_same_weights(tiny: Path) -> None:
    ids = PROMPTS[3]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert {name for name, _ in theirs.named_parameters()} == set(load_file(tiny / "model.safetensors"))
    ours = load_model(tiny, dtype="float32")
    logits = ours.logits(PagedRun(ours, 1, len(ids)).step({0: ids})[0])
    torch.testing.assert_close(logits, theirs(torch.tensor([ids])).logits[0])


# What goes to llama.cpp -----------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(engines.PEERS))
    return import_module("gguf_file")


def test_gguf_takes_every_weight_as_it_is(tiny: Path, gguf_file: ModuleType) -> None:
    read = dict(gguf_file.tensors(tiny / "model.safetensors"))
    expected = load_file(tiny / "model.safetensors")
    assert read.keys() == expected.keys()
    for name, values in read.items():
        assert torch.equal(torch.from_numpy(values), expected[name].float()), name
    names = {gguf_file.gguf_name(name) for name in read}
    assert len(names) == len(read) == 3 + 2 * 9
    assert {"token_embd.weight", "output.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= names


def test_gguf_rows_rotate_as_neighbours(gguf_file: ModuleType) -> None:
    """Turning the pairs (i, i + half) of a head and then sorting is sorting and then turning the pairs (2i, 2i + 1)."""
    heads, size = 3, 8
    rows = torch.randn(heads * size, 1, generator=torch.Generator().manual_seed(0))
    angles = torch.linspace(0.1, 2.0, size // 2)
    first, second = rows.view(heads, 2, size // 2).unbind(1)
    halves = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    turned = torch.stack(halves, 1).view(-1, 1)
    even, odd = torch.from_numpy(gguf_file.interleaved(rows.numpy(), size)).view(heads, size // 2, 2).unbind(2)
    pairs = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
    torch.testing.assert_close(
        torch.stack(pairs, 2).view(-1, 1), torch.from_numpy(gguf_file.interleaved(turned.numpy(), size))
    )


# Two adapters for real -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    loaded: dict[str, Any]
    generated: dict[str, Any]
    scored: dict[str, Any]
    refusal: str


@pytest.fixture(scope="module")
def answers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """What each engine made of the prompts, first with the language model, then with the reward model."""
    reward = checkpoint("random:tiny-reward", tmp_path_factory.mktemp("reward"))
    options = {"dtype": "float32", "threads": 1, "max_num_seqs": 3, "quantization": "awq"}

    def ask(name: str) -> Answers:
        with engines.start(name, threads=1, timeout=60) as child:
            loaded = child.load(tiny, options)
            generated = child.generate(PROMPTS, LENGTHS)
            child.load(reward, options)
            scored = child.score(PROMPTS)
            with pytest.raises(ChildError) as refusal:
                child.generate(PROMPTS, LENGTHS)
            return Answers(loaded, generated, scored, str(refusal.value))

    names = ("tandem", "transformers")
    with ThreadPoolExecutor() as both:
        return dict(zip(names, both.map(ask, names), strict=True))


def test_adapters_agree_on_greedy_tokens(answers: dict[str, Answers]) -> None:
    ours, theirs = (answers[name].generated for name in ("tandem", "transformers"))
    assert ours["token_ids"] == theirs["token_ids"]
    assert [len(ids) for ids in ours["token_ids"]] == ours["output_tokens"] == theirs["output_tokens"] == LENGTHS
    assert len({token for ids in ours["token_ids"] for token in ids}) > 8, "text that does not vary proves nothing"
    assert ours["computed_tokens"] == sum(LENGTHS)
    assert theirs["computed_tokens"] == 3 * 8 + 5, "a batch of three runs to its longest answer, the last is alone"


def test_adapters_say_what_they_are_and_what_it_took(answers: dict[str, Answers]) -> None:
    for name, found in answers.items():
        loaded, answer = found.loaded, found.generated
        assert loaded["versions"][name] and loaded["versions"]["torch"] == torch.__version__
        assert loaded["dtype"] == "float32" and loaded["threads"] == 1
        assert loaded["ignored"] == ["quantization"]
        assert loaded["import_seconds"] > 0.1 and loaded["load_seconds"] > 0
        assert 0 < answer["first_token_seconds"] < answer["seconds"]
        assert 0 < answer["cpu_seconds"] < 3 * answer["seconds"] + 0.1


def test_adapters_agree_on_scores(answers: dict[str, Answers]) -> None:
    ours, theirs = (torch.tensor(answers[name].scored["scores"]) for name in ("tandem", "transformers"))
    torch.testing.assert_close(ours, theirs)
    assert ours.shape == (len(PROMPTS), 1) and ours.std() > 0.01


def test_reward_model_that_is_asked_for_text_is_a_refusal(answers: dict[str, Answers]) -> None:
    for name, found in answers.items():
        assert found.refusal.startswith(f"{name} could not generate: ")
