"""The demo model with a chat template that knows tools and thinking, in the form of Qwen3's."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = """
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n\\nYou may call one or more functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each call return a JSON object within tags:\\n' }}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{%- if message.role == 'tool' %}{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- else %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- ('\\n' if message.content else '') + '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined %}
{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def make_agent_model(folder: Path, smollm2: Path) -> Path:
    """A folder with the demo model's files and this template. With examples before it the model does what they show."""
    folder.mkdir()
    for file in smollm2.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.unlink()
    settings.write_text(json.dumps({**values, "chat_template": TEMPLATE}))
    return folder
