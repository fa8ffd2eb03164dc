"""What becomes of every field that the routes under /v1/rlhf may be sent; see `api.fields`."""

from __future__ import annotations

from ..fields import ACCOUNT, CHAT, Field, honoured, ignored, refused

_COMMON: dict[str, Field] = {
    **honoured("model", "priority", "cache_salt", "timeout", "add_special_tokens", "chat_template_kwargs"),
    "user": ACCOUNT,
    "request_id": ignored("the x-request-id header names a request"),
}
_PROMPT = honoured("prompt", "prompt_token_ids", "messages")
_EVALUATION: dict[str, Field] = {
    **_COMMON,
    **honoured("models", "want", "kl_coef", "kl_estimator", "reward_clip", "missing_eos_penalty", "bootstrap_value"),
    **honoured("normalize", "encoding"),
}

SCORE_GROUP: dict[str, Field] = {
    **_COMMON,
    **_PROMPT,
    **honoured("completions", "normalize", "pairwise"),
    "pool": refused("the token that is read is the checkpoint's to say", "auto"),
    "want_values": refused("ask /v1/rlhf/evaluate for values", False),
}
EVALUATE: dict[str, Field] = {**_EVALUATION, **honoured("groups", "temperature")}
ROLLOUT: dict[str, Field] = {
    **_EVALUATION,
    **honoured("prompts", "messages", "n", "sampling", "stream"),
    "temperature": refused("sampling.temperature is that of the rollout and of its log-probabilities"),
}
SAMPLING: dict[str, Field] = {  # of a rollout, in its object of that name
    **{name: field for name, field in CHAT.items() if field.fate != "honoured"},
    **honoured("seed", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "logit_bias"),
    **honoured("presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words"),
    **honoured("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    **honoured("response_format", "structured_outputs", "truncate_prompt_tokens"),
}
NORMALIZE: dict[str, Field] = {**_COMMON, **honoured("demonstrations", "mode", "persist")}
WEIGHTS: dict[str, Field] = {
    **honoured("model", "source", "path", "adapter", "size", "handles", "version", "in_flight", "partial", "also"),
    "role": refused("model names the model whose weights are replaced"),
}
PREFERENCES: dict[str, Field] = honoured("prompt", "messages", "completions", "ranking", "scores", "model", "metadata")
