"""Built-in chat templates, for checkpoints that have none: `--chat-template NAME`.

The formats are the well-known ones of Alpaca, Vicuna 1.1 and ChatML; `plain` names the speakers and nothing else.
`bos_token` is empty for tokenizers that do not start a text with it.
"""

ALPACA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content ~ '\\n\\n' -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' -}}
    {{- '\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' -}}
    {%- else -%}
        {{- '### Instruction:\\n' ~ message.content ~ '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

VICUNA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions." -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- ' ASSISTANT: ' ~ message.content ~ eos_token -}}
    {%- else -%}
        {{- ' USER: ' ~ message.content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

CHATML = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message.role | capitalize ~ ': ' ~ message.content ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

BUILT_IN = {"alpaca": ALPACA, "vicuna": VICUNA, "chatml": CHATML, "plain": PLAIN}
