"""What vLLM makes of a checkpoint: `python vllm_reads.py DIRECTORY < prompts.json`, in vLLM's own environment.

stdin: a list of prompts as token ids. The last line of stdout: for each prompt its tokens' log-probabilities (without
the first's) and TOKENS greedy ones. In float32, so that what differs from Tandem is not rounding.

vLLM has no kernel for 8-bit weights with unquantized activations on CPUs. It is lent one in PyTorch; what config.json
means and where each tensor goes is still found out by vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

TOKENS = 24


def lend_kernel() -> None:
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    class TorchInt8(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return c.weight_type == scalar_types.uint8b128 and c.group_size == -1, "another type"

        def process_weights_after_loading(self, layer: Any) -> None:
            ins = self.config.partition_weight_shape[0]
            values = layer.weight_packed.data.contiguous().view(torch.uint8)[:, :ins].float() - 128
            layer.whole = values * layer.weight_scale.data.float()

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x.float(), layer.whole, bias).to(x.dtype)

    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].append(TorchInt8)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM prints to stdout as it likes
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the lent kernel is this process's
    lend_kernel()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_model_len=1024, seed=0)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(sys.stdin)]
    wanted = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    found = []
    for output in llm.generate(prompts, wanted, use_tqdm=False):
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = [entry[token].logprob for token, entry in pairs]
        found.append({"logprobs": logprobs, "greedy": list(output.outputs[0].token_ids)})
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
