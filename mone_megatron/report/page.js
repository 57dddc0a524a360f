'use strict';
(() => {
const DATA = JSON.parse(document.getElementById('data').textContent);
const NS = 'http://www.w3.org/2000/svg';
const color = (index) => `var(--c${index % 8})`;

const fmt = (v) => {
  if (v === null || v === undefined || !isFinite(v)) return 'not finite';
  const a = Math.abs(v);
  if (a === 0) return '0';
  if (a >= 1e12) return +(v / 1e12).toPrecision(4) + 'T';
  if (a >= 1e9) return +(v / 1e9).toPrecision(4) + 'B';
  if (a >= 1e6) return +(v / 1e6).toPrecision(4) + 'M';
  if (a >= 1e4) return +(v / 1e3).toPrecision(4) + 'K';
  if (a < 1e-3) return v.toExponential(2).replace(/\.?0+e/, 'e');
  return String(+v.toPrecision(5));
};

const el = (parent, tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
};
const svg = (parent, tag, attributes, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
};

const ticks = (low, high, wanted, whole) => {
  const rough = (high - low) / Math.max(wanted, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = rough / power;
  let step = power * (unit < 1.5 ? 1 : unit < 3.5 ? 2 : unit < 7.5 ? 5 : 10);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    found.push(+(k * step).toPrecision(12));
  }
  return found;
};

// Index of the entry of ascending xs nearest to x.
const nearest = (xs, x) => {
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
};

const placeTip = (tip, plot, x, y) => {
  tip.style.display = 'block';
  const left = x + 16 + tip.offsetWidth > plot.clientWidth ? x - tip.offsetWidth - 14 : x + 16;
  tip.style.left = Math.max(0, left) + 'px';
  tip.style.top = Math.max(0, y - tip.offsetHeight - 8) + 'px';
};

class LineChart {
  constructor(root, spec) {
    this.spec = spec;
    this.zoom = null;
    const legend = el(root, 'div', 'legend');
    for (const s of spec.series) {
      if (spec.series.length < 2 || !s.name) continue;
      const item = el(legend, 'span');
      const mark = el(item, 'i', s.kind === 'points' ? 'dot' : '');
      mark.style.background = color(s.color);
      if (s.kind === 'faint') mark.style.opacity = .4;
      el(item, 'span', '', s.name);
    }
    if (!legend.childNodes.length) legend.remove();
    this.plot = el(root, 'div', 'plot');
    this.tip = el(root.querySelector('.plot'), 'div', 'tip');
    this.draw();
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); })
      .observe(this.plot);
  }

  extent() {
    let x0 = Infinity, x1 = -Infinity;
    for (const s of this.spec.series) if (s.x.length) {
      x0 = Math.min(x0, s.x[0]); x1 = Math.max(x1, s.x[s.x.length - 1]);
    }
    if (this.zoom) [x0, x1] = this.zoom;
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    let y0 = Infinity, y1 = -Infinity;
    const see = (v) => { if (v !== null) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); } };
    for (const s of this.spec.series) s.x.forEach((x, k) => {
      if (x < x0 || x > x1) return;
      see(s.y[k]);
      if (s.low) { see(s.low[k]); see(s.high[k]); }
    });
    if (!isFinite(y0)) { y0 = 0; y1 = 1; }
    if (this.spec.zero) { y0 = Math.min(y0, 0); y1 = Math.max(y1, 0); }
    if (y1 - y0 < 1e-9 * Math.max(Math.abs(y0), Math.abs(y1), 1e-6)) {
      const room = Math.abs(y0) * .1 || 1;
      y1 += room;
      if (!this.spec.zero && y0) y0 -= room;
    }
    const pad = (y1 - y0) * .05;
    return [x0, x1, this.spec.zero && y0 === 0 ? 0 : y0 - pad, y1 + pad];
  }

  draw() {
    const width = this.width = this.plot.clientWidth, height = this.spec.height || 250;
    if (!width) return;
    if (this.svg) this.svg.remove();
    const [x0, x1, y0, y1] = this.extent();
    const yTicks = ticks(y0, y1, height / 55, false), labels = yTicks.map(fmt);
    const left = 14 + 7.2 * Math.max(3, ...labels.map((t) => t.length));
    const box = { left, right: width - 16, top: 8, bottom: height - 40 };
    const X = (x) => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
    const Y = (y) => box.bottom - (y - y0) / (y1 - y0) * (box.bottom - box.top);
    const root = this.svg = document.createElementNS(NS, 'svg');
    root.setAttribute('width', width); root.setAttribute('height', height);
    root.setAttribute('role', 'img'); root.setAttribute('aria-label', this.spec.title);
    this.plot.insertBefore(root, this.tip);
    yTicks.forEach((v, k) => {
      svg(root, 'line', { x1: box.left, x2: box.right, y1: Y(v), y2: Y(v),
        stroke: v === 0 && y0 < 0 ? 'var(--soft)' : 'var(--grid)' });
      svg(root, 'text', { x: box.left - 8, y: Y(v) + 4, 'text-anchor': 'end' }, labels[k]);
    });
    for (const v of ticks(x0, x1, width / 110, true)) {
      svg(root, 'line', { x1: X(v), x2: X(v), y1: box.bottom, y2: box.bottom + 4,
        stroke: 'var(--line)' });
      svg(root, 'text', { x: X(v), y: box.bottom + 17, 'text-anchor': 'middle' }, fmt(v));
    }
    svg(root, 'line', { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom,
      stroke: 'var(--line)' });
    svg(root, 'text', { x: (box.left + box.right) / 2, y: height - 5, 'text-anchor': 'middle' },
      this.spec.xLabel || 'step');
    const clip = svg(root, 'clipPath', { id: 'clip-' + this.spec.id });
    svg(clip, 'rect', { x: box.left - 5, y: box.top - 6, width: box.right - box.left + 10,
      height: box.bottom - box.top + 12 });
    const area = svg(root, 'g', { 'clip-path': `url(#clip-${this.spec.id})` });
    for (const mark of this.spec.marks) {
      const line = svg(area, 'line', { class: 'mark', x1: X(mark.x), x2: X(mark.x), y1: box.top,
        y2: box.bottom, stroke: 'var(--bad-ink)', 'stroke-dasharray': '2 4' });
      svg(line, 'title', {}, mark.text);
    }
    for (const s of this.spec.series) this.drawSeries(area, s, X, Y);
    this.cursor = svg(root, 'line', { y1: box.top, y2: box.bottom, stroke: 'var(--soft)',
      'stroke-dasharray': '3 3', visibility: 'hidden' });
    this.dots = this.spec.series.map((s) => svg(root, 'circle', { r: 4, fill: color(s.color),
      stroke: 'var(--card)', 'stroke-width': 1.5, visibility: 'hidden' }));
    const brush = svg(root, 'rect', { y: box.top, height: box.bottom - box.top, width: 0,
      fill: 'var(--soft)', opacity: .2 });
    const cover = svg(root, 'rect', { x: box.left, y: 0, width: box.right - box.left, height,
      fill: 'transparent' });
    const at = (event) => Math.min(box.right, Math.max(box.left,
      event.clientX - root.getBoundingClientRect().left));
    const value = (px) => x0 + (px - box.left) / (box.right - box.left) * (x1 - x0);
    let start = null;
    cover.addEventListener('pointerdown', (event) => {
      start = at(event); cover.setPointerCapture(event.pointerId);
    });
    cover.addEventListener('pointermove', (event) => {
      const px = at(event);
      if (start !== null) {
        brush.setAttribute('x', Math.min(px, start));
        brush.setAttribute('width', Math.abs(px - start));
      }
      this.hover(value(px), X, Y, event.clientY - root.getBoundingClientRect().top);
    });
    cover.addEventListener('pointerup', (event) => {
      const end = at(event), from = start;
      start = null;
      if (from === null || Math.abs(end - from) < 8) { brush.setAttribute('width', 0); return; }
      this.zoom = [value(Math.min(from, end)), value(Math.max(from, end))];
      this.leave(); this.draw();
    });
    cover.addEventListener('pointerleave', () => { if (start === null) this.leave(); });
    cover.addEventListener('dblclick', () => { this.zoom = null; this.leave(); this.draw(); });
  }

  drawSeries(area, s, X, Y) {
    if (s.low) {
      // One closed shape per stretch without gaps.
      let up = [], down = [];
      const flush = () => {
        if (up.length) svg(area, 'path', { d: 'M' + up.concat(down.reverse()).join('L') + 'Z',
          fill: color(s.color), opacity: .16 });
        up = []; down = [];
      };
      s.x.forEach((x, k) => {
        if (s.low[k] === null || s.high[k] === null) { flush(); return; }
        up.push(X(x).toFixed(1) + ' ' + Y(s.high[k]).toFixed(1));
        down.push(X(x).toFixed(1) + ' ' + Y(s.low[k]).toFixed(1));
      });
      flush();
    }
    if (s.kind === 'points' || s.x.length === 1) {
      s.x.forEach((x, k) => { if (s.y[k] !== null) svg(area, 'circle', { cx: X(x), cy: Y(s.y[k]),
        r: s.x.length > 40 ? 2 : 4, fill: color(s.color), stroke: 'var(--card)',
        'stroke-width': s.x.length > 40 ? 0 : 1 }); });
      return;
    }
    let d = '', pen = false;
    s.x.forEach((x, k) => {
      if (s.y[k] === null) { pen = false; return; }
      d += (pen ? 'L' : 'M') + X(x).toFixed(1) + ' ' + Y(s.y[k]).toFixed(1);
      pen = true;
    });
    const faint = s.kind === 'faint';
    svg(area, 'path', { d, fill: 'none', stroke: color(s.color), 'stroke-linejoin': 'round',
      'stroke-width': faint ? 1 : 1.9, opacity: faint ? .38 : 1,
      'stroke-dasharray': s.dash ? '6 4' : 'none' });
  }

  hover(x, X, Y, y) {
    const drawn = this.spec.series.filter((s) => s.x.length);
    const dense = drawn.filter((s) => s.kind !== 'points');
    if (!drawn.length) return;
    const near = this.spec.marks.filter((mark) => Math.abs(X(mark.x) - X(x)) <= 5);
    const guide = (dense.length ? dense : drawn).map((s) => s.x[nearest(s.x, x)])
      .reduce((a, b) => Math.abs(a - x) <= Math.abs(b - x) ? a : b);
    this.tip.replaceChildren();
    el(this.tip, 'div', 'soft', (this.spec.xLabel || 'step') + ' ' + guide.toLocaleString('en'))
      .style.margin = '0';
    this.spec.series.forEach((s, index) => {
      const dot = this.dots[index];
      dot.setAttribute('visibility', 'hidden');
      if (!s.x.length) return;
      const k = nearest(s.x, guide);
      // A curve is read at the guide's step, points (evaluations) at theirs when it is near.
      const reach = s.kind === 'points' ? 10 : 3;
      if (Math.abs(X(s.x[k]) - X(guide)) > reach) return;
      const line = el(this.tip, 'div');
      el(line, 'i').style.background = color(s.color);
      const where = s.x[k] === guide ? '' : ` (at ${s.x[k].toLocaleString('en')})`;
      let text = (s.name || this.spec.title) + ': ' + fmt(s.y[k]) + where;
      if (s.low) text += `  [${fmt(s.low[k])}, ${fmt(s.high[k])}]`;
      line.appendChild(document.createTextNode(text));
      if (s.y[k] !== null) {
        dot.setAttribute('cx', X(s.x[k])); dot.setAttribute('cy', Y(s.y[k]));
        dot.setAttribute('visibility', 'visible');
      }
    });
    for (const mark of near) el(this.tip, 'div', '', mark.text);
    this.cursor.setAttribute('x1', X(guide)); this.cursor.setAttribute('x2', X(guide));
    this.cursor.setAttribute('visibility', 'visible');
    placeTip(this.tip, this.plot, X(guide), y);
  }

  leave() {
    this.tip.style.display = 'none';
    this.cursor.setAttribute('visibility', 'hidden');
    for (const dot of this.dots) dot.setAttribute('visibility', 'hidden');
  }
}

