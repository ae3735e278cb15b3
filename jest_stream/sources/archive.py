"""Walks the members of a tar archive, strictly: anything but a whole archive is an error.

In: a seekable binary file and the offset of a header. Out: members in order, with the byte offset
of each. Tar is parsed here because `tarfile` takes a bad header for the end of the archive, and so
do the loaders built on it: of a shard that was cut in half they give half, without a word.
Reads the formats ustar, GNU and pax. No threads.

An archive is a row of units of 512 bytes. A member is a header and its data, filled up to whole
units; an extension may precede it, a header whose data are a longer name. Two units of zeros, the
marker, end the archive. Writers then add zeros up to a whole record.

    byte 0        512                1536     2048     3072    10240
         | header | 600 bytes of data | header | marker | zeros |
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jest_stream.errors import ShardError, ShardTruncatedError, UnsafeDataError

_UNIT = 512
_RECORD = 20 * _UNIT  # the default of all writers
# Records of tar --blocking-factor=N, for N a power of two up to 2,048. With any N, zeros up to
# 1 MiB would pass for padding at any length. With these, the chance that reserved space passes, of
# about 10 KiB in the length of the file, less than doubles.
_LARGE_RECORDS = tuple(_UNIT << power for power in range(5, 12))
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header
_PLAIN = ord("0")
# Headers that no data follows, even if they give a size: as tar itself reads them.
_WITHOUT_DATA = {
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
}
_EXTENSIONS = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
}
_LOOKS_LIKE = {
    b"\x1f\x8b": "gzip data, which is not unpacked here; run gunzip on it",
    b"BZh": "bzip2 data, which is not unpacked here; run bunzip2 on it",
    b"\xfd7zXZ": "xz data, which is not unpacked here; run unxz on it",
    b"\x28\xb5\x2f\xfd": "zstd data, which is not unpacked here; run unzstd on it",
    b"PK\x03\x04": "a zip file; pack its files with tar",
    b"PAR1": "a Parquet file; name its repository of the Hub, or pass datasets.load_dataset(...)",
    b"<": "an HTML or XML page, such as a server's error message; fetch the shard again",
    b"version https://git-lfs": "a git-lfs pointer; run git lfs pull",
}


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    kind: bytes
    """The header's type flag."""
    offset: int
    """Byte where its first header starts, an extension's if it has one."""


