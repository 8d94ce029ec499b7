"""data.sampling: stride takes the frames that the published code takes."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.test_loader import recipe_for
from tests.video.fields import field_packets
from tests.video.test_decode import sequential
from tests.videos import (  # 14 frames, 4.52 a second, at times that no constant rate has
    VARIABLE_MS,
    encoded,
    number_of,
    quiet,
    still_image,
)
from vjepa_scale.data.clips import ClipRef, clip_refs, pictures_of, strided_frames
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder
from vjepa_scale.data.substitution import substitute
from vjepa_scale.recipe import stages_of
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.video.container import DecodeError
from vjepa_scale.video.decode import decode_clip, times_of_frames
from vjepa_scale.video.inspect import probe_video
from vjepa_scale.video.stream import stream_pictures

ROWS = json.loads((Path(__file__).parents[1] / "published" / "strides.json").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "{source_frames} at {source_fps}, {frames}".format(**row))
def test_numbers_are_those_of_the_published_code(row: dict) -> None:
    draw = 0.5 if row["places"] is None else (row["offset"] + 0.5) / row["places"]
    asked = {name: row[name] for name in ("source_frames", "source_fps", "fps", "frames")}
    assert list(strided_frames(draw, **asked)) == row["numbers"]


def test_every_place_of_a_window_is_drawn_alike() -> None:
    draws = (np.arange(1000) + 0.5) / 1000
    asked = {"source_frames": 122, "source_fps": 30.0, "fps": 4.0, "frames": 16}
    first = [strided_frames(draw, **asked)[0] for draw in draws.tolist()]
    assert np.bincount(first).tolist() == [100] * 10


def test_rates_that_the_published_code_refuses_or_misreads() -> None:
    asked = {"source_frames": 12, "fps": 4.0, "frames": 4}
    assert strided_frames(0.0, source_fps=2.0, **asked) == (0, 1, 2, 3)  # stride 0 there
    rounded = 59 / 1.966  # 60 frames of a Matroska file, whose times are whole milliseconds
    assert strided_frames(0.0, source_fps=rounded, source_frames=60, fps=10.0, frames=4) == (0, 4, 8, 11)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_times_of_frames_are_those_of_decoding_in_order(container: str) -> None:
    for data in (encoded(40, rate=25, container=container), encoded(14, pts_ms=VARIABLE_MS, container=container)):
        times, _ = sequential(data)
        assert times_of_frames(data, range(len(times))) == pytest.approx(times, abs=1e-6)
        assert times_of_frames(data, [len(times) + 5]) == pytest.approx(times[-1:], abs=1e-6)
    with pytest.raises(DecodeError):
        times_of_frames(still_image(), [0])


def remuxed(source: bytes, container: str, change: Callable[[list[av.Packet]], list[av.Packet]]) -> bytes:
    """The packets of a video, changed."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(source)) as opened, av.open(buffer, "w", format=container) as out:
        stream = out.add_stream_from_template(opened.streams.video[0])
        for packet in change([packet for packet in opened.demux(video=0) if packet.size]):
            packet.stream = stream
            out.mux(packet)
    return buffer.getvalue()


def with_references(packets: list[av.Packet]) -> list[av.Packet]:
    """Before every fifth picture of a VP8 another one that is not shown (show_frame is bit 4: RFC 6386, 9.1)."""
    out = []
    for i, packet in enumerate(packets):
        if i % 5 == 2:
            other = bytearray(bytes(packets[-1 - i]))
            other[0] &= ~0x10
            hidden = av.Packet(bytes(other))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe = True
            out.append(hidden)
        out.append(packet)
    return out


def vp8_with_references() -> bytes:
    vp8 = encoded(30, rate=25, gop=1, container="webm", codec="libvpx", options={"auto-alt-ref": "0", "cpu-used": "8"})
    return remuxed(vp8, "webm", with_references)


def h264_from_between_keyframes() -> bytes:
    h264 = encoded(40, rate=25, gop=12, container="matroska", options={"bf": "0", "x264-params": "scenecut=0"})
    return remuxed(h264, "matroska", lambda packets: packets[5:])


def mp4_of_fields() -> bytes:
    return field_packets(20, "mp4")


def transport_stream_of_fields() -> bytes:
    return field_packets(20, "mpegts")


def matroska_of_fields() -> bytes:
    return field_packets(20, "matroska")


# Files with more packets than frames, and the pictures that decoding gives.
MORE_PACKETS = {
    vp8_with_references: [*range(30)],
    h264_from_between_keyframes: [*range(12, 40)],
    mp4_of_fields: [*range(20)],
    matroska_of_fields: [*range(20)],
    transport_stream_of_fields: [*range(20)],
}


