"""What a C or C++ library writes to stderr, taken at that library alone.

A shared library reaches `stderr` and `std::cerr` through a slot of its own (its global offset
table). Here the slots of the libraries that were named lead to a file in memory instead. File
descriptor 2, and all else that writes there (Python, faulthandler, NCCL, an abort), stay as they
are, so nothing else can be lost or delayed, however the process ends.

Linux, 64 bits, little-endian. Where a library's slots cannot be found or changed, its text goes to
the terminal as before. Source: the ELF and AMD64/AArch64 ABIs; libstdc++'s exported names.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GLOB_DAT = (6, 1025)  # relocations of a slot: R_X86_64_GLOB_DAT, R_AARCH64_GLOB_DAT
LOADED, DYNAMIC, RELRO = 1, 2, 0x6474E552  # kinds of program headers
STRTAB, SYMTAB, RELA, RELASZ = 5, 6, 7, 8  # kinds of entries of the dynamic section
STDERR, CERR = "stderr", "_ZSt4cerr"
OFSTREAM = "_ZNSt14basic_ofstreamIcSt11char_traitsIcEE"
SETBUF = "_ZNSt13basic_filebufIcSt11char_traitsIcEE6setbufEPcl"
RDBUF = "_ZNKSt14basic_ofstreamIcSt11char_traitsIcEE5rdbufEv"
STREAM_BYTES = 4096  # more than a std::ofstream takes (512)
APPEND = 1 | 16  # std::ios::app | std::ios::out
UNBUFFERED = 2  # _IONBF
MOST_BYTES = 1 << 20  # of text that has been read, before the file is emptied
# What a system, a library or a file of another kind leads to.
UNKNOWN = (OSError, ValueError, AttributeError, LookupError, RuntimeError, struct.error)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LibraryStderr:
    """The lines of some libraries, from when they are loaded and `take` is called.

    names: how their files' names begin.
    """

    def __init__(self, *names: str):
        self._names = names
        self._taken: dict[str, ctypes.CDLL] = {}
        self._fd, self._read_bytes = -1, 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Take those of the libraries that are loaded by now, which then stay so."""
        with self._lock, contextlib.suppress(*UNKNOWN):
            for path, base in _loaded(self._names):
                if path not in self._taken:
                    self._taken[path] = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_NOW)
                    for slot in list(slots(path)):
                        _lead(slot, base, self._targets[slot.name])

    @functools.cached_property
    def _targets(self) -> dict[str, int]:
        """Addresses of a FILE* and of a std::ostream that append to the file in memory."""
        self._fd = os.memfd_create("library_stderr")
        path = f"/proc/self/fd/{self._fd}".encode()
        self._kept = _c_file(path), _cpp_stream(path)
        for target in self._kept:  # for good: a library may write when Python has ended
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(target))
        return {STDERR: ctypes.addressof(self._kept[0]), CERR: ctypes.addressof(self._kept[1])}

    def lines(self) -> list[str]:
        """What has been written since the last call; without colours and empty lines."""
        if self._fd < 0:
            return []
        with self._lock:
            size = os.fstat(self._fd).st_size
            if size < self._read_bytes:  # emptied by another process that shares it, a fork
                self._read_bytes = 0
            data = os.pread(self._fd, size, self._read_bytes)
            whole = data[: data.rfind(b"\n") + 1]
            self._read_bytes += len(whole)
            if self._read_bytes > MOST_BYTES and whole == data:
                os.ftruncate(self._fd, 0)  # it is appended to, so that this needs no agreement
                self._read_bytes = 0
        text = COLOURS.sub("", whole.decode("utf-8", "replace"))
        return [line.strip() for line in text.split("\n") if line.strip()]


def _c_file(path: bytes) -> ctypes.c_void_p:
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(path, b"a"))
    if not file:
        raise OSError(f"{os.fsdecode(path)} cannot be opened")
    libc.setvbuf(file, None, UNBUFFERED, ctypes.c_size_t(0))
    return file


def _cpp_stream(path: bytes) -> ctypes.Array:
    """A std::ofstream without a buffer, which threads may write to at once as they may to cerr."""
    library = ctypes.CDLL("libstdc++.so.6")
    stream = ctypes.create_string_buffer(STREAM_BYTES)
    library[f"{OFSTREAM}C1Ev"](stream)
    buffer_of = library[RDBUF]
    buffer_of.restype = ctypes.c_void_p
    library[SETBUF](ctypes.c_void_p(buffer_of(stream)), None, ctypes.c_long(0))
    library[f"{OFSTREAM}4openEPKcSt13_Ios_Openmode"](stream, path, ctypes.c_int(APPEND))
    return stream


def _loaded(names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(path, address of its first byte) of the libraries in this process that are so named."""
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or not os.path.basename(fields[5]).startswith(names):
            continue
        if int(fields[2], 16) == 0:
            yield fields[5], int(fields[0].partition("-")[0], 16)


HEADER = struct.Struct("<IIQQQQQ")


class Header(NamedTuple):
    """A program header: a span of the file, and the addresses where it lies once loaded."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    size: int
    size_loaded: int

    def __contains__(self, address: object) -> bool:
        return self.address <= address < self.address + self.size_loaded


class Slot(NamedTuple):
    """name: STDERR or CERR; offset: from the library's first byte; read_only: once it is loaded."""

    name: str
    offset: int
    read_only: bool


def slots(path: str) -> Iterator[Slot]:
    """What of a library's file leads to stderr. Raises ValueError for what is no such file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        if elf[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no library of 64 bits")
        (first,) = struct.unpack_from("<Q", elf, 32)
        size, count = struct.unpack_from("<HH", elf, 54)
        headers = [Header(*HEADER.unpack_from(elf, first + size * i)) for i in range(count)]
        dynamic = next(h for h in headers if h.kind == DYNAMIC)
        section = elf[dynamic.offset : dynamic.offset + dynamic.size]
        entries = dict(struct.iter_unpack("<qQ", section))
        symbols, strings, table = (_place(headers, entries[k]) for k in (SYMTAB, STRTAB, RELA))
        for offset, info, _ in struct.iter_unpack("<QQq", elf[table : table + entries[RELASZ]]):
            if info & 0xFFFFFFFF not in GLOB_DAT:
                continue
            (at,) = struct.unpack_from("<I", elf, symbols + 24 * (info >> 32))
            name = elf[strings + at : elf.find(b"\0", strings + at)].decode()
            if name in (STDERR, CERR):
                yield Slot(name, offset, any(h.kind == RELRO and offset in h for h in headers))


def _place(headers: list[Header], address: int) -> int:
    """Where in the file stands what lies at an address."""
    part = next(h for h in headers if h.kind == LOADED and address in h)
    return part.offset + address - part.address


def _lead(slot: Slot, base: int, target: int) -> None:
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    address = base + slot.offset
    start = ctypes.c_void_p(address - address % page)
    if libc.mprotect(start, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "a library's slot cannot be changed")
    ctypes.c_void_p.from_address(address).value = target
    if slot.read_only:
        libc.mprotect(start, ctypes.c_size_t(page), mmap.PROT_READ)
