"""The component tree of a map: its connected bright regions, and which of them to keep.

N nodes of one map of P pixels, numbered so that a parent comes before its children.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Values = NDArray[np.float64]


class Tree(NamedTuple):
    """Hold all connected regions {map >= level}, 4-connected; a node is one with all its pixels.

    node: (P,) the smallest region around each pixel; level: (N,); ancestors: the parent of every
    node, its 2nd, 4th, 8th, … ancestor, each (N,), and N where there is none. With these, sums over
    subtrees take log2(depth) passes and no recursion.
    """

    node: Indices
    level: NDArray
    ancestors: list[Indices]

    def area(self) -> Values:
        """Return the number of pixels of every region, (N,)."""
        pixels = np.bincount(self.node, minlength=self.level.size)
        return self.subtree_sum(pixels.astype(np.float64))

    def subtree_sum(self, values: Values) -> Values:
        """Return the sum over each node and all nodes inside it, (N,)."""
        for ancestor in self.ancestors:
            values = values + np.bincount(ancestor, values, values.size + 1)[:-1]
        return values

    def subtree_min(self, values: Values) -> Values:
        """Return the minimum over each node and all nodes inside it, (N,)."""
        for ancestor in self.ancestors:
            least = np.append(values, np.inf)
            np.minimum.at(least, ancestor, values)
            values = least[:-1]
        return values

    def most_meaningful(self, log_nfa: Values) -> NDArray[np.bool_]:
        """Mark the regions that are less expected than those inside and around them, (N,).

        The result of U-Flow's alternation until nothing changes: of each chain without branches
        that ends in a leaf, keep the node of least log-NFA, the smallest on ties (prune); drop the
        children of a node if they are all leaves and none has less than the node (merge).
        In closed form: a subtree shrinks to one region if each of its branching nodes has the
        least log-NFA of its own subtree. That region lies on the chain at its top.
        """
        count = log_nfa.size
        parent = self.ancestors[0] if self.ancestors else np.full(count, count)
        children = np.bincount(parent, minlength=count + 1)
        least = self.subtree_min(log_nfa)
        blocked = (children[:-1] > 1) & (log_nfa > least)
        single = np.append(self.subtree_sum(blocked.astype(np.float64)) == 0, False)
        chain = np.where(children[parent] == 1, parent, np.arange(count))
        chain[parent == count] = np.flatnonzero(parent == count)  # the root begins a chain
        while not np.array_equal(longer := chain[chain], chain):
            chain = longer  # the topmost node of the chain without branches that a node is on
        top = single[:-1] & ~single[parent]
        candidates = np.flatnonzero(top[chain] & (log_nfa == least[chain]))
        winner = np.full(count, -1)
        np.maximum.at(winner, chain[candidates], candidates)  # later numbers are inside earlier
        marked = np.zeros(count, dtype=bool)
        marked[winner[top]] = True
        return marked

    def paint(self, marked: NDArray[np.bool_], values: Values) -> Values:
        """Return (P,) the value of the marked region around each pixel, nan outside all."""
        painted = np.append(np.where(marked, values, np.nan), np.nan)
        for ancestor in self.ancestors:
            outside = np.isnan(painted[:-1])
            painted[:-1][outside] = painted[ancestor[outside]]
        return painted[self.node]


def component_tree(image: NDArray) -> Tree:
    """Build the tree of a map (H, W), at least 3×3; neighbours of equal value are one node."""
    from skimage.morphology import max_tree  # slow to import; bundles without this test do without

    parents, order = max_tree(image, connectivity=1)
    flat, parents = image.reshape(-1), parents.reshape(-1)
    canonical = flat[parents] != flat
    canonical[order[0]] = True  # the root, its own parent
    pixels = order[canonical[order]]  # (N,) in ascending level, so parents come first
    count = pixels.size
    number = np.empty(flat.size, dtype=np.int64)
    number[pixels] = np.arange(count)
    node = number[np.where(canonical, np.arange(flat.size), parents)]
    ancestor = number[parents[pixels]]
    ancestor[0] = count
    ancestors = []
    while (ancestor < count).any():
        ancestors.append(ancestor)
        ancestor = np.append(ancestor, count)[ancestor]
    return Tree(node, flat[pixels], ancestors)
