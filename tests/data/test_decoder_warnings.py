"""What DALI's libraries write to stderr: caught at them alone, counted, each file named once."""

import ctypes
import os
import sys

import corrupt_images as made
import pytest
import torch

from cjepa_fast.config import DataSection
from cjepa_fast.data import dali
from cjepa_fast.data.decoder_warnings import KINDS, LOOKS, OTHERS, DecoderWarnings, summary
from cjepa_fast.data.loader import BatchSplit, Loader
from cjepa_fast.data.sources import open_images
from cjepa_fast.data.whole_images import WholeImages
from cjepa_fast.runtime import library_stderr

NOT_SRGB = made.png_with(b"sRGB", b"\x09")


@pytest.fixture
def dali_decodes(monkeypatch):
    monkeypatch.setenv("CJEPA_DECODER", "dali")
    if dali.problem(torch.device("cpu")):
        pytest.skip("DALI does not work here")
    dali.WRITTEN.lines()  # of tests before


def loader_of(root, cache, said, noted, batch=4):
    images = open_images(root, cache=cache, log=lambda line: None)
    data = DataSection(image_size=32, batch_size=batch, micro_batch_size=batch, threads=2)
    loader = Loader(
        images, data, BatchSplit(batch, batch), seed=0, device="cpu", dtype=torch.float32,
        log=said.append,
    )  # fmt: skip
    loader.skipped.attach(said.append, record=lambda row: None, note=noted.append)
    return loader


def test_each_file_is_named_once_and_every_line_counted(tmp_path, dali_decodes, capfd):
    root = made.good_folder(tmp_path / "set", 9)
    late = made.encoded(made.picture(1)).replace(b"JFIF\0\1", b"JFIF\0\7")
    made.write(root / "c0" / "late.jpg", late)
    made.write(root / "c1" / "odd.png", NOT_SRGB)
    said, noted = [], []
    loader = loader_of(root, tmp_path / "cache", said, noted)
    batches = loader.iterate(0)
    for _ in range(12):
        next(batches)
    loader.close()
    warned = [line for line in (*said, *noted) if "the decoder warns of" in line]
    assert sorted(line.split("warns of ")[1] for line in warned) == [
        "c0/late.jpg: Warning: unknown JFIF revision number 7.01",
        "c1/odd.png: libpng warning: sRGB: invalid",
    ]
    count = loader.skipped.warnings.count
    assert set(count) == {
        "Warning: unknown JFIF revision number N.N",
        "libpng warning: sRGB: invalid",
    }
    assert min(count.values()) >= 2  # in six epochs, some of whose lines come during a look
    assert summary(count).startswith(f"the decoder warned {count.total()} times (")
    out, err = capfd.readouterr()
    assert "JFIF" not in out + err and "libpng" not in err and "ERROR" not in err


def test_all_else_that_writes_to_stderr_still_does(dali_decodes, capfd):
    """The descriptor is the one that the process began with, for C code of other libraries too."""
    libc = ctypes.CDLL(None)
    os.write(2, b"by the descriptor\n")
    print("by Python", file=sys.stderr, flush=True)
    libc.fprintf(ctypes.c_void_p.in_dll(libc, "stderr"), b"by C\n")
    cerr = ctypes.CDLL("libstdc++.so.6")
    put = cerr["_ZStlsISt11char_traitsIcEERSt13basic_ostreamIcT_ES5_PKc"]
    put(ctypes.byref(ctypes.c_char.in_dll(cerr, library_stderr.CERR)), b"by C++\n")
    err = capfd.readouterr().err
    assert err.split("\n")[:-1] == ["by the descriptor", "by Python", "by C", "by C++"]
    assert dali.WRITTEN.lines() == []


def test_whole_images_name_the_file(dali_decodes, capsys):
    whole = WholeImages(4, 1)
    good, odd = made.encoded(made.picture(1)), made.stray_bytes(1)
    for _ in range(2):
        whole([good, odd, good], ["a", "b\n", "c"])
    assert capsys.readouterr().out.count("the decoder warns of b\\n: Corrupt JPEG data") == 1


class Decoder:
    """writes: by image, what decoding it writes; the bad ones do not decode."""

    def __init__(self, writes, bad=()):
        self.writes, self.bad, self.lines, self.looks = writes, bad, [], 0

    def library_messages(self):
        lines, self.lines = self.lines, []
        return lines

    def alone(self, name):
        self.looks += 1
        self.lines += self.writes.get(name, [])
        return None if name in self.bad else b""

    def suspects(self, *names):
        return lambda: [(name, lambda name=name: self.alone(name)) for name in names]


def hearing():
    said, noted = [], []
    return DecoderWarnings(said.append, noted.append), said, noted


def test_a_file_that_does_not_decode_is_not_counted():
    warnings, said, noted = hearing()
    decoder = Decoder({"bad": ["broken at 7"]}, bad={"bad"})
    decoder.lines = ["broken at 7"]
    warnings.hear(decoder, decoder.suspects("good", "bad"))
    assert not said and not noted and not summary(warnings.count)


def test_a_line_of_another_image_names_no_file():
    """One that is written once while another is looked at, as by a batch that is on its way."""
    warnings, said, noted = hearing()
    decoder = Decoder({})
    decoder.lines = ["odd 1"]
    late = iter([["odd 2"]])

    def decode():
        decoder.lines += next(late, [])
        return b""

    warnings.hear(decoder, lambda: [("a", decode)])
    assert said == ["the decoder warns: odd N (from now on counted)"] and not noted
    assert warnings.count == {"odd N": 2}


def test_looking_ends_and_kinds_are_bounded():
    warnings, *_ = hearing()
    for k in range(LOOKS + 5):
        decoder = Decoder({})
        decoder.lines = ["odd"]
        warnings.hear(decoder, decoder.suspects("a"))
        assert decoder.looks == (k < LOOKS)
    for k in range(2 * KINDS):
        decoder.lines = [f"kind {'x' * k}"]
        warnings.hear(decoder)
    assert len(warnings.count) == KINDS + 1 and warnings.count[OTHERS] == KINDS + 1


def test_a_library_that_is_none_is_left_alone(tmp_path):
    fake = made.write(tmp_path / "libx.so", b"\x7fELF\x01\x01" + bytes(99))
    with pytest.raises(ValueError, match="64 bits"):
        list(library_stderr.slots(fake))
    written = library_stderr.LibraryStderr("libc.so.6", "no-such")
    assert written.lines() == []
