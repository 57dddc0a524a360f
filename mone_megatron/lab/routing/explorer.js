(() => {
const { DATA, fmt, el, MAP, shade, placeTip } = window.monePage;
const data = DATA.extension;
const percent = (v) => v === null || v === undefined ? 'unknown' : +(100 * v).toPrecision(3) + '%';
const shown = (text) => JSON.stringify(text).slice(1, -1);
const state = { checkpoint: data.checkpoints.length - 1, layer: 0, expert: 0, token: '',
  neuron: '', sort: 'load', only: 'all' };

const root = document.getElementById('explorer');
const controls = el(root, 'div', 'controls');
const choice = (parent, name, label) => {
  const node = el(el(parent, 'label', '', label), 'select');
  node.name = name;
  return node;
};
const fill = (select, options, value) => {
  select.replaceChildren();
  options.forEach(([key, text]) => { el(select, 'option', '', text).value = key; });
  select.value = value;
};
const pickers = {
  checkpoint: choice(controls, 'checkpoint', 'checkpoint'),
  layer: choice(controls, 'layer', 'layer'),
  expert: choice(controls, 'expert', 'expert'),
};
for (const [key, select] of Object.entries(pickers)) {
  select.addEventListener('change', () => set({ [key]: +select.value }));
}

// A matrix of cells: hover tells of one, a click chooses it.
class Matrix {
  constructor(parent, title, note, id) {
    this.card = el(parent, 'div', 'card');
    this.card.id = id;
    this.title = el(this.card, 'h3', '', title);
    this.note = el(this.card, 'p', 'note', note);
    this.plot = el(this.card, 'div', 'plot');
    this.canvas = el(this.plot, 'canvas');
    this.tip = el(this.plot, 'div', 'tip');
    const scale = el(this.card, 'div', 'legend');
    scale.style.margin = '4px 0 6px';
    const item = el(scale, 'span');
    this.low = el(item, 'span');
    el(item, 'i').style.cssText = 'width:120px;height:9px;background:linear-gradient(to right,' +
      MAP.map((c) => `rgb(${c})`).join(',') + ')';
    this.high = el(item, 'span');
    this.plot.addEventListener('pointermove', (event) => this.at(event, (r, c, x, y) => {
      this.tip.textContent = this.spec.tell(r, c);
      placeTip(this.tip, this.plot, x, y);
    }));
    this.plot.addEventListener('pointerleave', () => { this.tip.style.display = 'none'; });
    this.plot.addEventListener('click', (event) => this.at(event, (r, c) => {
      if (this.spec.pick) this.spec.pick(r, c);
    }));
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); })
      .observe(this.plot);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.draw());
  }

  // spec: rows, columns (labels), value(r, c), tell(r, c), low, high, mark, rowName, columnName
  show(spec) {
    this.card.style.display = spec ? '' : 'none';
    this.spec = spec;
    if (spec) this.draw();
  }

  draw() {
    const spec = this.spec, width = this.width = this.plot.clientWidth;
    if (!spec || !width) return;
    const rows = spec.rows.length, columns = spec.columns.length, ratio = devicePixelRatio || 1;
    let low = Infinity, high = -Infinity;
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const v = spec.value(r, c);
      if (v !== null && v !== undefined) { low = Math.min(low, v); high = Math.max(high, v); }
    }
    if (!isFinite(low)) { low = 0; high = 1; }
    if (spec.zero) low = Math.min(0, low);
    this.low.textContent = fmt(low); this.high.textContent = fmt(high);
    const left = 20 + 7 * Math.max(...spec.rows.map((t) => String(t).slice(0, 18).length));
    const w = (width - left - 16) / columns;
    const h = Math.min(26, Math.max(spec.square ? Math.min(w, 360 / rows) : 4, 300 / rows));
    const box = this.box = { left, top: 6, w, h };
    const height = box.top + h * rows + 38;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: width + 'px', height: height + 'px' });
    this.canvas.className = spec.pick ? 'pick' : '';
    const g = this.canvas.getContext('2d'), style = getComputedStyle(document.documentElement);
    g.scale(ratio, ratio);
    g.fillStyle = style.getPropertyValue('--grid');
    g.fillRect(left, box.top, w * columns, h * rows);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const v = spec.value(r, c);
      if (v === null || v === undefined) continue;
      g.fillStyle = shade(high > low ? (v - low) / (high - low) : .5);
      g.fillRect(left + c * w, box.top + r * h, Math.max(1, w - (w > 6 ? 1 : 0)),
        Math.max(1, h - (h > 6 ? 1 : 0)));
    }
    if (spec.mark) {
      g.strokeStyle = style.getPropertyValue('--c1'); g.lineWidth = 2.5;
      g.strokeRect(left + spec.mark[1] * w, box.top + spec.mark[0] * h, w, h);
    }
    g.fillStyle = style.getPropertyValue('--soft');
    g.font = '12px system-ui, sans-serif';
    g.textAlign = 'right'; g.textBaseline = 'middle';
    const everyRow = Math.ceil(13 / h);
    spec.rows.forEach((label, r) => {
      const y = box.top + (r + .5) * h;
      if (r % everyRow === 0) g.fillText(String(label).slice(0, 18), left - 6, y);
    });
    g.textAlign = 'center'; g.textBaseline = 'top';
    const everyColumn = Math.ceil(34 / w);
    spec.columns.forEach((label, c) => {
      if (c % everyColumn === 0) g.fillText(label, left + (c + .5) * w, box.top + h * rows + 5);
    });
    g.fillText(`${spec.rowName} by ${spec.columnName}`, left + w * columns / 2,
      box.top + h * rows + 21);
  }

  at(event, use) {
    if (!this.spec || !this.box) return;
    const place = this.plot.getBoundingClientRect(), box = this.box;
    const x = event.clientX - place.left, y = event.clientY - place.top;
    const c = Math.floor((x - box.left) / box.w), r = Math.floor((y - box.top) / box.h);
    if (c < 0 || c >= this.spec.columns.length || r < 0 || r >= this.spec.rows.length) {
      this.tip.style.display = 'none'; return;
    }
    use(r, c, x, y);
  }
}

