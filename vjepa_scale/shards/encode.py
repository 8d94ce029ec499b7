"""Encodes the new video of a planned part, then decodes it and compares it with its source.

It must show the same source pictures as the plan (a seek can return others), have the planned facts, and decode to the
source's pictures. Any failure raises DecodeError, so that no record is written.
"""

import io
from fractions import Fraction
from functools import partial

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from vjepa_scale.core.worker_pool import heartbeat
from vjepa_scale.shards.transcode import Transcode, clock, digest_of, facts_of, middles
from vjepa_scale.video.container import DecodeError, Media, ffmpeg_errors, open_video
from vjepa_scale.video.decode import decoding_from, on_screen, pts_of, ticks_of, time_base, timed_frames
from vjepa_scale.video.display import UPRIGHT, Orientation, orientation_of
from vjepa_scale.video.inspect import decode_whole, frames_stamped_anew, picture_digest

REASON = "cannot be transcoded"
KEYFRAME_EVERY = 30
# Visually as good as the source; the same bytes on any processor and with any number of cores.
_X264 = {
    "preset": "veryfast",
    "crf": "20",
    "x264-params": f"keyint={KEYFRAME_EVERY}:min-keyint={KEYFRAME_EVERY}:scenecut=0:open-gop=0:bframes=0"
    ":threads=1:lookahead-threads=1:sliced-threads=0:cpu-independent=1",
}
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# Codecs whose 4:2:0 chroma FFmpeg places at the left of two pixels, as in the files written here.
_LEFT_SITED = ("h264", "hevc", "mpeg2video", "mpeg4")
_MATRIX_RGB, _MATRIX_601 = 0, 6  # AVCOL_SPC_RGB: the pictures have no matrix; AVCOL_SPC_SMPTE170M
# Pictures are compared as averages over 16 by 16 cells (fewer where those would be small), in which what an encoder
# changes (detail, noise, colour between two pixels) cancels out: at most 1.6 of 255 levels in the mean on real videos,
# 2 on noise, 3 on lines of one pixel in red and white, 4 on a patchwork of saturated colours. Garbage, a foreign
# picture, a swapped plane differ by far more, and so does full range taken for limited, unless there is nearly nothing
# to see.
_CELLS, _CELL = 16, 10  # at most so many in a row, of at least so many pixels
_TOLERANCE = 6.0


def transcode(source: Media, part: Transcode) -> bytes:
    """Returns the new video, an MP4, with deterministic bytes. source: the planned file. Raises DecodeError."""
    # Decodes from the beginning where seeking returns wrong pictures, or where frames are timed by counting them.
    for from_s in sorted({part.start_s, 0.0} if part.stamped is None else {0.0}, reverse=True):
        data, shown, thumbs = _encoded(source, part, from_s)
        if shown == part.shown:
            break
    else:
        raise DecodeError(REASON, f"{_name(part)}: the source's pictures are not those that were probed")
    data = _index_first(data)
    _check(data, part, thumbs)
    return data


def _name(part: Transcode) -> str:
    return f"from {part.start_s:.3f} to {part.end_s:.3f} s"


def _encoded(source: Media, part: Transcode, from_s: float) -> tuple[bytes, str, dict[int, npt.NDArray[np.uint8]]]:
    """Returns the new video, the digest of its source pictures, and thumbnails of some of them, by number."""
    rate, buffer = Fraction(part.rate), io.BytesIO()
    tick_s, gap = clock(rate)
    options = {"fflags": "+bitexact", "video_track_timescale": str(tick_s.denominator)}
    frames_of = timed_frames if part.stamped is None else partial(frames_stamped_anew, fps=Fraction(part.stamped))
    digester, thumbnailer = VideoReformatter(), _Thumbnailer(part)
    digests: list[bytes] = []
    thumbs: dict[int, npt.NDArray[np.uint8]] = {}
    with (
        decoding_from(source, from_s, frames_of) as (_, stream, frames),
        ffmpeg_errors(REASON),
        av.open(buffer, "w", format="mp4", options=options) as out,
    ):
        converter = _Converter(part, left_sited=stream.codec_context.codec.canonical_name in _LEFT_SITED)
        encoder, before, picture = None, None, None
        ticks = ticks_of(stream, middles(part.start_s, rate, part.frames).tolist())
        for k, shown in enumerate(on_screen(frames, ticks)):
            heartbeat()
            if picture is None or shown is not before:
                before, picture, digest = shown, converter(shown), picture_digest(digester, shown)
            digests.append(digest)
            if _compared(part, k):
                thumbs[k] = thumbnailer(shown)
            if encoder is None:
                encoder = _add_encoder(out, picture, rate)
            picture.pts, picture.time_base = k, 1 / rate
            _mux(out, encoder, picture, tick_s, gap)
        assert encoder is not None, "a part has at least one frame"
        _mux(out, encoder, None, tick_s, gap)
    return buffer.getvalue(), digest_of(digests), thumbs


