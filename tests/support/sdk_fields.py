"""Writes server/api/openai_fields.py: the names of all fields of the installed openai package's request types."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import openai
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatPlain
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatStreamed
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Plain
from openai.types.completion_create_params import CompletionCreateParamsStreaming as Streamed
from openai.types.embedding_create_params import EmbeddingCreateParams

TARGET = Path(__file__).parents[2] / "server" / "api" / "openai_fields.py"


def sdk_fields() -> dict[str, tuple[str, ...]]:
    return {
        "CHAT": tuple(sorted({*get_type_hints(ChatPlain), *get_type_hints(ChatStreamed)})),
        "COMPLETIONS": tuple(sorted({*get_type_hints(Plain), *get_type_hints(Streamed)})),
        "EMBEDDINGS": tuple(sorted(get_type_hints(EmbeddingCreateParams))),
    }


def text() -> str:
    parts = [
        f'"""Every request field of openai {openai.__version__}; written by tests/support/sdk_fields.py."""\n\n',
        "from __future__ import annotations\n\n",
        f'VERSION = "{openai.__version__}"\n',
    ]
    for name, fields in sdk_fields().items():
        parts.append(f"{name} = (\n" + "".join(f'    "{field}",\n' for field in fields) + ")\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"wrote {TARGET}")
