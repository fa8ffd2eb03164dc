"""What trainers and clients of other servers speak, one file per family of routes. Each translates and does nothing
else: `api` reads bodies, makes requests of the engine and takes its outputs."""

from __future__ import annotations

from . import llama_factory, openrlhf, slime, vllm_pooling, vllm_scoring

ROUTERS = tuple(module.router for module in (vllm_pooling, vllm_scoring, openrlhf, slime, llama_factory))
