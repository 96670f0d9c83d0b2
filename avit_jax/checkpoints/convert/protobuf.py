"""Protobuf's wire format, read field by field without making objects: a hostile file cannot make us fill the memory.

Source: https://protobuf.dev/programming-guides/encoding/. A message is a row of fields; each has a number and a varint,
4 or 8 bytes, or a length and that many bytes.
"""

from collections.abc import Iterator

MOST_FIELDS = 2_000_000  # of a file; a ViT's ONNX graph has fewer than 100,000
Field = tuple[int, int | memoryview]


class Budget:
    """Counts the fields that are read of a file. Raises ValueError beyond MOST_FIELDS."""

    def __init__(self) -> None:
        self.left = MOST_FIELDS

    def take(self) -> None:
        """Count one field."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MOST_FIELDS} fields: a ViT has far fewer")


def fields(message: memoryview, budget: Budget) -> Iterator[Field]:
    """The fields of a message in their order: number, and an int for varints, bytes for everything else.

    Raises ValueError where the bytes are no message.
    """
    place = 0
    while place < len(message):
        budget.take()
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("it is damaged: a field has no known type")
        if not number or length > len(message) - place:
            raise ValueError("it is damaged or truncated: a field ends behind the file")
        yield number, message[place : place + length]
        place += length


def varints(packed: memoryview, budget: Budget) -> Iterator[int]:
    """The numbers of a packed field."""
    place = 0
    while place < len(packed):
        budget.take()
        value, place = _varint(packed, place)
        yield value


def signed(value: int) -> int:
    """An int64 from its varint."""
    return value - 2**64 if value >= 2**63 else value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it is damaged or truncated: it ends within a number")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), place
    raise ValueError("it is damaged: one of its numbers has more than 10 bytes")
