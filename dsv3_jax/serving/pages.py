"""Pages of the latent cache, counted by who refers to them, and found again by what they hold."""

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from dsv3_jax.config.serving import PAGE_SIZE

_FORMAT = b"dsv3-jax latents 1"
"""Changes when a page's rows come to mean something else."""


class KeyChain:
    """Keys of one sequence's full pages: each is a SHA-256 over the page's tokens and the key of the page before.

    The first one's parent covers the format's version, the model's fingerprint and the salt, so equal keys mean equal
    latents, of tokens that may see each other.
    """

    def __init__(self, fingerprint: bytes, cache_salt: str):
        salt = cache_salt.encode("utf-8", "surrogatepass")
        lengths = struct.pack("<3Q", len(_FORMAT), len(fingerprint), len(salt))
        self._parent = hashlib.sha256(lengths + _FORMAT + fingerprint + salt).digest()
        self._keys: list[bytes] = []

    def first(self, num_pages: int, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the first `num_pages` pages of `tokens`, which only grow from call to call."""
        for page in range(len(self._keys), num_pages):
            ids = struct.pack(f"<{PAGE_SIZE}I", *tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
            self._parent = hashlib.sha256(self._parent + ids).digest()
            self._keys.append(self._parent)
        return self._keys[:num_pages]


class PagePool:
    """Which pages are free, cached or referenced; every page is one of these.

    Free: holds nothing of use. Cached: nobody refers to it, but its key is known, so it may be found until it is
    evicted, the least recently used first. Referenced: by one sequence that writes it, or by some that read it.
    """

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """The least recently used first."""
        self._references = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._found: dict[bytes, int] = {}

    @property
    def num_pages(self) -> int:
        """All of them."""
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Pages that `extend` could hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the leading keys that are known."""
        pages = []
        for key in keys:
            page = self._found.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Refers to pages that were found."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def has_room(self, found: Sequence[int], count: int) -> bool:
        """Whether `count` pages could be handed out after `found` were shared."""
        num_cached = sum(not self._references[page] for page in found)
        return self.num_available - num_cached >= count

    def extend(self, pages: list[int], count: int) -> None:
        """Puts `count` pages of a sequence's own behind `pages`; evicts cached ones where none is free."""
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Lets a full page of final tokens be found, unless another with the same content already is."""
        if key not in self._found:
            self._found[key], self._keys[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Refers to a sequence's pages no longer; its last page will be evicted first."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def forget(self) -> None:
        """Makes every page impossible to find; cached ones become free."""
        self._found.clear()
        self._keys = [None] * self.num_pages
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self, referenced: Iterable[int]) -> None:
        """Raises unless free, cached and referenced pages are all, and `referenced` names each reference once."""
        counts = Counter(referenced)
        if any(self._references[page] != counts[page] for page in range(self.num_pages)):
            raise RuntimeError(f"pages are referenced {dict(counts)} times, but counted as {self._references}.")
        everywhere = [*self._free, *self._cached, *counts]
        if sorted(everywhere) != list(range(self.num_pages)):
            raise RuntimeError(
                f"free {sorted(self._free)}, cached {list(self._cached)} and referenced {sorted(counts)} pages are not "
                f"each of {self.num_pages} pages once."
            )
        keyed = {key: page for page, key in enumerate(self._keys) if key is not None}
        if keyed != self._found or any(self._keys[page] is None for page in self._cached):
            raise RuntimeError("the keys of pages are not those by which they are found.")

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._found[key]
        return page
