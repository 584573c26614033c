"""Pages of the KV cache on the host: which are free, which requests hold, which keep a prefix for later requests.

A page holds the keys and values of ``size`` tokens of one sequence. Page 0 takes what padding writes and belongs to
nobody. Full pages stand in a radix tree by their tokens, so that a request with the same beginning shares them (as
RadixAttention, arXiv 2312.07104); those that nobody holds stay there until room is needed, and go in order of last
use, leaves first. At any time free + evictable + held = count - 1.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Hashable

import numpy as np


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A full page in the tree. Whoever holds it holds all its ancestors."""

    page: int
    tokens: bytes
    parent: "Node | None"
    children: "dict[bytes, Node]" = dataclasses.field(default_factory=dict)
    holders: int = 0
    used: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Lease:
    """The pages of one sequence, in order: first those in the tree (``nodes``), then its own.

    version: changes whenever the pages do.
    """

    root: Node
    nodes: list[Node]
    own: list[int]
    version: int = 0

    @property
    def pages(self) -> list[int]:
        return [node.page for node in self.nodes] + self.own


class PagePool:
    """Pages 1 to ``count - 1`` of one device's cache.

    Args:
        count: pages, with page 0.
        size: tokens of a page.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, 0, -1))
        self._roots: dict[Hashable, Node] = {}
        self._evictable = 0
        self._leaves: list[tuple[int, int, Node]] = []
        self._clock = itertools.count(1)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Pages that keep a prefix which nobody reads now."""
        return self._evictable

    @property
    def held(self) -> int:
        """Pages of open leases, shared ones counted once."""
        return self.count - 1 - self.free - self.evictable

    def open(self, family: Hashable, tokens: np.ndarray) -> Lease:
        """A lease on the longest prefix of ``tokens`` that the tree has in whole pages.

        The last token is never part of it: somebody must compute its logits.

        Args:
            family: what else keys and values depend on, such as the model and an adapter; prefixes are shared within.
            tokens: int32 ``[n]``.
        """
        root = self._roots.setdefault(family, Node(0, b"", None))
        lease, node = Lease(root, [], []), root
        for page in range((len(tokens) - 1) // self.size):
            child = node.children.get(self._key(tokens, page))
            if child is None:
                break
            self._hold(child)
            lease.nodes.append(child)
            node = child
        return lease

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Give ``lease`` room for ``tokens`` tokens in all; False, and no change, where pages do not suffice."""
        missing = -(-tokens // self.size) - len(lease.nodes) - len(lease.own)
        if missing <= 0:
            return True
        if missing > self.free + self.evictable:
            return False
        while missing > self.free:
            self._evict()
        for _ in range(missing):
            lease.own.append(self._free.pop())
            lease.version += 1
        return True

    def keep(self, lease: Lease, tokens: np.ndarray) -> None:
        """Enter the pages that ``tokens`` fill into the tree; their keys and values must be stored, or about to be.

        A page that is there already, because another request computed it meanwhile, replaces the lease's own.
        """
        for page in range(len(lease.nodes), len(tokens) // self.size):
            parent = lease.nodes[-1] if lease.nodes else lease.root
            key, own = self._key(tokens, page), lease.own.pop(0)
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = Node(own, key, parent)
                self._evictable += 1  # until it is held, on the next line but one
            else:
                self._free.append(own)
                lease.version += 1
            self._hold(node)
            lease.nodes.append(node)

    def close(self, lease: Lease) -> None:
        """Give everything back; pages in the tree stay there until room is needed."""
        self._free += reversed(lease.own)
        now = next(self._clock)
        for node in reversed(lease.nodes):
            node.holders -= 1
            node.used = now
            if node.holders == 0:
                self._evictable += 1
                self._offer(node)
        lease.nodes, lease.own = [], []

    def _key(self, tokens: np.ndarray, page: int) -> bytes:
        return tokens[page * self.size : (page + 1) * self.size].tobytes()

    def _hold(self, node: Node) -> None:
        if node.holders == 0:
            self._evictable -= 1
        node.holders += 1

    def _offer(self, node: Node) -> None:
        """Note a node that may go, if it is a leaf; others are noted when their last child goes."""
        if _may_go(node):
            heapq.heappush(self._leaves, (node.used, next(self._clock), node))
        if len(self._leaves) > 2 * self.count:  # most were held again since
            self._leaves = [entry for entry in self._leaves if _is_current(entry)]
            heapq.heapify(self._leaves)

    def _evict(self) -> None:
        """Free the leaf that was used longest ago."""
        entry = heapq.heappop(self._leaves)
        while not _is_current(entry):
            entry = heapq.heappop(self._leaves)
        node = entry[-1]
        assert node.parent is not None
        del node.parent.children[node.tokens]
        node.used = _GONE
        self._free.append(node.page)
        self._evictable -= 1
        self._offer(node.parent)


_GONE = -1


def _may_go(node: Node) -> bool:
    return node.parent is not None and node.holders == 0 and not node.children


def _is_current(entry: tuple[int, int, Node]) -> bool:
    used, _, node = entry
    return _may_go(node) and node.used == used