const MAP = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const shade = (t) => {
  const at = Math.min(Math.max(t, 0), 1) * (MAP.length - 1), k = Math.min(Math.floor(at), 7);
  return 'rgb(' + MAP[k].map((v, c) => Math.round(v + (MAP[k + 1][c] - v) * (at - k))) + ')';
};

class Heatmap {
  constructor(root, spec) {
    this.spec = spec;
    this.plot = el(root, 'div', 'plot');
    this.canvas = el(this.plot, 'canvas');
    this.tip = el(this.plot, 'div', 'tip');
    const scale = el(root, 'div', 'legend');
    scale.style.margin = '4px 0 6px';
    const item = el(scale, 'span');
    el(item, 'span', '', fmt(spec.low));
    const bar = el(item, 'i');
    bar.style.cssText = 'width:120px;height:9px;background:linear-gradient(to right,' +
      MAP.map((c) => `rgb(${c})`).join(',') + ')';
    el(item, 'span', '', fmt(spec.high));
    this.draw();
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); })
      .observe(this.plot);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.draw());
    this.plot.addEventListener('pointermove', (event) => this.hover(event));
    this.plot.addEventListener('pointerleave', () => { this.tip.style.display = 'none'; });
  }

  draw() {
    const { layers, steps, values, low, high } = this.spec;
    const width = this.width = this.plot.clientWidth;
    const rows = layers.length, ratio = devicePixelRatio || 1;
    if (!width) return;
    const cell = Math.min(26, Math.max(3, Math.floor(240 / rows)));
    const box = this.box = { left: 46, right: width - 16, top: 6, bottom: 6 + cell * rows, cell };
    const height = box.bottom + 38;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: width + 'px', height: height + 'px' });
    const g = this.canvas.getContext('2d'), style = getComputedStyle(document.documentElement);
    g.scale(ratio, ratio);
    g.fillStyle = style.getPropertyValue('--grid');
    g.fillRect(box.left, box.top, box.right - box.left, cell * rows);
    const w = (box.right - box.left) / steps.length;
    values.forEach((row, r) => row.forEach((v, c) => {
      if (v === null) return;
      g.fillStyle = shade((v - low) / (high - low));
      const from = Math.floor(box.left + c * w), to = Math.floor(box.left + (c + 1) * w);
      g.fillRect(from, box.top + r * cell, Math.max(1, to - from), cell);
    }));
    g.fillStyle = style.getPropertyValue('--soft');
    g.font = '12px system-ui, sans-serif';
    g.textAlign = 'right'; g.textBaseline = 'middle';
    // Every layer while rows are tall enough to be told apart, else about one label in 22 px.
    const every = [1, 2, 5, 10, 20, 50].find((n) => n * cell >= 13) || 50;
    layers.forEach((layer, r) => {
      if (every > 1 && r > 0 && layer % every) return;
      if (every > 1 && r === 0 && (every - layer % every) * cell < 13 && layer % every) return;
      g.fillText(layer, box.left - 7, box.top + (r + .5) * cell);
    });
    g.save(); g.translate(11, box.top + cell * rows / 2); g.rotate(-Math.PI / 2);
    g.textAlign = 'center';
    g.fillText(rows * cell > 34 ? 'layer' : '', 0, 0); g.restore();
    g.textAlign = 'center'; g.textBaseline = 'top';
    const labels = Math.max(1, Math.floor((box.right - box.left) / 80));
    const room = Math.max(1, Math.ceil(steps.length / labels));
    for (let c = 0; c < steps.length; c += room) {
      const x = box.left + (c + .5) * w;
      g.fillText(fmt(steps[c]), Math.max(x, box.left + 4), box.bottom + 5);
    }
    g.fillText(this.spec.columns, (box.left + box.right) / 2, box.bottom + 22);
  }

  hover(event) {
    const at = this.plot.getBoundingClientRect(), box = this.box;
    const x = event.clientX - at.left, y = event.clientY - at.top;
    const { layers, steps, values } = this.spec;
    const c = Math.floor((x - box.left) / (box.right - box.left) * steps.length);
    const r = Math.floor((y - box.top) / box.cell);
    if (c < 0 || c >= steps.length || r < 0 || r >= layers.length) {
      this.tip.style.display = 'none'; return;
    }
    const place = `layer ${layers[r]}, ${this.spec.columns} ${steps[c].toLocaleString('en')}`;
    this.tip.textContent = place + ': ' + fmt(values[r][c]);
    placeTip(this.tip, this.plot, x, y);
  }
}

