"""Chat templates by name: how LLaDA, Dream, Llama 3, Qwen 2.5 and ChatML write a dialogue, and one in plain text.

Jinja, with the `{% generation %}` tags that the published ones lack: what they enclose, an assistant's text and what
ends its turn, is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltIn:
    """A template.

    Attributes:
        source: Jinja.
        bos_token: what `bos_token` is where the tokenizer does not say so but has this token.
    """

    source: str
    bos_token: str = ""


def _turns(before: str, content: str, end: str, after: str = "", role: str = "message.role") -> str:
    """Every message as `before`, its content, `end` and `after`, of which content and end make up an answer."""
    turn = f"{{{{ {content} + {end} }}}}"
    return (
        f"{{{{ {before.format(role)} }}}}"
        f"{{% if message.role == 'assistant' %}}{{% generation %}}{turn}{{% endgeneration %}}"
        f"{{% else %}}{turn}{{% endif %}}{after}"
    )


def _loop(turns: str, generation_prompt: str) -> str:
    return (
        f"{{% for message in messages %}}{turns}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {generation_prompt} }}}}{{% endif %}}"
    )


_HEADER = r"'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
_HEADERS = r"{{ bos_token }}" + _loop(
    _turns(_HEADER, "message.content | trim", "'<|eot_id|>'"), _HEADER.format("'assistant'")
)

_START = r"'<|im_start|>' + {} + '\n'"
_CHATML_TURNS = _turns(_START, "message.content", "'<|im_end|>'", after=r"{{ '\n' }}")
_CHATML = _loop(_CHATML_TURNS, _START.format("'assistant'"))

# What tools answer stands, one answer after the other, in one turn of the user's.
_TOOL_ANSWERS = (
    r"{% if message.role == 'tool' %}"
    r"{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    r"{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    r"{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    r"{% else %}" + _CHATML_TURNS + r"{% endif %}"
)


def _qwen(system: str) -> str:
    """Qwen 2.5's: a dialogue without a system message gets this one."""
    default = rf"'<|im_start|>system\n{system}<|im_end|>\n'"
    return f"{{% if messages[0].role != 'system' %}}{{{{ {default} }}}}{{% endif %}}" + _loop(
        _TOOL_ANSWERS, _START.format("'assistant'")
    )


_PLAIN = _loop(
    r"{{ message.role | capitalize + ':\n' }}"
    r"{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    r"{% else %}{{ message.content }}{% endif %}{{ '\n' }}",
    r"'Assistant:\n'",
)

BUILT_IN = {
    "llada": BuiltIn(_HEADERS, bos_token="<|startoftext|>"),
    "dream": BuiltIn(_qwen("You are a helpful assistant.")),
    "llama3": BuiltIn(_HEADERS, bos_token="<|begin_of_text|>"),
    "qwen": BuiltIn(_qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "chatml": BuiltIn(_CHATML),
    "plain": BuiltIn(_PLAIN),
}
