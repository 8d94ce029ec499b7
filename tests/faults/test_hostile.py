"""Files that somebody else has prepared: none of them runs code or opens other files. A canary tells.

Each payload is first shown to work where it is not guarded against: else its test would test nothing.
"""

import io
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import webdataset
import yaml

from tests.chain import tool, write_recipe
from tests.shards.test_shards_inputs import rejected
from tests.videos import encoded, quiet
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.check import check_shards
from vjepa_scale.shards.index import index_shards
from vjepa_scale.video.container import DecodeError, FileSlice, open_video
from vjepa_scale.video.torchcodec import torchcodec_pictures


class Payload:
    """Pickled: a command that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.canary), 0o777, True)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path that only a payload makes; it must not be there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload has run"


def works(canary: Path, attack: Callable[[], object]) -> None:
    """The payload runs where nothing guards against it."""
    attack()
    assert canary.exists(), "not hostile at all"
    canary.rmdir() if canary.is_dir() else canary.unlink()


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.fault(
    "hostile",
    "any command that loads weights gets a `.pt` that runs code: features, surprise, planning, consolidate (also "
    "`--compare`), `init_from`, `continue_from`",
    "exit code 2, one line that names the file and the code in it",
)
def test_a_pt_that_runs_code_is_refused_by_every_command(
    two_data_sets: dict[str, Path], tmp_path: Path, canary: Path
) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"encoder": {"w": torch.ones(3)}, "loss": Payload(canary)}, file)
    works(canary, lambda: torch.load(file, weights_only=False))
    video = tmp_path / "video.mp4"
    video.write_bytes(encoded(20))
    picture, state = tmp_path / "video.mp4", ["--state", *["0"] * 7]
    cooldown = {"continue_from": None, "phases": [{"name": "decay", "start_lr": 1e-3, "final_lr": 1e-6}]}
    recipes = {
        word: write_recipe(
            tmp_path / f"{word}.yaml",
            tmp_path / "run",
            two_data_sets,
            pretrain=None,
            cooldown={**cooldown, word: str(file)},
        )
        for word in ("init_from", "continue_from")
    }
    commands: list[list[object]] = [
        ["extract_features", two_data_sets["left"], file, tmp_path / "out"],
        ["surprise", file, video],
        ["plan", file, "--now", picture, "--goal", picture, *state],
        ["consolidate", file, "--out", tmp_path / "out"],
        ["consolidate", "--compare", file],
        *(["launch", recipe, "--cluster", "local", "--wait"] for recipe in recipes.values()),
    ]
    for command in commands:
        done = tool(*map(str, command), check=False)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        assert not canary.exists(), command
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "hostile",
    "shards with pickled members, members of absolute names and of names with `../`, links, devices, pipes",
    "only videos, JSON and labels are read, and nothing is unpacked; links and devices are listed in rejected.jsonl",
)
def test_members_of_a_tar_are_neither_unpickled_nor_unpacked(tmp_path: Path, canary: Path) -> None:
    shards = tmp_path / "deep" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(encoded(12))
    pickled, video = pickle.dumps(Payload(canary)), encoded(10)
    pth = io.BytesIO()
    torch.save(Payload(canary), pth)
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name, content in (
            *(
                ("a.mp4", video),
                ("a.pyd", pickled),
                ("a.pickle", pickled),
                ("a.pkl", pickled),
                ("a.pth", pth.getvalue()),
            ),
            *(("../../escaped.mp4", video), (f"{tmp_path}/absolute.mp4", video), ("b.mp4", video)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            info = tarfile.TarInfo(f"link{number}.mp4")
            info.type, info.linkname = kind, str(tmp_path / "secret.mp4")
            tar.addfile(info)
    works(canary, lambda: next(iter(webdataset.WebDataset(str(shards / "0.tar"), shardshuffle=False).decode())))
    before = {path for path in tmp_path.rglob("*") if shards not in path.parents}

    index_shards(shards, workers=1, progress=quiet)
    manifest = Manifest.open(shards)
    assert [manifest.read(record) for record in range(manifest.records)] == [video] * 4
    reasons = rejected(shards)
    assert list(reasons.values()) == ["unreadable member"]
    assert sum("link" in row for row in (shards / "rejected.jsonl").read_text().splitlines()) == 5
    assert check_shards(shards, decode=True, workers=1, progress=quiet) == []
    assert {path for path in tmp_path.rglob("*") if shards not in path.parents} == before


def test_a_column_of_a_manifest_is_not_unpickled(shards: Manifest, tmp_path: Path, canary: Path) -> None:
    folder = Path(shutil.copytree(shards.folder, tmp_path / "shards"))
    column = folder / "columns" / "key.npy"
    np.save(column, np.array([Payload(canary)] * shards.records, dtype=object), allow_pickle=True)
    works(canary, lambda: np.load(column, allow_pickle=True))
    with pytest.raises(UserError, match=r"columns/key\.npy: cannot read the column"):
        Manifest.open(folder)


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.fault(
    "hostile",
    "`pipe:COMMAND`, which WebDataset runs in a shell, as a data set, a shard in a manifest, a list of videos or a row "
    "of one, or weights",
    "no such file: exit code 2 (a row of a list is rejected); no shell ever gets an address",
)
def test_pipe_addresses_are_names_of_files_that_are_not_there(
    two_data_sets: dict[str, Path], shards: Manifest, tmp_path: Path, canary: Path
) -> None:
    address = f"pipe:touch {canary}"
    works(canary, lambda: webdataset.gopen(address).read())
    folder = Path(shutil.copytree(shards.folder, tmp_path / "shards"))
    first = shards.shards[0].name
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace(first, address))
    with pytest.raises(UserError, match="the shard is missing"):
        Manifest.open(folder)
    rows = tmp_path / "list.txt"
    rows.write_text(f"{address}\n{tmp_path / 'good.mp4'}\n")
    (tmp_path / "good.mp4").write_bytes(encoded(40))
    tool("make_shards", rows, tmp_path / "of-list")
    assert list(rejected(tmp_path / "of-list").values()) == ["unreadable"]
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    for command in (
        ["make_shards", address, tmp_path / "out"],
        ["consolidate", address, "--out", tmp_path / "out"],
        ["launch", recipe, f"data.sets.left.path='{address}'", "--cluster", "local", "--wait"],
        ["launch", recipe, f"pretrain.init_from='{address}'", "--cluster", "local", "--wait"],
    ):
        done = tool(*map(str, command), check=False)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert not canary.exists(), command


def playlists(folder: Path) -> dict[str, bytes]:
    """Files that name another one, ``folder``/secret.ts, by all the ways that FFmpeg follows."""
    secret = folder / "secret.ts"
    secret.write_bytes(encoded(40, container="mpegts"))
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S">'
        f'<Period><AdaptationSet mimeType="video/mp2t"><Representation id="1" bandwidth="1"><BaseURL>{secret}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    return {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.3,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
        "address.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.3,\nfile:{secret}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "dash.mpd": mpd.encode(),
        "session.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45454 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.fault(
    "hostile",
    "a playlist (HLS, DASH, FFmpeg's concat, SDP) among the videos or in a shard, which names another file or address",
    "no video: rejected when shards are made; in a shard, replaced and named as a clip that does not decode. FFmpeg "
    "may open no other file or address",
)
def test_playlists_do_not_reach_other_files(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    files = playlists(tmp_path)
    for name, content in files.items():
        (videos / name).write_bytes(content)
    reached = []
    for name in ("list.m3u8", "concat.mp4"):
        with av.open(str(videos / name), options={"safe": "0", "allowed_extensions": "ALL"}) as container:
            reached.append(sum(1 for _ in container.decode(video=0)))
    assert reached == [40, 40], "not hostile at all"

    (videos / "good.mp4").write_bytes(encoded(60))
    tool("make_shards", videos, tmp_path / "shards")
    found = rejected(tmp_path / "shards")
    assert found.keys() == files.keys()
    assert set(found.values()) <= {"unreadable", "not a video", "no video stream"}
    for content in files.values():
        part = tmp_path / "part"
        part.write_bytes(b"before" + content)
        for media in (content, FileSlice(part, 6, len(content))):
            with pytest.raises(DecodeError), open_video(media) as (container, stream):
                next(container.decode(stream))


@pytest.mark.system("torchcodec")
def test_torchcodec_never_gets_a_playlist(tmp_path: Path) -> None:
    for content in playlists(tmp_path).values():
        with pytest.raises(DecodeError):
            torchcodec_pictures(content, [0.0])


# -- YAML ------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "hostile",
    "YAML with Python tags: a recipe, one that it extends, an override, a profile, the recipe in a run folder",
    "exit code 2, one line that names the file",
)
def test_python_tags_in_yaml_run_nothing(two_data_sets: dict[str, Path], tmp_path: Path, canary: Path) -> None:
    tag = f"!!python/object/apply:subprocess.check_call [[mkdir, '{canary}']]"
    works(canary, lambda: yaml.unsafe_load(f"run: {tag}"))
    assert subprocess  # the tag finds what is imported
    good = write_recipe(tmp_path / "good.yaml", tmp_path / "run", two_data_sets)
    evil, child, profile = (tmp_path / f"{name}.yaml" for name in ("evil", "child", "profile"))
    evil.write_text(good.read_text() + f"pretrain: {tag}\n")
    child.write_text("extends: evil.yaml\n")
    profile.write_text(f"sbatch: {{comment: {tag}}}\n")
    (tmp_path / "folder").mkdir()
    shutil.copy(evil, tmp_path / "folder" / "recipe.yaml")
    local = ("--cluster", "local", "--wait")
    for words in (
        ["launch", evil, *local],
        ["launch", child, *local],
        ["launch", good, f"pretrain={tag}", *local],
        ["launch", good, f"launch.profile={profile}", "--cluster", "slurm", "--dry-run", "--print-sbatch"],
        ["launch", "status", tmp_path / "folder"],
        ["evaluate", tmp_path / "folder"],
        ["report", tmp_path / "folder"],
    ):
        done = tool(*map(str, words), check=False)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        assert not canary.exists(), words
