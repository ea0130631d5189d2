"""The chat format as a Jinja template. It needs no tokenizer, and every tokenizer is saved with it."""

JINJA = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- set thinking = message.thinking or message.reasoning_content -%}"
    "{%- if loop.last and message.role == 'assistant' and thinking -%}"
    "{{- '<think>\\n' + thinking + '\\n</think>\\n' -}}{%- endif -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content or [] -%}"
    "{%- if part.type != 'text' -%}{{- raise_exception('this model reads text, no ' + part.type) -}}{%- endif -%}"
    "{{- '' if loop.first else '\\n' -}}{{- part.text -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if not loop.last or message.role != 'assistant' or not add_generation_prompt -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- if loop.last and message.role != 'assistant' and add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n</think>\\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""For transformers and llama.cpp. `enable_thinking=False` writes the empty dream, as their users expect. A content may
be OpenAI's list of parts: their texts, a line each, as llama.cpp joins them; none (null) is empty."""
