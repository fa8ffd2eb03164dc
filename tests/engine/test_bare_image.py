"""The engine runs where only torch, numpy, safetensors and tokenizers are installed, and Tandem itself is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, types

class Blocked:
    names = {"msgspec", "zmq", "typer", "rich", "llguidance", "fastapi", "pydantic", "uvicorn", "transformers"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not on a bare image")

sys.meta_path.insert(0, Blocked())
tandem = types.ModuleType("tandem")
tandem.__path__ = [sys.argv[1]]
sys.modules["tandem"] = tandem

from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Request, Sampling

hub = Hub.load([ModelSpec("policy", sys.argv[2])], EngineOptions(kv_cache_memory_bytes=1 << 22, threads=1))
answer = hub.run([Request(1, "policy", [5, 6, 7], Sampling(max_tokens=4, seed=0, ignore_eos=True))])
tokens = [token for output in answer[1] for token in output.token_ids]
assert answer[1][-1].finish == "length", answer
print(len(tokens), "tokens")
"""


def test_the_engine_needs_nothing_else(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", "llama", tokenizer=False)
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "4 tokens\n", result.stderr
