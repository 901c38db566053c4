"""No text from outside forges a line, moves a cursor, or ends a table's cell."""

import io
import os
import sys

import pytest
import tiny

from cjepa_fast import pretrain
from cjepa_fast.runtime.printable import (
    in_markdown,
    is_open,
    is_terminal,
    markdown_code,
    printable,
    printable_lines,
    say,
)
from cjepa_fast.telemetry import progress

CASES = {
    "plain name.jpg": "plain name.jpg",
    "caf\u00e9 \u732b.jpg": "caf\u00e9 \u732b.jpg",
    "a\nerror: forged": "a\\nerror: forged",
    "\x1b[31mred\x9b2J": "\\x1b[31mred\\x9b2J",
    os.fsdecode(b"caf\xe9"): "caf\\xe9",
    "\ud800": "\\ud800",
    "gpj\u202e.exe": "gpj\\u202e.exe",  # right to left
    "\u2028": "\\u2028",
}


@pytest.mark.parametrize("text", CASES)
def test_what_is_not_printable_is_escaped(text, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert printable(text) == CASES[text]
    assert printable(os.fsencode(text) if text != "\ud800" else text) == CASES[text]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_terminal_takes_it(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    every = "".join(map(chr, range(0x3000))) + "\ud800\udcff\U0001f600"
    print(printable(every), printable(Exception(every)), file=out)


def test_lines_stay_lines():
    assert printable_lines("a\n\x1bb") == "a\n\\x1bb"


def test_markdown_shows_it_as_text():
    assert in_markdown("# Owned\n<img onerror=x>|") == r"\# Owned\\n\<img onerror=x\>\|"
    assert in_markdown("[a](b) `c` **d** &lt;") == r"\[a\](b) \`c\` \*\*d\*\* \&lt;"
    assert markdown_code("a`<b>`\n") == "`a'<b>'\\n`"


class Tee:
    """As programs log what is printed: write and flush alone."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_stream_with_write_and_flush_alone_takes_what_is_said():
    tee = Tee()
    say("a", tee)
    assert tee.text == "a\n" and is_open(tee) and not is_terminal(tee)
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        assert not is_open(stream) and not is_terminal(stream)


def test_such_streams_end_no_training(tmp_path, monkeypatch):
    out, err = Tee(), Tee()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(progress, "PLAIN_S", 0.0)
    run = pretrain(tiny.write_config(tmp_path), epochs=1)
    assert run.status == 0 and "step 2" in out.text and "building the networks" in err.text


def test_what_goes_to_stderr_ends_no_command():
    """A full disk beneath it: say() loses the line, print raises."""
    files = (tiny.ROOT / "cjepa_fast").rglob("*.py")
    assert not [path for path in files if "file=sys.stderr" in path.read_text(encoding="utf-8")]
