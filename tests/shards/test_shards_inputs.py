"""Lists, images, parts and segments: what they become, judged by PyAV, plain webdataset and arithmetic."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from tests.chain import tool
from tests.video.test_decode import FILES, rotated, sequential
from tests.videos import audio_only, encoded, number_of, quiet, still_image
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.shards.sources import Source, read_list
from vjepa_scale.video.decode import decode_clip


def samples(folder: Path) -> list[tuple[dict, bytes]]:
    """(what is known, the clip's bytes) of every sample, as plain webdataset reads them, by path and start."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (clip,) = (value for name, value in sample.items() if name != "json" and not name.startswith("__"))
        found.append((json.loads(sample["json"]), clip))
    return sorted(found, key=lambda pair: (pair[0]["path"], pair[0].get("start", 0)))


def rejected(folder: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in read_jsonl(folder / "rejected.jsonl")}


# -- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.mp4 3\n\nwith space.mp4 0\n", [Source("a.mp4", "3"), Source("with space.mp4", "0")]),
        ("/x/a.jpg::a caption\n", [Source("/x/a.jpg", "a caption")]),
        ('"a b.mp4"\n"c d.mp4" 1\ne.mp4\n', [Source("a b.mp4"), Source("c d.mp4", "1"), Source("e.mp4")]),
        ("path,label\na.mp4,up\n", [Source("a.mp4", "up")]),
        (
            'label,path,start,end,note\r\nup,"a, b.mp4",1.5,3,x\r\n,c.mp4,,,\r\n',
            [
                Source("a, b.mp4", "up", 1.5, 3.0, {"start": "1.5", "end": "3", "note": "x"}),
                Source("c.mp4"),
            ],
        ),
        (
            '{"path": "a.mp4", "label": 4, "caption": "ö", "start": 2}\n{"path": "b.mp4"}\n',
            [Source("a.mp4", "4", 2.0, None, {"caption": "ö", "start": 2}), Source("b.mp4")],
        ),
        ("path;label\na, b.mp4;playing guitar\n", [Source("a, b.mp4", "playing guitar")]),
        (
            "Video_Path\tClass\tfold\na.mp4\tplaying guitar\t3\n",
            [Source("a.mp4", "playing guitar", None, None, {"fold": "3"})],
        ),
        ("filename,label\na.mp4,up\n", [Source("a.mp4", "up")]),
        ("path,class\na.mp4,up\n", [Source("a.mp4", None, None, None, {"class": "up"})]),
        ("a.mp4,up\nb c.mp4, 3\nd.mp4\n", [Source("a.mp4", "up"), Source("b c.mp4", "3"), Source("d.mp4")]),
        ('"a; b.mp4";up and down\n', [Source("a; b.mp4", "up and down")]),
        ("a.mp4,take 2.mp4 3\n", [Source("a.mp4,take 2.mp4", "3")]),
        (
            "b c.mp4\tplaying guitar\na.mp4\t\t3\nd.mp4 4\n",
            [Source("b c.mp4", "playing guitar"), Source("a.mp4", "3"), Source("d.mp4", "4")],
        ),
        ('"b c.mp4"\tup\n', [Source("b c.mp4", "up")]),
        (
            '[\n {"path": "a.mp4", "label": 4},\n "b.mp4",\n {"video": "c.mp4"}\n]\n',
            [Source("a.mp4", "4"), Source("b.mp4"), Source("c.mp4")],
        ),
        ("[group] a.mp4 3\n", [Source("[group] a.mp4", "3")]),
    ],
    ids=[
        *("lines", "colons", "quotes", "csv", "csv with times", "json lines", "semicolons", "tabs", "another name"),
        *("a class beside a path", "no header", "no header, quoted", "a comma in a name", "lines with tabs"),
        *("tabs and quotes", "json array", "a bracket in a name"),
    ],
)
def test_a_list_says_what_is_wanted(text: str, expected: list[Source], tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert list(read_list(tmp_path / "list")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "is empty"),
        ("path,label\na.mp4\n", r"list:2: 1 cells under 2"),
        ('{"path": "a"}\n{"label": 1}\n', r"list:2: no path"),
        ('{"path": "a"}\n{"path"\n', r"list:2: not JSON"),
        ('{"path": "a", "label": [1]}\n', r"list:1: label \[1\]"),
        ("path,start\na.mp4,soon\n", r"list:2: start 'soon'"),
        ("path,start,end\na.mp4,3,2\n", r"list:2: end 2.0 is not after"),
        ('"a b.mp4\n', r"list:1: No closing quotation"),
        ("video;file;label\na;b;c\n", r"list:1: which is the path: video or file\?"),
        ("file,class,action\na,b,c\n", r"list:1: which is the label: class or action\?"),
        ("a.mp4,up,1.5\n", r"list:1: 3 cells, and no header.*path,label,"),
        ("a.mp4\tup\tdown\n", r"list:1: 3 cells between tabs"),
        ("path;label\na.mp4\n", r"list:2: 1 cells under 2 columns \(quote cells that have a ';'"),
        ('[{"path": "a"}, {"id": 1}]', r"list:item 2: no path among id"),
        ('["a.mp4",', "list: not JSON"),
        ('{\n"path": "a"}\n', "list:1: not JSON.*one object a line, or one array"),
        ("label,youtube_id,time_start,time_end,split\nx,abc,soon,10,train\n", "list:2: no row of Kinetics"),
    ],
)
def test_a_list_that_is_wrong_is_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_list(tmp_path / "list"))


