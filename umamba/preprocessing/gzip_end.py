"""Refuses a .nii.gz that is cut short, which readers pass in silence, mostly without unpacking it.

The last four bytes of a gzip file are the length of its content, and a NIfTI header tells what
that must be: only where the two differ is the file unpacked to find its end.
"""

from __future__ import annotations

import os
import struct
import zlib

HEADER_BYTES = 348
GZIP = 31  # zlib's word for a gzip header and the largest window


def refuse_cut_short(file: str) -> None:
    """ValueError for a .nii.gz without the end of its gzip stream or with too few voxels."""
    if not file.endswith(".nii.gz"):
        return
    with open(file, "rb") as raw:
        start = raw.read(4096)
        if not start.startswith(b"\x1f\x8b"):
            return  # not compressed, whatever its name says
        try:
            header = zlib.decompressobj(GZIP).decompress(start, HEADER_BYTES)
            expected = _content_bytes(header)
            raw.seek(-min(4, len(start)), os.SEEK_END)
            told = int.from_bytes(raw.read(), "little")
            if expected is not None and told == expected % 2**32:
                return
            raw.seek(0)
            n_bytes = 0
            member = zlib.decompressobj(GZIP)
            while chunk := raw.read(2**16):  # a thousand times as much unpacked
                while chunk and not (member.eof and chunk[0] != 0x1F):
                    if member.eof:
                        member = zlib.decompressobj(GZIP)
                    n_bytes += len(member.decompress(chunk))
                    chunk = member.unused_data
        except zlib.error as error:
            raise ValueError(
                f"{file} is damaged, its gzip stream does not decompress ({error})"
            ) from None
    if not member.eof:
        raise ValueError(f"{file} is cut short, its gzip stream has no end")
    if expected is not None and n_bytes < expected:
        raise ValueError(f"{file} is cut short, {expected - n_bytes} bytes are missing")


def _content_bytes(header: bytes) -> int | None:
    """Bytes of the whole NIfTI-1 file that begins so; None where this is no such header."""
    for order in "<>":
        if len(header) == HEADER_BYTES and struct.unpack_from(f"{order}i", header)[0] == 348:
            n_axes, *shape = struct.unpack_from(f"{order}8h", header, 40)
            (n_bits,) = struct.unpack_from(f"{order}h", header, 72)
            (offset,) = struct.unpack_from(f"{order}f", header, 108)
            n_voxels = 1
            for extent in shape[: max(n_axes, 0)]:
                n_voxels *= max(extent, 1)
            return int(offset) + n_voxels * n_bits // 8
    return None
