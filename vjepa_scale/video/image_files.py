"""Decodes image files with FFmpeg, and handles what FFmpeg does not.

These are TIFFs with tags unknown to FFmpeg, PNGs with EXIF that it cannot read, and HEIF files, for which it returns
the coded items only: tiles, thumbnails, and borders that are not displayed.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple
from zlib import crc32

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from vjepa_scale.video.container import DecodeError, Media, ffmpeg_errors, is_heif, is_image, open_container, open_media

# Tags that a TIFF's pixels depend on (TIFF 6.0, sections 3 to 22). Where FFmpeg does not know one of them (the coding
# of YCbCr, say), its pixels would be wrong.
_REDUCED, _JPEG_TABLES, _DNG_VERSION = 254, 347, 50706
_TIFF_STRUCTURE = frozenset([*range(254, 267), 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 339])
_TIFF_STRUCTURE |= {_JPEG_TABLES, *range(512, 522), *range(529, 533)}
_PNG_SIGNATURE, _EXIF_PREFIX = b"\x89PNG\r\n\x1a\n", b"Exif\0\0"
_TIFF_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


def tiff_of_pixels(data: bytes) -> bytes:
    """Returns a TIFF whose first directory keeps only the tags that its pixels depend on.

    FFmpeg's strict decoding refuses any tag that it does not know: an orientation, a copyright, alpha.
    """
    start, entries = _tiff_directory(data)
    kept = [entry for tag, entry in entries if tag in _TIFF_STRUCTURE]
    if not kept:
        return data
    directory = struct.pack(f"{_TIFF_BYTE_ORDERS[data[:4]]}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


def wrong_in_tiff(data: bytes) -> str:
    """Returns why FFmpeg would decode a TIFF wrongly without an error; empty where it would not."""
    order = _TIFF_BYTE_ORDERS.get(data[:4], "<")
    for tag, entry in _tiff_directory(data)[1]:
        if tag == _JPEG_TABLES:
            return "JPEG inside TIFF, whose tables FFmpeg does not read"
        if tag == _DNG_VERSION or (tag == _REDUCED and struct.unpack_from(f"{order}I", entry, 8)[0] & 1):
            return "a camera's raw data, of which the first picture is a thumbnail"
    return ""


def _tiff_directory(data: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """Returns offset and (tag, entry) list of a TIFF's first directory; no entries if it is truncated or BigTIFF."""
    order = _TIFF_BYTE_ORDERS.get(data[:4])
    if order is None or len(data) < 8:
        return 0, []
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return start, []
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[at : at + 12] for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12)]
    return start, [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries]


def pngs_of_other_exif(data: bytes) -> Iterator[bytes]:
    """Yields a PNG with EXIF that FFmpeg can read, without the prefix that some programs write; then without EXIF.

    FFmpeg refuses the whole picture where it cannot read its EXIF. Yields nothing for other files.
    """
    at = len(_PNG_SIGNATURE)
    while data.startswith(_PNG_SIGNATURE) and at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if kind == b"eXIf":
            exif = data[at + 8 : end - 4]
            if exif.startswith(_EXIF_PREFIX):
                chunk = b"eXIf" + exif.removeprefix(_EXIF_PREFIX)
                yield (
                    data[:at] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", crc32(chunk)) + data[end:]
                )
            yield data[:at] + data[end:]
            return
        at = end


# -- HEIF: HEIC, AVIF ------------------------------------------------------------------------------


