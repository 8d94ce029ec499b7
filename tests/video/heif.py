"""HEIC files as phones write them: one coded picture or a grid of them, cut, turned and mirrored (ISO 23008-12)."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]


def heic(
    tiles: list[Picture],
    *,
    columns: int = 1,
    size: tuple[int, int] | None = None,
    clean: tuple[int, int] | None = None,
    quarters: int = 0,
    mirror: int | None = None,
) -> tuple[bytes, list[Picture]]:
    """A HEIC file, and its tiles as PyAV decodes each.

    size:     (width, height) of what the tiles give together, of a grid
    clean:    (width, height) of the part of it that is shown, of its top left corner
    quarters: turns counter-clockwise; mirror: after that, 0 top to bottom, 1 left to right
    """
    coded = [_coded(tile) for tile in tiles]
    height, width = tiles[0].shape[:2]
    whole = size or (width, height)
    properties = [_full("ispe", struct.pack(">II", *whole))]
    for name, given, value in (
        ("clap", clean, clean and _clean(whole, clean)),
        ("irot", quarters, bytes([quarters])),
        ("imir", mirror is not None, bytes([mirror or 0])),
    ):
        if given:
            properties.append(_box(name, value))
    own = list(range(1, len(properties) + 1))
    properties += [_box("hvcC", coded[0][1]), _full("ispe", struct.pack(">II", width, height))]
    last = len(properties)
    items = [(2 + k, "hvc1", data, [last - 1, last]) for k, (data, _, _) in enumerate(coded)]
    if size is None:
        items = [(1, "hvc1", coded[0][0], [last - 1, *own])]
    else:
        rows = len(tiles) // columns
        items.insert(0, (1, "grid", struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size), own))
    return _file(items, properties), [decoded for _, _, decoded in coded]


def _file(items: list[tuple[int, str, bytes, list[int]]], properties: list[bytes]) -> bytes:
    """items: number, kind, bytes and properties of each; the first is the main one, of which the others are tiles."""

    def written(start: int) -> bytes:
        places = b""
        for number, _, data, _ in items:
            places += struct.pack(">HHHII", number, 0, 1, start, len(data))
            start += len(data)
        kinds = [_full("infe", struct.pack(">HH4sx", number, 0, kind.encode()), 2) for number, kind, _, _ in items]
        owned = [struct.pack(">HB", number, len(own)) + bytes(own) for number, _, _, own in items]
        tiles = struct.pack(f">HH{len(items) - 1}H", 1, len(items) - 1, *(number for number, *_ in items[1:]))
        meta = [
            _full("hdlr", bytes(4) + b"pict" + bytes(13)),
            _full("pitm", struct.pack(">H", 1)),
            _full("iloc", b"\x44\x00" + struct.pack(">H", len(items)) + places),
            _full("iinf", struct.pack(">H", len(items)) + b"".join(kinds)),
            _full("iref", _box("dimg", tiles)) if len(items) > 1 else b"",
            _box(
                "iprp",
                _box("ipco", b"".join(properties)) + _full("ipma", struct.pack(">I", len(items)) + b"".join(owned)),
            ),
        ]
        return _box("ftyp", b"heic\0\0\0\0mif1heic") + _full("meta", b"".join(meta))

    head = written(0)
    return written(len(head) + 8) + _box("mdat", b"".join(data for _, _, data, _ in items))


def _box(kind: str, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind.encode() + data


def _full(kind: str, data: bytes, version: int = 0) -> bytes:
    return _box(kind, bytes([version, 0, 0, 0]) + data)


def _clean(whole: tuple[int, int], clean: tuple[int, int]) -> bytes:
    """Where the middle of the top left corner lies from the middle of the whole, in halves of a pixel."""
    (width, height), (w, h) = whole, clean
    return struct.pack(">IIIIiIiI", w, 1, h, 1, w - width, 2, h - height, 2)


def _coded(picture: Picture) -> tuple[bytes, bytes, Picture]:
    """HEVC of one picture, its configuration, and the picture that PyAV decodes of it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        options = {"x265-params": "log-level=error:pools=1:bframes=0", "crf": "10"}
        stream = out.add_stream("libx265", rate=1, options=options)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt, stream.codec_context.codec_tag = "yuv420p", "hvc1"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1)
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        stream = container.streams.video[0]
        (packet,) = [bytes(packet) for packet in container.demux(stream) if packet.size]
        configuration = stream.codec_context.extradata
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        return packet, configuration, next(container.decode(video=0)).to_ndarray(format="rgb24")
