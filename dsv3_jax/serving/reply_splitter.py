"""A chat model's reply, taken apart as it comes: what it thought, what it answered."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.text import Detokenizer

_NEVER = sys.maxsize


class ReplyPiece(NamedTuple):
    """A piece of a reply."""

    reasoning: str
    content: str


class ReplySplitter:
    """Splits a reply's text at the marks that its ids have; the same letters written as text split nothing.

    The mark that closes the reasoning ends it. One that opens it counts as the first id of a reply, and changes nothing
    where the prompt has opened the reasoning already. Marks that count are in neither text. A reply that ends before
    its reasoning does has no content.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        *,
        open_id: int | None,
        close_id: int | None,
        is_reasoning: bool,
    ):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._tokenizer = tokenizer
        self._open_id, self._close_id = open_id, close_id
        self._num_ids = self._num_decoded = self._num_split = 0
        self._may_close = is_reasoning
        """At the last id."""
        self._is_reasoning = is_reasoning
        """At the last character, which may be far behind."""
        self._marks: list[tuple[int, int, bool]] = []
        """(start, end) of marks in the text to come, and whether reasoning follows."""

    def add(self, text: str, token_ids: Sequence[int]) -> ReplyPiece:
        """Splits the text of a `Delta`, given the ids that came with it."""
        for token in token_ids:
            self._read(token)
        split = {True: "", False: ""}
        while text:
            start, end, follows = self._marks[0] if self._marks else (_NEVER, _NEVER, False)
            if self._num_split >= end:
                self._is_reasoning = follows
                del self._marks[0]
                continue
            is_mark = self._num_split >= start
            piece = text[: (end if is_mark else start) - self._num_split]
            split[self._is_reasoning] += "" if is_mark else piece
            self._num_split += len(piece)
            text = text[len(piece) :]
        return ReplyPiece(reasoning=split[True], content=split[False])

    def _read(self, token: int) -> None:
        """Notes where in the text a mark will stand."""
        is_first = self._num_ids == 0
        self._num_ids += 1
        if not is_first and not self._may_close:
            return  # no mark counts any more
        self._num_decoded += len(self._detokenizer.add(token))
        opens, closes = is_first and token == self._open_id, self._may_close and token == self._close_id
        if opens or closes:
            size = len(self._tokenizer.decode([token], skip_special=True))
            self._marks.append((self._num_decoded - size, self._num_decoded, opens))
            self._may_close = opens
