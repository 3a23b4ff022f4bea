"""Pieces of documents by random access, in an order drawn anew over the whole corpus every epoch."""

from collections import OrderedDict

import grain
import numpy as np
from jaxtyping import Int

from dsv3_jax.data import fim, pack
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.token_split import split_at_line_breaks
from dsv3_jax.data.tokenizer import TextTokenizer

_CACHED_TOKENS = 2**24


class Documents:
    """Documents as a run learns from them: `bos text eos`, some rearranged, some tokens split (report section 4.1).

    What happens to a document depends on (seed, document, epoch). The `cached_tokens` last used stay in memory, so that
    the pieces of a long document do not each prepare it again.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: TextTokenizer,
        *,
        fim_rate: float,
        token_split_rate: float,
        seed: int,
        cached_tokens: int = _CACHED_TOKENS,
    ):
        self._shards, self._tokenizer = shards, tokenizer
        self._fim_rate, self._token_split_rate, self._seed = fim_rate, token_split_rate, seed
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached, self._cached_tokens = 0, cached_tokens

    def num_full_rows(self, seq_len: int) -> Int[np.ndarray, "N"]:
        """Whole rows of `seq_len` labels in each document, before anything happens to it."""
        marks = sum(mark is not None for mark in (self._tokenizer.bos_id, self._tokenizer.eos_id))
        return np.maximum(self._shards.lengths() + (marks - 1), 0) // seq_len

    def get(self, number: int, epoch: int) -> Int[np.ndarray, "N"]:
        """Document `number` as it is in this epoch."""
        key = (number, epoch)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        document = self._cache[key] = self._arrange(number, epoch)
        self._cached += len(document)
        while self._cached > self._cached_tokens:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return document

    def _arrange(self, number: int, epoch: int) -> Int[np.ndarray, "N"]:
        rng = np.random.default_rng((self._seed, epoch, number))
        tokenizer = self._tokenizer
        ids = self._shards[number].astype(np.int32)
        if rng.random() < self._fim_rate and tokenizer.fim is not None:
            parts = fim.split(tokenizer.decode(ids), rng)
            ids = fim.assemble(*(tokenizer.encode(part) for part in parts), ids=tokenizer.fim)
        if self._token_split_rate > 0:
            ids = split_at_line_breaks(ids, tokenizer.line_break_halves, rate=self._token_split_rate, rng=rng)
        return pack.as_document(ids, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def shuffled_pieces(documents: Documents, *, seq_len: int, seed: int) -> grain.MapDataset:
    """Endless pieces {"tokens": [n]} by random access; each epoch has every piece once, in an order of its own.

    A piece is a row of `seq_len` + 1 tokens (`pack.piece`), the last one of a document whatever is left. Memory holds
    eight bytes a document: the order is a function of the seed, computed where it is asked for.
    """
    starts = np.concatenate([[0], np.cumsum(documents.num_full_rows(seq_len) + 1)])
    num_pieces = int(starts[-1])

    def cut(index: int, piece: int) -> dict[str, np.ndarray]:
        number = int(np.searchsorted(starts, piece, side="right")) - 1
        first, after = (int(bound) for bound in starts[number : number + 2])
        document = documents.get(number, index // num_pieces)
        return {"tokens": pack.piece(document, piece - first, num_pieces=after - first, seq_len=seq_len)}

    return grain.MapDataset.range(num_pieces).shuffle(seed=seed).repeat(None).map_with_index(cut)