const wide = el(root, 'div');
const loads = new Matrix(wide, 'Load of every expert', 'share of all tokens', 'loads');
loads.card.className = 'card wide';
const missing = el(root, 'p', 'note');
missing.id = 'missing';
const grid = el(root, 'div', 'grid');
const together = new Matrix(grid, 'Experts together', '', 'together');
const domains = new Matrix(grid, 'Domains', 'share of each domain\'s tokens', 'domains');

const tokenCard = el(grid, 'div', 'card');
tokenCard.id = 'tokens';
const tokenTitle = el(tokenCard, 'h3');
el(tokenCard, 'p', 'note', 'share of the occurrences of a frequent token routed to this expert');
const tokenFilters = el(tokenCard, 'div', 'filters');
const tokenInput = el(el(tokenFilters, 'label', '', 'token contains'), 'input');
tokenInput.name = 'token';
tokenInput.addEventListener('input', () => set({ token: tokenInput.value }));
const tokenRows = el(tokenCard, 'div', 'rows');

const neuronCard = el(root, 'div', 'card wide');
neuronCard.id = 'neurons';
neuronCard.style.marginTop = '14px';
const neuronTitle = el(neuronCard, 'h3');
const neuronNote = el(neuronCard, 'p', 'note');
const neuronFilters = el(neuronCard, 'div', 'filters');
const sortPicker = choice(neuronFilters, 'sort', 'order');
fill(sortPicker, [['load', 'most kept first'], ['number', 'by number'],
  ['token', 'most token-specific first'], ['domain', 'most domain-specific first']], 'load');
sortPicker.addEventListener('change', () => set({ sort: sortPicker.value }));
const onlyPicker = choice(neuronFilters, 'only', 'show');
fill(onlyPicker, [['all', 'all'], ['dead', 'dead only'], ['alive', 'kept at least once']], 'all');
onlyPicker.addEventListener('change', () => set({ only: onlyPicker.value }));
const neuronInput = el(el(neuronFilters, 'label', '', 'neuron number'), 'input');
neuronInput.name = 'neuron';
neuronInput.type = 'number';
neuronInput.addEventListener('input', () => set({ neuron: neuronInput.value }));
const neuronCount = el(neuronCard, 'p', 'note');
neuronCount.id = 'neuron-count';
const neuronPlot = el(neuronCard, 'div', 'plot');
const neuronCanvas = el(neuronPlot, 'canvas');
const neuronTip = el(neuronPlot, 'div', 'tip');
const pairs = new Matrix(root, 'Neurons kept together', '', 'pairs');
const unpaired = el(root, 'p', 'note');
unpaired.id = 'unpaired';
pairs.card.className = 'card wide';
pairs.card.style.marginTop = '14px';

let bars = null;
const tokenText = (place) => place < 0 ? null : shown(data.tokens[place][1]);
// A space is seen.
const visible = (place) => tokenText(place).replaceAll(' ', '␣');

