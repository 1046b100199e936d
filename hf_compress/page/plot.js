// Draws checkpoints over one axis. Knows Chart.js, and nothing of tables and filters.

// Shapes tell kinds apart where colours do not; kinds.py and page.css know the same names.
const KINDS = {
  dense: { label: 'dense', shape: 'circle', turn: 0 },
  unstructured: { label: 'unstructured', shape: 'circle', turn: 0 },
  'within-layers': { label: 'unstructured, within layers', shape: 'triangle', turn: 0 },
  'n-m': { label: 'N:M', shape: 'rectRot', turn: 0 },
  structured: { label: 'filters, neurons, heads', shape: 'rect', turn: 0 },
  'low-rank': { label: 'low rank', shape: 'triangle', turn: 180 },
  rounded: { label: 'rounded', shape: 'triangle', turn: 90 },
  chained: { label: 'chained', shape: 'rectRounded', turn: 0 },
  coded: { label: 'coded', shape: 'triangle', turn: 270 },
  other: { label: 'other', shape: 'circle', turn: 0 },
};
const REACH = 16; // pixels from a point within which it is meant

function formatSize(count) {
  let size = count;
  for (const unit of ['B', 'kB', 'MB', 'GB']) {
    if (Math.abs(size) < 1000 || unit === 'GB') return `${+size.toFixed(unit === 'B' ? 0 : 1)} ${unit}`;
    size /= 1000;
  }
}

function formatTick(unit, value) {
  if (unit === 'bytes') return formatSize(value);
  const text = String(+value.toPrecision(6));
  return { percent: `${text} %`, ratio: `${text} x` }[unit] || text;
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Points that no other one beats: at least as good in both, and better in one.
function paretoFront(points, isMoreBetterX, isMoreBetterY) {
  const gain = (a, b, isMore) => (isMore ? a - b : b - a);
  const beats = (q, p) => {
    const [x, y] = [gain(q.x, p.x, isMoreBetterX), gain(q.y, p.y, isMoreBetterY)];
    return x >= 0 && y >= 0 && (x > 0 || y > 0);
  };
  return points.filter((p) => !points.some((q) => beats(q, p))).sort((a, b) => a.x - b.x || a.y - b.y);
}

function valueRange(values, unit) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low) * 0.1 || Math.abs(high) * 0.05 || 1;
  const range = { suggestedMin: low >= 0 ? Math.max(0, low - pad) : low - pad, suggestedMax: high + pad };
  const most = unit === 'percent' ? 100 : 1;
  return high <= most && high + pad > most && low >= 0 ? { ...range, max: most } : range;
}

function axisRange(axis, points) {
  if (axis.unit === 'percent') return { min: 0, max: 100 };
  if (axis.unit === 'ratio') return { suggestedMin: 0.6, suggestedMax: 1.2 };
  return { min: 0, suggestedMax: 1.05 * Math.max(...points.map((p) => p.x)) };
}

function datasetsOf(points, front) {
  const kinds = [...new Set(points.map((p) => p.row.kind))];
  const line = {
    label: 'Pareto front', type: 'line', data: front, order: 2, clip: 16,
    showLine: true, pointRadius: 0, pointHitRadius: 0, borderWidth: 1.5, borderColor: cssColor('front'),
  };
  const groups = kinds.map((kind) => {
    const { label, shape, turn } = KINDS[kind];
    return {
      label, data: points.filter((p) => p.row.kind === kind), pointStyle: shape, rotation: turn, order: 1, clip: 16,
      backgroundColor: cssColor(kind === 'dense' ? 'card' : kind),
      borderColor: cssColor(kind === 'dense' ? 'dense' : 'card'),
      borderWidth: kind === 'dense' ? 2 : 1.5,
      radius: (context) => (context.raw?.isFront ? 8 : 5.5) + (shape === 'rectRot' || shape === 'triangle' ? 1 : 0),
      hoverRadius: (context) => (context.raw?.isFront ? 9 : 7),
      hoverBorderColor: cssColor('ink'),
      hoverBackgroundColor: cssColor(kind === 'dense' ? 'card' : kind),
    };
  });
  return [line, ...groups];
}

// The dense checkpoint as a line, and its value at the end where its point is not.
function drawDense(chart, value, text, point) {
  const { ctx, chartArea: area, scales } = chart;
  const y = scales.y.getPixelForValue(value);
  ctx.save();
  ctx.strokeStyle = cssColor('dense');
  ctx.setLineDash([5, 4]);
  ctx.lineWidth = 1.25;
  ctx.beginPath();
  ctx.moveTo(area.left, y);
  ctx.lineTo(area.right, y);
  ctx.stroke();
  ctx.restore();
  const isRight = point && scales.x.getPixelForValue(point.x) > (area.left + area.right) / 2;
  const x = isRight ? area.left + 4 : area.right - textWidth(chart, text);
  const label = { text, x, y: y - 16 < area.top ? y + 14 : y - 6, color: cssColor('quiet') };
  return { label, box: [area.left, y - 1, area.right, y + 1] };
}

function textWidth(chart, text) {
  chart.ctx.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return chart.ctx.measureText(text).width;
}

