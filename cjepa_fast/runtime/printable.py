"""Text from outside (names of files, of classes), as terminals, logs and Markdown may show it.

Names are data: none may begin a line of its own, move the cursor, or end a table or a link.
"""

import contextlib
import os
import sys
from typing import TextIO

IN_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*[]<>|&#"})


def printable(text: object) -> str:
    """In one line, what is not printable escaped as in a Python string; no name makes it fail.

    Bytes that are no UTF-8 (os.fsdecode's surrogates) are shown as such, \\xe9, and so is what
    stdout's encoding lacks.
    """
    text = os.fsdecode(text) if isinstance(text, (bytes, os.PathLike)) else str(text)
    shown = "".join(c if c.isprintable() else _escaped(c) for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def printable_lines(text: object) -> str:
    """`printable` of each line: for a message whose line ends are our own."""
    return "\n".join(map(printable, str(text).split("\n")))


def in_markdown(text: object) -> str:
    """`printable`, and nothing in it is a heading, a link, HTML or the end of a table's cell."""
    return printable(text).translate(IN_MARKDOWN)


def markdown_code(text: object) -> str:
    """`printable` between backticks, which it cannot leave."""
    return f"`{printable(text).replace('`', chr(39))}`"


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """print, flushed. What a full disk or a closed terminal refuses is lost: it ends no work."""
    stream = stream or sys.stdout
    if is_open(stream):
        with contextlib.suppress(OSError):
            stream.write(text + end)
            stream.flush()


def is_open(stream: TextIO | None) -> bool:
    """Not where the process has none, or closed it. What a program puts in place of stdout, to
    log it as well, may have write and flush alone: it counts as open."""
    return stream is not None and not getattr(stream, "closed", False)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one that can be drawn on."""
    return is_open(stream) and hasattr(stream, "isatty") and stream.isatty()


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
