"""A page taken apart again: its elements, and the pixels of its pictures."""

import base64
import struct
import zlib
from html.parser import HTMLParser
from typing import NamedTuple

from vllm_s2o.report.markup import VOID


class Element(NamedTuple):
    name: str
    attributes: dict[str, str]
    text: list[str]
    """Of the element itself and of what is in it."""

    @property
    def words(self) -> str:
        return "".join(self.text)


class _Parser(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found: list[Element] = []
        self.open: list[Element] = []

    def handle_starttag(self, name, attributes):
        element = Element(name, dict(attributes), [])
        self.found.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open and self.open[-1].name == name, f"</{name}> ends what is not open"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text.append(data)


def elements(page: str) -> list[Element]:
    """All elements in their order; each must end where it should."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.found


def named(found: list[Element], name: str, **attributes: str) -> list[Element]:
    """Elements of a name; `class_` is one of their classes."""
    wanted = {key.rstrip("_"): value for key, value in attributes.items()}
    one = wanted.pop("class", None)
    return [
        element
        for element in found
        if element.name == name
        and wanted.items() <= element.attributes.items()
        and (one is None or one in element.attributes.get("class", "").split())
    ]


class Picture(NamedTuple):
    rows: list[bytes]
    palette: bytes
    transparency: bytes


def picture(uri: str) -> Picture:
    """An indexed PNG whose lines are not filtered."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        content = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + length
    width, height, depth, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colours) == (8, 3)
    pixels = zlib.decompress(chunks[b"IDAT"])
    assert len(pixels) == height * (width + 1)
    lines = [pixels[row * (width + 1) : (row + 1) * (width + 1)] for row in range(height)]
    assert all(line[0] == 0 for line in lines)
    return Picture([line[1:] for line in lines], chunks[b"PLTE"], chunks[b"tRNS"])
