"""Members of a zip, so that threads can read them in place.

`zipfile` would keep an object of some 600 bytes per member. A member is known here by the offset of
its header in the central directory, which holds all else: sizes, method, CRC32, position.
"""

import posixpath
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dgpt_jax.data.image_ops import UnreadableImage
from dgpt_jax.data.ingest.tar_index import clean_path
from dgpt_jax.errors import UserError
from dgpt_jax.storage.byte_ranges import RangeReader

END, END64, LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
# Fields, after the signature, of a header in the central directory, and of one before a member.
CENTRAL = struct.Struct("<4s HHHHHH III HHH HH I I")
LOCAL = struct.Struct("<4s HHHHH III HH")
TAIL = 22 + 20 + 65535  # longest end of a zip: record, Zip64's locator, comment
CHUNK = 1 << 20
STORED, DEFLATED = 0, 8
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz"}
WIDE = 0xFFFFFFFF  # the value is in the Zip64 field
UNIX = 3  # system whose file modes are in the external attributes


@dataclass(frozen=True, slots=True)
class _Header:
    """A header of the central directory. start: of the header before the member. length: of this
    header, with all that follows it."""

    name: bytes
    flags: int
    method: int
    crc32: int
    packed: int
    size: int
    start: int
    length: int
    mode: int


def is_zip(name: bytes) -> bool:
    """True for the name of a zip."""
    return name[-4:].lower() == b".zip"


def members(
    file: RangeReader, note: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[bytes, int, int]]:
    """Yields (path, offset of its header in the central directory, bytes unpacked) of the files.

    `note` logs symbolic links, which are not followed. Raises UserError if the zip is truncated,
    damaged, encrypted, or compressed by another method than deflate.
    """
    position, end, count = _central_directory(file)
    block, first = b"", position
    for _ in range(count):
        last = first + len(block)
        if position + (64 << 10) * 3 + CENTRAL.size > last < file.size:  # the longest header
            first, block = position, file.read_at(position, CHUNK)
        header = _parse(file, block, position - first)
        if not header.name.endswith(b"/"):
            if stat.S_ISLNK(header.mode):
                note(f"{header.name.decode(errors='backslashreplace')} in {file.path}, a link")
            else:
                _check_readable(file, header)
                yield clean_path(header.name), position, header.size
        position += header.length
    if position != end:
        raise UserError(f"{file.path} is damaged: its directory ends at byte {position}, not {end}")


def read(path: bytes, offset: int) -> bytes:
    """Reads a member by the offset of its header in the central directory. Raises UnreadableImage
    if its data are damaged, OSError if the zip cannot be read, UserError if it has changed."""
    with RangeReader(path) as file:
        header = _parse(file, file.read_at(offset, CENTRAL.size + (64 << 10)), 0)
        guess = LOCAL.size + len(header.name) + 64  # of the header before the member
        block = file.read_at(header.start, guess + header.packed)
        if len(block) < LOCAL.size or block[:4] != b"PK\x03\x04":
            raise UnreadableImage("no header before its data in the zip")
        *_, name_length, extra_length = LOCAL.unpack_from(block)
        begin = LOCAL.size + name_length + extra_length
        if begin > guess:
            block = file.read_at(header.start, begin + header.packed)
    data = block[begin : begin + header.packed]
    if header.method == DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, header.size + 1)
        except zlib.error as e:
            raise UnreadableImage(f"damaged in the zip: {e}") from None
    if len(data) != header.size or zlib.crc32(data) != header.crc32:
        raise UnreadableImage("damaged in the zip: its CRC32 differs")
    return data


def _central_directory(file: RangeReader) -> tuple[int, int, int]:
    """Returns (start, end, number of headers) of the central directory."""
    start = max(file.size - TAIL, 0)
    tail = file.read_at(start, TAIL)
    at = tail.rfind(END)
    if at < 0 or len(tail) < at + 22:
        raise UserError(
            f"{file.path} is not a zip or is truncated: its directory, at the end, is missing; "
            f"copy or download it again"
        )
    _, disk, _, _, count, size, offset, _ = struct.unpack_from("<4s HHHH II H", tail, at)
    end = start + at
    locator = tail[max(at - 20, 0) : at]
    if locator[:4] == LOCATOR64:
        (end,) = struct.unpack_from("<Q", locator, 8)
        record = file.read_at(end, 56)
        if len(record) < 56 or record[:4] != END64:
            raise UserError(f"{file.path} is damaged: its Zip64 record is missing")
        disk, _, _, count, size, offset = struct.unpack_from("<II QQ QQ", record, 16)
    if disk:
        raise UserError(f"{file.path} is one of several parts of a zip: join them first (zip -s 0)")
    if offset + size != end:  # data before or within, as in a file that was cut or joined
        raise UserError(
            f"{file.path} is damaged: its directory should end at byte {end}, not {offset + size}; "
            f"copy or download it again"
        )
    return offset, end, count


def _parse(file: RangeReader, block: bytes, at: int) -> _Header:
    """Parses the header of the central directory at an offset of a block."""
    fixed = block[at : at + CENTRAL.size]
    if len(fixed) < CENTRAL.size or fixed[:4] != b"PK\x01\x02":
        raise UserError(f"{file.path} is damaged, or has changed since it was listed")
    (
        _, made_by, _, flags, method, _, _, crc32, packed, size, name_length, extra_length,
        comment_length, _, _, attributes, start,
    ) = CENTRAL.unpack(fixed)  # fmt: skip
    name_end = at + CENTRAL.size + name_length
    name = block[at + CENTRAL.size : name_end]
    extra = block[name_end : name_end + extra_length]
    if len(name) < name_length or len(extra) < extra_length:
        raise UserError(f"{file.path} is damaged: a name ends beyond its directory")
    size, packed, start = _wide(extra, [size, packed, start])
    mode = attributes >> 16 if made_by >> 8 == UNIX else 0
    length = CENTRAL.size + name_length + extra_length + comment_length
    return _Header(_utf8(name, flags), flags, method, crc32, packed, size, start, length, mode)


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Replaces values of 0xFFFFFFFF by those of the Zip64 field, in order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            wide = [w for (w,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            return [wide.pop(0) if value == WIDE and wide else value for value in values]
    return values


def _utf8(name: bytes, flags: int) -> bytes:
    """Returns a name as UTF-8; without the flag that says so, it may be in DOS's code page."""
    name = name.replace(b"\\", b"/")
    if not flags & 0x800:
        try:
            name.decode()
        except UnicodeDecodeError:
            return name.decode("cp437").encode()
    return name


def _check_readable(file: RangeReader, header: _Header):
    """Raises UserError if a member cannot be read in place."""
    name = posixpath.basename(header.name).decode(errors="backslashreplace")
    if header.flags & 1:
        raise UserError(f"{file.path} is encrypted ({name}): unzip it with its password")
    if header.method not in (STORED, DEFLATED):
        method = METHODS.get(header.method, f"method {header.method}")
        raise UserError(f"{file.path} is compressed by {method} ({name}): unzip it first")
    if header.start + LOCAL.size + header.packed > file.size:
        raise UserError(
            f"{file.path} is damaged: {name} ends beyond the file; copy or download it again"
        )
