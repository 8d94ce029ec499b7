"""What FFmpeg does not make of image files: TIFFs with tags that it does not know."""

import struct

# A TIFF's pixels depend on these (TIFF 6.0, sections 3 to 22): of those among them that FFmpeg does not know (how YCbCr
# is coded, say) pixels would be wrong.
_REDUCED, _JPEG_TABLES, _DNG_VERSION = 254, 347, 50706
_TIFF_STRUCTURE = frozenset([*range(254, 267), 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 339])
_TIFF_STRUCTURE |= {_JPEG_TABLES, *range(512, 522), *range(529, 533)}
_TIFF_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


def tiff_of_pixels(data: bytes) -> bytes:
    """A TIFF whose first directory has no tags but those that its pixels depend on.

    FFmpeg's strict decoding refuses any other tag that it does not know: an orientation, a copyright, alpha.
    """
    start, entries = _tiff_directory(data)
    kept = [entry for tag, entry in entries if tag in _TIFF_STRUCTURE]
    if not kept:
        return data
    directory = struct.pack(f"{_TIFF_BYTE_ORDERS[data[:4]]}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


def wrong_in_tiff(data: bytes) -> str:
    """Why FFmpeg would make another picture of a TIFF than is meant, with no error; or nothing."""
    order = _TIFF_BYTE_ORDERS.get(data[:4], "<")
    for tag, entry in _tiff_directory(data)[1]:
        if tag == _JPEG_TABLES:
            return "JPEG inside TIFF, whose tables FFmpeg does not read"
        if tag == _DNG_VERSION or (tag == _REDUCED and struct.unpack_from(f"{order}I", entry, 8)[0] & 1):
            return "a camera's raw data, of which the first picture is a thumbnail"
    return ""


def _tiff_directory(data: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """Where the first directory of a TIFF begins, and its (tag, entry); none where it is cut short, or BigTIFF."""
    order = _TIFF_BYTE_ORDERS.get(data[:4])
    if order is None or len(data) < 8:
        return 0, []
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return start, []
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[at : at + 12] for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12)]
    return start, [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries]