const charts = [...document.querySelectorAll('.chart')]
  .map((node) => new LineChart(node, DATA.charts[node.dataset.id]));
for (const node of document.querySelectorAll('.heatmap')) {
  new Heatmap(node, DATA.heatmaps[node.dataset.id]);
}
// What a cell is sorted by: its value, or the number that its text begins with, or the text, as
// names in the first column always are.
const UNITS = { K: 1e3, M: 1e6, B: 1e9, T: 1e12 };
const sortKey = (cell) => {
  if (cell.dataset.value !== undefined) return +cell.dataset.value;
  const text = cell.textContent.trim();
  if (cell.cellIndex === 0) return text;
  const found = /^[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?/i.exec(text);
  return found ? +found[0].replaceAll(',', '') * (UNITS[text[found[0].length]] || 1) : text;
};
const compareKeys = (a, b) => {
  // Numbers before texts, and what is not a number or empty at the end, whichever way it is sorted.
  const rank = (v) => typeof v === 'number' ? (isNaN(v) ? 2 : 0) : v === '' || v === '-' ? 2 : 1;
  if (rank(a) !== rank(b)) return [rank(a) - rank(b), true];
  if (rank(a) === 2) return [0, true];
  return [typeof a === 'number' ? a - b : 
    a.localeCompare(b, 'en', { numeric: true }), false];
};
const makeSortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const text = head.textContent;
    head.textContent = '';
    const button = el(head, 'button', '', text);
    button.type = 'button';
    button.title = 'sort by this column';
    button.addEventListener('click', () => {
      const way = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [sortKey(row.cells[column]), row]);
      rows.sort(([a], [b]) => {
        const [order, fixed] = compareKeys(a, b);
        return fixed ? order : way * order;
      });
      for (const [, row] of rows) body.appendChild(row);
    });
  });
};
for (const table of document.querySelectorAll('table.sortable')) makeSortable(table);
// The page of a run that is going reads itself again, and stays where its reader is. What it keeps
// meanwhile is the tab's own.
const live = document.getElementById('live');
if (live) {
  const kept = 'mone live ' + location.pathname;
  const details = [...document.querySelectorAll('details')];
  try {
    const before = JSON.parse(sessionStorage.getItem(kept));
    sessionStorage.removeItem(kept);
    if (before) {
      history.scrollRestoration = 'manual';
      details.forEach((node, index) => { node.open = Boolean(before.open[index]); });
      scrollTo(0, before.y);
    }
  } catch { /* a browser that keeps nothing for files: the page begins at its top */ }
  const written = Date.parse(live.dataset.written), every = 1000 * live.dataset.seconds;
  const due = Date.now() + every;
  live.querySelector('time').textContent = new Date(written).toLocaleString();
  let held = false;
  addEventListener('pointerdown', () => { held = true; });
  addEventListener('pointerup', () => { held = false; });
  const age = live.querySelector('.age');
  const words = (s) => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min`
    : `${Math.round(s / 3600)} h`;
  const look = () => {
    const zoomed = charts.some((chart) => chart.zoom);
    const old = Date.now() - written;
    age.textContent = `, ${words(Math.max(0, old / 1000))} ago; ` + (
      zoomed ? 'a newer one waits until no curve is zoomed.'
        : old > 10 * every + 600000 ? 'nothing newer came: the run may have ended without a word.'
          : 'this page reads itself again.');
    if (Date.now() < due || document.hidden || held || zoomed) return;
    const state = { y: scrollY, open: details.map((node) => node.open) };
    try { sessionStorage.setItem(kept, JSON.stringify(state)); } catch { /* as above */ }
    location.reload();
  };
  look();
  setInterval(look, 1000);
}
// For a page's own views (Page.extend).
window.monePage = { DATA, fmt, el, svg, ticks, color, MAP, shade, placeTip };
})();
