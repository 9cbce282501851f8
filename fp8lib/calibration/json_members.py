"""Members of a JSON object, one at a time, so that a file of gigabytes is never in memory as a whole.

`json` parses whole documents only. ijson reads streams, but makes an event of every
number, and a statistics file has a hundred million.
"""

import json
import re
from collections.abc import Iterator
from typing import TextIO

from fp8lib.checkpoint.untrusted import printable

_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_ENTRY = 50_000_000
"""Characters of JSON that one entry may take: what is held in memory beside the entries themselves."""
CHUNK = 1 << 22


def members(file: TextIO, decoder: json.JSONDecoder) -> Iterator[tuple[str, object]]:
    """Names and values of the object that is in a JSON file, holding one at a time.

    Raises:
        ValueError: not JSON, or not an object.
    """
    text, position, last = "", 0, "the beginning"

    def more() -> bool:
        nonlocal text, position
        if len(text) - position > _MAX_ENTRY:
            raise ValueError(f"too long an entry after {last}")
        # Much more at a time for an entry that is long: each attempt parses it from its beginning.
        read = file.read(max(CHUNK, 7 * (len(text) - position)))
        text, position = text[position:] + read, 0
        return bool(read)

    def symbol() -> str:
        """The next character that is no white space, "" at the end."""
        nonlocal position
        while True:
            position = _SPACE.match(text, position).end()
            if position < len(text):
                return text[position]
            if not more():
                return ""

    def value() -> object:
        nonlocal position
        symbol()
        while True:
            try:
                found, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if not more():
                    raise ValueError(f"{error.msg} after {last}") from None
                continue
            if end == len(text) and more():
                continue  # a number may go on
            position = end
            return found

    def expect(wanted: str) -> str:
        nonlocal position
        if (found := symbol()) not in tuple(wanted):
            raise ValueError(f"{' or '.join(wanted)} expected after {last}")
        position += 1
        return found

    if symbol() != "{":
        raise ValueError("not a JSON object of tensor names")
    expect("{")
    going_on = symbol() != "}" or expect("}") == ","
    while going_on:
        name = value()
        if not isinstance(name, str):
            raise ValueError(f"a name expected after {last}")
        last = printable(name)
        expect(":")
        yield name, value()
        going_on = expect(",}") == ","
    if symbol():
        raise ValueError("more after its end")
