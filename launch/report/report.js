"use strict";
// Hover: a line at the nearest step and every series' value there.
const number = (value) => value === null ? "–" :
  Math.abs(value) >= 1e-3 || value === 0 ? Number(value.toPrecision(4)).toLocaleString("en") : value.toExponential(2);

for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const show = (i) => {
    cursor.setAttribute("x1", data.xs[i]);
    cursor.setAttribute("x2", data.xs[i]);
    const shown = data.series.map((values, k) =>
      (data.series.length > 1 ? data.labels[k] + " " : "") + number(values[i]));
    readout.textContent = "step " + data.steps[i] + ": " + shown.join(" · ");
    figure.classList.add("hovering");
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    data.xs.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(data.xs[nearest] - x)) nearest = i; });
    show(nearest);
  });
  svg.addEventListener("pointerleave", () => figure.classList.remove("hovering"));
}

// A thumbnail opens and closes its answer.
for (const button of document.querySelectorAll("button.thumb")) {
  const panel = document.getElementById(button.getAttribute("aria-controls"));
  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-pressed", String(!panel.hidden));
  });
}
