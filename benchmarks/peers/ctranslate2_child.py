"""CTranslate2's `Generator` with static batches. See `child.py`.

A batch runs until its longest answer is there; `max_num_seqs` is its size, and CTranslate2 puts prompts of like length
together. `dtype` is what the converted file holds; CTranslate2 computes in a type that it supports on this processor,
and the answer to `load` says in which.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from child import answers, ignored, on_cpu, serve, stopwatch, versions
from converted import place

TYPES = ("float32", "bfloat16", "float16", "int8")


class CTranslate2:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        on_cpu(options)
        began = time.perf_counter()
        import ctranslate2

        imported = time.perf_counter()
        wanted = options.get("dtype") or "auto"
        wanted = "bfloat16" if wanted == "auto" else wanted
        if wanted not in TYPES:
            raise ValueError(f"dtype {wanted}: CTranslate2 is measured with {', '.join(TYPES)}")
        directory = convert(Path(model), wanted)  # once; not part of loading
        vocabulary = json.loads((Path(model) / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        self.tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        self.batch = options.get("max_num_seqs") or 0
        written = time.perf_counter()
        threads = options.get("threads") or len(os.sched_getaffinity(0))
        self.generator = ctranslate2.Generator(str(directory), device="cpu", inter_threads=1, intra_threads=threads)
        return {
            "versions": versions("ctranslate2", "transformers", "torch"),
            "import_seconds": imported - began,
            "load_seconds": time.perf_counter() - written,
            "dtype": self.generator.compute_type,
            "threads": threads,
            "ignored": ignored(options, "dtype", "threads", "max_num_seqs", "device"),
            "note": f"static batches of {wanted} weights: each runs until its longest answer is there",
        }

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]:
        prompts = [[self.tokens[token] for token in ids] for ids in token_ids]
        longest = max(output_lens)
        with stopwatch() as watch:
            results = self.generator.generate_batch(
                prompts,
                max_batch_size=self.batch,
                beam_size=1,
                sampling_topk=1,
                max_length=longest,
                min_length=longest,
                end_token=[],
                include_prompt_in_result=False,
            )
        generated = [result.sequences_ids[0] for result in results]
        return answers(generated, output_lens, watch, computed=sum(map(len, generated)))

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]:
        raise ValueError("CTranslate2 has no reward heads")


def convert(checkpoint: Path, kind: str) -> Path:
    """CTranslate2's own converter, once per checkpoint and type."""
    target = place(checkpoint, f"ct2-{kind}")
    if not target.exists():
        from ctranslate2.converters import TransformersConverter

        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        TransformersConverter(str(checkpoint)).convert(str(part), quantization=kind, force=True)
        part.rename(target)
    return target


if __name__ == "__main__":
    serve(CTranslate2())
