"""Opens a report in headless Chromium and lists what is wrong with it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (390, 1400)

# Every chart has values in every trace.
_EMPTY_CHARTS = """
return [...document.querySelectorAll(".chart")].filter((box) => {
  const traces = box.classList.contains("js-plotly-plot") ? box._fullData : [];
  const full = (trace) => (trace.orientation === "h" ? trace.x : trace.y).some((value) => Number.isFinite(value));
  return !traces.length || !traces.every(full) || !box.querySelector(".trace, .bars path, .point");
}).map((box) => box.getAttribute("aria-label"));
"""
# Text that is wider than its box, or than the page; boxes that scroll may hold wider content.
_OVERFLOWING = """
const scrolls = (node) => node.closest(".scroll, pre, nav, svg");
const shown = (node) => node.getClientRects().length > 0;
return [...document.body.querySelectorAll("*")].filter((node) => shown(node) && !scrolls(node)).filter((node) =>
  node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline" && node.clientWidth > 0
  || node.getBoundingClientRect().right > innerWidth + 1
).map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`);
"""
# Text of a chart that leaves the chart, or lies over other text of it.
_COLLIDING = """
const found = [];
for (const box of document.querySelectorAll(".chart")) {
  const outer = box.getBoundingClientRect();
  const texts = [...box.querySelectorAll("svg text")].filter((node) => node.textContent.trim()).map((node) =>
    [node.textContent, node.getBoundingClientRect()]).filter(([, at]) => at.width > 0);
  for (const [text, at] of texts) {
    const across = at.left < outer.left - 1 || at.right > outer.right + 1;
    if (across || at.bottom > outer.bottom + 1 || at.top < outer.top - 1)
      found.push(`${box.getAttribute("aria-label")}: ${text} leaves its chart`);
  }
  texts.forEach(([one, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 2 && high > 3) found.push(`${box.getAttribute("aria-label")}: ${one} lies over ${other}`);
  }));
}
return found;
"""
# Contrast of text with its ground by WCAG 2's formula.
_FAINT = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = light(getComputedStyle(document.body).backgroundColor);
const faint = (colour) => {
  const [dark, bright] = [ground, light(colour)].sort((one, other) => one - other);
  return (bright + 0.05) / (dark + 0.05) < 4.5;
};
const texts = [...document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, figcaption, nav a")];
const ticks = [...document.querySelectorAll(".xtick text, .ytick text")];
const colours = [[texts, "color"], [ticks, "fill"]].flatMap(([nodes, property]) =>
  nodes.map((node) => [node, getComputedStyle(node)[property]]));
return colours.filter(([node, colour]) => faint(colour)).map(([node]) => node.textContent.slice(0, 40));
"""


def missing() -> str:
    """What a browser test needs that is not here; empty: nothing."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return "a browser: apt-get install chromium chromium-driver"
    return ""


@contextmanager
def chromium() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


def problems_of(driver: Any, page: Path) -> list[str]:
    """Everything that is wrong with a page at each width and in each scheme; empty: nothing."""
    found: list[str] = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        for width in WIDTHS:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(page.as_uri())
            for what, script in (
                ("empty chart", _EMPTY_CHARTS),
                ("too wide", _OVERFLOWING),
                ("text of a chart", _COLLIDING),
                ("faint text", _FAINT),
            ):
                found += [f"{what} at {width}, {scheme}: {each}" for each in driver.execute_script(script)]
            if driver.execute_script("return document.documentElement.scrollWidth > innerWidth"):
                found.append(f"the page is wider than {width}")
    found += [f"console: {entry['message']}" for entry in driver.get_log("browser")]
    return found + [f"request: {url}" for url in requests_of(driver) if url != page.as_uri()]


def requests_of(driver: Any) -> list[str]:
    """The addresses that Chromium has asked for since the last call, without pictures that are in the page."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]
