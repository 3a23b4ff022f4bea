"""Ids of a completion to its text, as they come: whole characters, ended by stop strings."""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.params import SamplingParams

_CUT = "\ufffd"
"""What bytes that are no whole character decode to."""

_WINDOW = 8
"""Tokens before a new one that decide its text; four bytes settle where characters begin, and each token has one."""


class Detokenizer:
    """The text behind a prompt, a token at a time.

    All pieces and `end()` together are what `decode(prompt + ids, skip_special=True)` has behind `decode(prompt)`; of a
    character that the prompt cut, the whole one. A token costs the same however many came before.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for token in reversed(prompt_ids):
            if len(self._window) == _WINDOW:
                break
            if tokenizer.has_text(token):
                self._window.insert(0, token)
        self._given = self._decoded()

    def add(self, token: int) -> str:
        """The characters that are whole with this token; none for an id without text."""
        if not self._tokenizer.has_text(token):
            return ""
        self._window.append(token)
        text = self._decoded()
        start = self._num_given(text)
        end = max(start, len(text) - text.endswith(_CUT))  # bytes to come may complete a last character
        self._given = text[:end]
        if len(self._window) > 2 * _WINDOW:
            self._forget(held=len(text) - end)
        return text[start:end]

    def end(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        text = self._decoded()
        return text[self._num_given(text) :]

    def _num_given(self, text: str) -> int:
        """How many characters of `text` are out; what stands for a character that the prompt cut may change."""
        return len(self._given) - (not text.startswith(self._given))

    def _forget(self, *, held: int) -> None:
        """Leaves the newest tokens in the window."""
        del self._window[:-_WINDOW]
        text = self._decoded()
        self._given = text[: len(text) - held]

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=True)


class TextPiece(NamedTuple):
    """What some tokens add to a completion."""

    text: str
    num_tokens: int
    """How many of the tokens belong to the completion: fewer than given where a stop string ended it."""
    stop: str | None
    """The stop string that ended it."""


class TextStream:
    """A completion's text, held back where it may become a stop string.

    The stop string ends it that is complete first, of several at once the longest: so it is the same however text is
    cut into tokens. One that would be complete within the first `min_tokens` tokens is text, as in vLLM.
    """

    def __init__(self, tokenizer: TextTokenizer, params: SamplingParams, prompt_ids: Sequence[int]):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._params = params
        self._longest = max((len(stop) for stop in params.stop), default=0)
        self._held = ""
        self._num_tokens = 0
        self._is_ended = False

    def add(self, tokens: Sequence[int]) -> TextPiece:
        """The text that is certain with these tokens; leave out an id that ended the completion."""
        written = []
        for count, token in enumerate(tokens, 1):
            text = self._detokenizer.add(token)
            self._num_tokens += 1
            if not text:
                continue
            checked = len(self._held)
            self._held += text
            found = self._first_stop(checked) if self._num_tokens > self._params.min_tokens else None
            if found is not None:
                start, end = found
                stop = self._held[start:end]
                written.append(self._held[: end if self._params.include_stop_str_in_output else start])
                self._held, self._is_ended = "", True
                return TextPiece("".join(written), count, stop)
            certain = self._first_that_may_stop()
            written.append(self._held[:certain])
            self._held = self._held[certain:]
        return TextPiece("".join(written), len(tokens), None)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self._is_ended else self._held + self._detokenizer.end()

    def _first_stop(self, checked: int) -> tuple[int, int] | None:
        """(start, end) of the stop string that ends first behind `checked` characters of what is held."""
        found = []
        for stop in self._params.stop:
            start = self._held.find(stop, max(0, checked + 1 - len(stop)))
            if start >= 0:
                found.append((start + len(stop), start))
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _first_that_may_stop(self) -> int:
        """Where the beginning of a stop string begins that reaches the end of what is held."""
        size = len(self._held)
        for start in range(max(0, size + 1 - self._longest), size):
            tail = self._held[start:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._params.stop):
                return start
        return size
