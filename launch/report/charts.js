// Makes the charts of a report live: read off, zoom, smooth, log scale. Draws as chart.py does.
"use strict";
(() => {
  const { charts, marks, span } = JSON.parse(document.getElementById("data").textContent);
  const LEFT = 54, RIGHT = 20, TOP = 18, BOTTOM = 24, HEIGHT = 230, MAX_DOTS = 60;
  const NS = "http://www.w3.org/2000/svg";
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const by = (id) => document.getElementById(id);
  let view = span, width = 1, cursor = null;

  const add = (parent, name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  };

  const short = (value) => {
    const size = Math.abs(value);
    for (const [limit, divisor, letter] of [[1e12, 1e12, "T"], [1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
      if (size >= limit) return Number((value / divisor).toPrecision(4)) + letter;
    if (size && size < 1e-3) return Number(value.toPrecision(3)).toExponential();
    return String(Number(value.toPrecision(4)));
  };
  const exact = (value) => Math.abs(value) >= 1e5
    ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(6)));

  const linearTicks = (low, high, most) => {
    if (!(high > low)) return [low];
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((times) => power * times >= rough * 0.999);
    const ticks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(n * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const decades = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    for (let power = first; power <= last; power++) decades.push(power);
    const every = Math.max(1, Math.floor(decades.length / 6)), inside = (v) => low <= v && v <= high;
    const powers = decades.filter((p) => p % every === 0).map((p) => 10 ** p).filter(inside);
    if (powers.length > 2) return powers;
    const between = decades.flatMap((p) => [1, 2, 5].map((times) => times * 10 ** p)).filter(inside);
    return between.length > 1 ? between : linearTicks(low, high, 6);
  };

  const scale = (low, high, start, stop, isLog) => {
    const f = isLog ? Math.log10 : (v) => v, from = f(low), size = f(high) - from;
    return (value) => (start + (size > 0 ? (f(value) - from) / size : 0.5) * (stop - start)).toFixed(1);
  };

  const isSmooth = (line) => width > 1 && line.x.length > MAX_DOTS;  // a few evaluations stay as they are
  // The mean of up to `width` points around each: fewer at the ends.
  const smoothed = (values) => {
    const sums = [0], half = (width - 1) / 2;
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    return values.map((_, n) => {
      const a = Math.max(0, n - half), b = Math.min(values.length, n + half + 1);
      return (sums[b] - sums[a]) / (b - a);
    });
  };
  const first = (steps, step) => {  // the first place whose step is not below
    let low = 0, high = steps.length;
    while (low < high) { const mid = (low + high) >> 1; if (steps[mid] < step) low = mid + 1; else high = mid; }
    return low;
  };
  const nearest = (steps, step) => {
    const n = first(steps, step);
    if (n === 0) return 0;
    return n < steps.length && steps[n] - step < step - steps[n - 1] ? n : n - 1;
  };
  const seen = (line) => [Math.max(0, first(line.x, view[0]) - 1), Math.min(line.x.length, first(line.x, view[1]) + 1)];

  const range = (chart) => {
    let low = Infinity, high = -Infinity;
    for (const line of chart.lines) {
      const [a, b] = seen(line), lows = line.low.length ? line.low : line.y, highs = line.high.length ? line.high : line.y;
      for (let n = a; n < b; n++) { low = Math.min(low, lows[n]); high = Math.max(high, highs[n]); }
    }
    if (low > high) return chart.log ? [1, 10] : [0, 1];
    if (chart.log) { const room = Math.max((high / low) ** 0.05, 1.02); return [low / room, high * room]; }
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    return [low < 0 || low - room > 0 ? low - room : 0, high + room];
  };

  const drawLine = (svg, line, x, y, style, clip) => {
    const [a, b] = seen(line), kind = "s" + line.style, group = add(svg, "g", { "clip-path": clip });
    const path = (values) => {
      const places = [];
      for (let n = a; n < b; n++) places.push(x(line.x[n]) + " " + y(values[n]));
      return places;
    };
    const draw = (values, extra) => add(group, "path", { class: "line " + kind + extra, d: "M" + path(values).join("L") });
    if (a >= b) return;
    if (line.low.length)
      add(group, "path", { class: "band " + kind, d: "M" + [...path(line.high), ...path(line.low).reverse()].join("L") + "Z" });
    if (isSmooth(line)) { draw(line.y, " faint"); draw(smoothed(line.y), ""); return; }
    draw(line.y, "");
    if (b - a <= MAX_DOTS && !line.low.length)
      for (let n = a; n < b; n++) add(group, "circle", { class: kind, cx: x(line.x[n]), cy: y(line.y[n]), r: 2.5 });
  };

  const draw = (figure) => {
    const number = Number(figure.dataset.chart), chart = charts[number], svg = figure.querySelector("svg[role=img]");
    const wide = Math.max(240, figure.clientWidth), right = wide - RIGHT, floor = HEIGHT - BOTTOM;
    const [low, high] = range(chart);
    const x = scale(view[0], view[1], LEFT, right), y = scale(low, high, floor, TOP, chart.log);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${wide} ${HEIGHT}`);
    const defs = add(svg, "defs", {}), clip = add(defs, "clipPath", { id: "clip" + number });
    add(clip, "rect", { x: LEFT, y: TOP, width: right - LEFT, height: floor - TOP });
    for (const tick of chart.log ? logTicks(low, high) : linearTicks(low, high, 6)) {
      add(svg, "path", { class: "grid", d: `M${LEFT} ${y(tick)}H${right}` });
      add(svg, "text", { class: "tick y", x: LEFT - 7, y: Number(y(tick)) + 4 }, short(tick));
    }
    for (const tick of linearTicks(view[0], view[1], Math.max(2, Math.min(6, Math.floor(wide / 75)))))
      if (Number.isInteger(tick)) add(svg, "text", { class: "tick", x: x(tick), y: floor + 17 }, short(tick));
    add(svg, "path", { class: "axis", d: `M${LEFT} ${floor}H${right}` });
    add(svg, "text", { class: "tick name", x: LEFT - 7, y: floor + 17 }, "step");
    for (const [step, kind, text] of marks) {
      if (step < view[0] || step > view[1]) continue;
      const group = add(svg, "g", { class: "mark " + kind });
      add(group, "title", {}, text);
      add(group, "path", { d: `M${x(step)} ${TOP}V${floor}` });
      add(group, "use", { href: "#" + kind, x: x(step), y: TOP - 14 });
    }
    for (const line of chart.lines) drawLine(svg, line, x, y, chart.log, `url(#clip${number})`);
    figure.cross = add(svg, "path", { class: "cross", d: "" });
    figure.zoom = add(svg, "rect", { class: "zoom", y: TOP, height: floor - TOP, width: 0 });
    figure.places = { x, right, floor };
    read(figure);
  };

  // Every chart shows the same step, each line its nearest point.
  const read = (figure) => {
    const chart = charts[figure.dataset.chart], { x, floor } = figure.places;
    figure.cross.setAttribute("d", cursor === null ? "" : `M${x(cursor)} ${TOP}V${floor}`);
    if (cursor === null) { figure.querySelector("output").textContent = ""; return; }
    const said = chart.lines.map((line) => {
      const n = nearest(line.x, cursor), near = line.x[n] === cursor ? "" : ` (step ${exact(line.x[n])})`;
      const mean = isSmooth(line) ? `, mean ${exact(smoothed(line.y)[n])}` : "";
      const band = line.low.length ? ` [${exact(line.low[n])} to ${exact(line.high[n])}]` : "";
      return `${line.name} ${exact(line.y[n])}${mean}${band}${near}`;
    });
    const happened = marks.filter((mark) => mark[0] === cursor).map((mark) => mark[2]);
    figure.querySelector("output").textContent = [`step ${exact(cursor)}: ${said.join(", ")}`, ...happened].join("; ");
  };
  const point = (step) => { cursor = step; figures.forEach(read); };
  const show = (from, to) => {
    view = [Math.max(span[0], from), Math.min(span[1], to)];
    if (!(view[1] > view[0])) view = span;
    by("whole").disabled = view[0] === span[0] && view[1] === span[1];
    figures.forEach(draw);
  };
  const stepAt = (figure, event) => {
    const box = figure.querySelector("svg[role=img]").getBoundingClientRect(), { right } = figure.places;
    const place = Math.min(right, Math.max(LEFT, event.clientX - box.left));
    return view[0] + (place - LEFT) / (right - LEFT) * (view[1] - view[0]);
  };
  const all = (chart) => chart.lines[0].x;

  const listen = (figure) => {
    const chart = charts[figure.dataset.chart], svg = figure.querySelector("svg[role=img]"), log = figure.querySelector(".log");
    let start = null;
    svg.addEventListener("pointerdown", (event) => { if (event.button === 0) { start = stepAt(figure, event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointermove", (event) => {
      const step = stepAt(figure, event), steps = all(chart);
      point(steps[nearest(steps, step)]);
      if (start === null) return;
      const [a, b] = [start, step].sort((p, q) => p - q).map(figure.places.x).map(Number);
      figure.zoom.setAttribute("x", a);
      figure.zoom.setAttribute("width", b - a);
    });
    svg.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [a, b] = [start, stepAt(figure, event)].sort((p, q) => p - q);
      start = null;
      if (figure.places.x(b) - figure.places.x(a) > 5) show(a, b); else figure.zoom.setAttribute("width", 0);
    });
    svg.addEventListener("pointercancel", () => { start = null; figure.zoom.setAttribute("width", 0); });
    svg.addEventListener("pointerleave", () => { if (start === null) point(null); });
    svg.addEventListener("dblclick", () => show(...span));
    const turn = () => { chart.log = !chart.log; log.querySelector("input").checked = chart.log; draw(figure); };
    if (log) { log.hidden = false; log.querySelector("input").addEventListener("change", turn); }
    figure.tabIndex = 0;
    figure.addEventListener("blur", () => point(null));
    figure.addEventListener("keydown", (event) => {
      if (event.target !== figure || event.ctrlKey || event.metaKey || event.altKey) return;
      const steps = all(chart), middle = cursor === null ? (view[0] + view[1]) / 2 : cursor, size = view[1] - view[0];
      const at = nearest(steps, cursor === null ? view[0] : cursor);
      const by_key = {
        ArrowLeft: () => point(steps[Math.max(0, at - 1)]),
        ArrowRight: () => point(steps[cursor === null ? at : Math.min(steps.length - 1, at + 1)]),
        "+": () => show(middle - size / 4, middle + size / 4),
        "-": () => show(middle - size, middle + size),
        l: () => log && turn(),
        Escape: () => show(...span),
      };
      const does = by_key[event.key] || by_key[event.key.toLowerCase()];
      if (does) { event.preventDefault(); does(); }
    });
  };

  if (!figures.length) return;
  document.querySelector(".tools").hidden = false;
  figures.forEach(draw);
  figures.forEach(listen);
  by("whole").addEventListener("click", () => show(...span));
  by("smooth").addEventListener("change", (event) => { width = Number(event.target.value); figures.forEach(draw); });
  by("theme").addEventListener("change", (event) => { document.documentElement.style.colorScheme = event.target.value; });
  new ResizeObserver(() => figures.forEach(draw)).observe(document.querySelector(".charts"));
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
