// Puts the page together from the JSON in it: what is chosen, filtered, sorted and copied.

const content = JSON.parse(document.getElementById('content').textContent);
const byId = (id) => document.getElementById(id);
const chosen = { axis: content.axes[content.start || 0], metric: content.metrics[0] || null, hidden: new Set() };
const rows = content.rows;

for (const row of rows) {
  row.numbers = (metric) => numbersOf(row, metric);
}

function say(text) {
  byId('status').textContent = text;
}

function numbersOf(row, first) {
  const metrics = [...content.metrics].sort((a, b) => (b === first) - (a === first));
  const scored = metrics.map(({ key, label }) => {
    const { text, change } = row.metrics[key];
    return change ? [`${label} (vs dense)`, `${text} (${change})`] : [label, text];
  });
  const cells = content.columns.filter(({ key }) => key in row.cells).map(({ key, label }) => [label, row.cells[key]]);
  return [...scored, ...cells.filter(([, text]) => text), ...row.more];
}

function readCell(row, key) {
  const scored = chosen.metric ? row.metrics[chosen.metric.key] : null;
  if (key === 'metric') return scored;
  if (key === 'change') return { text: scored.change, value: scored.delta };
  return { text: row.cells[key], value: row.values[key] };
}

function fillHeader() {
  byId('overline').textContent = content.overline;
  byId('lead').textContent = content.lead;
  for (const [name, text] of content.facts) {
    const fact = element('div');
    fact.append(element('dt', name), element('dd', text));
    byId('facts').append(fact);
  }
  if (content.link) {
    const link = element('a', content.link.text);
    Object.assign(link, { href: content.link.address, target: '_blank', rel: 'noopener noreferrer' });
    byId('lead').append(' ', link);
  }
  for (const { label, value, note } of content.tiles) {
    const tile = element('div', '', 'tile');
    const look = value.length > 20 ? 'value long' : 'value';
    tile.append(element('p', label, 'quiet'), breakable('p', value, look), element('p', note, 'quiet'));
    byId('tiles').append(tile);
  }
  byId('notes').append(...content.notes.map((note) => element('li', note)));
  byId('footer').textContent = content.footer;
  byId('table-title').textContent = content.table_title;
}

function fillChoices() {
  for (const axis of content.axes) {
    const label = element('label');
    const state = { type: 'radio', name: 'axis', value: axis.key, checked: axis === chosen.axis };
    const input = Object.assign(element('input'), state);
    input.addEventListener('change', () => {
      chosen.axis = axis;
      draw();
    });
    label.append(input, element('span', axis.label));
    byId('axes').append(label);
  }
  byId('metric-choice').hidden = content.metrics.length < 2;
  byId('metric').append(...content.metrics.map(({ key, label }) => new Option(label, key)));
  byId('metric').addEventListener('change', (event) => {
    chosen.metric = content.metrics.find(({ key }) => key === event.target.value);
    table.refresh({ metric: chosen.metric.label });
    draw();
  });
}

function checkbox(label, className, kind) {
  const [box, input] = [element('label', '', className), element('input')];
  Object.assign(input, { type: 'checkbox', checked: true });
  box.append(input);
  if (kind) box.append(marker(kind));
  box.append(element('span', label));
  return { box, input };
}

// A box for every pattern, and one for all patterns of a kind: the legend of the chart too.
function fillFilters() {
  for (const kind of Object.keys(KINDS)) {
    const members = rows.filter((row) => row.kind === kind && kind !== 'dense');
    if (!members.length) continue;
    const group = element('div', '', 'group');
    group.setAttribute('role', 'group');
    group.setAttribute('aria-label', KINDS[kind].label);
    const whole = checkbox(KINDS[kind].label, 'kind', kind);
    const parts = members.map((row) => ({ row, ...checkbox(shortName(row), 'chip') }));
    for (const { row, input } of parts) input.setAttribute('aria-label', row.name);
    const update = () => {
      for (const { row, input } of parts) chosen.hidden[input.checked ? 'delete' : 'add'](row);
      const count = parts.filter(({ input }) => input.checked).length;
      Object.assign(whole.input, { checked: count === parts.length, indeterminate: count > 0 && count < parts.length });
      draw(false);
    };
    whole.input.addEventListener('change', () => {
      for (const { input } of parts) input.checked = whole.input.checked;
      update();
    });
    for (const { input } of parts) input.addEventListener('change', update);
    const chips = element('div', '', 'chips');
    chips.append(...parts.map(({ box }) => box));
    group.append(whole.box, chips);
    byId('filters').append(group);
  }
}

