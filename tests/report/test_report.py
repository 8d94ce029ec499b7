"""What a report says of runs, against their files; and reports of damaged, old and unfinished runs."""

import base64
import io
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.chain import tool
from tests.report.material import copied, enrich
from vjepa_scale.report.charts import COLOURS, bars_chart
from vjepa_scale.report.read import Series, smoothed, thinned
from vjepa_scale.report.write import prose


class Page(HTMLParser):
    """A page's charts by title, tables as rows of cells, pictures by label, texts, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.charts: dict[str, Any] = {}
        self.rows: list[list[str]] = []
        self.pictures: list[tuple[str, Image.Image]] = []
        self.refers_to: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self._json, self._label = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.refers_to += [str(given[key]) for key in ("src", "href", "srcset", "action") if key in given]
        if tag in ("img", "meta", "link", "br", "i"):
            if tag == "img":
                data = base64.b64decode(str(given["src"]).partition("base64,")[2])
                self.pictures.append((str(given["alt"]), Image.open(io.BytesIO(data))))
            return
        self._inside.append(str(given.get("type", tag)))
        self._label = str(given.get("aria-label") or self._label)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("img", "meta", "link", "br", "i"):
            return
        if self._inside.pop() == "application/json":
            self.charts[self._label] = json.loads(self._json)
            self._json = ""

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "application/json":
            self._json += data
        elif inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif inside not in ("script", "style"):
            self.text += data

    def row(self, *cells: str) -> list[str]:
        """The only row that begins with these cells."""
        (found,) = [row for row in self.rows if row[: len(cells)] == list(cells)]
        return found


def report(*words: object, out: Path) -> Page:
    done = tool("report", *words, "--out", out)
    assert f"written: {out} (" in done.stdout
    assert out.stat().st_size < 12e6
    page = Page(out)
    elsewhere = [place for place in page.refers_to if not place.startswith(("data:", "#"))]
    assert not elsewhere
    return page


@pytest.fixture
def rich(finished: Path, tmp_path: Path) -> Path:
    run = copied(finished, tmp_path / "runs & <more>")
    enrich(run)
    return run


def test_a_report_has_what_the_files_have(rich: Path, finished: Path, tmp_path: Path) -> None:
    page = report(rich, out=tmp_path / "report.html")
    rows = {
        stage: [json.loads(line) for line in (finished / stage / "metrics.jsonl").open()]
        for stage in ("pretrain", "cooldown")
    }
    curves = page.charts["pretrain → cooldown"]["data"]

    def points(**wanted: object) -> dict[float, float | None]:
        """The points of all curves with these values, by step."""
        chosen = [curve for curve in curves if all(curve.get(key) == value for key, value in wanted.items())]
        return {x: y for curve in chosen for x, y in zip(curve["x"], curve["y"], strict=True)}

    rates = {row["step"]: row["lr"] for of_stage in rows.values() for row in of_stage}
    assert points(name="learning rate") == pytest.approx(rates, rel=1e-5)
    losses = points(name="loss", opacity=0.3)
    assert losses[7] == pytest.approx(rows["pretrain"][7]["loss"], rel=1e-5)
    assert losses[17] == pytest.approx(rows["cooldown"][-1]["loss"], rel=1e-5)
    assert losses[6] is None  # NaN there
    assert "not finite in 1 of 12 steps" in page.text
    stepped = {
        (x, y) for curve in curves for x, y in zip(curve["x"], curve["y"], strict=True) if "shape" in curve["line"]
    }
    assert stepped >= {(0, 32), (4, 32), (5, 40), (11, 40), (0, 4), (11, 4), (12, 8)}  # the recipe of tests/chain.py
    # limits
    for name, limit in (("collapse/context_rank", 5.0), ("collapse/target_std", 0.25)):
        dashes = [shape["y0"] for shape in page.charts[name]["layout"]["shapes"] if shape["type"] == "line"]
        assert limit in dashes
    assert "collapse/context_rank of pretrain is " in page.text
    # stages, restarts, failures
    assert page.row("pretrain", "done")[2:4] == ["12 of 12", "2"]
    assert page.row("cooldown", "done")[8] == "continue_from: pretrain"
    assert "OutOfMemoryError: <b>CUDA</b> out of memory & more" in [cell for row in page.rows for cell in row]
    assert page.row("pretrain", "left", "truncated") == ["pretrain", "left", "truncated", "7"]
    assert "best checkpoint" in page.text
    assert "step 8" in page.text
    assert "k-NN 40.0 %" in page.text
    # recipe
    printed = page.text.partition("The resolved recipe")[2].partition("Written ")[0]
    assert yaml.safe_load(printed) == yaml.safe_load((rich / "recipe.yaml").read_text())
    assert "python tools/consolidate.py" in page.text


def test_the_mixture_is_what_the_order_draws(finished: Path, tmp_path: Path) -> None:
    page = report(finished, "--no-features", out=tmp_path / "report.html")
    dumped = tool("launch", finished / "recipe.yaml", f"run.dir={finished}", "--dump-order", "0:18").stdout.splitlines()
    clips = Counter((line.split("\t")[7], line.split("\t")[2]) for line in dumped[1:])
    for (stage, name), count in clips.items():
        assert page.row(stage, name)[2] == str(count)
    assert sum(clips.values()) == 18 * 8


def test_masks_cover_what_their_captions_say(finished: Path, tmp_path: Path) -> None:
    page = report(finished, "--no-features", out=tmp_path / "report.html")
    masks = [(label, picture) for label, picture in page.pictures if label.startswith("masks")]
    clips = [picture for label, picture in page.pictures if label == "clip"]
    assert len(clips) * 2 == len(masks)
    assert {picture.height for picture in clips} == {32, 40}  # frames as they are trained: three geometries
    for label, picture in masks:
        predicted = int(re.findall(r"predicts (\d+)%", label)[0])
        pixels = np.asarray(picture).astype(int)
        # Orange is laid over the frame: 0.55·(255, 140, 25.5) and no more than 0.45·255 of the frame.
        red, _, blue, alpha = np.moveaxis(pixels, -1, 0)
        orange = (red >= 0.55 * 255 - 1) & (blue <= 0.55 * 25.5 + 0.45 * 255 + 1) & (red - blue > 60) & (alpha > 0)
        assert 100 * orange.sum() / (alpha > 0).sum() == pytest.approx(predicted, abs=4), label


def test_features_of_several_checkpoints(finished: Path, tmp_path: Path) -> None:
    page = report(finished, out=tmp_path / "report.html")
    labels = Counter(label for label, _ in page.pictures if "step" in label)
    assert set(labels) >= {"pretrain, step 12", "cooldown, step 18"}
    assert len(set(labels.values())) == 1
    last = next(picture for label, picture in page.pictures if label == "cooldown, step 18")
    grid = np.asarray(last)[:40, :48, :3].reshape(5, 8, 6, 8, 3)
    assert (grid == grid[:, :1, :, :1]).all()  # one colour per patch of 8×8 pixels
    assert len(np.unique(grid[:, 0, :, 0].reshape(-1, 3), axis=0)) > 5


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    def do(run: Path) -> None:
        for path in run.glob(name) if "*" in name else [run / name]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return do


_OTHER_ROWS = b'{"step": "a"}\n[1]\n{"step": 3, "phase": 5, "loss": 0, "clips_per_s": 1, "lr": "x"}\n'
# What is done to a run, and words of its report.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metrics": (lambda run: (run / "pretrain/metrics.jsonl").unlink(), "cooldown"),
    "metrics of bytes": (_write("cooldown/metrics.jsonl", b"\xff\x00{\n" * 50), "Stages"),
    "rows of other things": (_write("pretrain/metrics.jsonl", _OTHER_ROWS), "Stages"),
    "no history": (lambda run: (run / "pretrain/history.jsonl").unlink(), "Stages"),
    "no ledger": (lambda run: (run / "ledger.jsonl").unlink(), "No clip was replaced"),
    "checkpoints gone": (lambda run: shutil.rmtree(run / "pretrain/checkpoints"), "cooldown, step 18"),
    "manifests damaged": (_write("*/checkpoints/*/manifest.json", b"{"), "No features"),
    "evaluations damaged": (_write("pretrain/evaluations.jsonl", b'{"step": 3, "knn": "x"}\n{"a'), "Results"),
    "summary of another kind": (_write("summary.json", b'{"parts": 3, "linear_probe": [1]}'), "Results"),
    "pictures damaged": (_write("pictures/episode.png", b"no picture"), "Planning: what the camera sees"),
    "source damaged": (_write("launches/*/source.json", b"[]"), "Commands"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_reported_without_its_lost_parts(damage: str, finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    do, words = DAMAGES[damage]
    do(run)
    words_of = ["--no-features"] if damage not in ("checkpoints gone", "manifests damaged") else []
    out = tmp_path / "report.html"
    tool("report", run, "--out", out, *words_of)
    assert words in out.read_text().partition("<script>/**")[0]


def test_spikes_are_named(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    with open(run / "ledger.jsonl", "a") as file:
        for row in (
            {"step": 9, "to": 8, "action": "rollback", "left_out": {}},
            {"step": 11, "to": None, "action": "skip"},
        ):
            file.write(json.dumps({"event": "spike", "stage": "pretrain", "saw": "x", **row}) + "\n")
    page = report(run, "--no-features", out=tmp_path / "report.html")
    assert "Spikes of pretrain: 2 (1 rolled back), the last: step 11 skipped: x." in page.text


def test_shards_that_are_gone(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["sets"]["left"]["path"] = str(tmp_path / "gone")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = report(run, out=tmp_path / "report.html")
    assert "No clips of pretrain: data.sets.left.path" in page.text
    assert "The mixture of cooldown is not known" in page.text
    assert "No features: data.sets.left.path" in page.text
    assert "pretrain → cooldown" in page.charts


def test_several_runs(rich: Path, finished: Path, tmp_path: Path) -> None:
    other = copied(finished, tmp_path / "other" / rich.name)
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["optimizer"]["betas"] = [0.9, 0.95]
    recipe["pretrain"]["phases"][0]["final_lr"] = 0.5
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = report(rich, other, out=tmp_path / "report.html")
    start = next(place for place, row in enumerate(page.rows) if row[0] == "key")
    assert page.rows[start] == ["key", str(rich), str(other)]  # the folders' names are equal
    assert {row[0] for row in page.rows[start + 1 :]} == {"optimizer.betas", "pretrain.phases.0.final_lr"}
    assert page.row("pretrain.phases.0.final_lr")[1:] == ["0.001", "0.5"]
    names = {curve["name"] for curve in page.charts["pretrain → cooldown"]["data"]}
    assert names == {str(rich), str(other)}
    again = tool("report", rich, rich, "--out", tmp_path / "twice.html", check=False)
    assert again.returncode == 2
    assert "a run is given twice" in again.stderr


def test_a_preview(finished: Path, tmp_path: Path) -> None:
    words = [
        finished.parent / "recipe.yaml",
        f"run.dir={tmp_path / 'new'}",
        "pretrain.weight_decay={start: 0.1, final: 0.4}",
    ]
    page = report("--preview", *words, out=tmp_path / "report.html")
    curves = {curve["name"]: curve for curve in page.charts["pretrain → cooldown"]["data"]}
    rates = dict(zip(curves["learning rate"]["x"], curves["learning rate"]["y"], strict=True))
    # warmup from 1e-4 to 1e-3 in 5 steps, constant, then to 1e-6 in 6 (tests/chain.py)
    assert [rates[step] for step in (0, 4, 5, 11, 17)] == pytest.approx([2.8e-4, 1e-3, 1e-3, 1e-3, 1e-6])
    decays = dict(zip(curves["weight decay"]["x"], curves["weight decay"]["y"], strict=True))
    assert decays[11] == pytest.approx(0.4)
    assert page.row("pretrain", "constant")[3] == "4 × 40×32"
    assert [label for label, _ in page.pictures if label.startswith("masks 1")]
    assert "Refused now" not in page.text
    absent = report(
        "--preview", words[0], words[1], f"data.sets.left.path={tmp_path / 'none'}", out=tmp_path / "b.html"
    )
    assert "Refused now" in absent.text
    assert absent.row("left")[2] == "not there"


def test_a_preview_of_a_recipe_for_gpus_estimates_memory_and_days(tmp_path: Path) -> None:
    page = report("--preview", "vitb_1gpu", out=tmp_path / "report.html")
    memory = [row[2:] for row in page.rows if row[:2] == ["pretrain", "constant"] and "GB" in row[2]]
    assert len(memory) == 1
    assert re.fullmatch(r"\d+\.\d GB of RTX4090's 24", memory[0][0])
    assert all(float(cell.replace(",", "")) > 0 for cell in memory[0][1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a run folder, or --preview RECIPE"),
        (["nowhere"], "nowhere: no such folder"),
        (["tests"], "not a run folder: it has no recipe.yaml"),
        (["--preview", "dmo"], "did you mean demo?"),
    ],
)
def test_refusals(words: list[str], said: str) -> None:
    done = tool("report", *words, check=False)
    assert done.returncode == 2
    assert said in done.stderr


# -- curves and text --------------------------------------------------------------------------------


def test_thinned_curves_keep_extremes() -> None:
    values = np.sin(np.arange(300_000) / 5000)
    values[123_456], values[222_222], values[5:400] = 9, -7, math.nan
    found = thinned(Series(np.arange(300_000.0), values), 2000)
    assert len(found) <= 2000
    assert (np.diff(found.steps) > 0).all()
    assert (found.values == values[found.steps.astype(int)])[np.isfinite(found.values)].all()
    assert (np.nanmax(found.values), np.nanmin(found.values)) == (9, -7)
    short = Series(np.arange(3.0), np.arange(3.0))
    assert thinned(short, 2000) is short


def test_smoothed_curves_are_means_around_a_row() -> None:
    values = np.random.default_rng(0).normal(size=500)
    found = smoothed(Series(np.arange(500.0), values)).values
    expected = np.convolve(values, np.ones(21) / 21, mode="valid")  # 2 % of 500 on either side
    assert found[10:-10] == pytest.approx(expected)
    assert found[0] == pytest.approx(values[:11].mean())
    values[100] = math.nan
    assert smoothed(Series(np.arange(500.0), values)).values[95] == pytest.approx(np.nanmean(values[85:106]))


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("a < b & `c<d>`", "a &lt; b &amp; <code>c&lt;d&gt;</code>"),
        ("of `action`: [action.md](action.md#loss)", "of <code>action</code>: action.md"),
        ("**bold** <script>", "<strong>bold</strong> &lt;script&gt;"),
    ],
)
def test_prose(markdown: str, html: str) -> None:
    assert prose(markdown) == html


def test_more_entries_than_colours_are_all_there() -> None:
    """A recipe may have any number of data sets."""
    values = {f"set {number}": [float(number)] for number in range(2 * len(COLOURS) + 1)}
    chart = bars_chart("clips", ["all"], values, unit="%")
    assert [name for name, _ in chart.legend] == list(values)
