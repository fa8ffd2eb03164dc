"""transformers' `generate` with static batches. See `child.py`.

It has no scheduler: prompts are padded on the left to the longest of their batch, which runs until its longest answer
is there. `max_num_seqs` is the size of a batch; batches follow each other in the order given.
"""

from __future__ import annotations

import time
from typing import Any

from child import answers, batches, ignored, serve, stopwatch, versions


class Transformers:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        import torch
        import transformers

        imported = time.perf_counter()
        self.torch = torch
        if options.get("threads"):
            torch.set_num_threads(options["threads"])
        config = transformers.AutoConfig.from_pretrained(model)
        scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
        kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
        wanted = options.get("dtype") or "auto"
        self.device = options.get("device") or "cpu"
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = options.get("max_num_seqs")
        taken: Any = kind.from_pretrained(model, dtype=wanted if wanted == "auto" else getattr(torch, wanted))
        self.model = taken.eval().to(self.device)
        self.pad = 0 if self.model.config.pad_token_id is None else self.model.config.pad_token_id
        self.model.config.pad_token_id = self.pad
        # Nothing of the checkpoint's own sampling, and no end: lengths are what was asked for.
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=self.pad)
        return {
            "versions": versions("transformers", "torch"),
            "import_seconds": imported - began,
            "load_seconds": time.perf_counter() - imported,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ignored": ignored(options, "dtype", "threads", "max_num_seqs", "device"),
            "note": "static batches: each runs until its longest answer is there",
        }

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]:
        torch = self.torch
        generated: list[list[int]] = []
        computed = 0
        with stopwatch() as watch, torch.inference_mode():

            def note(ids: Any, scores: Any, **_: Any) -> Any:
                watch.note_first()
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

            for batch in batches(output_lens, self.batch):
                ids, mask = self._padded([token_ids[i] for i in batch], left=True)
                longest = max(output_lens[i] for i in batch)
                rows = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=longest,
                    do_sample=False,
                    stopping_criteria=[note],
                )
                generated += rows[:, ids.shape[1] :].tolist()
                computed += longest * len(batch)
        return answers(generated, output_lens, watch, computed)

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]:
        """Padded on the right: the head reads the last token that is no padding, so no sequence may end in that id."""
        if any(ids[-1] == self.pad for ids in token_ids):
            raise ValueError(f"a sequence ends in the padding token {self.pad}")
        scores: list[list[float]] = []
        with stopwatch() as watch, self.torch.inference_mode():
            for batch in batches([len(ids) for ids in token_ids], self.batch):
                ids, mask = self._padded([token_ids[i] for i in batch], left=False)
                scores += self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().tolist()
        return {**watch.times, "scores": scores}

    def _padded(self, rows: list[list[int]], *, left: bool) -> tuple[Any, Any]:
        """ids and mask [batch, longest]"""
        width = max(map(len, rows))
        ids = self.torch.full((len(rows), width), self.pad)
        mask = self.torch.zeros((len(rows), width), dtype=self.torch.long)
        for row, tokens in enumerate(rows):
            place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
            ids[row, place] = self.torch.tensor(tokens)
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)


if __name__ == "__main__":
    serve(Transformers())
