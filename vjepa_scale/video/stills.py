"""The picture of an image file."""

from contextlib import suppress

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from vjepa_scale.video.container import DecodeError, ffmpeg_errors, is_heif, is_image, open_container
from vjepa_scale.video.image_files import heif_picture, pngs_of_other_exif, tiff_of_pixels, wrong_in_tiff
from vjepa_scale.video.media import Media, open_media


def still_picture(data: Media, *, strict: bool = False) -> av.VideoFrame | None:
    """The picture of an image file; None where it is something else. Raises DecodeError.

    strict: damage that the decoder could paint over (the missing half of a JPEG) is an error too
    """
    with open_container(data) as container:
        if not is_image(container) or not container.streams.video or container.format.name == "tty":
            return None
        if is_heif(container):
            return _heif_picture(container, _whole(data), strict=strict)
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


def _heif_picture(container: InputContainer, data: bytes, *, strict: bool) -> av.VideoFrame:
    """The main picture of a HEIF file, upright, of the coded items that FFmpeg gives as streams."""
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