def test_kinetics_own_list_finds_the_videos_that_its_downloaders_wrote(tmp_path: Path) -> None:
    """In one folder, in one for each split, in one for each class, or both."""
    rows = [("-3B32lodo2M", 59, 69), ("abc", 0, 10), ("d_e", 120, 130), ("gone", 1, 11), ("f", 7, 17)]
    places = ["", "train", "playing guitar", None, "train/playing guitar"]
    names = [f"{name}_{start:06d}_{end:06d}.mp4" for name, start, end in rows]
    for place, name in zip(places, names, strict=True):
        if place is not None:
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).write_bytes(b"")
    text = "label,youtube_id,time_start,time_end,split\n"
    text += "".join(f"playing guitar,{name},{start},{end},train\n" for name, start, end in rows)
    (tmp_path / "train.csv").write_text(text)
    found = list(read_list(tmp_path / "train.csv"))
    assert [source.path for source in found] == [
        "-3B32lodo2M_000059_000069.mp4",
        "train/abc_000000_000010.mp4",
        "playing guitar/d_e_000120_000130.mp4",
        "gone_000001_000011.mp4",
        "train/playing guitar/f_000007_000017.mp4",
    ]
    assert {(source.label, source.start_s, source.end_s) for source in found} == {("playing guitar", None, None)}
    assert found[0].metadata is not None
    assert found[0].metadata["youtube_id"] == "-3B32lodo2M"


def test_a_list_of_which_nothing_can_be_used_shows_how_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\nwhat;which\na;b\n")
    with pytest.raises(UserError) as raised:
        make_shards(tmp_path / "list", tmp_path / "out", Settings(), workers=1, progress=quiet)
    assert str(raised.value) == (
        f"{tmp_path / 'list'}: none of 2 files can be used: 2 unreadable; the first is {tmp_path / 'what;which'}: "
        "no such file; the list's first line is 'what;which' (a list has `path label` lines, or CSV or JSON with a "
        "`path`; paths are relative to the list's folder)"
    )
    assert not (tmp_path / "out").exists()


def test_a_video_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(4))
    with pytest.raises(UserError, match="neither a folder nor a list"):
        make_shards(tmp_path / "a.mp4", tmp_path / "out", Settings(), workers=1, progress=quiet)


