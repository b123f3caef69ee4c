"""The messages of a record, and whether what a template wrote of them has all.

Note: calls of tools are written in many ways, so they are not looked for by their words. The template is asked once for each
shape of conversation with marks in place of what is said, called and offered, and all marks must be there.
"""

import re
from collections.abc import Callable
from functools import cache

from ted_scale.base.parsing import parse_json

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
RENDER = Callable[[list[dict], list | None], str]


def object_in(record: str) -> dict:
    """A ValueError has the rest of a sentence."""
    try:
        values = parse_json(record)
    except ValueError as error:
        raise ValueError(f"must be a JSON object, but is not ({error}); correct it or pass --on-error skip") from None
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, but is {type(values).__name__}; correct it or pass --on-error skip")
    return values


def list_of(values: dict, key: str) -> list[dict]:
    """The messages under a key, without keys that are null, as in Parquet. A ValueError has the rest of a sentence."""
    found = values.get(key)
    if not (isinstance(found, list) and found and all(isinstance(message, dict) for message in found)):
        has = f"it is {kind_of(found)}" if found is not None else f"the keys are {', '.join(map(str, values))[:100]}"
        raise ValueError(
            f'must have a list of messages in "{key}", but {has}; docs/fine_tuning.md rewrites other forms, or pass '
            "--on-error skip"
        )
    messages = [{name: value for name, value in message.items() if value is not None} for message in found]
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            raise ValueError(f'must have a role in every message of "{key}", but message {number} has none; correct it')
    return messages


def kind_of(value) -> str:
    if isinstance(value, list):
        return "a list of something else" if value else "empty"
    return {"str": "a text", "dict": "an object"}.get(type(value).__name__, "no list")


def tools_of(values: dict) -> list | None:
    """A list, or the text of one, as tables have it that cannot hold tools of several forms."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = parse_json(tools)
        except ValueError:
            raise ValueError(
                'must have a JSON list in "tools", but has another text; correct it or pass --on-error skip'
            ) from None
    if tools and not isinstance(tools, list):
        raise ValueError(
            f'must have a list in "tools", but has {type(tools).__name__}; correct it or pass --on-error skip'
        )
    return tools or None


def said_in(message: dict) -> list[str]:
    """The texts of a message; its content may be a list of parts. A ValueError has the rest of a sentence."""
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise ValueError(
            f'must have text, a list or null as the "content" of every message, but one has {type(content).__name__}; '
            "correct it or pass --on-error skip"
        )
    content = content or []
    parts = [content] if isinstance(content, str) else content
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def said(record: str) -> str:
    """All text of a conversation, or of a prompt with its completion, without what a template writes around it. A ValueError has
    the rest of a sentence."""
    values = object_in(record)
    parts = [part for key in ("messages", "prompt", "completion") if (part := values.get(key)) is not None]
    text = "".join(part if isinstance(part, str) else turns(part) for part in parts)
    if text != text.encode("utf-8", "replace").decode():
        raise ValueError("must hold text that UTF-8 can write, but has half a surrogate pair; correct it")
    return text


def turns(messages) -> str:
    """A line or more for each."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("must have text or a list of messages, but has neither; correct it")
    return "".join(f"{text}\n" for message in messages for text in said_in(message))


def refuse_dropped(template: str, render: RENDER, text: str, messages: list[dict], tools: list | None) -> None:
    """All that was said must be in the text, in order. Thoughts before an earlier answer may be left out, as at inference."""
    shape = (len(tools or ()), tuple(thoughts_of(messages[-1])), *map(shape_of, messages))
    if shape not in (known := dropped_by(template)):
        known[shape] = dropped(render, messages, tools)
    if known[shape]:
        raise drops(known[shape])
    at = 0
    for number, message in enumerate(messages, 1):
        for said in said_in(message) if message["role"] != "tool" else ():
            words = said.rpartition("</think>")[2].strip()
            found = text.find(words, at)
            if found < 0:
                raise drops(f"turn {number} ({message['role']})")
            at = found + len(words)


def shape_of(message: dict) -> tuple:
    return message["role"], type(message.get("content")), bool(said_in(message)), len(calls_of(message))


def drops(what: str) -> ValueError:
    return ValueError(
        f"must be shown whole by the chat template, but it drops or changes {what}; give another template by --chat-template FILE"
    )


@cache
def dropped_by(template: str) -> dict[tuple, str]:
    """What a template drops, by the shape of a conversation."""
    return {}


def dropped(render: RENDER, messages: list[dict], tools: list | None) -> str:
    """What the template does not write of marks in place of texts; "" where it writes all, or takes no marks."""
    marked = [marked_message(number, message) for number, message in enumerate(messages, 1)]
    try:
        text = render(marked, [renamed(tool, mark_of(n, "tool")) for n, tool in enumerate(tools or ())] or None)
    except ValueError:
        return ""
    for number, message in enumerate(messages, 1):
        if said_in(message) and mark_of(number) not in text:
            return f"turn {number} ({message['role']})"
        is_list = (
            isinstance(message.get("content"), list) and message["role"] != "tool"
        )  # a tool's answer may be shown as JSON
        if is_list and re.search(rf"""['"]text['"]: ['"]{mark_of(number)}""", text):
            return f"turn {number} ({message['role']}), whose list of parts it writes as Python does (make it one text)"
        if not all(mark_of(number, f"call{k}of") in text for k in range(len(calls_of(message)))):
            return f"the tool calls of turn {number}"
    if (thoughts := thoughts_of(messages[-1])) and mark_of(len(messages), "thought") not in text:
        return f"{thoughts[0]} of turn {len(messages)} (write it into the content, or take it out)"
    return "" if all(mark_of(n, "tool") in text for n in range(len(tools or ()))) else "the tools"


def mark_of(number: int, kind: str = "turn") -> str:
    return f"marked{kind}{number}x"


def marked_message(number: int, message: dict) -> dict:
    marks = {}
    if texts := said_in(message):
        content, mark = message["content"], mark_of(number)
        marks["content"] = mark if isinstance(content, str) else [{"type": "text", "text": mark} for _ in texts]
    marks |= dict.fromkeys(thoughts_of(message), mark_of(number, "thought"))
    if calls := calls_of(message):
        marks["tool_calls"] = [renamed(call, mark_of(number, f"call{k}of")) for k, call in enumerate(calls)]
    return {**message, **marks}


def renamed(thing, name: str):
    """A call or a tool by another name; it may be one itself, or have it as its function."""
    if not isinstance(thing, dict):
        return thing
    if isinstance(function := thing.get("function"), dict):
        return {**thing, "function": {**function, "name": name}}
    return {**thing, "name": name}


def thoughts_of(message: dict) -> list[str]:
    """The keys under which a message has what was thought before it, of which a template reads one."""
    return [key for key in THOUGHTS if isinstance(message.get(key), str) and message[key].strip()]


def calls_of(message: dict) -> list:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []
