"""llama.cpp through its C interface, with as many sequences in a step as `max_num_seqs`. See `child.py`.

llama-cpp-python's own `Llama` computes one sequence after another; llama.cpp itself does not have to, so it is asked
directly: prompts are computed as soon as a slot is free, then all running sequences take a token per step.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import gguf_file
from child import Stopwatch, answers, ignored, on_cpu, serve, stopwatch, versions

TYPES = {"auto": "bf16", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0"}
STEP = 256  # llama.cpp rounds a sequence's share of its cache up to this many tokens


class LlamaCpp:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        on_cpu(options)
        began = time.perf_counter()
        import llama_cpp
        import numpy

        imported = time.perf_counter()
        self.api, self.numpy = llama_cpp, numpy
        wanted = options.get("dtype") or "auto"
        if wanted not in TYPES:
            raise ValueError(f"dtype {wanted}: llama.cpp is measured with {', '.join(TYPES)}")
        file = gguf_file.write(Path(model), TYPES[wanted])  # once; not part of loading
        written = time.perf_counter()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.slots = options.get("max_num_seqs")
        self.step_tokens = options.get("max_num_batched_tokens") or 2048
        self.threads = options.get("threads") or len(os.sched_getaffinity(0))  # its own default is four, on any machine
        self.context: Any = None
        self.shape = (0, 0)
        known = ("dtype", "threads", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "device")
        return {
            "versions": versions("llama-cpp-python", "gguf", "numpy"),
            "import_seconds": imported - began,
            "load_seconds": time.perf_counter() - written,
            "dtype": TYPES[wanted],
            "threads": self.threads,
            "ignored": ignored(options, *known),
            "note": "through the C interface, several sequences per step",
        }

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]:
        slots = min(self.slots or len(token_ids), len(token_ids))
        longest = max(len(ids) + length for ids, length in zip(token_ids, output_lens, strict=True))
        self._prepare(slots, -(-longest // STEP) * STEP)
        waiting = deque(range(len(token_ids)))
        running: dict[int, int] = {}  # slot -> prompt
        generated: list[list[int]] = [[] for _ in token_ids]
        with stopwatch() as watch:
            while waiting or running:
                rows: list[tuple[int, int, int, bool]] = []  # token, position, slot, whether it is followed
                for slot in range(slots):
                    if waiting and slot not in running:
                        prompt = running[slot] = waiting.popleft()
                        ids = token_ids[prompt]
                        rows += [(token, place, slot, place == len(ids) - 1) for place, token in enumerate(ids)]
                if not rows:
                    for slot, prompt in running.items():
                        answer = generated[prompt]
                        rows.append((answer[-1], len(token_ids[prompt]) + len(answer) - 1, slot, True))
                for start in range(0, len(rows), self.step_tokens):
                    for slot, token in self._step(rows[start : start + self.step_tokens], watch):
                        prompt = running[slot]
                        generated[prompt].append(token)
                        if len(generated[prompt]) == output_lens[prompt]:
                            del running[slot]
                            self.api.llama_memory_seq_rm(self.memory, slot, -1, -1)
        return answers(generated, output_lens, watch, computed=sum(map(len, generated)))

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]:
        raise ValueError("GGUF files of reward models are not written here")

    def _prepare(self, slots: int, tokens: int) -> None:
        """A context of `slots` sequences of up to `tokens` each, empty; kept while its shape is the same."""
        api = self.api
        if self.shape != (slots, tokens):
            if self.context is not None:
                api.llama_batch_free(self.batch)
                api.llama_free(self.context)
            params = api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = slots * tokens, slots
            params.n_batch = self.step_tokens
            params.n_threads = params.n_threads_batch = self.threads
            self.context = api.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp makes no context for {slots} sequences of {tokens} tokens")
            self.memory = api.llama_get_memory(self.context)
            self.batch = api.llama_batch_init(self.step_tokens, 0, 1)
            self.shape = (slots, tokens)
        api.llama_memory_clear(self.memory, True)

    def _step(self, rows: list[tuple[int, int, int, bool]], watch: Stopwatch) -> list[tuple[int, int]]:
        """(slot, next token) of the rows that are followed."""
        api, batch = self.api, self.batch
        batch.n_tokens = len(rows)
        for row, (token, place, slot, followed) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, place, followed
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot
        status = api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens gave status {status}")
        found: list[tuple[int, int]] = []
        for row, (_, _, slot, followed) in enumerate(rows):
            if followed:
                logits = api.llama_get_logits_ith(self.context, row)
                found.append((slot, int(self.numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())))
        watch.note_first()
        return found


if __name__ == "__main__":
    serve(LlamaCpp())
