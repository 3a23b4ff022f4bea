"""Log-probabilities as OpenAI's objects, for completions and for chats."""

import codecs
from collections.abc import Sequence
from typing import Any

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.sequence import TokenLogprobs

_LEAST = -9999.0
"""In the place of minus infinity, which JSON lacks."""


class Tokens:
    """How single tokens are shown."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        r"""A token's text; `bytes:\xf0\x9f` where it is no whole character, `token_id:7` where there is none."""
        spelt = self.bytes(token)
        if spelt is None:
            return f"token_id:{token}"
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{one:02x}" for one in spelt)

    def bytes(self, token: int) -> bytes | None:
        """The bytes a token stands for; None where it has none."""
        return None if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def adds_text(self, token: int) -> bool:
        """Whether a token is part of the text that clients get."""
        return self._tokenizer is not None and self._tokenizer.has_text(token)


class CompletionLogprobs:
    """The `logprobs` object of one completion, piece by piece."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, ids: Sequence[int], places: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The object for the next tokens; a place without log-probabilities (the prompt's first token) is null."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, place in zip(ids, places, strict=True):
            text = self._tokens.text(token)
            found["tokens"].append(text)
            found["text_offset"].append(self._offset)
            found["token_logprobs"].append(None if place is None else _finite(place.logprob))
            found["top_logprobs"].append(None if place is None else self._top(text, place))
            if self._tokens.adds_text(token):
                self._offset += len(self._decoder.decode(self._tokens.bytes(token) or b""))
        return found

    def _top(self, text: str, place: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the one that stands there."""
        top: dict[str, float] = {}
        for token, logprob in place.top:
            top.setdefault(self._tokens.text(token), _finite(logprob))
        top.setdefault(text, _finite(place.logprob))
        return top


def chat_logprobs(tokens: Tokens, ids: Sequence[int], places: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` object of some tokens of a chat."""
    content = [
        {
            **_entry(tokens, token, place.logprob),
            "top_logprobs": [_entry(tokens, other, logprob) for other, logprob in place.top],
        }
        for token, place in zip(ids, places, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokens: Tokens, token: int, logprob: float) -> dict[str, Any]:
    spelt = tokens.bytes(token)
    return {"token": tokens.text(token), "logprob": _finite(logprob), "bytes": None if spelt is None else list(spelt)}


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST)
