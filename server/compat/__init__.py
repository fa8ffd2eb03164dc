"""What trainers and clients of other servers speak, one file per family of routes. Each translates and does nothing
else: `api` reads bodies, makes requests of the engine and takes its outputs."""

from __future__ import annotations

from . import (
    adapters,
    llama_factory,
    openrlhf,
    sglang_control,
    sglang_generate,
    sglang_info,
    slime,
    trl_legacy,
    trl_scoring,
    vllm_control,
    vllm_generate,
    vllm_pooling,
    vllm_scoring,
)

SCORING = (vllm_pooling, vllm_scoring, openrlhf, slime, llama_factory)
GENERATION = (vllm_generate, sglang_generate, trl_legacy, trl_scoring)
STATE = (vllm_control, sglang_info)
CONTROL = (vllm_control, sglang_control, adapters, trl_legacy)  # each has `admin`, routes that not everybody may call

ROUTERS = tuple(module.router for module in (*SCORING, *GENERATION, *STATE))
ADMINS = tuple(module.admin for module in CONTROL)
