"""The messages of a record as a chat template takes them, whatever public data sets call their parts."""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from nemodiff_train.data.notes import LEFT_OUT, NULLS, TRAILING, UNREAD_KEYS, Notes
from nemodiff_train.errors import UserError

Message = dict[str, object]
"""A message as a chat template takes it, with ``role`` and ``content``."""

_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ANSWERS = ("assistant", "ai", "bot", "chatgpt", "function_call", "gpt", "model", "tool_call")
"""Roles of the model in public data, in lower case; a template knows only the first."""
_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys that say whether a message is trained on: 1 or true, 0 or false."""
_PARTIAL_MARKS = ("train_detail", "training_detail", "loss_scale")
_REMEDY = "correct or remove the record"


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation."""

    messages: list[Message]
    where: str
    """File and line, for messages to the user."""
    tools: list[object] | None = None
    """Definitions of the tools, as the template takes them."""
    ignored: frozenset[int] = frozenset()
    """Indices of answers that are context only, not trained on."""

    @property
    def answers(self) -> list[int]:
        """Return the indices of the messages that are trained on."""
        roles = [message["role"] for message in self.messages]
        return [index for index, role in enumerate(roles) if role == "assistant" and index not in self.ignored]


def read_conversation(
    messages: object, tools: object, system: object, where: str, template: str | None, notes: Notes
) -> Conversation | None:
    """Return a conversation, or None for a record that is left out, which ``notes`` counts.

    Args:
        messages: A list of messages, each with ``role`` and ``content`` or, as ShareGPT has them, ``from`` and
            ``value``; or such a list as JSON.
        tools: Definitions of tools, as a list or as JSON, or None.
        system: A text to begin with, or None.
        where: File and line.
        template: Source of the chat template, to know which keys it reads; None to assume that it reads all.
        notes: Counts what is not used.

    Raises:
        UserError: The record cannot be trained on as it was meant; it does not say where.
    """
    listed = _parsed(messages)
    if not listed:
        notes.add(LEFT_OUT, "no messages", where)
        return None
    if not isinstance(listed, list) or not all(_is_message(message) for message in listed):
        raise UserError(f"not a list of messages with 'role' and 'content'; {_REMEDY}")
    cleaned = [_renamed(_without_nulls(message, notes, where)) for message in listed]
    trained_on = [_is_trained_on(message) for message in cleaned]
    read: list[Message] = []
    for message in cleaned:
        if (normal := _read_message(message, template)) is None:
            notes.add(LEFT_OUT, "a message without text", where)
            return None
        read.append(normal)
    for key in (key for message in read for key in message):
        if key not in ("role", "content") and not names(template, key):
            notes.add(UNREAD_KEYS, key, where)
    if system and _needs_system(read, system):
        read, trained_on = [{"role": "system", "content": system}, *read], [True, *trained_on]
    ignored = frozenset(index for index, is_trained_on in enumerate(trained_on) if not is_trained_on)
    conversation = Conversation(read, where, _tools(tools), ignored)
    roles = [str(message["role"]) for message in read]
    if "assistant" not in roles:
        raise UserError(f"no message of role 'assistant'; its roles: {', '.join(roles)}; {_REMEDY}")
    if not conversation.answers:
        notes.add(LEFT_OUT, "every answer is marked as not trained on", where)
        return None
    if roles[-1] != "assistant":
        notes.add(TRAILING, f"of role '{roles[-1]}'", where)
    return conversation


@cache
def names(template: str | None, key: str) -> bool:
    """Return whether a template names a key."""
    return template is None or re.search(rf"\b{re.escape(key)}\b", template) is not None