@pytest.mark.parametrize("decoder", ["pyav", pytest.param("torchcodec", marks=pytest.mark.system("torchcodec"))])
@pytest.mark.parametrize("make", MORE_PACKETS)
def test_packets_are_not_frames(make: Callable[[], bytes], decoder: str) -> None:
    """Numbers are of decoded frames, as the manifest counts them."""
    data, shown = make(), MORE_PACKETS[make]
    times, pictures = sequential(data)
    assert [number_of(picture) for picture in pictures] == shown
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > len(shown)
    facts = probe_video(data)
    assert facts.frames == len(shown)
    numbers = tuple(range(0, len(shown), 3))
    assert times_of_frames(data, numbers, frames=facts.frames) == pytest.approx([times[i] for i in numbers])
    if make is vp8_with_references:  # its packets say so
        assert times_of_frames(data, numbers) == pytest.approx([times[i] for i in numbers])
    ref = ClipRef(0, 0, "a", 0, (0.0,) * len(numbers), 4.0, numbers, facts.frames)
    clip = pictures_of(ref, data, decoder=decoder)
    assert [number_of(picture) for picture in clip] == [shown[i] for i in numbers]
    for i, time_s in enumerate(times):  # between fields, too; each alone, so that it is sought
        clip = decode_clip(data, times_s=[time_s + 0.01, time_s + 0.03], decoder=decoder)
        assert [number_of(picture) for picture in clip] == [shown[i]] * 2
        assert number_of(decode_clip(data, times_s=[time_s + 0.03], decoder=decoder)[0]) == shown[i]


def test_a_file_of_fields_that_breaks_off_is_refused() -> None:
    """Its header counts fields; half of them gone is not a frame for each."""
    data = field_packets(60, "mp4")
    assert [*stream_pictures(data, fps=25.0)][-1].shape == (64, 64, 3)
    index = data.index(b"moov") - 4
    with pytest.raises(DecodeError, match="does not decode to the end"):
        probe_video(data[: index // 2] + bytes(index - index // 2) + data[index:])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Constant and variable rates, and a picture."""
    folder, out = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("made") / "shards"
    (folder / "constant.mp4").write_bytes(encoded(60, rate=20, gop=8))
    (folder / "short.mp4").write_bytes(encoded(9, rate=20, gop=8))
    (folder / "variable.mkv").write_bytes(encoded(14, pts_ms=VARIABLE_MS, gop=5, container="matroska"))
    (folder / "picture.jpg").write_bytes(still_image(33))
    make_shards(folder, out, Settings(images=True), workers=1, progress=quiet)
    return Manifest.open(out)


@pytest.mark.parametrize("decoder", ["pyav", pytest.param("torchcodec", marks=pytest.mark.system("torchcodec"))])
def test_clips_show_these_frames(mixed: Manifest, decoder: str) -> None:
    """Numbers are read off the pictures: at a variable rate, too, they count frames and not time."""
    recipe = recipe_for(mixed, sampling="stride", decoder=decoder)
    phases = stages_of(recipe)["pretrain"].phases
    order = DataOrder(seed=7, sets=[(n, mixed.records_per_shard) for n in "ab"], phases=phases, lanes=2)
    shown = dict[str, set[tuple[int, ...]]]()
    for step in range(2, 6):
        for ref in clip_refs(recipe.data, phases[1], order, {"a": mixed, "b": mixed}, step=step, slots=range(8)):
            for clip in (ref, substitute(mixed, ref, attempt=1, data=recipe.data)):
                pictures = pictures_of(clip, mixed.read(clip.record), decoder=decoder)
                name = Path(json.loads(mixed.read(clip.record, "json"))["path"]).stem
                shown.setdefault(name, set()).add(tuple(number_of(picture) for picture in pictures))
    assert {tuple(np.diff(numbers).tolist()) for numbers in shown["constant"]} == {(6, 7, 6)}
    assert len(shown["constant"]) > 3
    assert shown["short"] == {(0, 8, 8, 8)}
    assert {tuple(np.diff(numbers).tolist()) for numbers in shown["variable"]} == {(1, 1, 1)}
    assert len(shown["variable"]) > 3
    assert shown["picture"] == {(33,) * 4}


def test_the_loader_samples_as_its_recipe_says(mixed: Manifest) -> None:
    def clips(**data: object) -> list[list[int]]:
        recipe = recipe_for(mixed, size=(48, 64), augment={"area": 1.0, "aspect": 4 / 3, "flip": 0.0}, **data)
        phases = stages_of(recipe)["pretrain"].phases
        order = DataOrder(seed=7, sets=[(n, mixed.records_per_shard) for n in "ab"], phases=phases, lanes=2)
        manifests = {"a": mixed, "b": mixed}
        refs = clip_refs(recipe.data, phases[1], order, manifests, step=2, slots=range(8))
        with PhaseLoader(
            stage=stages_of(recipe)["pretrain"],
            phase=phases[1],
            order=order,
            manifests=manifests,
            dp_rank=0,
            dp_world_size=1,
            first_step=2,
        ) as loader:
            rows = [clip for part in next(iter(loader)) for clip in part.clips]
        out = [[number_of(picture.permute(1, 2, 0).numpy()) for picture in row.unbind(1)] for row in rows]
        for ref, numbers in zip(refs, out, strict=True):
            assert ref.numbers is None or list(ref.numbers) == numbers
        return out

    assert clips(sampling="stride") != clips()


def test_a_clip_by_time_has_no_numbers() -> None:
    assert ClipRef(0, 0, "a", 0, (0.0,), 4.0).numbers is None
