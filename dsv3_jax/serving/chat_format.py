"""Conversations to the ids that DeepSeek's chat models were trained on."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import UserError
from dsv3_jax.data.stored import read_object
from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.chat_messages import Turn, read_turns
from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.reply_splitter import ReplySplitter

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
OPEN, CLOSE = "<think>", "</think>"

NAMES = ("v3", "r1", "v3.1", "plain")
_NEEDED = {
    "v3": (USER, ASSISTANT),
    "r1": (USER, ASSISTANT, OPEN, CLOSE),
    "v3.1": (USER, ASSISTANT, OPEN, CLOSE),
    "plain": (),
}

_PUTS_CLOSE = re.compile(r"<｜Assistant｜></think>|\{\{-?\s*['\"]</think>['\"]\s*-?\}\}")
_PUTS_OPEN = re.compile(r"<think>(?:\\n|\n)")


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How a model wants conversations.

    "v3" and "r1" are those of V3 and R1, "v3.1" switches between thinking and answering at once. "plain" is V2's, for
    models that have no marks for turns: `User: …`, a blank line, `Assistant:`. Marks are put in as ids, everything that
    is said as text, so no text becomes a mark.
    """

    name: str
    tokenizer: TextTokenizer

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"chat format {self.name!r} is unknown; choose one of {', '.join(NAMES)}.")
        missing = [mark for mark in _NEEDED[self.name] if self.tokenizer.id_of(mark) is None]
        if missing:
            raise UserError(
                f"chat format {self.name!r} needs {' '.join(missing)}, which the tokenizer lacks; choose plain."
            )

    def encode(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant goes on.

        Args:
            messages: with `role` (system or developer, user, assistant) and `content`, as OpenAI has them.
            thinking: whether to think first; None: as the model does by itself. Only v3.1 can choose.
        Raises: `RequestError` that names what is wrong.
        """
        turns = read_turns(messages)
        is_thinking = self.is_thinking(thinking)
        parts = self._plain(turns) if self.name == "plain" else self._marked(turns, is_thinking)
        return self._ids(parts)

    def is_thinking(self, asked: bool | None = None) -> bool:
        """Whether a reply starts inside its reasoning.

        Raises: `RequestError` where the model cannot do what is asked.
        """
        if self.name == "v3.1":
            return bool(asked)
        always = self.name == "r1"
        if asked not in (None, always):
            does = "always thinks" if always else "has no thinking mode"
            raise RequestError(
                f"thinking={asked}: a model of chat format {self.name} {does}; leave it out.", param="thinking"
            )
        return always

    def splitter(self, prompt_ids: Sequence[int], *, thinking: bool | None = None) -> ReplySplitter:
        """What takes a reply to `encode(messages, thinking=thinking)` apart."""
        return ReplySplitter(
            self.tokenizer,
            prompt_ids,
            open_id=self.tokenizer.id_of(OPEN),
            close_id=self.tokenizer.id_of(CLOSE),
            is_reasoning=self.is_thinking(thinking),
        )

    def _marked(self, turns: Sequence[Turn], is_thinking: bool) -> list[int | str | None]:
        user, assistant, opened, closed = (self.tokenizer.id_of(mark) for mark in (USER, ASSISTANT, OPEN, CLOSE))
        begin = [assistant, closed] if self.name == "v3.1" else [assistant]
        parts: list[int | str | None] = [self.tokenizer.bos_id]
        parts.append("\n\n".join(turn.text for turn in turns if turn.role == "system"))
        for turn in turns:
            if turn.role == "user":
                parts += [user, turn.text]
            elif turn.role == "assistant":
                parts += [*begin, self._without_thought(turn.text), self.tokenizer.eos_id]
        if not is_thinking:
            return [*parts, *begin]
        return [*parts, assistant, opened, "\n" if self.name == "r1" else ""]

    def _without_thought(self, text: str) -> str:
        """What an earlier turn said: V3 and R1 cut behind the last mark, V3.1 behind the first."""
        return text.split(CLOSE, 1 if self.name == "v3.1" else -1)[-1]

    def _plain(self, turns: Sequence[Turn]) -> list[int | str | None]:
        eos = self.tokenizer.eos_id
        parts: list[int | str | None] = [self.tokenizer.bos_id]
        for turn in turns:
            if turn.role == "assistant":
                parts += [f"Assistant: {turn.text}", "\n\n" if eos is None else eos]
            else:
                parts.append(f"{'User: ' if turn.role == 'user' else ''}{turn.text}\n\n")
        return [*parts, "Assistant:"]

    def _ids(self, parts: Sequence[int | str | None]) -> list[int]:
        """Marks, and the texts between them, each encoded whole; what is None is not there."""
        ids: list[int] = []
        text = ""
        for part in [*(part for part in parts if part is not None), -1]:
            if isinstance(part, str):
                text += part
                continue
            ids += [*self.tokenizer.encode(text).tolist(), part]
            text = ""
        return ids[:-1]


def chat_format_of(folder: Path, tokenizer: TextTokenizer, *, name: str | None = None) -> ChatFormat | None:
    """The chat format of a model: `name`, or what the chat template in its folder shows.

    A folder without a template, or with one whose marks the tokenizer lacks, gets "plain". None where the template is
    another kind of model's: then no chats are answered.

    Raises: `UserError` for an unknown name, marks that the tokenizer lacks, or a file that cannot be read.
    """
    if name is not None:
        return ChatFormat(name, tokenizer)
    template = _template(folder)
    if template is None:
        return ChatFormat("plain", tokenizer)
    found = _name_of(template)
    if found is None:
        return None
    has_marks = all(tokenizer.id_of(mark) is not None for mark in _NEEDED[found])
    return ChatFormat(found if has_marks else "plain", tokenizer)


def _name_of(template: str) -> str | None:
    """Which format a chat template renders, by the marks that it puts."""
    if ASSISTANT not in template:
        return None
    if _PUTS_CLOSE.search(template):
        return "v3.1"
    return "r1" if _PUTS_OPEN.search(template) else "v3"


def _template(folder: Path) -> str | None:
    """The chat template that a folder has, in a file of its own or among the tokenizer's settings."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    file = own if own.is_file() else settings
    try:
        if file is own:
            return own.read_text(encoding="utf-8")
        found = read_object(settings).get("chat_template") if settings.is_file() else None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read ({e}); correct it, or choose --chat-format.") from e
    if isinstance(found, list):  # several, by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None
