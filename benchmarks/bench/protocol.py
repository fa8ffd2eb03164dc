"""How a process that holds one engine is spoken to: a JSON object per line on its stdin, one per answer on its stdout.

    {"do": "load", "model": PATH, "options": {…}}                     versions, import_seconds, load_seconds, dtype, …
    {"do": "generate", "token_ids": …, "output_lens": …, "seed": 0}   seconds, cpu_seconds, output_tokens, token_ids, …
    {"do": "score", "token_ids": …}                                   seconds, cpu_seconds, scores

An answer is {"ok": {…}} or {"error": "what was wrong"}, after which the process can be asked on. What it writes to
stderr is its log. An engine has its own process, so that it may have its own interpreter and libraries, so that memory
and threads of one do not disturb another, and so that a crash is a sentence in the result instead of the end of the
run. The other side is `benchmarks/peers/child.py`.

`options`, all optional; what an engine has no counterpart for is named in the answer's `ignored`:

    dtype                    auto | float32 | bfloat16 | float16; int8, w8a8 where the engine has such weights
    threads                  of the engine
    max_model_len            tokens, prompt and answer together
    max_num_seqs             sequences that are computed together
    max_num_batched_tokens   of one step
    enable_prefix_caching    off unless asked for: a repeated run would read its prompts from the cache
    deterministic, device, kv_cache_memory_bytes, kv_cache_dtype     Tandem's flags of those names
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_TAIL = 3000  # characters of the log that an error cites


class ChildError(RuntimeError):
    """An engine's process refused, died, hung or answered nonsense. The message names it and ends with its log."""


class Child:
    """A process that holds one engine; `command` starts it. A context manager.

    It leads a process group of its own, so that what it started ends with it. `env` comes on top of this process's
    environment. `timeout`: seconds that one answer may take. Raises ChildError from every call that gets no answer;
    after a death, a time-out or an unreadable answer the process is gone, after a refusal it can be asked on.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, *, timeout: float = 900.0
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._received = bytearray()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._log.close()
            raise ChildError(f"{name} cannot be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        os.set_blocking(self._to.fileno(), False)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """The end of what it wrote to stderr; empty once it is closed."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL, max(size - LOG_TAIL, 0))
        return tail.decode("utf-8", "replace").strip()

    def load(self, model: Path | str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Imports the engine and reads the checkpoint. Another call takes another checkpoint where the engine can.

        The answer has `versions` (by package), `import_seconds`, `load_seconds`, and what the engine really took:
        `dtype`, `threads`, `ignored` options, and a `note` where its way of running is not the others'.
        """
        return self.ask("load", model=str(model), options=dict(options or {}))

    def generate(self, token_ids: Sequence[Sequence[int]], output_lens: Sequence[int], seed: int = 0) -> dict[str, Any]:
        """Greedy, past end-of-text tokens, prompt i to exactly `output_lens[i]` tokens, all handed over at once.

        `seconds` and `cpu_seconds` (the process and its children, all threads) are taken around the engine's work
        alone. `output_tokens[i]` counts what was asked for; `computed_tokens` sums what the engine computed for it,
        which is more where a batch runs until its longest answer. `first_token_seconds` is None where the engine does
        not tell. `token_ids` are the answers.
        """
        if len(token_ids) != len(output_lens):
            raise ValueError(f"{len(token_ids)} prompts, but {len(output_lens)} output lengths")
        answer = self.ask("generate", token_ids=token_ids, output_lens=output_lens, seed=seed)
        if answer["output_tokens"] != list(output_lens):
            raise ChildError(f"{self.name} was asked for {list(output_lens)} tokens and gave {answer['output_tokens']}")
        return answer

    def score(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`scores[i]`: the reward head's outputs at the last token of sequence i; `seconds`, `cpu_seconds`."""
        return self.ask("score", token_ids=token_ids)

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        answer = self._exchange({"do": do, **given})
        if "error" in answer:
            raise ChildError(self._sentence(f"could not {do}: {answer['error']}"))
        return answer["ok"]

    def close(self) -> None:
        """Ends the process and everything it started. Safe to call again."""
        with contextlib.suppress(OSError):  # it may be gone, with a request still in the pipe
            self._to.close()
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._kill()
        self._from.close()
        self._log.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Neither side may block for ever: what does not fit a pipe is sent while answers are looked for."""
        if self._process.poll() is not None:
            raise ChildError(self._sentence(f"ended with status {self._process.returncode}"))
        unsent = memoryview(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as pipes:
            pipes.register(self._from, selectors.EVENT_READ)
            pipes.register(self._to, selectors.EVENT_WRITE)
            while b"\n" not in self._received:
                ready = pipes.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    self._kill()
                    raise ChildError(self._sentence(f"gave no answer to {request['do']} within {self.timeout:g} s"))
                for key, _ in ready:
                    if key.fileobj is self._from:
                        self._read(request["do"])
                        continue
                    try:
                        unsent = unsent[os.write(self._to.fileno(), unsent[: 1 << 16]) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]  # it is ending: reading says how
                    if not unsent:
                        pipes.unregister(self._to)
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return self._parse(line, request["do"])

    def _read(self, do: str) -> None:
        part = os.read(self._from.fileno(), 1 << 16)
        if part:
            self._received += part
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.poll()
        self._kill()
        how = "closed its stdout" if status is None else f"died of signal {-status}" if status < 0 else ""
        raise ChildError(self._sentence(f"{how or f'ended with status {status}'} during {do}"))

    def _parse(self, line: bytes, do: str) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and len(answer.keys() & {"ok", "error"}) == 1:
                return answer
        self._kill()
        raise ChildError(self._sentence(f"answered {do} with what is no answer: {line[:200]!r}"))

    def _sentence(self, what: str) -> str:
        return f"{self.name} {what}" + (f"\n--- end of its log:\n{self.log}" if self.log else "")