function fillName(row, cell) {
  const [name, texts] = [element('div', '', 'name'), element('div')];
  if (row.kind) name.append(marker(row.kind));
  texts.append(breakable('span', row.name, 'pattern'));
  if (row.badge) texts.append(element('span', row.badge, 'badge'));
  if (row.detail) texts.append(element('span', row.detail, 'detail'));
  name.append(texts);
  if (row.snippet) {
    const button = element('button', 'Copy', 'copy');
    button.type = 'button';
    button.title = 'Copy the Python that loads it';
    button.setAttribute('aria-label', `Copy the Python that loads ${row.name}`);
    button.addEventListener('click', () => copy(row, button));
    name.append(button);
  }
  cell.append(name);
}

function showSnippet(row) {
  byId('snippet').hidden = false;
  byId('snippet-title').textContent = `Python that loads ${row.name}`;
  byId('snippet').querySelector('code').textContent = row.snippet;
}

async function copy(row, button) {
  showSnippet(row);
  if (!(await writeClipboard(row.snippet))) {
    getSelection().selectAllChildren(byId('snippet').querySelector('code'));
    say('This browser does not let pages copy. The Python is selected below the table.');
    return;
  }
  button.textContent = 'Copied';
  button.classList.add('done');
  say(`Copied the Python that loads ${row.name}`);
  setTimeout(() => {
    button.textContent = 'Copy';
    button.classList.remove('done');
  }, 2000);
}

async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelection(text); // no clipboard for pages without HTTPS, nor in frames that may not use it
  }
}

function copySelection(text) {
  const focused = document.activeElement;
  const area = element('textarea', text, 'hidden');
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand('copy');
  area.remove();
  focused.focus();
  return isCopied;
}

function draw(isAnimated = true) {
  const { axis, metric } = chosen;
  const shown = rows.filter((row) => !chosen.hidden.has(row));
  table.show((row) => !chosen.hidden.has(row));
  const count = `${shown.length} of ${rows.length} shown`;
  if (byId('count').textContent && byId('count').textContent !== count) say(count);
  byId('count').textContent = count;
  const isMeasured = rows.some((row) => row.kind !== 'dense' && row.values[axis.key] != null);
  byId('chart-title').textContent = `${metric ? metric.label : 'Metric'} over ${axis.label.toLowerCase()}`;
  byId('missing').textContent = metric ? axis.missing : content.metric_missing;
  byId('missing').hidden = Boolean(metric) && isMeasured;
  byId('plot').hidden = byId('caption').hidden = !byId('missing').hidden;
  if (byId('plot').hidden) return;
  byId('chart').setAttribute('aria-label', `${metric.label} over ${axis.title}, ${shown.length} checkpoints`);
  const front = plot.draw(axis, metric, shown, isAnimated);
  const better = `${axis.better} ${axis.title.split(',')[0]} and ${metric.less ? 'lower' : 'higher'} ${metric.label}`;
  byId('caption').textContent = `Pareto front, the line and its larger points: none of those shown has both ${better}. `
    + `On it: ${front.map((row) => row.name).join(', ')}.`;
}

function go(row) {
  const line = table.line(row);
  const target = line.querySelector('.copy') || line;
  line.tabIndex = -1;
  target.focus({ preventScroll: true });
  line.scrollIntoView({ block: 'center', behavior: 'smooth' });
}

const table = makeTable(byId('table'), content.columns, rows, readCell, fillName);
if (chosen.metric) table.refresh({ metric: chosen.metric.label });
const plot = makePlot(byId('chart'), byId('tooltip'), {
  picked: go,
  said: say,
  shown: (row) => rows.forEach((each) => table.line(each).classList.toggle('marked', each === row)),
});
for (const row of rows) {
  const line = table.line(row);
  line.addEventListener('mouseenter', () => plot.mark(row));
  line.addEventListener('mouseleave', () => plot.mark(null));
}
fillHeader();
fillChoices();
fillFilters();
const first = rows.find((row) => row.snippet && row.kind !== 'dense') || rows.find((row) => row.snippet);
if (first) showSnippet(first);
if (content.layers) {
  byId('layers-card').hidden = false;
  byId('layers-title').textContent = content.layers.title;
  byId('layers-note').textContent = content.layers.note;
  const read = (row, key) => ({ text: row.cells[key], value: row.values[key] });
  makeTable(byId('layers'), content.layers.columns, content.layers.rows, read, fillName);
}
draw(false);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => draw(false));