def _add_encoder(out: OutputContainer, picture: av.VideoFrame, rate: Fraction) -> VideoStream:
    stream = out.add_stream("libx264", rate=rate, options=_X264)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    context = stream.codec_context
    context.time_base, context.thread_count = 1 / rate, 1
    context.color_range, context.colorspace = picture.color_range, picture.colorspace
    context.color_primaries, context.color_trc = picture.color_primaries, picture.color_trc
    return stream


def _mux(out: OutputContainer, encoder: VideoStream, picture: av.VideoFrame | None, tick_s: Fraction, gap: int) -> None:
    for packet in encoder.encode(picture):
        packet.pts, packet.dts = (
            None if t is None else round(t * packet.time_base / tick_s) for t in (packet.pts, packet.dts)
        )
        packet.time_base, packet.duration = tick_s, gap
        out.mux(packet)


class _Converter:
    """Converts pictures of any format to upright yuv420p of the new size, in limited range.

    Keeps the colour matrix and writes it into the file, so decoders treat the new video as the source. RGB pictures get
    BT.601, the default of decoders that ignore the tag. All pictures of a video get the colour tags of its first,
    because a file has only one.
    """

    def __init__(self, part: Transcode, *, left_sited: bool) -> None:
        self._part, self._left_sited = part, left_sited
        self._reformatter, self._weaver = VideoReformatter(), VideoReformatter()
        self._colours: tuple[int, int, int] | None = None

    def __call__(self, picture: av.VideoFrame) -> av.VideoFrame:
        orientation = orientation_of(picture)
        if self._colours is None:
            matrix = _MATRIX_601 if picture.colorspace == _MATRIX_RGB else picture.colorspace
            self._colours = (matrix, picture.color_primaries, picture.color_trc)
        matrix, primaries, transfer = self._colours
        with ffmpeg_errors("pixels that cannot be converted"):
            upright = orientation == UPRIGHT and not picture.interlaced_frame
            if self._left_sited and upright and "420" in picture.format.name:
                planes = self._scaled(picture, "yuv420p", matrix, orientation).to_ndarray()
            else:
                if picture.interlaced_frame:  # otherwise its fields would be scaled separately
                    picture = _whole_planes(self._weaver, picture)
                scaled = self._scaled(picture, "yuv444p", matrix, orientation).to_ndarray()
                planes = _subsampled(np.stack([orientation.of(plane) for plane in scaled]))
        # A new frame: the source's would pass its type (a forced keyframe) and captions to the encoder.
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.color_range, frame.colorspace = ColorRange.MPEG, matrix
        frame.color_primaries, frame.color_trc = primaries, transfer
        return frame

    def _scaled(self, picture: av.VideoFrame, pixels: str, matrix: int, orientation: Orientation) -> av.VideoFrame:
        width, height = orientation.size(self._part.width, self._part.height)
        return self._reformatter.reformat(
            picture,
            width=width,
            height=height,
            format=pixels,
            dst_colorspace=Colorspace.ITU601 if matrix == _MATRIX_601 else matrix,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING,
            threads=1,
        )


