"""Chat templates in the shape of well-known ones, and tokenizers of bytes that are trained here."""

import functools

from tokenizers import Tokenizer as Pieces
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.chat import Encoder

QWEN3 = """\
{%- macro calls(message, content) -%}
{%- for one in message.tool_calls or [] -%}
{%- set call = one.function or one -%}
{{ '\\n' if content or not loop.first }}<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments if call.arguments is string else call.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{%- endmacro -%}
{%- set first_is_system = messages[0].role == 'system' -%}
{%- if tools -%}
<|im_start|>system
{{ messages[0].content + '\\n\\n' if first_is_system }}# Tools

<tools>
{%- for tool in tools -%}
{{ '\\n' + tool | tojson }}
{%- endfor %}

</tools>

Call one in this form:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif first_is_system -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- set asked = namespace(at=messages | length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
{%- if message.role == 'user' and not asked.found -%}
{%- set asked.at = messages | length - 1 - loop.index0 -%}
{%- set asked.found = true -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
{%- set said = namespace(thought='', content=message.content) -%}
{%- if message.reasoning_content is string -%}
{%- set said.thought = message.reasoning_content -%}
{%- elif '</think>' in message.content -%}
{%- set said.thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set said.content = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > asked.at and (loop.last or said.thought) -%}
{{ '<think>\\n' + said.thought.strip('\\n') + '\\n</think>\\n\\n' + said.content.lstrip('\\n') -}}
{%- else -%}
{{ said.content -}}
{%- endif -%}
{{ calls(message, said.content) }}<|im_end|>
{% elif message.role == 'tool' -%}
{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
<tool_response>
{{ message.content }}
</tool_response>
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' -}}
{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false -}}
{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- set told = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{%- set others = messages[1:] if messages[0].role == 'system' else messages -%}
{%- macro begins(role) -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- endmacro -%}
{{ begins('system') + ('Environment: ipython\\n' if tools else '') + 'Cutting Knowledge Date: December 2023\\n\\n' -}}
{{ told + '<|eot_id|>' -}}
{%- for message in others -%}
{%- if message.role == 'tool' or message.role == 'ipython' -%}
{{ begins('ipython') + (message.content | tojson if message.content is iterable else message.content) -}}
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}
{{ raise_exception('This model only supports single tool-calls at once!') }}
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{ begins('assistant') + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
{%- elif loop.first and tools -%}
{{ begins('user') + 'Answer with a call of one of these functions, as {"name": ..., "parameters": ...}.\\n\\n' -}}
{%- for tool in tools -%}
{{ tool | tojson(indent=4) + '\\n\\n' -}}
{%- endfor -%}
{{ message.content | trim -}}
{%- else -%}
{{ begins(message.role) + message.content | trim -}}
{%- endif -%}
{{ '<|eot_id|>' -}}
{%- endfor -%}
{{ begins('assistant') if add_generation_prompt -}}
"""

MISTRAL = """\
{{- bos_token -}}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set state = namespace(number=0) -%}
{%- for message in messages if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) -%}
{%- if (message.role == 'user') != (state.number % 2 == 0) -%}
{{ raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/...') }}
{%- endif -%}
{%- set state.number = state.number + 1 -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if tools and message == asked[-1] -%}
{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{ '[INST] ' + message.content + '[/INST]' -}}
{%- elif message.tool_calls -%}
{{ '[TOOL_CALLS] [' -}}
{%- for call in message.tool_calls -%}
{%- if not call.id or call.id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) -}}
{%- endfor -%}
{%- elif message.role == 'assistant' -%}
{{ ' ' + message.content | trim + eos_token -}}
{%- elif message.role == 'tool' -%}
{%- if not message.tool_call_id or message.tool_call_id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- else -%}
{{ raise_exception('Only user, assistant and tool roles are supported!') }}
{%- endif -%}
{%- endfor -%}
"""

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' if loop.first and message.role != 'system' -}}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

R1 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '<|User|>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{ '<|Assistant|>' + message.content.split('</think>')[-1] + '<|end_of_sentence|>' -}}
{%- else -%}
{{ '<|Tool|>' + message.content -}}
{%- endif -%}
{%- endfor -%}
{{ '<|Assistant|><think>\\n' if add_generation_prompt -}}
"""

CHANNELS = """\
{%- set last = namespace(call=none) -%}
{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' if tools -}}
{%- for message in messages -%}
{%- if message.tool_calls -%}
{%- set last.call = message.tool_calls[0].function.name -%}
{{ '<|start|>assistant' -}}
{{ ' to=' + last.call + '<|message|>' + message.tool_calls[0].function.arguments | tojson + '<|call|>' -}}
{%- elif message.role == 'tool' -%}
{{ raise_exception('there was no call before the answer') if not last.call -}}
{{ '<|start|>' + last.call + ' to=assistant<|message|>' + message.content + '<|end|>' -}}
{%- else -%}
{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{{ '<|start|>assistant' if add_generation_prompt -}}
"""

CONTROL = {
    CHANNELS: ["<|end|>", "<|call|>", "<|start|>", "<|message|>"],
    QWEN3: ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
    CHATML: ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
    LLAMA3: [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|python_tag|>",
    ],
    MISTRAL: [
        "</s>",
        "<s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ],
    R1: ["<|end_of_sentence|>", "<s>", "<|User|>", "<|Assistant|>", "<|Tool|>"],
}
"""Special tokens by template; the first ends a turn."""
ADDED = {QWEN3: ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]}
BOS = ("<s>", "<|begin_of_text|>")
NUM_ENDS = {CHANNELS: 2, QWEN3: 2, CHATML: 2, LLAMA3: 2}
SAID = "the calculator says that 12 * 34 is 408, and 5 + 6 is 11. Hello world! It's a tool, isn't it?\n\n<think> {name}"

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@functools.cache
def tokenizer(template, *, is_of_words=False):
    """A BPE tokenizer of bytes (or in the way of sentencepiece) with the template's special tokens."""
    special = CONTROL[template]
    pieces = Pieces(BPE())
    if is_of_words:
        pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        pieces.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({*map(chr, range(32, 127)), "\n", "▁"})
    else:
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator([SAID, template] * 4, trainer)
    bos = next((one for one in BOS if one in special), None)
    hf = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=special[0], bos_token=bos)
    hf.add_tokens(ADDED.get(template, []))
    hf.chat_template = template
    return Tokenizer(hf, tuple(hf.convert_tokens_to_ids(special[: NUM_ENDS.get(template, 1)])))


def encoder(template, *, tools=(CALCULATOR,), is_of_words=False, **options):
    return Encoder(
        tokenizer(template, is_of_words=is_of_words), template, options=options, tools=tuple(tools), is_continued=True
    )