class Members:
    """Iterates over the members of an archive, header by header. Owns the place in the file.

    Args:
      file: the archive, seekable.
      shard: its name in errors.
      offset: byte of the header to begin with.
    """

    def __init__(self, file: BinaryIO, shard: str, offset: int) -> None:
        self._file = file
        self._shard = shard
        self._num_bytes = file.seek(0, os.SEEK_END)
        self.position = offset
        """Byte of the next header; at the end, of the end-of-archive marker."""

    def __iter__(self) -> Iterator[Member]:
        return self

    def __next__(self) -> Member:
        """Returns the next member; its data may be read until the next call."""
        # The offset is that of the first extension: a reader that starts at the plain header would
        # miss the long name.
        offset, name, size = self.position, None, None
        # A member may have several extensions, such as a long name and a pax header. Their values
        # replace those of the plain header, whose size ends at 8 GiB and whose name at 100 bytes.
        while True:
            header = self._header()
            header_name, header_size, kind = self._parse(header)
            if kind not in _EXTENSIONS:
                break
            records = self._extension(kind, header_size)
            name = records.get("path", name)
            size = records.get("size", size)
        if size is not None:
            header_size = self._number(size, offset)
        if header_size < 0 or kind == tarfile.GNUTYPE_SPARSE:
            raise self._broken(offset, "holds a sparse file or one of negative size")
        if kind in _WITHOUT_DATA:
            header_size = 0
        self.position += _padded(header_size)
        return Member(header_name if name is None else name, header_size, kind, offset)

    def data(self, member: Member) -> bytes:
        """Returns the bytes of the member that was returned last."""
        if self.position > self._num_bytes:
            raise self._truncated(f"within member {member.name!r}")
        self._file.seek(self.position - _padded(member.size))
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise self._truncated(f"within member {member.name!r}, while it was being read")
        return data

    def check_tail(self, *, is_counted: bool = False) -> None:
        """Raises unless zeros follow the marker, and no more of them than writers add.

        Args:
          is_counted: whether the archive is known to hold as many examples as it should.
        """
        end = self.position + 2 * _UNIT  # the first byte after the marker
        self._file.seek(end)
        while chunk := self._file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise self._broken(
                    self.position,
                    "goes on after its end-of-archive marker (joined archives?); "
                    "the rest would never be read",
                )
        # Zeros at the end have two causes:
        # 1. A writer that padded the archive to its record.
        # 2. A download that stopped after the space was reserved: examples are missing, and the
        #    file may have any length.
        # The number of examples tells them apart; without it, a file that ends where a record of
        # its writer would is taken for the first.
        if not is_counted and not _is_padding(end, self._num_bytes):
            raise self._truncated(
                f"in zeros from byte {self.position} on, too many to be padding (if they are, pass "
                "a manifest that says how many examples there are)"
            )

    def _header(self) -> bytes:
        """Returns the next header; raises `StopIteration` at the marker.

        Three ways of ending are errors: no bytes where a header should be, a part of a header, and
        one unit of zeros that no second one follows.
        """
        position = self.position
        self._file.seek(position)
        header = self._file.read(_UNIT)
        if len(header) < _UNIT:
            where = "within a header" if header else "without its end-of-archive marker"
            raise self._truncated(where)
        if header[0] == 0 and not header.strip(b"\0"):
            second = self._file.read(_UNIT)
            if len(second) < _UNIT:
                raise self._truncated("within its end-of-archive marker")
            if second.strip(b"\0"):
                raise self._broken(position, "holds a single empty block, not an end marker")
            raise StopIteration
        self.position += _UNIT
        return header

    def _parse(self, header: bytes) -> tuple[str, int, bytes]:
        """Returns name, size and type of a header whose checksum is right."""
        # Nearly all headers are this plain: 5 us, where `tarfile`, which knows all, takes 22.
        if header[156] == _PLAIN and header[345] == 0:
            end = header.find(b"\0", 0, 100)
            try:
                if int(header[148:154], 8) == sum(header) - sum(header[148:156]) + 8 * 32:
                    name = header[: end if end >= 0 else 100].decode("utf-8", "surrogateescape")
                    return name, int(header[124:135], 8), tarfile.REGTYPE
            except ValueError:
                pass  # another way of writing numbers
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            offset = self.position - _UNIT
            fault = f"holds no tar header at byte {offset} ({error})"
            if offset == 0:
                looks = (text for start, text in _LOOKS_LIKE.items() if _starts(header, start))
                fault = f"is not a tar archive: it is {next(looks, 'no format known here')}"
            raise self._broken(offset, fault) from error
        return info.name, info.size, info.type

    def _extension(self, kind: bytes, size: int) -> dict[str, str]:
        """Returns the `path` and `size` that an extension gives to the member after it, if any."""
        offset = self.position - _UNIT
        if not 0 <= size <= _MAX_EXTENSION_BYTES:
            raise UnsafeDataError(
                f"shard {self._shard!r} has a header of {size:,} bytes at byte {offset}; names and "
                f"attributes take at most {_MAX_EXTENSION_BYTES:,}. Do not trust this file."
            )
        self.position += _padded(size)
        if self.position > self._num_bytes:
            raise self._truncated("within a long header")
        data = self._file.read(size)
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        if kind == tarfile.GNUTYPE_LONGLINK:
            return {}
        records = self._pax_records(data, offset)
        if any(name.startswith("GNU.sparse") for name in records):
            raise self._broken(offset, "holds a sparse file")
        if kind == tarfile.XGLTYPE:
            if "path" in records or "size" in records:
                raise self._broken(offset, "gives one name or size to all members")
            return {}
        return records

    def _pax_records(self, data: bytes, offset: int) -> dict[str, str]:
        """Returns the records `LENGTH KEY=VALUE\\n` of a pax header.

        LENGTH counts the whole record, its own digits and the newline too: in `16 path=a/b.jpg\\n`
        it is 2 + 1 + 12 + 1 = 16 bytes.
        """
        records, position = {}, 0
        while position < len(data):
            length = data[position : position + 20].partition(b" ")[0]
            end = position + self._number(length.decode("latin-1"), offset)
            record = data[position + len(length) + 1 : end]
            name, equals, value = record.partition(b"=")
            if not equals or end > len(data) or value[-1:] != b"\n":
                raise self._broken(offset, "holds a pax header that cannot be parsed")
            records[name.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
            position = end
        return records

    def _number(self, text: str, offset: int) -> int:
        """Returns a number written in decimal; at most 19 digits, as any 64-bit size has."""
        if not (text.isascii() and text.isdigit()) or len(text) > 19:
            raise self._broken(
                offset, f"has a header at byte {offset} with {text[:40]!r} where a number should be"
            )
        return int(text)

    def _broken(self, offset: int, fault: str) -> ShardError:
        return ShardError(
            f"shard {self._shard!r} {fault}. Write or fetch it again, or take it out of the "
            "source.",
            shard=self._shard,
            offset=offset,
        )

    def _truncated(self, where: str) -> ShardTruncatedError:
        return ShardTruncatedError(
            f"shard {self._shard!r} ends at byte {self._num_bytes} {where}: it was cut off, and "
            "the examples after that are missing. Write or fetch it again, or take it out of the "
            "source.",
            shard=self._shard,
            offset=min(self.position, self._num_bytes),
        )


def _padded(size: int, unit: int = _UNIT) -> int:
    """Returns the size rounded up to whole units: 0 -> 0, 1 -> 512, 512 -> 512, 513 -> 1024."""
    return -(-size // unit) * unit


def _is_padding(end: int, num_bytes: int) -> bool:
    """Returns whether a writer would fill up an archive that ends at `end` to `num_bytes`.

    Any length up to the end of the default record passes: some writers pad less or not at all. A
    larger record must match exactly. Of an archive that ends at byte 12,000, lengths up to 20,480
    pass, and 32,768, 65,536, ... 1,048,576.
    """
    if num_bytes <= _padded(end, _RECORD):
        return True
    return any(num_bytes == _padded(end, record) for record in _LARGE_RECORDS)


def _starts(header: bytes, start: bytes) -> bool:
    return header.startswith(start) or (start == b"<" and header.lstrip().startswith(b"<"))
