"""Interlaced H.264 with a packet for each field (PAFF), which no encoder here writes.

By ITU-T H.264, 7.3, the least that a decoder takes. Both fields of picture i show ``videos.picture(i)``.
"""

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from tests.videos import picture

HEIGHT, WIDTH = 64, 64


class _Bits:
    def __init__(self) -> None:
        self.text = ""

    def u(self, size: int, *values: int) -> "_Bits":
        self.text += "".join(f"{value:0{size}b}" for value in values)
        return self

    def ue(self, *values: int) -> "_Bits":
        for value in values:
            self.text += f"{value + 1:b}".zfill(2 * (value + 1).bit_length() - 1)
        return self

    def aligned(self, mark: str = "") -> bytes:
        self.text += mark
        self.text += "0" * (-len(self.text) % 8)
        return int(self.text, 2).to_bytes(len(self.text) // 8, "big")


def _unit(head: int, payload: bytes) -> bytes:
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + bytes([head]) + bytes(out)


def _parameters() -> bytes:
    # Main profile; 8 bits of picture order; one reference; fields allowed, not mixed inside a frame.
    sps = _Bits().ue(0, 0, 0, 4, 1).u(1, 0).ue(WIDTH // 16 - 1, HEIGHT // 32 - 1).u(1, 0, 0, 1, 0, 0)
    pps = _Bits().ue(0, 0).u(1, 0, 0).ue(0, 0, 0).u(1, 0).u(2, 0).ue(0, 0, 0).u(1, 1, 0, 0)
    return _unit(0x67, bytes([77, 0, 30]) + sps.aligned("1")) + _unit(0x68, pps.aligned("1"))


def _top(planes: list[np.ndarray], number: int) -> bytes:
    """An instantaneous refresh: an intra slice of plain pixels."""
    bits = _Bits().ue(0, 7, 0).u(4, 0).u(1, 1, 0).ue(number % 2).u(8, 0).u(1, 0, 0).ue(0, 1)
    out = b""
    for row in range(HEIGHT // 32):
        for column in range(WIDTH // 16):
            out += bits.ue(25).aligned()  # I_PCM
            for plane, size in zip(planes, (16, 8, 8), strict=True):
                out += plane[size * row : size * (row + 1), size * column : size * (column + 1)].tobytes()
            bits = _Bits()
    return _unit(0x65, out + bits.aligned("1"))


def _bottom() -> bytes:
    """A slice that skips all macroblocks: the field is as the top one."""
    bits = _Bits().ue(0, 5, 0).u(4, 0).u(1, 1, 1).u(8, 1).u(1, 0, 0, 0).ue(0, 1).ue(HEIGHT * WIDTH // 512)
    return _unit(0x21, bits.aligned("1"))


def _fields(frames: int) -> Iterator[bytes]:
    for i in range(frames):
        image = av.VideoFrame.from_ndarray(picture(i, HEIGHT, WIDTH), format="rgb24").reformat(format="yuv420p")
        planes = image.to_ndarray()
        chroma = planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        yield _parameters() + _top([plane[::2] for plane in (planes[:HEIGHT], *chroma)], i)
        yield _bottom()


def field_packets(frames: int, container: str) -> bytes:
    """A video of 25 frames a second."""
    packets, buffer = list(_fields(frames)), io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join(packets)), format="h264") as source,
        av.open(buffer, "w", format=container) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for i, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.duration = stream, i, i, 1
            packet.time_base, packet.is_keyframe = Fraction(1, 50), i % 2 == 0
            out.mux(packet)
    return buffer.getvalue()