def test_shards_of_a_list(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"clip {i}.mp4").write_bytes(encoded(20 + i))
    rows = [{"path": f"clip {i}.mp4", "label": i % 2, "robot": {"arm": i}} for i in range(3)]
    rows += [{"path": str(tmp_path / "clip 0.mp4"), "label": "again"}, {"path": "nowhere.mp4"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shards(tmp_path / "list.jsonl", tmp_path / "out", Settings(shard_records=2), workers=2, progress=quiet)
    made = samples(tmp_path / "out")
    assert [clip for _, clip in made] == [(tmp_path / f"clip {i}.mp4").read_bytes() for i in range(3)]
    assert [known["label"] for known, _ in made] == ["0", "1", "0"]
    assert [known["metadata"] for known, _ in made] == [{"robot": {"arm": i}} for i in range(3)]
    assert Manifest.open(tmp_path / "out").classes == ["0", "1"]
    again = "duplicate with another label"
    assert rejected(tmp_path / "out") == {str(tmp_path / "clip 0.mp4"): again, "nowhere.mp4": "unreadable"}


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["mjpeg", "png"])
def test_an_image_is_a_clip_that_stands_still(codec: str) -> None:
    data = still_image(37, codec=codec)
    with av.open(io.BytesIO(data)) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for start_s in (0.0, 0.4, 100.0):
        clip = decode_clip(data, times_s=[start_s + k / 4 for k in range(5)])
        assert np.stack(clip).shape == (5, 48, 64, 3)
        assert all(np.array_equal(image, expected) for image in clip)
        assert number_of(clip[0]) == 37


def test_a_folder_of_images(tmp_path: Path) -> None:
    for i in range(4):
        path = tmp_path / "pictures" / f"n{i % 2}" / f"{i}.{'JPEG' if i else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(still_image(i, codec="mjpeg" if i else "png"))
    (tmp_path / "pictures" / "n0" / "half.jpeg").write_bytes(still_image(9, size=(480, 640))[:4000])
    (tmp_path / "pictures" / "n0" / "drawn.txt").write_text("text that FFmpeg could draw")
    with pytest.raises(UserError, match=r"not a video.*--images"):
        make_shards(tmp_path / "pictures", tmp_path / "out", Settings(), workers=1, progress=quiet)
    settings = Settings(images=True, min_s=1.0, segment_s=10)  # of videos only
    make_shards(tmp_path / "pictures", tmp_path / "out", settings, workers=2, progress=quiet)
    shards = Manifest.open(tmp_path / "out")
    assert shards.classes == ["n0", "n1"]
    assert shards.column("duration").tolist() == [0.0] * 4
    assert shards.column("frames").tolist() == [1] * 4
    assert (shards.column("width")[0], shards.column("height")[0]) == (64, 48)
    for record in range(4):
        number = int(Path(json.loads(shards.read(record, "json"))["path"]).stem)
        assert shards.column("label")[record] == number % 2
        clip = decode_clip(shards.read(record), times_s=[0.0, 0.25, 0.5])
        assert [number_of(image) for image in clip] == [number] * 3
    assert set(rejected(tmp_path / "out")) == {"n0/half.jpeg", "n0/drawn.txt"}
    assert rejected(tmp_path / "out")["n0/half.jpeg"] == "does not decode to the end"


# -- parts ----------------------------------------------------------------------------------------

CUT = {kind: FILES[kind] for kind in FILES if "one keyframe" not in kind} | {
    "turned": lambda: rotated(encoded(60, rate=30, gop=10)),
    "vp8": lambda: encoded(60, rate=30, gop=10, container="webm", codec="libvpx"),
    "hevc, open groups": lambda: encoded(
        60, rate=30, gop=10, codec="libx265", options={"x265-params": "log-level=error"}
    ),
    "open groups": lambda: encoded(90, rate=30, gop=10, options={"x264-params": "open-gop=1:scenecut=0"}),
}


@pytest.mark.parametrize("kind", CUT)
def test_segments_are_the_video_picture_by_picture(kind: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    data = CUT[kind]()  # once: threads make x264 write other bytes, now and then
    (tmp_path / "videos" / "long").write_bytes(data)
    summary = make_shards(tmp_path / "videos", tmp_path / "out", Settings(segment_s=0.7), workers=1, progress=quiet)
    times, pictures = sequential(data)
    made = samples(tmp_path / "out")
    assert len(made) == summary.clips > 1
    assert not summary.rejected
    frame, end = 0, 0.0
    for known, clip in made:
        assert known["start"] == pytest.approx(end, abs=1e-6)
        end = known["end"]
        own_times, own_pictures = sequential(clip)
        assert len(own_pictures) == known["frames"]
        for at, image in zip(own_times, own_pictures, strict=True):
            assert np.array_equal(image, pictures[frame])
            assert at - own_times[0] == pytest.approx(times[frame] - times[frame - own_times.index(at)], abs=2e-3)
            frame += 1
        with av.open(io.BytesIO(clip)) as container:
            keys = [packet for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
            assert known["end"] - known["start"] <= 0.7 + 1e-6 or len(keys) == 1 or "open" in kind
    assert frame == len(pictures)
    assert end == pytest.approx(times[-1], abs=0.25)


def test_groups_of_known_length_are_gathered_up_to_the_limit(tmp_path: Path) -> None:
    options = {"x264-params": "scenecut=0:keyint=10:min-keyint=10:bframes=2"}  # a keyframe every third of a second
    (tmp_path / "long.mp4").write_bytes(encoded(100, rate=30, gop=10, options=options))
    (tmp_path / "short.mp4").write_bytes(encoded(29, rate=30, gop=10))
    (tmp_path / "uncuttable.mp4").write_bytes(encoded(40, rate=30, gop=250, options={"x264-params": "scenecut=0"}))
    settings = Settings(segment_s=1.0, min_s=0.5)
    make_shards(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", settings, workers=1, progress=quiet)
    out = tmp_path.parent / f"{tmp_path.name}-out"
    made = samples(out)
    assert [(known.get("start"), known.get("end")) for known, _ in made] == [
        pytest.approx((0, 1)),
        pytest.approx((1, 2)),
        pytest.approx((2, 3)),
        (None, None),
        (None, None),
    ]
    assert made[3][1] == (tmp_path / "short.mp4").read_bytes()  # no longer than a segment: not touched
    assert made[4][1] == (tmp_path / "uncuttable.mp4").read_bytes()  # one keyframe, at its beginning
    for second, (_, clip) in enumerate(made[:3]):
        wanted = [(30 * second + n) % 64 for n in range(30)]
        assert [number_of(image) for image in sequential(clip)[1]] == wanted
    (row,) = read_jsonl(out / "rejected.jsonl")  # the last third of a second
    assert (row["path"], row["reason"]) == ("long.mp4", "too short")
    assert "from 3.000 s" in row["detail"]


def test_start_and_end_widen_to_whole_groups(tmp_path: Path) -> None:
    options = {"x264-params": "scenecut=0:keyint=10:min-keyint=10"}
    (tmp_path / "a.mp4").write_bytes(encoded(60, rate=20, gop=10, options=options))  # half a second a group, 3 s
    (tmp_path / "list.csv").write_text("path,label,start,end\na.mp4,x,0.7,1.2\na.mp4,y,2.0,\na.mp4,z,9,10\na.mp4,w,,\n")
    make_shards(tmp_path / "list.csv", tmp_path / "out", Settings(), workers=1, progress=quiet)
    made = {known["label"]: (known, clip) for known, clip in samples(tmp_path / "out")}
    assert {label: (known.get("start"), known.get("end")) for label, (known, _) in made.items()} == {
        "x": (0.5, 1.5),
        "y": (2.0, 3.0),
        "w": (None, None),
    }
    assert [number_of(image) for image in sequential(made["x"][1])[1]] == list(range(10, 30))
    assert made["x"][0]["metadata"] == {"start": "0.7", "end": "1.2"}
    assert rejected(tmp_path / "out") == {"a.mp4": "no such part"}


def test_a_codec_that_no_part_can_hold_is_rejected(tmp_path: Path) -> None:
    """Sorenson's H.263, of old FLVs: neither MP4 nor Matroska takes it. Uncut, its bytes are kept."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "long.flv").write_bytes(encoded(40, rate=20, gop=5, container="flv", codec="flv1"))
    (tmp_path / "videos" / "short.flv").write_bytes(encoded(10, rate=20, gop=5, container="flv", codec="flv1"))
    make_shards(tmp_path / "videos", tmp_path / "out", Settings(segment_s=1), workers=1, progress=quiet)
    assert rejected(tmp_path / "out") == {"long.flv": "cannot be cut by copying"}
    assert [known["path"] for known, _ in samples(tmp_path / "out")] == ["short.flv"]


# -- broken files ---------------------------------------------------------------------------------


def test_every_broken_file_is_named_and_every_file_accounted_for(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    good = encoded(60, rate=30, faststart=True)
    files = {
        "good.mp4": (good, None),
        "same as good.mp4": (good, "duplicate"),
        "cut.mp4": (good[:-1200], "does not decode to the end"),
        "index lost.mp4": (encoded(60)[:2000], "unreadable"),
        "empty.mp4": (b"", "zero length"),
        "sound.wav": (audio_only(), "no video stream"),
        "picture.png": (still_image(1, codec="png"), "not a video"),
        "text.txt": (b"not a video at all\n" * 9, "unreadable"),
        "playlist.m3u8": (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "unreadable"),
        "short.mp4": (encoded(3, rate=30), "too short"),
        "noise.mkv": (np.random.default_rng(0).bytes(9000), "unreadable"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    (folder / "ring.mp4").symlink_to(folder / "ring.mp4")
    summary = make_shards(folder, tmp_path / "out", Settings(min_s=0.5), workers=2, progress=quiet)
    expected = {name: reason for name, (_, reason) in files.items() if reason}
    expected |= {"gone.mp4": "unreadable", "ring.mp4": "unreadable"}
    assert rejected(tmp_path / "out") == expected
    kept = {known["path"] for known, _ in samples(tmp_path / "out")}
    assert kept | set(expected) == {path.name for path in folder.iterdir()}
    assert summary.rejected["unreadable"] == 6
    details = {row["path"]: row["detail"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")}
    assert details["same as good.mp4"] == "of good.mp4"
    assert details["gone.mp4"] == "a broken link"


def test_the_tool_tells_what_was_made(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(encoded(40, rate=20))
    (tmp_path / "videos" / "b.mp4").write_bytes(encoded(50, rate=25, size=(32, 80)))
    (tmp_path / "videos" / "c.mp4").write_bytes(encoded(42, rate=20))
    (tmp_path / "videos" / "d.jpg").write_bytes(still_image(1))
    folders = (tmp_path / "videos", tmp_path / "out")
    run = tool("make_shards", *folders, "--images", "--min-seconds", 2.05, "--copy")
    assert "2 clips" in run.stdout
    assert "resolutions: 64x48 (2)" in run.stdout
    assert "frames a second: still (1), 20 (1)" in run.stdout
    assert "2  too short" in run.stdout
    for wrong in (["--segment", "0"], ["--min-seconds", "-1"], ["--segment", "nan"]):
        run = tool("make_shards", *folders, *wrong, check=False)
        assert run.returncode == 2
        assert run.stderr.startswith("error: make_shards.py --"), run.stderr
