"""Packing: which lengths share a row."""

import bisect
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing (Johnson, 1973): rows of the lengths' places, each where it fits tightest in `capacity`."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[i])
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
        rows[row].append(i)
        left = room - lengths[i]
        if not by_room.setdefault(left, []):
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return rows
