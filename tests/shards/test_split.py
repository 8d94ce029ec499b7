"""--val: two data sets of which no video, group or clip is in both."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.chain import tool
from tests.shards.test_shards_inputs import samples
from tests.shared import contents
from tests.videos import encoded
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_jsonl
from vjepa_scale.shards.make import Settings, make_split
from vjepa_scale.shards.sources import SIDES, Source, of_side


def sides(sources: list[Source], *, val: float, by: str = "source", seed: int = 0) -> dict[str, list[Source]]:
    where = Path("list")
    asked = {"val": val, "by": by, "seed": seed, "where": where}
    return {side: list(of_side(iter(sources), Path(), side=side, **asked)) for side in SIDES}  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["source", "folder", "video"])
def test_no_group_is_torn_apart(by: str) -> None:
    """Of 2000 groups with three sources each, a tenth is in val, give or take five standard deviations."""
    named = {"source": "{g}.mp4", "folder": "{g}/{n}.mp4", "video": "{n}/{g}.mp4"}[by]
    rows = [(g, n) for g in range(2000) for n in range(3)]
    sources = [Source(named.format(g=g, n=n), str(g), n, n + 1, {"video": g}) for g, n in rows]
    split = sides(sources, val=0.1, by=by)
    groups = {side: {source.label for source in found} for side, found in split.items()}
    assert not groups["train"] & groups["val"]
    assert sorted((int(s.label or ""), s.start_s) for s in split["train"] + split["val"]) == rows
    assert abs(len(groups["val"]) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert sides(sources, val=0.1, by=by, seed=1)["val"] != split["val"]
    fewer = sides(sources[300:], val=0.1, by=by)["val"]
    assert {source.label for source in fewer} == groups["val"] - {str(g) for g in range(100)}  # whatever else there is


def test_another_spelling_of_a_path_is_the_same_source() -> None:
    names = [(f"a/{n}.mp4", f"./a/../a/{n}.mp4", str(Path(f"a/{n}.mp4").absolute())) for n in range(40)]
    split = sides([Source(name) for group in names for name in group], val=0.5)
    assert all(len({source.path for source in split["val"]} & set(group)) in (0, 3) for group in names)


def test_videos_are_split_with_their_segments_and_copies(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    for n in range(12):
        (videos / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        (videos / f"{n % 2}/{n}.mp4").write_bytes(encoded(20 + n, rate=10, gop=5))
    for n in range(12):
        shutil.copyfile(videos / "0/0.mp4", videos / f"0/copy {n}.mp4")
    words = (videos, out, "--val", 0.3, "--segment", 1, "--workers", 2)
    run = tool("make_shards", *words)
    made = {side: samples(out / side) for side in SIDES}
    paths = {side: {known["path"] for known, _ in made[side]} for side in SIDES}
    assert paths["train"]
    assert paths["val"]
    assert not paths["train"] & paths["val"]
    assert not {clip for _, clip in made["train"]} & {clip for _, clip in made["val"]}
    left = {side: list(read_jsonl(out / side / "rejected.jsonl")) for side in SIDES}
    everything = {str(path.relative_to(videos)) for path in videos.rglob("*.mp4")}
    assert paths["train"] | paths["val"] | {row["path"] for side in SIDES for row in left[side]} == everything
    clips = Counter(known["path"] for side in SIDES for known, _ in made[side])
    assert min(clips.values()) > 1
    details = {row["detail"].split(",")[0] for row in left["val"] if row["reason"] == "duplicate"}
    assert details == {"of a clip in train"}
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    told = [line.split(":")[0] for line in run.stdout.splitlines() if line.endswith(" written")]
    assert told == [str(out / side) for side in SIDES]
    before = contents(out)
    assert tool("make_shards", *words).stdout.count("already there") == 2
    assert contents(out) == before
    source = json.loads((out / "val/manifest.json").read_text())["source"]
    assert (source["side"], source["val"]) == ("val", 0.3)


def test_a_split_that_cannot_be_is_refused(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for n in range(3):
        (videos / f"{n}.mp4").write_bytes(b"x")
    for words, told in (
        (("--val", 0.0), "--val: 0.0 is no fraction"),
        (("--val", "nan"), "--val: nan is no fraction"),
        (("--val-by", "folder"), "--val-by: only for a split"),
        (("--val", 1e-9), "--val: no source falls into val (a larger fraction"),
        (("--val", 1 - 1e-9), "--val: no source falls into train (a smaller fraction"),
        (("--val", 0.5, "--val-by", "scene"), "0.mp4 has no 'scene' to split by"),
    ):
        run = tool("make_shards", videos, out, *words, check=False)
        assert run.returncode == 2
        assert told in run.stderr, run.stderr
        assert not out.exists()
    (out / "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="not empty: thesis"):
        make_split(videos, out, Settings(val=0.5), lambda *_: pytest.fail("nothing is made"))
