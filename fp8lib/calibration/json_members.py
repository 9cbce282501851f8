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
    stream = _Stream(file, decoder)
    if stream.symbol() != "{":
        raise ValueError("not a JSON object of tensor names")
    stream.expect("{")
    going_on = stream.symbol() != "}" or stream.expect("}") == ","
    while going_on:
        name = stream.value()
        if not isinstance(name, str):
            raise ValueError(f"a name expected after {stream.last}")
        stream.last = printable(name)
        stream.expect(":")
        yield name, stream.value()
        going_on = stream.expect(",}") == ","
    if stream.symbol():
        raise ValueError("more after its end")


class _Stream:
    """JSON text that is read as it is needed.

    Attributes:
        last: the member before, for messages.
    """

    def __init__(self, file: TextIO, decoder: json.JSONDecoder) -> None:
        self._file, self._decoder = file, decoder
        self._text, self._position = "", 0
        self.last = "the beginning"

    def symbol(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def expect(self, wanted: str) -> str:
        """Take the next character, one of those that are wanted."""
        if (found := self.symbol()) not in tuple(wanted):
            raise ValueError(f"{' or '.join(wanted)} expected after {self.last}")
        self._position += 1
        return found

    def value(self) -> object:
        """Take the next value."""
        self.symbol()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise ValueError(f"{error.msg} after {self.last}") from None
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._position = end
            return found

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        rest = len(self._text) - self._position
        if rest > _MAX_ENTRY:
            raise ValueError(f"too long an entry after {self.last}")
        # Much more at a time for an entry that is long: each attempt parses it from its beginning.
        read = self._file.read(max(CHUNK, 7 * rest))
        self._text, self._position = self._text[self._position :] + read, 0
        return bool(read)