def _parsed(value: object) -> object:
    """Return the content of a text of JSON, else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and bool(message.get("role") or (message.get("from") and "value" in message))


def _renamed(message: Message) -> Message:
    """Return a message of ShareGPT under the names of chat templates."""
    if message.get("role"):
        return message
    sender, content = str(message.pop("from")), message.pop("value", None)
    return {**message, "role": _SHAREGPT.get(sender, sender), "content": content}


def _without_nulls(message: Message, notes: Notes, where: str) -> Message:
    """Drop the keys that are null: a column of Arrow gives every record the keys of all."""
    kept = {}
    for key, value in message.items():
        if value is not None:
            kept[key], dropped = drop_nulls(value)
            if dropped:
                notes.add(NULLS, key, where)
    return kept


def drop_nulls(value: object) -> tuple[object, int]:
    """Return a value of JSON without the null entries of its objects, and how many there were."""
    if isinstance(value, list):
        parts = [drop_nulls(part) for part in value]
        return [part for part, _ in parts], sum(dropped for _, dropped in parts)
    if not isinstance(value, dict):
        return value, 0
    entries = {key: drop_nulls(part) for key, part in value.items() if part is not None}
    dropped = len(value) - len(entries) + sum(dropped for _, dropped in entries.values())
    return {key: part for key, (part, _) in entries.items()}, dropped


def _is_trained_on(message: Message) -> bool:
    """Remove the marks of a message, and return whether they allow training on it."""
    if partial := next((key for key in _PARTIAL_MARKS if key in message), None):
        raise UserError(f"'{partial}': a loss on part of an answer is not supported; remove it")
    marks = {key: message.pop(key) for key in _MARKS if key in message}
    for key, mark in marks.items():
        if mark not in (0, 1):  # True and False as well
            raise UserError(f"'{key}' of a message is {mark!r}; use 1 to train on it, else 0")
        if mark and message["role"] != "assistant":
            raise UserError(
                f"'{key}' of a message of role '{message['role']}' has to be 0: only answers are trained on"
            )
    return all(marks.values())


def _read_message(message: Message, template: str | None) -> Message | None:
    """Return a message whose content is text and whose tool calls are objects; None if there is nothing in it."""
    role = message["role"]
    if not isinstance(role, str):
        raise UserError(f"a message's role is {role!r}, not text; {_REMEDY}")
    if role != "assistant" and role.lower() in _ANSWERS:
        raise UserError(f"a message has the role '{role}'; rename it to 'assistant' to train on it")
    content = _text(message.get("content"))
    known = ("role", "content", "name", "tool_call_id")
    others = [key for key in message if key not in known and names(template, key)]
    if not others and content is None and role != "tool":
        return None
    if not others and role == "assistant" and not (content or "").strip():
        return None
    calls = {"tool_calls": _tool_calls(message["tool_calls"])} if "tool_calls" in message else {}
    return {**message, "content": content or "", **calls}


def _text(content: object) -> str | None:
    """Return content as one text; parts of text are joined."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"a part of a message is of type {kind!r}, not text; {_REMEDY}")
            if extra := next((key for key in part if key not in ("type", "text")), None):
                raise UserError(f"a part of a message has the key '{extra}', which nothing reads; remove it")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f"the content of a message is of type {type(content).__name__}, not text; {_REMEDY}")
    if content is not None:
        check_text(content, "content")
    return content


def check_text(text: str, name: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half a surrogate pair in '{name}'; correct or remove it") from error


def _tool_calls(calls: object) -> list[object]:
    """Return tool calls with their arguments as objects; OpenAI's are JSON in a text, which templates would quote."""
    parsed = _parsed(calls)
    if not isinstance(parsed, list) or not all(isinstance(call, dict) for call in parsed):
        raise UserError(f"'tool_calls' is not a list of objects; {_REMEDY}")
    return [_with_arguments(call) for call in parsed]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _with_arguments(function)}
    if not isinstance(call.get("arguments"), str):
        return call
    arguments = _parsed(call["arguments"] or "{}")
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a tool call are not a JSON object: {call['arguments'][:80]!r}; {_REMEDY}")
    return {**call, "arguments": arguments}


def _tools(tools: object) -> list[object] | None:
    """Return definitions of tools as objects; many data sets keep them as JSON in a text."""
    listed = _parsed(tools)
    if not listed:
        return None
    definitions = [_parsed(tool) for tool in listed] if isinstance(listed, list) else [listed]
    if not all(isinstance(tool, dict) for tool in definitions):
        raise UserError(f"'tools' is not a list of objects; {_REMEDY}")
    return [drop_nulls(tool)[0] for tool in definitions]


def _needs_system(messages: list[Message], system: object) -> bool:
    """Return whether a system prompt that stands beside the messages has to be put before them.

    Raises:
        UserError: It is not text, or another one stands among the messages.
    """
    if not isinstance(system, str):
        raise UserError(
            f"the system prompt beside the messages is of type {type(system).__name__}, not text; {_REMEDY}"
        )
    check_text(system, "system")
    if messages[0]["role"] != "system":
        return True
    if messages[0]["content"] != system:
        raise UserError("a system prompt stands beside the messages and another one among them; remove one")
    return False