const tellNeuron = (neurons, k) => {
  let text = `neuron ${k}: kept by ${percent(neurons.load[k])} of the tokens`;
  if (neurons.token[k] >= 0) {
    text += `; by ${percent(neurons.tokenShare[k])} of "${visible(neurons.token[k])}"`;
  }
  if (data.domains.length > 1 && neurons.domain[k] >= 0) {
    text += `; by ${percent(neurons.domainShare[k])} of ${data.domains[neurons.domain[k]]}`;
  }
  return text;
};

const drawNeurons = () => {
  const width = neuronPlot.clientWidth;
  if (!bars || !width) return;
  bars.drawn = width;
  const ratio = devicePixelRatio || 1, height = 190, top = 8, bottom = height - 22, left = 46;
  Object.assign(neuronCanvas, { width: width * ratio, height: height * ratio });
  Object.assign(neuronCanvas.style, { width: width + 'px', height: height + 'px' });
  const g = neuronCanvas.getContext('2d'), style = getComputedStyle(document.documentElement);
  g.scale(ratio, ratio);
  const w = Math.min(24, (width - left - 16) / Math.max(1, bars.order.length));
  Object.assign(bars, { left, w });
  const most = Math.max(1e-9, ...bars.neurons.load.filter((v) => v !== null));
  g.font = '12px system-ui, sans-serif'; g.textAlign = 'right'; g.textBaseline = 'middle';
  for (const share of [0, .5, 1]) {
    const y = bottom - share * (bottom - top);
    g.fillStyle = style.getPropertyValue('--grid'); g.fillRect(left, y, width - left - 16, 1);
    g.fillStyle = style.getPropertyValue('--soft'); g.fillText(percent(share * most), left - 6, y);
  }
  g.fillStyle = style.getPropertyValue('--c0');
  bars.order.forEach((k, place) => {
    const h = (bars.neurons.load[k] || 0) / most * (bottom - top);
    g.fillRect(left + place * w, bottom - h, Math.max(1, w - (w > 4 ? 1 : 0)), h);
  });
  // What all would be kept by if the load were even.
  const even = bottom - bars.even / most * (bottom - top);
  g.fillStyle = style.getPropertyValue('--c1');
  if (even >= top) g.fillRect(left, even, width - left - 16, 1);
  g.fillStyle = style.getPropertyValue('--soft'); g.textAlign = 'left';
  g.fillText('neurons; line: an even load', left, height - 8);
};
neuronPlot.addEventListener('pointermove', (event) => {
  if (!bars) return;
  const place = neuronPlot.getBoundingClientRect();
  const at = Math.floor((event.clientX - place.left - bars.left) / bars.w);
  if (at < 0 || at >= bars.order.length) { neuronTip.style.display = 'none'; return; }
  neuronTip.textContent = tellNeuron(bars.neurons, bars.order[at]);
  placeTip(neuronTip, neuronPlot, event.clientX - place.left, event.clientY - place.top);
});
neuronPlot.addEventListener('pointerleave', () => { neuronTip.style.display = 'none'; });
new ResizeObserver(() => { if (bars && bars.drawn !== neuronPlot.clientWidth) drawNeurons(); })
  .observe(neuronPlot);

const showTokens = (rows) => {
  tokenTitle.textContent = `Tokens of expert ${state.expert}`;
  tokenRows.replaceChildren();
  const wanted = state.token.toLowerCase();
  const fitting = rows.filter(([place]) => tokenText(place).toLowerCase().includes(wanted));
  if (!fitting.length) {
    el(tokenRows, 'p', 'note', rows.length ? 'No token fits.'
      : 'No frequent token: none occurs often enough, or the trace holds no token ids.');
    return;
  }
  const table = el(tokenRows, 'table'), head = el(table, 'tr');
  for (const name of ['token', 'share', 'occurrences']) el(head, 'th', '', name);
  for (const [place, share, count] of fitting) {
    const row = el(table, 'tr');
    el(row, 'td', 'token', visible(place)).title = `token ${data.tokens[place][0]}`;
    el(row, 'td', '', percent(share));
    el(row, 'td', '', count.toLocaleString('en'));
  }
};

