(() => {
const { DATA, fmt, el, svg, ticks, color, placeTip } = window.monePage;
const { studies, interest } = DATA.extension;
const NS = 'http://www.w3.org/2000/svg';
const signed = (v) => v === null ? 'not finite' : (v < 0 ? '\u2212' : '+') + Math.abs(v).toFixed(4);
const plain = (v) => v === null ? 'not finite' : v.toFixed(4);
const withEnds = (i, form) => !i ? 'none' : form(i.mean) + (i.low === null ? ' (error unknown)'
  : ` [${form(i.low)}, ${form(i.high)}]`);
// All that is drawn, so that nothing is cut off.
const reach = (values, pad) => {
  const known = values.filter((v) => v !== null && v !== undefined);
  let low = Math.min(...known), high = Math.max(...known);
  if (!known.length) [low, high] = [0, 1];
  const room = pad * (high - low) || Math.abs(high) * .02 || 1;
  return [low - room, high + room];
};
const root = (plot, tip, width, height, label) => {
  const node = document.createElementNS(NS, 'svg');
  node.setAttribute('viewBox', `0 0 ${width} ${height}`);
  node.setAttribute('height', height);
  node.setAttribute('role', 'img'); node.setAttribute('aria-label', label);
  plot.insertBefore(node, tip);
  return node;
};

class View {
  constructor(section, study, index) {
    this.study = study;
    this.focused = null;
    this.rows = [];
    this.drawn = section.querySelector('.drawn');
    const forest = el(this.drawn, 'div', 'card forest');
    el(forest, 'h3', '', `Loss less that of ${study.reference}`);
    el(forest, 'p', 'note', 'dots are seeds, the diamond their mean with its 95% interval; left ' +
      `is better. Grey: within ${interest} nats.`);
    this.forest = el(forest, 'div', 'plot');
    const costs = el(this.drawn, 'div', 'costs');
    this.costs = study.costs.map((cost) => {
      const card = el(costs, 'div', 'card');
      el(card, 'h3', '', 'Loss: ' + cost.title.toLowerCase());
      el(card, 'p', 'note', cost.label + (cost.alike ? '; all within 2%: side by side'
        : '; dashed: no other beats these in both'));
      return el(card, 'div', 'plot');
    });
    this.plots = [this.forest, ...this.costs];
    for (const plot of this.plots) {
      plot.tip = el(plot, 'div', 'tip');
      plot.addEventListener('pointerleave', () => this.focus(null));
    }
    this.draw();
    new ResizeObserver(() => { if (this.forest.clientWidth !== this.width) this.draw(); })
      .observe(this.forest);
    const names = study.variants.map((variant) => variant.name);
    for (const id of ['ranking', 'runs']) {
      for (const row of document.querySelectorAll(`#${id}${index} tbody tr`)) {
        const which = names.indexOf(row.cells[0].textContent);
        row.dataset.row = which;
        this.rows.push(row);
        row.addEventListener('pointerenter', () => this.focus(which));
        row.addEventListener('pointerleave', () => this.focus(null));
      }
    }
  }

  // Tells of one variant everywhere; null of none.
  focus(which, plot, x, y) {
    this.focused = which;
    this.drawn.classList.toggle('focus', which !== null);
    for (const node of this.drawn.querySelectorAll('[data-variant]')) {
      node.classList.toggle('on', +node.dataset.variant === which);
    }
    for (const row of this.rows) row.classList.toggle('on', +row.dataset.row === which);
    for (const one of this.plots) one.tip.style.display = 'none';
    if (which !== null && plot) this.tell(this.study.variants[which], plot, x, y);
  }

  tell(variant, plot, x, y) {
    const tip = plot.tip, line = (text, soft) => {
      el(tip, 'div', soft ? 'soft' : '', text).style.margin = '0';
    };
    tip.replaceChildren();
    const head = el(tip, 'div');
    el(head, 'i').style.background = color(variant.color);
    el(head, 'b', '', variant.name);
    line(`${variant.verdict}; val_loss ${withEnds(variant.loss, plain)}`, true);
    if (variant.difference) line(`less ${this.study.reference}: ` +
      withEnds(variant.difference, signed));
    variant.seeds.forEach((seed, k) => {
      const d = variant.differences[k];
      line(`seed ${seed}: ${plain(variant.losses[k])}` +
        (d === null || variant.isReference ? '' : `, ${signed(d)}`), true);
    });
    this.study.costs.forEach((cost, k) => line(`${cost.label}: ${fmt(variant.costs[k])}`, true));
    placeTip(tip, plot, x, y);
  }

  draw() {
    this.width = this.forest.clientWidth;
    if (!this.width) return;
    for (const old of this.drawn.querySelectorAll('svg')) old.remove();
    this.drawForest();
    this.study.costs.forEach((cost, k) => this.drawCost(cost, k));
    this.focus(this.focused);
  }

  // A mark of a variant that tells of it when pointed at.
  group(parent, which) {
    return svg(parent, 'g', { 'data-variant': which });
  }

  drawForest() {
    const rows = this.study.variants.map((variant, which) => ({ variant, which }))
      .filter(({ variant }) => variant.difference || variant.isReference);
    const width = this.width, rowHeight = 26, top = 6, height = top + rowHeight * rows.length + 42;
    const longest = Math.max(...rows.map(({ variant }) => variant.name.length));
    const left = Math.min(width * .4, 24 + 7.4 * longest), right = width - 18;
    const [low, high] = reach(rows.flatMap(({ variant: v }) => v.isReference ? [0]
      : [...v.differences, v.difference.low, v.difference.high, v.difference.mean]), .04);
    const X = (v) => left + (v - low) / (high - low) * (right - left);
    const bottom = top + rowHeight * rows.length;
    const area = root(this.forest, this.forest.tip, width, height,
      `Each seed's difference to ${this.study.reference}`);
    const from = Math.max(left, X(-interest)), to = Math.min(right, X(interest));
    svg(area, 'rect', { x: from, width: Math.max(0, to - from), y: top, height: bottom - top,
      fill: 'var(--grid)' });
    for (const v of ticks(low, high, width / 110, false)) {
      svg(area, 'line', { x1: X(v), x2: X(v), y1: top, y2: bottom + 4, stroke: 'var(--grid)' });
      svg(area, 'text', { x: X(v), y: bottom + 18, 'text-anchor': 'middle' }, fmt(v));
    }
    svg(area, 'line', { x1: X(0), x2: X(0), y1: top, y2: bottom, stroke: 'var(--soft)',
      'stroke-dasharray': '5 4' });
    svg(area, 'text', { x: (left + right) / 2, y: height - 5, 'text-anchor': 'middle' },
      `val_loss less that of ${this.study.reference}, nats a token`);
    rows.forEach(({ variant, which }, place) => {
      const y = top + rowHeight * (place + .5), paint = color(variant.color);
      const group = this.group(area, which);
      svg(group, 'text', { x: left - 14, y: y + 4, 'text-anchor': 'end', class: 'name' },
        variant.name);
      if (!variant.isReference) {
        const { mean, low: from, high: to } = variant.difference;
        for (const d of variant.differences) if (d !== null) {
          svg(group, 'circle', { cx: X(d), cy: y, r: 4, fill: paint, opacity: .4 });
        }
        if (from !== null) {
          svg(group, 'path', { d: `M${X(from)} ${y - 5}V${y + 5}M${X(from)} ${y}H${X(to)}` +
            `M${X(to)} ${y - 5}V${y + 5}`, stroke: paint, 'stroke-width': 2, fill: 'none' });
        }
        svg(group, 'path', { d: `M${X(mean) - 6} ${y}l6 -6l6 6l-6 6z`, fill: paint });
      } else svg(group, 'circle', { cx: X(0), cy: y, r: 5, fill: paint });
      const cover = svg(area, 'rect', { x: 0, y: y - rowHeight / 2, width, height: rowHeight,
        fill: 'transparent', class: 'cover' });
      cover.addEventListener('pointermove', (event) => {
        const box = this.forest.getBoundingClientRect();
        this.focus(which, this.forest, event.clientX - box.left, event.clientY - box.top);
      });
    });
  }

  drawCost(cost, k) {
    const plot = this.costs[k], width = plot.clientWidth, height = 300;
    const { variants } = this.study;
    const box = { left: 52, right: width - 16, top: 8, bottom: height - 30 };
    const places = variants.map((v, which) => cost.alike ? which : v.costs[k]);
    const [x0, x1] = reach(places, .08);
    const [y0, y1] = reach(variants.flatMap((v) => [...v.pairedSeeds,
      ...(v.paired ? [v.paired.low, v.paired.high, v.paired.mean] : [])]), .04);
    const X = (x) => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
    const Y = (y) => box.bottom - (y - y0) / (y1 - y0) * (box.bottom - box.top);
    const area = root(plot, plot.tip, width, height, 'Loss over ' + cost.label);
    for (const v of ticks(y0, y1, height / 55, false)) {
      svg(area, 'line', { x1: box.left, x2: box.right, y1: Y(v), y2: Y(v),
        stroke: 'var(--grid)' });
      svg(area, 'text', { x: box.left - 8, y: Y(v) + 4, 'text-anchor': 'end' }, fmt(v));
    }
    if (cost.alike) {
      svg(area, 'text', { x: (box.left + box.right) / 2, y: box.bottom + 18,
        'text-anchor': 'middle' }, fmt(variants.find((v) => v.isReference).costs[k]));
    } else for (const v of ticks(x0, x1, width / 90, false)) {
      svg(area, 'line', { x1: X(v), x2: X(v), y1: box.bottom, y2: box.bottom + 4,
        stroke: 'var(--line)' });
      svg(area, 'text', { x: X(v), y: box.bottom + 18, 'text-anchor': 'middle' }, fmt(v));
    }
    const best = cost.alike ? [] : cost.unbeaten.map(([x, y]) => [X(x), Y(y)]);
    if (best.length) {
      svg(area, 'path', { d: `M${best[0][0]} ${best[0][1]}` + best.slice(1)
        .map(([x, y]) => `H${x}V${y}`).join('') + `H${box.right}`, fill: 'none',
        stroke: 'var(--soft)', 'stroke-dasharray': '5 4' });
    }
    const points = [];
    variants.forEach((variant, which) => {
      const x = X(places[which]), paint = color(variant.color), group = this.group(area, which);
      for (const loss of variant.pairedSeeds) if (loss !== null) {
        svg(group, 'circle', { cx: x, cy: Y(loss), r: 3, fill: paint, opacity: .35 });
      }
      if (!variant.paired) return;
      const { mean, low, high } = variant.paired;
      if (low !== null) {
        svg(group, 'path', { d: `M${x - 4} ${Y(low)}h8M${x} ${Y(low)}V${Y(high)}` +
          `M${x - 4} ${Y(high)}h8`, stroke: paint, 'stroke-width': 1.5, fill: 'none',
          opacity: .7 });
      }
      svg(group, 'path', { d: `M${x - 6} ${Y(mean)}l6 -6l6 6l-6 6z`, fill: paint });
      points.push([x, Y(mean), which]);
    });
    const cover = svg(area, 'rect', { x: 0, y: 0, width, height, fill: 'transparent',
      class: 'cover' });
    cover.addEventListener('pointermove', (event) => {
      const at = plot.getBoundingClientRect();
      const x = event.clientX - at.left, y = event.clientY - at.top;
      const far = (point) => Math.hypot(point[0] - x, point[1] - y);
      const near = points.reduce((a, b) => !a || far(b) < far(a) ? b : a, null);
      this.focus(near && far(near) < 40 ? near[2] : null, plot, x, y);
    });
  }
}

for (const section of document.querySelectorAll('.study')) {
  const index = +section.dataset.study;
  new View(section, studies[index], index);
}
})();
