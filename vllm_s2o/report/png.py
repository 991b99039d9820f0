"""Pictures of shades: PNG files with a palette, as data URIs."""

import base64
import struct
import zlib
from collections.abc import Sequence

Colour = tuple[int, int, int]

CLEAR = 0
"""The shade that lets the page show through."""

SHADES = 64
"""Shades beside it, 1 to SHADES: as many as the eye tells apart, and few enough to compress well."""


def png(rows: Sequence[bytes], colours: Sequence[Colour]) -> bytes:
    """An indexed PNG.

    Args:
        rows: a byte for each pixel: CLEAR, or the number of a colour, from 1.
        colours: at most 255.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    palette = bytes(3) + bytes(value for colour in colours for value in colour)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)),
            chunk(b"PLTE", palette),
            chunk(b"tRNS", b"\0"),  # CLEAR; the others are opaque
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
            chunk(b"IEND", b""),
        )
    )


def uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def ramp(stops: Sequence[str], count: int = SHADES) -> list[Colour]:
    """`count` colours along some that are given as #rrggbb, evenly."""
    given = [tuple(int(stop[at : at + 2], 16) for at in (1, 3, 5)) for stop in stops]
    colours = []
    for index in range(count):
        place = index / (count - 1) * (len(given) - 1)
        first = min(int(place), len(given) - 2)
        r, g, b = (round(a + (place - first) * (b - a)) for a, b in zip(given[first], given[first + 1], strict=True))
        colours.append((r, g, b))
    return colours