// Shares say enough where colour and shape say the rest.
function shortName(row) {
  const isShare = row.kind === 'unstructured' || row.kind === 'within-layers';
  return isShare ? row.name.split(':')[1] : row.name;
}

// Boxes along the line of the front, so that no name is crossed by it.
function boxesOfLine(at) {
  const front = at.filter(({ p }) => p.isFront).sort((a, b) => a.x - b.x || a.y - b.y);
  return front.slice(1).flatMap((end, i) => {
    const [start, count] = [front[i], Math.ceil(Math.hypot(end.x - front[i].x, end.y - front[i].y) / 4)];
    return Array.from({ length: count }, (_, k) => {
      const [x, y] = [start.x + ((end.x - start.x) * k) / count, start.y + ((end.y - start.y) * k) / count];
      return [x - 1, y - 1, x + 1, y + 1];
    });
  });
}

// Names beside their points, those of the front first, wherever there is room.
function placeNames(chart, points, taken) {
  const { chartArea: area, scales } = chart;
  const at = points.map((p) => ({ x: scales.x.getPixelForValue(p.x), y: scales.y.getPixelForValue(p.y), p }));
  const boxes = [...at.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]), ...boxesOfLine(at), ...taken];
  const isFree = (box) => boxes.every((b) => box[2] < b[0] || box[0] > b[2] || box[3] < b[1] || box[1] > b[3]);
  const isInside = ([left, top, right, low]) =>
    left >= area.left && right <= area.right + 8 && top >= area.top && low <= area.bottom;
  const placed = [];
  const isNamed = ({ p }) => !['dense', 'within-layers'].includes(p.row.kind); // these lie beside those over all layers
  for (const { x, y, p } of at.filter(isNamed).sort((a, b) => b.p.isFront - a.p.isFront)) {
    const text = shortName(p.row);
    const width = textWidth(chart, text);
    const places = [[x - width / 2, y + 22], [x + 13, y + 4], [x - width - 13, y + 4], [x - width / 2, y - 13]];
    const around = places.map(([left, base]) => [left, base - 11, left + width, base + 3]);
    const found = around.find((box) => isInside(box) && isFree(box));
    if (!found) continue;
    boxes.push(found);
    placed.push({ text, x: found[0], y: found[3] - 3, color: cssColor('soft') });
  }
  return placed;
}

function marksPlugin(state) {
  return {
    id: 'marks',
    beforeDatasetsDraw(chart) {
      const point = state.points.find((p) => p.row.kind === 'dense');
      state.line = state.dense === null ? null : drawDense(chart, state.dense, `dense ${state.denseText}`, point);
    },
    afterDatasetsDraw(chart) {
      const own = state.line ? [state.line.label] : [];
      const taken = own.map((l) => [l.x, l.y - 11, l.x + textWidth(chart, l.text), l.y + 3]);
      if (state.line) taken.push(state.line.box);
      for (const label of [...own, ...placeNames(chart, state.points, taken)]) {
        textWidth(chart, label.text);
        chart.ctx.fillStyle = label.color;
        chart.ctx.fillText(label.text, label.x, label.y);
      }
      if (state.marked) drawRing(chart, state.marked);
    },
  };
}

function drawRing(chart, point) {
  const { ctx, scales } = chart;
  ctx.save();
  ctx.strokeStyle = cssColor('accent');
  ctx.lineWidth = 2;
  ctx.beginPath();
  ctx.arc(scales.x.getPixelForValue(point.x), scales.y.getPixelForValue(point.y), 13, 0, 2 * Math.PI);
  ctx.stroke();
  ctx.restore();
}

function chartOptions(state, isAnimated) {
  const isStill = !isAnimated || matchMedia('(prefers-reduced-motion: reduce)').matches;
  const look = { color: cssColor('quiet'), maxRotation: 0, padding: 6 };
  const tick = (unit) => ({ ...look, callback: (value) => formatTick(unit, value) });
  const title = (text) => ({ display: true, text, color: cssColor('soft'), font: { size: 13 } });
  const { axis, metric, points } = state;
  return {
    responsive: true,
    maintainAspectRatio: false,
    animation: isStill ? false : { duration: 350 },
    layout: { padding: { top: 8, right: 10 } },
    interaction: { mode: 'nearest', intersect: false },
    onHover(event, elements) {
      const near = event.type === 'mouseout' ? [] : pointsNear(state, event, elements);
      state.canvas.style.cursor = near.length ? 'pointer' : 'default';
      if ((near[0] || null) !== state.marked) showPoints(state, near);
    },
    onClick(event, elements) {
      const [point] = pointsNear(state, event, elements);
      if (point) state.picked(point.row);
    },
    plugins: { legend: { display: false }, tooltip: { enabled: false } },
    scales: {
      x: {
        type: 'linear',
        ...axisRange(axis, points),
        grid: { display: false },
        border: { color: cssColor('line') },
        ticks: { ...tick(axis.unit), maxTicksLimit: 8 },
        title: title(axis.title),
      },
      y: {
        ...valueRange(points.map((p) => p.y), metric.unit),
        grid: { color: cssColor('grid') },
        border: { display: false },
        ticks: { ...tick(metric.unit), maxTicksLimit: 7 },
        title: title(metric.label + (metric.less ? ', lower is better' : '')),
      },
    },
  };
}

