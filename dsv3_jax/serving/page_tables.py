"""The pages of every sequence: those that hold what it begins with already, and its own behind them."""

from collections.abc import Collection, Container

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.pages import KeyChain, PagePool
from dsv3_jax.serving.sequence import Sequence, Work


class PageTables:
    """Fills `Sequence.pages` from a pool, and finds full pages again by their tokens where `is_shared`."""

    def __init__(self, num_pages: int, *, fingerprint: bytes, is_shared: bool, with_completions: bool = True):
        """Pages of completions are found again only `with_completions`: decoding may write other last bits."""
        self._pool = PagePool(num_pages)
        self._fingerprint, self._is_shared, self._with_completions = fingerprint, is_shared, with_completions
        self._chains: dict[int, KeyChain] = {}
        self._computing: dict[bytes, Sequence] = {}
        """Who will publish the page of a key."""

    @property
    def num_tokens(self) -> int:
        """That all pages hold."""
        return self._pool.num_pages * PAGE_SIZE

    @property
    def num_available(self) -> int:
        """Pages that no running sequence refers to."""
        return self._pool.num_available

    @property
    def usage(self) -> float:
        """Share of the pages that running sequences refer to."""
        return 1 - self._pool.num_available / self._pool.num_pages

    def open(self, sequence: Sequence, *, num_spare: int, may_find: bool) -> bool:
        """Gives a sequence pages for all its tokens, if `num_spare` are left then. True where it may run.

        Its first tokens count as computed where pages are found that hold them, never its last one. It had better wait
        for a sequence ahead of it in rank that is about to compute the next page, and share that.
        """
        length = len(sequence.tokens)
        keys = self._keys(sequence, length // PAGE_SIZE)
        wanted = keys[: (length - 1) // PAGE_SIZE] if may_find else []
        found = self._pool.find(wanted)
        if len(found) < len(wanted):
            owner = self._computing.get(wanted[len(found)])
            if owner is not None and owner.rank < sequence.rank:
                return False
        num_new = pages_for(length) - len(found)
        if not self._pool.has_room(found, num_new + num_spare):
            return False
        for key in keys[len(found) :]:
            self._computing.setdefault(key, sequence)
        sequence.num_computed = len(found) * PAGE_SIZE
        self._pool.share(found)
        self._pool.extend(found, num_new)
        sequence.pages = found
        return True

    def extend(self, sequence: Sequence) -> None:
        """One more page; there must be one available."""
        self._pool.extend(sequence.pages, 1)

    def count(self, work: Work) -> None:
        """Counts the tokens of a step as computed, and lets the pages that they filled be found."""
        sequence = work.sequence
        sequence.num_computed += work.count
        before, after = work.start // PAGE_SIZE, sequence.num_computed // PAGE_SIZE
        if before == after:
            return
        for page, key in zip(sequence.pages[before:after], self._keys(sequence, after)[before:]):
            self._pool.publish(page, key)
            if self._computing.get(key) is sequence:
                del self._computing[key]

    def close(self, sequence: Sequence) -> None:
        """Takes a sequence's pages back; nobody waits for it to compute one."""
        self._pool.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0
        for key in self._keys(sequence, len(sequence.tokens) // PAGE_SIZE) if self._computing else ():
            if self._computing.get(key) is sequence:
                del self._computing[key]

    def end(self, sequence: Sequence) -> None:
        """Drops what is remembered of a sequence that does not come back."""
        self._chains.pop(sequence.id, None)

    def forget(self, fingerprint: bytes) -> None:
        """Lets no page be found again that holds latents of the weights so far."""
        self._fingerprint = fingerprint
        self._pool.forget()
        self._chains.clear()
        self._computing.clear()

    def check(self, running: Collection[Sequence], *, live: Container[int]) -> None:
        """Raises unless free + cached + referenced pages == total, and only `live` sequences are remembered."""
        self._pool.check(page for sequence in running for page in sequence.pages)
        if any(one.num_computed > len(one.pages) * PAGE_SIZE for one in running):
            raise RuntimeError("a running sequence has more tokens computed than its pages hold.")
        ids = {sequence.id for sequence in running}
        if any(owner.id not in ids for owner in self._computing.values()):
            raise RuntimeError("a page is awaited from a sequence that does not run.")
        if any(one not in live for one in self._chains):
            raise RuntimeError("the keys of a sequence's pages outlive it.")

    def _keys(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        """Keys of its first pages, of those that may be shared."""
        if not self._is_shared:
            return []
        if not self._with_completions:
            num_pages = min(num_pages, len(sequence.prompt) // PAGE_SIZE)
        if sequence.id not in self._chains:
            self._chains[sequence.id] = KeyChain(self._fingerprint, sequence.cache_salt)
        return self._chains[sequence.id].first(num_pages, sequence.tokens)


def pages_for(num_tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)
