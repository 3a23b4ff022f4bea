"""Byte-level BPE over the `tokenizers` library: text to ids, ids to text, bytes of each id."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config.check import UserError
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.data.fim import FimIds
from dsv3_jax.data.stored import read_object

BOS, EOS, PAD = "<|bos_token|>", "<|eos_token|>", "<|pad_token|>"
FIM_MARKS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *FIM_MARKS)
"""Of a tokenizer trained here: their ids are 0..5 in this order."""

_RELEASED_FIM_MARKS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
_RELEASED_PAD = "<｜▁pad▁｜>"

_LINE_BREAKS = ("\u010a", "\u010d")  # line feed and carriage return in the byte alphabet

_SPELT_AS_THEMSELVES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _SPELT_AS_THEMSELVES]
_BYTE_OF = {chr(byte): byte for byte in _SPELT_AS_THEMSELVES} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""The byte alphabet: which byte a character of a token spells."""

_LONGEST_WORD = 256
"""Characters after which a word is cut while merges are learnt: learning takes quadratic time in its length."""

_WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one mark or blank before it
        r"\p{N}{1,3}",  # digits in threes
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*(?=[ \t]))?",  # marks, with the line break and indentation after them
        r"[ \t]*[\r\n]+(?:[ \t]+(?=[ \t]\S))?",  # line breaks, with the indentation after them
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class TextTokenizer:
    """A tokenizer.json with the roles the project needs; marks written in a text stay text.

    A mark is any added token, called special or not (released tokenizers do not call theirs so), but for runs of
    blanks, which some tokenizers add to spell indentation.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_id: int | None = 0, eos_id: int | None = 1):
        self._inner = inner
        self._encoder = _encoder_of_text(inner)
        self.bos_id = bos_id
        self.eos_id = eos_id

    @property
    def num_tokens(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """The padding token, or eos where the tokenizer has none, or 0 where nothing ends a text."""
        for name in (PAD, _RELEASED_PAD):
            found = self._inner.token_to_id(name)
            if found is not None:
                return found
        return 0 if self.eos_id is None else self.eos_id

    @property
    def fim(self) -> FimIds | None:
        """Ids of the fill-in-the-middle marks, None where the tokenizer lacks one."""
        for names in (FIM_MARKS, _RELEASED_FIM_MARKS):
            begin, hole, end = (self._inner.token_to_id(name) for name in names)
            if begin is not None and hole is not None and end is not None:
                return FimIds(begin, hole, end)
        return None

    def encode(self, text: str) -> Int[np.ndarray, "N"]:
        """Ids of a text, without bos and eos."""
        return np.asarray(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to continue: bos, where texts begin with it, and the text's."""
        return [*([] if self.bos_id is None else [self.bos_id]), *(int(i) for i in self.encode(text))]

    def encode_many(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        """`encode` of each, on all cores."""
        found = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def decode(self, ids: Sequence[int | np.integer] | Integer[np.ndarray, "N"], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 (a cut character) become U+FFFD.

        `skip_special` leaves out special tokens and bos, eos, pad and fill-in-the-middle marks.
        """
        hidden = self._roles if skip_special else ()
        return self._inner.decode([int(i) for i in ids if i not in hidden], skip_special_tokens=skip_special)

    def id_of(self, mark: str) -> int | None:
        """The id of a mark, None where the tokenizer lacks it."""
        return self._marks.get(mark)

    def has_text(self, i: int) -> bool:
        """Whether an id adds to a text: `decode(skip_special=True)` does not leave it out, and it has a token."""
        return i not in self._left_out and self._inner.id_to_token(i) is not None

    @functools.cached_property
    def _marks(self) -> dict[str, int]:
        return {token.content: i for i, token in self._inner.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _left_out(self) -> set[int]:
        return self._roles | {i for i, token in self._inner.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def bytes_per_token(self) -> Int[np.ndarray, "V"]:
        """UTF-8 bytes each id stands for; 0 for bos, eos, pad, fill-in-the-middle, special tokens and unused ids."""
        sizes = np.zeros(self.num_tokens, np.int32)
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            sizes[i] = len(token)  # one character of the byte alphabet a byte
        for i, token in self._inner.get_added_tokens_decoder().items():
            sizes[i] = 0 if token.special else len(token.content.encode())
        sizes[list(self._roles)] = 0
        return sizes

    def token_bytes(self, i: int) -> bytes | None:
        """The UTF-8 bytes that an id stands for, be they whole characters or not; None for an id without a token."""
        if i in self._added:
            return self._added[i].encode()
        token = self._inner.id_to_token(i)
        return None if token is None else bytes(_BYTE_OF[character] for character in token)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._inner.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _roles(self) -> set[int]:
        roles = [self.bos_id, self.eos_id, self.pad_id, *(dataclasses.astuple(self.fim) if self.fim else ())]
        return {i for i in roles if i is not None}

    @functools.cached_property
    def line_break_halves(self) -> Int[np.ndarray, "V 2"]:
        """The tokens before and from the first line break of each id that joins the two, -1 for all others."""
        halves = np.full((self.num_tokens, 2), -1, np.int32)
        word = " x"  # what follows decides where indentation ends
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            if not any(mark in token[1:] for mark in _LINE_BREAKS):
                continue
            text = self.decode([i])
            cut = min((place for place in (text.find("\n"), text.find("\r")) if place >= 0), default=0)
            parts = [self.encode(text[:cut]), self.encode(text[cut:] + word)[: -len(self.encode(word))]]
            if text[:cut].strip() and [len(part) for part in parts] == [1, 1]:
                halves[i] = np.concatenate(parts)
        return halves

    def to_json(self) -> str:
        """The tokenizer.json that `load` and other libraries read."""
        return self._inner.to_str(pretty=True)


def _encoder_of_text(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """`inner` without what its file may ask for besides: active marks, padding, truncation, random merges."""
    parsed = json.loads(inner.to_str())
    for token in parsed["added_tokens"]:
        token["special"] = token["special"] or bool(token["content"].strip())
    parsed["padding"] = parsed["truncation"] = None
    parsed["model"].pop("dropout", None)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    encoder.encode_special_tokens = True  # special tokens in a text are text
    return encoder


def train(texts: Iterator[str], *, vocab_size: int) -> TextTokenizer:
    """Learns a byte-level BPE of at most `vocab_size` entries, special tokens included; the same texts, the same ids.

    The time is linear in the text, also where a "word" never ends (rulers, base64, a script without blanks): it is
    learnt in pieces of 256 characters, and encoded whole.

    Raises:
        UserError: `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(
            f"vocab_size={vocab_size} is too small for 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"use {least} or more (ModelConfig.vocab_size)."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST_WORD), as_bytes])
    inner.train_from_iterator(texts, trainer)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return TextTokenizer(inner)


def load(path: str | Path, *, bos_id: int | None = 0, eos_id: int | None = 1) -> TextTokenizer:
    """Reads a tokenizer.json, or the one in a folder.

    Raises:
        UserError: no such file, no tokenizer, or bos or eos has no token.
    """
    file = user_path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    try:
        read_object(file)
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise UserError(f"{shown(file)} does not exist; give a tokenizer.json or a folder with one.") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{shown(file)} cannot be read as JSON ({e}); give a tokenizer.json.") from e
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{shown(file)} is no tokenizer that tokenizers {tokenizers.__version__} reads ({e}).") from e
    for role, i in (("bos", bos_id), ("eos", eos_id)):
        if i is not None and inner.id_to_token(i) is None:
            raise UserError(
                f"{shown(file)} has no token {i}, the model's {role}_id; set model.{role}_id to one of its ids."
            )
    return TextTokenizer(inner, bos_id=bos_id, eos_id=eos_id)