// A plot of rows; `picked(row)` is called for a click or Enter on a point, `shown(row)` when a point's numbers appear,
// `said(text)` with the numbers of a point that a key goes to.
function makePlot(canvas, tooltip, callbacks) {
  const state = { ...callbacks, canvas, tooltip, chart: null, points: [], marked: null, dense: null, line: null };
  bindKeys(state);
  for (const type of ['blur', 'mouseleave']) canvas.addEventListener(type, () => state.marked && showPoints(state, []));
  return {
    draw: (axis, metric, rows, isAnimated) => drawRows(state, axis, metric, rows, isAnimated),
    mark(row) {
      state.marked = state.points.find((p) => p.row === row) || null;
      tooltip.hidden = true;
      state.chart?.draw();
    },
  };
}

// Draws rows over an axis and returns those of the front; the others move to their new places.
function drawRows(state, axis, metric, rows, isAnimated) {
  const valueOf = (row) => row.metrics[metric.key]?.value ?? null;
  const points = rows.map((row) => ({ x: row.values[axis.key] ?? null, y: valueOf(row), row }));
  const dense = rows.find((row) => row.kind === 'dense');
  Object.assign(state, { axis, metric, marked: null, points: points.filter((p) => p.x !== null && p.y !== null) });
  Object.assign(state, { dense: dense ? valueOf(dense) : null, denseText: dense?.metrics[metric.key]?.text });
  const front = paretoFront(state.points, axis.better === 'more', !metric.less);
  for (const point of state.points) point.isFront = front.includes(point);
  state.tooltip.hidden = true;
  const data = { datasets: datasetsOf(state.points, front) };
  if (state.chart) {
    Object.assign(state.chart, { data, options: chartOptions(state, isAnimated) });
    state.chart.update();
  } else {
    const options = chartOptions(state, false);
    state.chart = new Chart(state.canvas, { type: 'scatter', data, options, plugins: [marksPlugin(state)] });
  }
  return front.map((p) => p.row);
}

function showPoints(state, points) {
  const { chart, canvas, tooltip } = state;
  state.marked = points[0] || null;
  fillTooltip(tooltip, points.map((p) => p.row), state.metric);
  if (points.length) placeTooltip(tooltip, canvas, chart, points[0]);
  state.shown(points.length ? points[0].row : null);
  chart.draw();
}

function pointsNear({ chart }, event, elements) {
  const isNear = ({ element }) => Math.hypot(element.x - event.x, element.y - event.y) < REACH;
  const points = elements.filter(isNear).map((e) => chart.data.datasets[e.datasetIndex].data[e.index]);
  return [...new Set(points)]; // those of the front are in its line too
}

function bindKeys(state) {
  state.canvas.addEventListener('keydown', (event) => {
    const order = [...state.points].sort((a, b) => a.x - b.x || a.y - b.y);
    const next = nextPoint(event.key, order, order.indexOf(state.marked));
    if (event.key === 'Enter' && state.marked) state.picked(state.marked.row);
    if (event.key === 'Escape') showPoints(state, []);
    if (!next) return;
    event.preventDefault();
    showPoints(state, [next]);
    state.said(tooltipText(state.tooltip));
  });
}

function nextPoint(key, order, index) {
  const last = order.length - 1;
  const back = index < 0 ? last : index - 1;
  const to = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: back, ArrowUp: back, Home: 0, End: last }[key];
  return to === undefined ? null : order[Math.min(last, Math.max(0, to))];
}

function fillTooltip(tooltip, rows, metric) {
  tooltip.hidden = !rows.length;
  if (!rows.length) return;
  const [row, ...others] = rows;
  const list = element('dl');
  for (const [name, text] of row.numbers(metric)) list.append(element('dt', name), element('dd', text));
  const title = element('p', row.name, 'tooltip-title');
  title.prepend(marker(row.kind));
  tooltip.replaceChildren(title, list);
  if (others.length) tooltip.append(element('p', `also here: ${others.map((r) => r.name).join(', ')}`, 'quiet'));
}

function tooltipText(tooltip) {
  const terms = [...tooltip.querySelectorAll('dt')].map((dt) => `${dt.textContent} ${dt.nextSibling.textContent}`);
  return `${tooltip.firstChild.textContent}: ${terms.join(', ')}`;
}

function placeTooltip(tooltip, canvas, chart, point) {
  const [x, y] = [chart.scales.x.getPixelForValue(point.x), chart.scales.y.getPixelForValue(point.y)];
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const isRight = x + width + 20 <= canvas.clientWidth;
  const left = isRight ? x + 18 : x - width - 18;
  tooltip.style.left = `${Math.max(0, Math.min(left, canvas.clientWidth - width))}px`;
  tooltip.style.top = `${Math.max(0, Math.min(y - height / 2, canvas.clientHeight - height))}px`;
}
