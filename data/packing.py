"""Fitting documents of unequal length into rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns documents to as few rows as a greedy rule finds: longest first, each into the fullest row that still
    has room (Johnson 1974; never more than 11/9 of the optimum plus one row).

    Args:
        lengths: token count of each document, between 1 and `capacity`.
        capacity: tokens that a row holds.

    Returns:
        The indices of the documents of each row. Rows are ordered by their first document and documents inside a row
        keep their order, so that the result stays as close to the given order as packing allows.

    Raises:
        ValueError: a length outside of 1..capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {index} has {length} tokens; a row holds between 1 and {capacity}")
    rows: list[list[int]] = []
    # Rows that have room, by how much: a heap of each size, and the sizes that occur, sorted. There are at most
    # `capacity` sizes, however many rows there are.
    with_room: dict[int, list[int]] = {}
    sizes: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(sizes, length)
        if place == len(sizes):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free = sizes[place]
            row = heappop(with_room[free])
            if not with_room[free]:
                del with_room[free], sizes[place]
        rows[row].append(index)
        if left := free - length:
            if left not in with_room:
                with_room[left] = []
                insort(sizes, left)
            heappush(with_room[left], row)
    return sorted(sorted(row) for row in rows)