class HeifPicture(NamedTuple):
    """Structure of the main picture of a HEIF file (ISO 23008-12).

    tiles:         numbers of the coded items, row by row
    columns:       tiles in a row; 1 where there is one tile
    width, height: of the assembled picture before the changes; tiles may cover more
    changes:       ("clap" | "irot" | "imir", content of its box), in order
    """

    tiles: list[int]
    columns: int
    width: int
    height: int
    changes: list[tuple[str, bytes]]

    def of(self, tiles: Mapping[int, npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        """Assembles the displayed picture, [H, W, 3], from its tiles. Raises ValueError."""
        rows = [self.tiles[at : at + self.columns] for at in range(0, len(self.tiles), self.columns)]
        whole = np.concatenate([np.concatenate([tiles[item] for item in row], axis=1) for row in rows])
        if len(self.tiles) > 1 and (whole.shape[0] < self.height or whole.shape[1] < self.width):
            raise ValueError(f"{whole.shape[1]} by {whole.shape[0]} pixels of {self.width} by {self.height}")
        shown = whole[: self.height, : self.width]
        for kind, box in self.changes:
            if kind == "clap":
                shown = _cleaned(shown, box)
            elif kind == "irot":
                shown = np.rot90(shown, box[0] & 3)
            else:
                shown = shown[:, ::-1] if box[0] & 1 else shown[::-1]
        return np.ascontiguousarray(shown)


def heif_picture(data: bytes) -> HeifPicture:
    """Reads the structure of the main item of a HEIF file. Raises ValueError where it is not supported."""
    try:
        return _heif_picture(data)
    except (struct.error, KeyError, IndexError) as error:
        raise ValueError(f"the description of its items is damaged ({type(error).__name__})") from None


def _heif_picture(data: bytes) -> HeifPicture:
    meta = dict(_boxes(dict(_boxes(data))["meta"][4:]))
    version, number = meta["pitm"][0], meta["pitm"][4:]
    (main,) = struct.unpack_from(">I" if version else ">H", number)
    kind = _item_kinds(meta["iinf"])[main]
    properties = _properties(meta["iprp"], main)
    changes = [(name, box) for name, box in properties if name in ("clap", "irot", "imir")]
    if kind != "grid":
        if kind not in ("hvc1", "av01", "avc1", "jpeg"):
            raise ValueError(f"an item of the kind {kind!r}")
        width, height = struct.unpack_from(">II", dict(properties)["ispe"], 4)
        return HeifPicture([main], 1, width, height, changes)
    grid = _content(data, meta, main)
    width, height = struct.unpack_from(">II" if grid[1] & 1 else ">HH", grid, 4)
    tiles = _references(meta["iref"], main)
    columns = grid[3] + 1
    if len(set(tiles)) != (grid[2] + 1) * columns:
        raise ValueError(f"{len(set(tiles))} tiles for {grid[2] + 1} rows of {columns}")
    return HeifPicture(tiles, columns, width, height, changes)


def _boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (kind, content) of each box (ISO 14496-12)."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", data, at + 8), 16
        if size == 0:
            size = len(data) - at
        if size < header:
            raise ValueError(f"a box of {size} bytes")
        yield kind.decode("latin-1"), data[at + header : at + size]
        at += size


def _item_kinds(iinf: bytes) -> dict[int, str]:
    kinds = {}
    for _, infe in _boxes(iinf[6:] if iinf[0] == 0 else iinf[8:]):
        number = ">I" if infe[0] == 3 else ">H"
        (item,) = struct.unpack_from(number, infe, 4)
        at = 4 + struct.calcsize(number) + 2  # after the protection index
        kinds[item] = infe[at : at + 4].decode("latin-1")
    return kinds


def _properties(iprp: bytes, item: int) -> list[tuple[str, bytes]]:
    """Returns (kind, box) of an item's properties, in the item's order."""
    every, found = list(_boxes(dict(_boxes(iprp))["ipco"])), []
    for kind, ipma in _boxes(iprp):
        if kind != "ipma":
            continue
        (count,), at = struct.unpack_from(">I", ipma, 4), 8
        for _ in range(count):
            number = ">I" if ipma[0] else ">H"
            (owner,) = struct.unpack_from(number, ipma, at)
            at += struct.calcsize(number)
            wide, associations = ipma[3] & 1, ipma[at]
            at += 1
            for _ in range(associations):
                index = struct.unpack_from(">H", ipma, at)[0] & 0x7FFF if wide else ipma[at] & 0x7F
                at += 2 if wide else 1
                if owner == item and index:
                    found.append(every[index - 1])
    return found


def _references(iref: bytes, item: int) -> list[int]:
    """Returns the items that an item is derived from, in order."""
    number = ">I" if iref[0] else ">H"
    size = struct.calcsize(number)
    for kind, box in _boxes(iref[4:]):
        if kind == "dimg" and struct.unpack_from(number, box)[0] == item:
            (count,) = struct.unpack_from(">H", box, size)
            return [struct.unpack_from(number, box, size + 2 + size * k)[0] for k in range(count)]
    return []


def _content(data: bytes, meta: Mapping[str, bytes], item: int) -> bytes:
    """Returns the bytes of an item (used for grids, which are short) at its location."""
    iloc, at = meta["iloc"], 6
    version, sizes = iloc[0], [iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, iloc[5] & 15]

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(iloc):
            raise IndexError
        return int.from_bytes(iloc[at - size : at], "big")

    offset_size, length_size, base_size, index_size = sizes if version else [*sizes[:3], 0]
    number = 4 if version == 2 else 2
    for _ in range(take(number)):
        owner, method = take(number), take(2) & 15 if version else 0
        file, base, extents = take(2), take(base_size), take(2)
        if owner != item:
            take(extents * (index_size + offset_size + length_size))
            continue
        if file or method > 1 or extents != 1:
            raise ValueError("a grid that is described elsewhere, or in pieces")
        take(index_size)
        start = base + take(offset_size)
        return (meta["idat"] if method == 1 else data)[start : start + take(length_size)]
    raise KeyError(item)


def _cleaned(picture: npt.NDArray[np.uint8], clap: bytes) -> npt.NDArray[np.uint8]:
    """Crops a picture to its clean aperture: a size, and the offset of its centre. Raises ValueError."""
    width_n, width_d, height_n, height_d = struct.unpack_from(">4I", clap)
    right_n, right_d, down_n, down_d = struct.unpack_from(">iIiI", clap, 16)
    if not (width_d and height_d and right_d and down_d):
        raise ValueError("a clean aperture without size")
    height, width = picture.shape[:2]
    new_width, new_height = round(width_n / width_d), round(height_n / height_d)
    left = math.floor((width - new_width) / 2 + right_n / right_d + 0.25)
    top = math.floor((height - new_height) / 2 + down_n / down_d + 0.25)
    if not (new_width and new_height and 0 <= left <= width - new_width and 0 <= top <= height - new_height):
        raise ValueError("a clean aperture outside the picture")
    return picture[top : top + new_height, left : left + new_width]


# -- the picture -----------------------------------------------------------------------------------


def still_picture(data: Media, *, strict: bool = False) -> av.VideoFrame | None:
    """Decodes the picture of an image file; None for other files. Raises DecodeError.

    strict: damage that the decoder could conceal (the missing half of a JPEG) is an error too
    """
    with open_container(data) as container:
        if not is_image(container) or not container.streams.video or container.format.name == "tty":
            return None
        if is_heif(container):
            return _picture_of_heif(container, _whole(data), strict=strict)
        if container.format.name == "tiff_pipe":
            return _tiff_picture(_whole(data), strict=strict)
        try:
            return _only_picture(container, strict=strict)
        except DecodeError:
            for other in pngs_of_other_exif(_whole(data)):
                with suppress(DecodeError), open_container(other) as reopened:
                    return _only_picture(reopened, strict=strict)
            raise


def _whole(data: Media) -> bytes:
    with open_media(data) as file:
        return file.read()


def _tiff_picture(data: bytes, *, strict: bool) -> av.VideoFrame:
    if wrong := wrong_in_tiff(data):
        raise DecodeError("unreadable", wrong)
    if strict:
        with open_container(tiff_of_pixels(data)) as container:
            _only_picture(container, strict=True)
    with open_container(data) as container:
        return _only_picture(container, strict=False)


def _picture_of_heif(container: InputContainer, data: bytes, *, strict: bool) -> av.VideoFrame:
    """Assembles the main picture of a HEIF file, upright, from the coded items that FFmpeg returns as streams."""
    reason = "does not decode to the end" if strict else "unreadable"
    try:
        layout = heif_picture(data)
        streams = [stream for stream in container.streams.video if stream.id in layout.tiles]
        for stream in streams:
            if stream.codec_context is None:
                raise DecodeError("unreadable", "no decoder for its codec")
            stream.codec_context.thread_count = 1
            if strict:
                stream.codec_context.options = {"err_detect": "explode"}
        reformatter, tiles = VideoReformatter(), {}
        with ffmpeg_errors(reason):
            for packet in container.demux(streams):
                for picture in packet.decode():
                    assert isinstance(picture, av.VideoFrame), "of video streams"
                    rgb = reformatter.reformat(picture, format="rgb24", threads=1).to_ndarray()
                    tiles[packet.stream.id] = np.asarray(rgb, np.uint8)
        if missing := [item for item in layout.tiles if item not in tiles]:
            raise DecodeError(reason, f"{len(missing)} of {len(layout.tiles)} tiles")
        return av.VideoFrame.from_ndarray(layout.of(tiles), format="rgb24")
    except ValueError as error:
        raise DecodeError("unreadable", f"HEIF: {error}") from None


def _only_picture(container: InputContainer, *, strict: bool) -> av.VideoFrame:
    context = container.streams.video[0].codec_context
    if context is None:
        raise DecodeError("unreadable", "no decoder for its codec")
    context.thread_count = 1
    if strict:
        context.options = {"err_detect": "explode"}
    with ffmpeg_errors("does not decode to the end" if strict else "unreadable"):
        picture = next(container.decode(video=0), None)
    if picture is None:
        raise DecodeError("zero length", "no frame decodes")
    return picture
