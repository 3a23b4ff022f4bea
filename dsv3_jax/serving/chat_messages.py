"""Messages of a chat request, checked: who speaks, what they say."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsv3_jax.serving.errors import RequestError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Turn(NamedTuple):
    """One message."""

    role: str
    """"system", "user" or "assistant"."""
    text: str


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The messages as turns; `reasoning_content` and other fields that change no prompt are passed over.

    Raises: `RequestError` that names the field at fault.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one message.", param="messages")
    return [_read_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read_turn(message: Mapping[str, Any], where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is no object; give one with role and content.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        is_tool = role in ("tool", "function")
        why = "tools are not supported" if is_tool else f"the roles are {', '.join(_ROLES)}"
        raise RequestError(f"{where}.role={role!r}: {why}; change or leave out the message.", param=f"{where}.role")
    for field, why in (
        ("tool_calls", "tools are not supported"),
        ("function_call", "tools are not supported"),
        ("prefix", "a reply cannot be begun by the client"),
    ):
        if message.get(field):
            raise RequestError(f"{where}.{field}: {why}; leave it out.", param=f"{where}.{field}")
    return Turn(_ROLES[role], _text(message.get("content"), f"{where}.content"))


def _text(content: object, where: str) -> str:
    """A content's text; of several parts, one a line."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "\n".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{where} is no text; give a string or a list of text parts.", param=where)
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise RequestError(f"{where} has half of a surrogate pair; give valid Unicode.", param=where)
    return content


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise RequestError(f"{where} is of type {kind!r}; only parts of type 'text' are read.", param=where)
    text = part.get("text")
    return _text(text if isinstance(text, str) else None, f"{where}.text")
