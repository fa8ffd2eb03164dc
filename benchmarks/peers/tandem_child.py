"""Tandem's engine in this process: the one that serves, without HTTP. See `child.py`."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any, get_args

from child import Stopwatch, answers, ignored, serve, stopwatch, versions

NAME = "model"


class Tandem:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        import torch

        from tandem.server.engine.hub import Hub
        from tandem.server.engine.options import Dtype, EngineOptions, ModelSpec

        imported = time.perf_counter()
        given = {"enable_prefix_caching": False} | {k: v for k, v in options.items() if v is not None}
        dtype, pages = given.pop("dtype", "auto"), given.pop("kv_cache_dtype", "auto")
        precision = {"dtype": dtype} if dtype in get_args(Dtype) else {"quantization": dtype}
        known = {field.name for field in fields(EngineOptions)}
        self.hub = Hub.load(
            [ModelSpec(NAME, model, kv_dtype=pages, **precision)],
            EngineOptions(**{name: value for name, value in given.items() if name in known}),
        )
        while self.hub.idle():  # what a server would prepare while nobody asks
            pass
        card = self.hub.engines[0].card
        return {
            "versions": versions("tandem", "torch"),
            "import_seconds": imported - began,
            "load_seconds": time.perf_counter() - imported,
            "dtype": card.precision,
            "threads": torch.get_num_threads(),
            "ignored": ignored(given, *known),
        }

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]:
        from tandem.server.engine.request import Request, Sampling

        requests = [
            Request(number, NAME, ids, Sampling(length, seed, temperature=0.0, ignore_eos=True))
            for number, (ids, length) in enumerate(zip(token_ids, output_lens, strict=True))
        ]
        generated: list[list[int]] = [[] for _ in requests]
        with stopwatch() as watch:
            for output in self._run(requests, watch):
                generated[output.request_id] += output.token_ids
        return answers(generated, output_lens, watch, computed=sum(map(len, generated)))

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]:
        from tandem.server.engine.request import Request

        requests = [Request(i, NAME, ids, want=frozenset({"score"})) for i, ids in enumerate(token_ids)]
        scores: list[list[float]] = [[] for _ in requests]
        with stopwatch() as watch:
            for output in self._run(requests, watch):
                scores[output.request_id] = output.scores or []
        return {**watch.times, "scores": scores}

    def _run(self, requests: list[Any], watch: Stopwatch) -> Any:
        """Every output; the first failed request ends it all, for its figures would mean nothing."""
        hub = self.hub
        outputs = [output for request in requests for output in hub.submit(request)]
        while True:
            for output in outputs:
                if output.error is not None:
                    for request in requests:
                        hub.abort(request.id)
                    raise RuntimeError(output.error.message)
                watch.note_first()
                yield output
            if not hub.has_work:
                return
            outputs = hub.step()


if __name__ == "__main__":
    serve(Tandem())