def _subsampled(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Subsamples yuv444p [3, H, W], both even, to yuv420p [H * 3/2, W], with H.264's chroma position: left."""
    width = planes.shape[2]
    padded = np.pad(planes[1:], ((0, 0), (0, 0), (1, 0)), mode="edge").astype(np.uint16)
    columns = padded[:, :, :width:2] + 2 * padded[:, :, 1::2] + padded[:, :, 2::2]
    chroma = ((columns[:, ::2] + columns[:, 1::2] + 4) // 8).astype(np.uint8)
    return np.concatenate([planes[0].ravel(), chroma.ravel()]).reshape(-1, width)


def _index_first(data: bytes) -> bytes:
    """Returns the same MP4 with the index before the pictures, so that readers need not seek to the end."""
    index = data[data.rindex(b"moov") - 4 :]
    buffer = io.BytesIO()
    with ffmpeg_errors(REASON), av.open(io.BytesIO(data)) as source:
        stream = source.streams.video[0]
        options = {
            "fflags": "+bitexact",
            "video_track_timescale": str(time_base(stream).denominator),
            "moov_size": str(len(index) + 8),  # 8 bytes for an empty box that the muxer writes after it
        }
        with av.open(buffer, "w", format="mp4", options=options) as out:
            copy = out.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = copy
                    out.mux(packet)
    return buffer.getvalue()


def _compared(part: Transcode, number: int) -> bool:
    """Returns whether to compare a picture: first and last of each group, since damage lasts until the group's end."""
    return number % KEYFRAME_EVERY in (0, KEYFRAME_EVERY - 1) or number == part.frames - 1


def _check(data: bytes, part: Transcode, thumbs: dict[int, npt.NDArray[np.uint8]]) -> None:
    """Decodes the new video and checks number, size, times, and thumbnails of its pictures. Raises DecodeError."""
    found = decode_whole(data)
    if found.facts != facts_of(part):
        raise DecodeError(REASON, f"{_name(part)}: it decodes to {found.facts} in place of {facts_of(part)}")
    thumbnailer, (tick_s, gap) = _Thumbnailer(part), clock(Fraction(part.rate))
    with open_video(data) as (container, stream):
        for k, picture in enumerate(timed_frames(container, stream)):
            if pts_of(picture) * time_base(stream) != k * gap * tick_s:
                raise DecodeError(REASON, f"{_name(part)}: picture {k} comes at another time")
            if k in thumbs and (apart := _apart(thumbnailer(picture), thumbs[k])) > _TOLERANCE:
                raise DecodeError(REASON, f"{_name(part)}: picture {k} differs by {apart:.1f} of 255 levels")


def _apart(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


class _Thumbnailer:
    """Averages over the cells of a picture, upright, as RGB. Averages before conversion, so clipping has no effect."""

    def __init__(self, part: Transcode) -> None:
        self._cells = max(2, min(_CELLS, min(part.width, part.height) // _CELL))
        self._reformatter = VideoReformatter()

    def __call__(self, picture: av.VideoFrame) -> npt.NDArray[np.uint8]:
        with ffmpeg_errors("pixels that cannot be converted"):
            planes = _whole_planes(self._reformatter, picture)
            averages = np.stack([_averages(plane, self._cells) for plane in planes.to_ndarray()])
            small = av.VideoFrame.from_ndarray(averages, format="yuv444p")
            small.color_range, small.colorspace = planes.color_range, planes.colorspace
            rgb = self._reformatter.reformat(small, format="rgb24", threads=1)
        return orientation_of(picture).of(np.asarray(rgb.to_ndarray(), np.uint8))


def _whole_planes(reformatter: VideoReformatter, picture: av.VideoFrame) -> av.VideoFrame:
    """Converts a picture to yuv444p (chroma for every pixel) in limited range, with the same colour matrix."""
    matrix = _MATRIX_601 if picture.colorspace == _MATRIX_RGB else picture.colorspace
    planes = reformatter.reformat(
        picture,
        format="yuv444p",
        dst_colorspace=Colorspace.ITU601 if matrix == _MATRIX_601 else matrix,
        dst_color_range=ColorRange.MPEG,
        interpolation=_SCALING,
        threads=1,
    )
    whole = av.VideoFrame.from_ndarray(planes.to_ndarray(), format="yuv444p")
    whole.color_range, whole.colorspace = ColorRange.MPEG, matrix
    return whole


def _averages(plane: npt.NDArray[np.uint8], cells: int) -> npt.NDArray[np.uint8]:
    """Returns the means of cells, [H, W] -> [cells, cells]; a pixel on an edge counts in part."""
    total = plane.astype(np.float64)
    for axis in (0, 1):
        length = total.shape[axis]
        edges = np.linspace(0, length, cells + 1)
        whole = np.minimum(edges.astype(int), length - 1)
        before = np.insert(total.cumsum(axis), 0, 0.0, axis)
        part = np.expand_dims(edges - whole, 1 - axis)
        summed = before.take(whole, axis) + part * total.take(whole, axis)
        total = np.diff(summed, axis=axis) * (cells / length)
    return total.round().astype(np.uint8)
