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

// Timeline: a lane for the controller and each worker, over the last steps or any before them.
const KINDS = [
  ["sampling", 0, ["generate", "sample"]],
  ["looking again", 3, ["examine"]],
  ["scoring", 2, ["score"]],
  ["learning", 1, ["update", "logprobs", "kl"]],
  ["weight sync", 5, ["send", "stage", "end update"]],
];
const OTHER = ["other", 4, []];
const ROLES = ["controller", "rollout engine", "reward worker", "learner rank"];
const [LABEL, SHARE, LANE, BAR, AXIS] = [130, 78, 34, 22, 24];  // pixels

function element(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Time within [start, end] that the events cover, overlaps counted once.
function covered(events, start, end) {
  let [sum, until] = [0, start];
  for (const { ts, dur } of [...events].sort((a, b) => a.ts - b.ts)) {
    const stop = Math.min(ts + dur, end);
    sum += Math.max(0, stop - Math.max(ts, until));
    until = Math.max(until, stop);
  }
  return sum;
}

const seconds = (micros) => (micros / 1e6).toFixed(micros < 1e5 ? 3 : micros < 1e7 ? 2 : 1) + " s";
const roundStep = (rough) => {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((m) => m * power >= rough) * power;
};

for (const figure of document.querySelectorAll("figure.timeline")) {
  const events = JSON.parse(figure.dataset.timeline);
  const [svg, readout, zoom] = ["svg", ".readout", ".zoom"].map((name) => figure.querySelector(name));
  const steps = events.filter(({ pid, name }) => pid === "controller" && /^step \d+$/.test(name));
  if (!steps.length) { figure.remove(); continue; }
  const role = (who) => ROLES.findIndex((name) => who.startsWith(name));
  const place = (who) => role(who) * 1e6 + Number((who.match(/\d+$/) || [0])[0]);
  const lanes = [...new Set(events.map(({ pid }) => pid))].sort((a, b) => place(a) - place(b));
  const kind = (name) => KINDS.find(([, , names]) => names.includes(name)) || OTHER;
  const seen = new Set(events.filter(({ pid }) => pid !== "controller").map(({ name }) => kind(name)));
  figure.querySelector(".legend").replaceChildren(...[...KINDS, OTHER].filter((one) => seen.has(one)).map(([title, colour]) => {
    const key = document.createElement("span"), box = document.createElement("i");
    box.style.setProperty("--c", `var(--s${colour})`);
    key.append(box, title);
    return key;
  }));
  let [count, last] = [Math.min(3, steps.length), steps.length];  // the steps last - count ... last - 1 are shown

  function draw() {
    const width = svg.clientWidth, height = AXIS + LANE * lanes.length + 4;
    const shown = steps.slice(last - count, last);
    const [start, end] = [shown[0].ts, shown[count - 1].ts + shown[count - 1].dur];
    const x = (ts) => LABEL + (Math.min(Math.max(ts, start), end) - start) / (end - start) * (width - LABEL - SHARE);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    const every = roundStep((end - start) / 8);
    for (let at = 0; at <= end - start; at += every)
      element(svg, "text", { class: "tick", x: x(start + at), y: 12, "text-anchor": "middle" }, Number((at / 1e6).toPrecision(6)) + " s");
    lanes.forEach((who, row) => {
      const y = AXIS + row * LANE, own = events.filter(({ pid, ts, dur }) => pid === who && ts < end && ts + dur > start);
      element(svg, "text", { class: "name", x: 0, y: y + BAR / 2 + 4 }, who);
      if (row) {
        element(svg, "line", { class: "idle", x1: LABEL, x2: width - SHARE, y1: y + BAR / 2, y2: y + BAR / 2, "stroke-width": BAR });
        const idle = 100 * (1 - covered(own, start, end) / (end - start));
        element(svg, "text", { x: width, y: y + BAR / 2 + 4, "text-anchor": "end" }, idle.toFixed(0) + " % idle");
      }
      for (const one of own.sort((a, b) => b.dur - a.dur)) {
        const left = x(one.ts), wide = Math.max(1, x(one.ts + one.dur) - left);
        const bar = element(svg, "rect", { class: row ? "work" : "step", x: left, y, width: wide, height: BAR, rx: Math.min(3, wide / 2), style: `--c:var(--s${kind(one.name)[1]})` });
        bar.addEventListener("pointerenter", () => { readout.textContent = `${who}: ${one.name}, ${seconds(one.dur)}, from ${seconds(one.ts - start)} on`; });
        if (!row && wide > 7 * one.name.length) element(svg, "text", { class: "on", x: left + wide / 2, y: y + BAR / 2 + 4, "text-anchor": "middle" }, one.name);
      }
    });
    for (const { ts } of shown) element(svg, "line", { class: "border", x1: x(ts), x2: x(ts), y1: AXIS - 6, y2: height });
    for (const button of zoom.querySelectorAll("button[data-count]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.count) === count));
    zoom.querySelector(".earlier").disabled = last <= count;
    zoom.querySelector(".later").disabled = last >= steps.length;
  }

  function press(text, act, name) {
    const button = document.createElement("button");
    button.textContent = text;
    button.type = "button";
    button.addEventListener("click", () => { act(); draw(); });
    if (name) button.className = name;
    zoom.append(button);
    return button;
  }
  press("‹ earlier", () => { last = Math.max(count, last - count); }, "earlier");
  for (const n of [...[1, 3, 10, 30, 100].filter((n) => n < steps.length), steps.length])
    press(n === steps.length ? `all ${n}` : String(n), () => { count = n; last = Math.max(n, last); }).dataset.count = n;
  press("later ›", () => { last = Math.min(steps.length, last + count); }, "later");
  svg.addEventListener("pointerleave", () => { readout.textContent = "\u00a0"; });
  new ResizeObserver(draw).observe(svg.parentElement);
}

// A thumbnail opens and closes its answer.
for (const button of document.querySelectorAll("button.thumb")) {
  const panel = document.getElementById(button.getAttribute("aria-controls"));
  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-pressed", String(!panel.hidden));
  });
}
