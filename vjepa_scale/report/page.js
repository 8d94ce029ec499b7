// Draws the charts, in the colours of the page's scheme and at the width of their boxes.
(() => {
  const charts = [...document.querySelectorAll(".chart")].map((box) => ({
    box,
    figure: JSON.parse(box.parentElement.querySelector('script[type="application/json"]').textContent),
  }));
  const config = { displayModeBar: false, scrollZoom: false, doubleClick: false };

  function themed(layout, width) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const out = structuredClone(layout);
    out.width = width;
    out.font = { family: getComputedStyle(document.body).fontFamily, size: 11, color: colour("--soft") };
    out.hoverlabel = { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } };
    for (const key of Object.keys(out).filter((name) => /^[xy]axis\d*$/.test(name))) {
      Object.assign(out[key], { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, showline: key[0] === "x" });
      if (key[0] === "x") out[key].showgrid = false;
    }
    // A phase is named where its name fits.
    const { l = 0, r = 0 } = out.margin;
    out.annotations = (out.annotations || []).filter((note) => {
      const share = /^share (.*)$/.exec(note.name || "");
      return !share || share[1] * (width - l - r) > 5.6 * note.text.length + 6;
    });
    return out;
  }

  function draw() {
    for (const { box, figure } of charts) {
      Plotly.react(box, structuredClone(figure.data), themed(figure.layout, box.clientWidth), config);
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  let later;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar changes the height
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(draw, 120);
  });
})();
