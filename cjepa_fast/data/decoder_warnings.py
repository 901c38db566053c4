"""What the decoder's libraries write of images that they decode all the same: counted and named.

libjpeg says "Corrupt JPEG data: premature end of data segment", and nothing of which file. So when
lines come, the images that were in the decoder are decoded once more, each alone.
"""

import re
from collections import Counter
from collections.abc import Callable

from cjepa_fast.data.decoder import Decoder, WholeDecoder
from cjepa_fast.runtime.printable import printable

KINDS = 20  # of lines, told apart
LOOKS = 20  # for the images that lines are about: each costs two batches decoded once more
NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")
OTHERS = "others"

Suspect = tuple[str, Callable[[], object]]  # an image's name, and what decodes it alone


class DecoderWarnings:
    """say: takes a line for the terminal, the first of its kind; note: one for the log, once a
    file."""

    def __init__(self, say: Callable[[str], None], note: Callable[[str], None]):
        self.say, self.note = say, note
        self.count: Counter[str] = Counter()
        self._named: dict[str, set[str]] = {}  # the kinds of each file
        self._said: set[str] = set()  # kinds
        self._looks = 0

    def hear(
        self, decoder: Decoder | WholeDecoder, suspects: Callable[[], list[Suspect]] = list
    ) -> None:
        """Count what has been written since the last call, of one of `suspects`."""
        new = Counter(map(self._kind, decoder.library_messages()))
        if not new:
            return
        self.count += new
        explained: set[str] = set()
        for suspect in self._worth_a_look(suspects(), set(new)):
            explained |= self._look_at(suspect, decoder)
        for kind in sorted(new.keys() - explained - self._said):
            self._said.add(kind)
            self.say(f"the decoder warns: {printable(kind)} (from now on counted)")

    def _worth_a_look(self, suspects: list[Suspect], kinds: set[str]) -> list[Suspect]:
        """Those that are not named yet; none where others explain it all, or after many looks."""
        explained = {kind for name, _ in suspects for kind in self._named.get(name, ())}
        if not suspects or kinds <= explained or self._looks == LOOKS:
            return []
        self._looks += 1
        return [suspect for suspect in suspects if suspect[0] not in self._named]

    def _look_at(self, suspect: Suspect, decoder: Decoder | WholeDecoder) -> set[str]:
        """The kinds of what is written of an image, twice: once, it may be of another."""
        name, decode = suspect
        readable = decode() is not None
        if not (found := decoder.library_messages()):
            return set()
        decode()
        again = set(map(self._kind, decoder.library_messages()))
        kinds = {kind: line for line in found if (kind := self._kind(line)) in again}
        self.count += Counter(kind for line in found if (kind := self._kind(line)) not in again)
        if not readable:  # it is found, and named as such, when its batch comes
            self.count -= Counter(map(self._kind, found))
        elif kinds:
            self._named[name] = set(kinds)
            text = f"the decoder warns of {printable(name)}: {printable(', '.join(kinds.values()))}"
            (self.note if self._said >= kinds.keys() else self.say)(text)
            self._said |= kinds.keys()
        return set(kinds)

    def _kind(self, line: str) -> str:
        """A line without its numbers; one of many kinds is not told from others."""
        kind = NUMBERS.sub("N", line)
        return kind if kind in self.count or len(self.count) < KINDS else OTHERS


def summary(count: Counter[str]) -> str:
    """The count of each kind, in a sentence; "" where there is none."""
    if not count:
        return ""
    kinds = ", ".join(f"{printable(kind)}: {number:,}" for kind, number in count.most_common())
    times = "once" if count.total() == 1 else f"{count.total():,} times"
    return f"the decoder warned {times} ({kinds})"
