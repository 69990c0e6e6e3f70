"""Renders chats with transformers; see README.md. Usage: python make.py > cases.json"""

import json
import sys

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# With generation blocks, on lines of their own, so that the trimming of space matters.
MARKED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim + eos_token }}
        {%- endgeneration %}
    {%- else %}
{{ '<' ~ message.role ~ '>' }}
{{ message.content }}
    {% endif %}
{% endfor %}
"""

MARKED_LOOSE = """{% for message in messages %}
  {% if message.role == 'assistant' %}
  {% generation %}
  A: {{ message.content }}
  {% endgeneration %}
  {% else %}
  Q: {{ message.content }}
  {% endif %}
{% endfor %}
"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions:" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

PYTHON = """{%- set ns = namespace(n=0) -%}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}
{% for m in messages %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ m.content.strip().upper() }} {{ m['content'][:3] }} {{ m.content.split(' ')[0] }} {{ m.content.replace('e', '3') }} {{ m.get('x', 'none') }} {{ m.content | length }}
{%+ if true %} kept {% endif +%}
{% set ns.n = ns.n + 1 %}
{% endfor %}
{% macro wrap(x, tail='!') %}[{{ x }}{{ tail }}]{% endmacro %}
{{ wrap('a') }} {{ wrap('b', tail='?') }} {{ ns.n }} {{ true }} {{ none }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ 1.0 }} {{ [1, 'a', none] }} {{ 'x' * 3 }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ missing }} {{ missing | default('d') }} {{ 'a' in 'abc' }} {{ messages[-1].role }} {{ {'b': [1, {'c': 'é<&>"'}], 'a': 1.5, 'n': none, 't': true} | tojson }}
{{ {'b': [1, {'c': []}], 'a': {}} | tojson(indent=2) }}
{{- strftime_now('%Y') | length }}
"""

CHAT = [
    {"role": "user", "content": " Hello there <you> & me"},
    {"role": "assistant", "content": "Hi! How are you?\n"},
    {"role": "user", "content": "Fine; \"quoted\" é 日本"},
    {"role": "assistant", "content": "Good."},
]
SYSTEM = [{"role": "system", "content": "Be brief.\n"}] + CHAT[:3]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's <weather>",
            "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "number"}}, "required": ["z"]},
        },
    }
]
CALL = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"z": "Rome", "a": 1.5}}}]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo."},
]


def cases():
    for name, template in [("chatml", CHATML), ("llama", LLAMA), ("qwen3", QWEN3), ("mistral", MISTRAL), ("gemma", GEMMA), ("marked", MARKED), ("marked_loose", MARKED_LOOSE), ("python", PYTHON)]:
        for messages, tools in [(CHAT, None), (SYSTEM, None), (CALL, TOOLS), (CHAT[:1], None)]:
            for prompt in [False, True]:
                yield name, template, messages, tools, prompt


out = {"transformers": transformers.__version__, "tokens": TOKENS, "templates": {}, "cases": []}
for name, template, messages, tools, prompt in cases():
    out["templates"][name] = template
    case = {"template": name, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
    marked = "generation %}" in template
    try:
        rendered, spans = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, return_assistant_tokens_mask=marked, **TOKENS
        )
        case["rendered"] = rendered[0]
        if marked:
            case["assistant"] = [rendered[0][a:b] for a, b in spans[0]]
    except Exception as e:  # what a template raises is part of what is compared
        case["refused"] = str(e)
    out["cases"].append(case)
json.dump(out, sys.stdout, indent=1, ensure_ascii=False)