const showNeurons = (part, layer) => {
  const neurons = part && part.neurons && part.neurons[state.expert];
  neuronCard.style.display = neurons ? '' : 'none';
  unpaired.textContent = '';
  if (!neurons) { bars = null; pairs.show(null); return; }
  const load = neurons.load.map((v) => v || 0);
  const excess = (share, k) => share[k] === null ? -1 : share[k] - load[k];
  let order = load.map((_, k) => k).filter((k) =>
    (state.only !== 'dead' || load[k] === 0) && (state.only !== 'alive' || load[k] > 0) &&
    (state.neuron === '' || k === +state.neuron));
  const key = { load: (k) => load[k], number: (k) => -k,
    token: (k) => excess(neurons.tokenShare, k), domain: (k) => excess(neurons.domainShare, k),
  }[state.sort];
  order = order.map((k) => [key(k), k]).sort((a, b) => b[0] - a[0] || a[1] - b[1])
    .map(([, k]) => k);
  bars = { neurons, order, even: layer.kept / layer.neurons };
  const dead = load.filter((v) => v === 0).length;
  neuronTitle.textContent = `Neurons of expert ${state.expert}`;
  let note = `${layer.kept} of ${layer.neurons} kept by a token; ${dead} never`;
  if (part.adjacent[state.expert] !== null) {
    note += `; adjacent tokens share ${percent(part.adjacent[state.expert])}`;
  }
  if (part.saturation && part.saturation[state.expert] !== null) {
    note += `; ${percent(part.saturation[state.expert])} shared with the last checkpoint`;
  }
  neuronNote.textContent = note;
  neuronCount.textContent = order.length === 1 ? tellNeuron(neurons, order[0])
    : `${order.length} of ${layer.neurons} neurons shown`;
  drawNeurons();
  const pair = part.pairs[state.expert];
  pairs.note.textContent = 'share of the tokens that keep i that also keep j; the most kept ' +
    'neurons of the busiest experts are counted';
  if (!pair && Object.keys(part.pairs).length) {
    unpaired.textContent = 'Neurons kept together were counted for the busiest experts of this ' +
      'layer only: ' + Object.keys(part.pairs).join(', ') + '.';
  }
  pairs.show(!pair ? null : {
    rows: pair.neurons, columns: pair.neurons, rowName: 'neuron i', columnName: 'neuron j',
    square: true, zero: true,
    value: (r, c) => r === c ? null : pair.values[r * pair.neurons.length + c],
    tell: (r, c) => `of the tokens that keep ${pair.neurons[r]}, ` +
      `${percent(pair.values[r * pair.neurons.length + c])} keep ${pair.neurons[c]} ` +
      `(of all ${percent(load[pair.neurons[c]])})`,
  });
};

const draw = () => {
  const layer = data.layers[state.layer], load = data.loads[state.checkpoint];
  fill(pickers.checkpoint, data.checkpoints.map((one, k) => [k, one.name]), state.checkpoint);
  fill(pickers.layer, data.layers.map((one, k) => [k, `layer ${one.layer}`]), state.layer);
  fill(pickers.expert, load[state.layer].map((v, e) => [e, `expert ${e} (${percent(v)})`]),
    state.expert);
  const most = Math.max(...data.layers.map((one) => one.experts));
  loads.show({
    rows: data.layers.map((one) => one.layer), columns: [...Array(most).keys()],
    rowName: 'layer', columnName: 'expert', zero: true, mark: [state.layer, state.expert],
    value: (r, c) => load[r][c],
    tell: (r, c) => `layer ${data.layers[r].layer}, expert ${c}: ${percent(load[r][c])} of tokens`,
    pick: (r, c) => { if (c < data.layers[r].experts) set({ layer: r, expert: c }); },
  });
  const part = data.parts[`${state.checkpoint}:${state.layer}`];
  missing.textContent = part ? '' : 'This layer of this checkpoint is left out of the page to ' +
    'keep it small; the Parquet tables have it.';
  grid.style.display = part ? '' : 'none';
  if (part) {
    const names = [...Array(layer.experts).keys()];
    together.title.textContent = `Experts together, layer ${layer.layer}`;
    together.note.textContent = 'share of the tokens of i that also go to j';
    together.show({
      rows: names, columns: names, rowName: 'expert i', columnName: 'expert j', square: true,
      zero: true, mark: [state.expert, state.expert],
      value: (r, c) => r === c ? null : part.together[r * layer.experts + c],
      tell: (r, c) => r === c ? `expert ${r}` : `of the tokens of expert ${r}, ` +
        `${percent(part.together[r * layer.experts + c])} also go to ${c} ` +
        `(of all ${percent(load[state.layer][c])})`,
      pick: (r) => set({ expert: r }),
    });
    domains.show(data.domains.length < 2 ? null : {
      rows: data.domains, columns: names, rowName: 'domain', columnName: 'expert', zero: true,
      value: (r, c) => part.domains[r][c],
      tell: (r, c) => `${percent(part.domains[r][c])} of the tokens of ${data.domains[r]} go to ` +
        `expert ${c} (of all ${percent(load[state.layer][c])})`,
      pick: (r, c) => set({ expert: c }),
    });
    showTokens(part.tokens[state.expert]);
  }
  showNeurons(part, layer);
};

const set = (changes) => {
  Object.assign(state, changes);
  state.expert = Math.min(state.expert, data.layers[state.layer].experts - 1);
  draw();
};
set({});
})();
