"""What becomes of every field a client may send: honoured, ignored because it cannot matter here, or refused and why.

`openai_fields` lists what the installed SDK can send; a test holds these tables against it and against `protocol`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Field:
    fate: Literal["honoured", "ignored", "refused"]
    reason: str = ""
    neutral: tuple[object, ...] = ()  # values of a refused field that ask for nothing

    def lets_pass(self, value: object) -> bool:
        return value is None or any(type(value) is type(other) and value == other for other in self.neutral)


HONOURED = Field("honoured")


def ignored(reason: str) -> Field:
    return Field("ignored", reason)


def refused(reason: str, *neutral: object) -> Field:
    return Field("refused", reason, neutral)


def honoured(*names: str) -> dict[str, Field]:
    return dict.fromkeys(names, HONOURED)


ACCOUNT = ignored("bookkeeping of OpenAI's accounts")
STRUCTURED = refused("structured_outputs replaces it")
NO_IMAGES = refused("the models read text only", [], {}, "")

VLLM: dict[str, Field] = {  # what its sampling parameters and its bodies have besides
    "session_id": ignored("every prompt prefix is cached"),
    "stream_interval": ignored("a chunk holds what has come"),
    "truncation_side": refused("truncate_prompt_tokens keeps the last tokens", "left"),
    "logprob_token_ids": refused("log-probabilities are of the drawn and the likeliest tokens", []),
    "thinking_token_budget": refused("thinking is not counted apart"),
    "repetition_detection": refused("an answer that repeats itself goes on"),
    "routed_experts_prompt_start": refused("there are no experts", 0),
    "watermarking": refused("nothing is marked", False),
    "vllm_xargs": refused("there are none", {}),
    "kv_transfer_params": refused("one engine computes prompt and answer", {}),
    "ec_transfer_params": refused("one engine computes prompt and answer", {}),
    "return_token_offsets": refused("logprobs has text_offset", False),
    "return_mm_kwargs": refused("the models read text only", False),
    "mm_payload": NO_IMAGES,
}

_GENERATION = {  # chat and completions
    **honoured("model", "n", "stream", "stream_options", "stop", "seed", "max_tokens", "min_tokens"),
    **honoured("temperature", "top_p", "top_k", "min_p", "logit_bias", "logprobs", "logprobs_mode", "prompt_logprobs"),
    **honoured("presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words"),
    **honoured("stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    **honoured("return_token_ids", "return_tokens_as_token_ids", "return_weight_spans", "truncate_prompt_tokens"),
    **honoured("add_special_tokens"),
    **honoured("priority", "cache_salt", "timeout", "response_format", "structured_outputs", "best_of", "rank_by"),
    "user": ACCOUNT,
    "request_id": ignored("the x-request-id header names a request"),
    "guided_json": STRUCTURED,
    "guided_regex": STRUCTURED,
    "guided_choice": STRUCTURED,
    "guided_grammar": STRUCTURED,
    "use_beam_search": refused("there is no beam search", False),
    "length_penalty": refused("it belongs to beam search, and there is none", 1, 1.0),
    "spaces_between_special_tokens": refused("special tokens are decoded as the tokenizer has them", True),
    "mm_processor_kwargs": NO_IMAGES,
    **VLLM,
}

CHAT: dict[str, Field] = {
    **_GENERATION,
    "echo": refused("a chat's answer is the new message alone; continue_final_message writes on from one", False),
    **honoured("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    **honoured("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    "metadata": ACCOUNT,
    "store": ACCOUNT,
    "service_tier": ACCOUNT,
    "safety_identifier": ACCOUNT,
    "prompt_cache_key": ignored("every prompt prefix is cached"),
    "prompt_cache_options": ignored("every prompt prefix is cached"),
    "prompt_cache_retention": ignored("every prompt prefix is cached"),
    "reasoning_effort": ignored("the models have no such dial"),
    "verbosity": ignored("the models have no such dial"),
    "audio": refused("the models write text only"),
    "modalities": refused("the models write text only", ["text"]),
    "moderation": refused("there is no moderation model"),
    "prediction": refused("predicted outputs are not supported"),
    "web_search_options": refused("there is no web search"),
    "functions": refused("tools replace it", []),
    "function_call": refused("tool_choice replaces it", "none"),
    "chat_template": refused("a template from a request is never run; start the server with --chat-template"),
    "include_reasoning": refused("--reasoning-parser tells thinking apart", True),
    "return_prompt_text": refused("POST /tokenize shows what a template makes", False),
    "media_io_kwargs": NO_IMAGES,
    "documents": refused("pass what the template needs in chat_template_kwargs"),
}

COMPLETIONS: dict[str, Field] = {
    **_GENERATION,
    **honoured("prompt", "echo"),
    "suffix": refused("the models only write on from a prompt", ""),
    "prompt_embeds": refused("send a prompt as text or token ids"),
}

CONVERSATION = (  # what a chat template is given
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    "add_special_tokens",
)
TOKENIZE: dict[str, Field] = {
    **honoured("model", "prompt", "return_token_strs", *CONVERSATION),
    "chat_template": CHAT["chat_template"],
    "mm_processor_kwargs": CHAT["mm_processor_kwargs"],
}
DETOKENIZE: dict[str, Field] = honoured("model", "tokens", "skip_special_tokens")

REWARDS: dict[str, Field] = {
    **honoured("model", "input", "conversations", "add_special_tokens", "chat_template_kwargs"),
    **honoured("priority", "cache_salt", "timeout", "normalize"),
    "user": ACCOUNT,
    "request_id": ignored("the x-request-id header names a request"),
}

EMBEDDINGS: dict[str, Field] = {
    **honoured("model", "input", "dimensions", "encoding_format", "normalize", "truncate_prompt_tokens"),
    **honoured("add_special_tokens", "priority", "cache_salt", "timeout"),
    "user": ACCOUNT,
    "request_id": ignored("the x-request-id header names a request"),
    "messages": refused("send the text as input"),
    "embed_dtype": refused("numbers are float32", "float32"),
    "endianness": refused("base64 holds little-endian numbers", "little"),
}
