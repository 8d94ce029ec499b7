"""Reports in headless Chromium: every chart has data, text fits on a phone and on a desk, nothing is requested."""

from pathlib import Path

import pytest

from tests.chain import tool
from tests.report.browser import chromium, problems_of, requests_of
from tests.report.material import copied, enrich
from vjepa_scale.report.blocks import Charts, Section
from vjepa_scale.report.charts import timeline_chart
from vjepa_scale.report.write import write_page

pytestmark = pytest.mark.system("chromium")


@pytest.mark.slow
def test_reports_in_a_browser(four_stages: Path, tmp_path: Path) -> None:
    rich = copied(four_stages, tmp_path / "a run <with & everything>")
    enrich(rich, rows=2500)
    one, several, preview = (tmp_path / f"{name}.html" for name in ("one", "several", "preview"))
    tool("report", rich, "--out", one)
    tool("report", rich, four_stages, "--out", several)
    tool("report", "--preview", four_stages / "recipe.yaml", "pretrain.weight_decay={final: 0.4}", "--out", preview)
    with chromium() as driver:
        for page in (one, several, preview):
            assert problems_of(driver, page) == []
            assert driver.title


def test_times_of_attempts_have_room(tmp_path: Path) -> None:
    """From seconds to months, wherever the first tick falls: a date too long for its place was found by chance."""
    begin = 1_764_462_720.0  # 2025-11-30, 00:32 UTC
    charts = [
        timeline_chart(f"{span} s", [("pretrain", begin + shift, begin + shift + span, "done", "text")])
        for span in (3, 20, 70, 600, 5_000, 40_000, 90_000, 700_000, 9e6, 4e7)
        for shift in (0, 0.1 * span, 0.37 * span, 0.73 * span)
    ]
    page = tmp_path / "page.html"
    section = Section("times", "Times", [Charts([chart]) for chart in charts])
    write_page(page, title="Times", subtitle=(), tiles=(), sections=[section], footer="")
    with chromium() as driver:
        assert problems_of(driver, page) == []


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        """<!DOCTYPE html><meta name="viewport" content="width=device-width">
        <body style="background: rgb(250, 250, 250)">
        <p style="color: rgb(200, 200, 200)">faint</p><p style="width: 3000px">wide</p>
        <div class="chart" aria-label="empty"><svg><text x="5" y="20">one</text><text x="9" y="22">two</text>
        <text x="5" y="400">out</text></svg></div><img src="nowhere.png"><script>console.error("broken")</script>"""
    )
    with chromium() as driver:
        found = problems_of(driver, page)
        assert requests_of(driver) == []  # each is listed once
    said = (
        "empty chart at 390",
        "too wide at 1400",
        "one lies over two",
        "out leaves its chart",
        "faint text",
        "console: ",
    )
    for words in (*said, "request: ", "wider than 390"):
        assert [problem for problem in found if words in problem], (words, found)
