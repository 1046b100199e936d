// A table that sorts itself: a click, or Enter, on a header. And the small parts that all of the page is made of.

const SVG = 'http://www.w3.org/2000/svg';
const PATHS = {
  circle: 'M6 1.2a4.8 4.8 0 1 0 0 9.6a4.8 4.8 0 1 0 0-9.6z',
  triangle: 'M6 .8 11.4 10.4H.6z',
  rect: 'M1.6 1.6h8.8v8.8H1.6z',
  rectRot: 'M6 .3 11.7 6 6 11.7.3 6z',
  rectRounded: 'M4 1.4h4a2.6 2.6 0 0 1 2.6 2.6v4a2.6 2.6 0 0 1-2.6 2.6H4a2.6 2.6 0 0 1-2.6-2.6V4A2.6 2.6 0 0 1 4 1.4z',
};

// Text only ever becomes text: nothing here parses HTML.
function element(name, text = '', className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Long names may break behind a colon and the like, and in front of the next module's name.
function breakable(name, text, className) {
  const made = element(name, '', className);
  for (const part of text.split(/(?<=[:+_/])|(?<=\.)(?=[a-z])/)) made.append(part, document.createElement('wbr'));
  return made;
}

function marker(kind) {
  const { shape, turn } = KINDS[kind];
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 12 12');
  svg.setAttribute('class', 'marker');
  svg.setAttribute('aria-hidden', 'true');
  svg.dataset.kind = kind;
  const path = document.createElementNS(SVG, 'path');
  path.setAttribute('d', PATHS[shape]);
  path.setAttribute('transform', `rotate(${turn} 6 6)`);
  svg.append(path);
  return svg;
}

// `read(row, key)` gives { text, value }; `decorate(row, cell)` fills the first cell.
function makeTable(table, columns, rows, read, decorate) {
  const sorting = { key: null, isFalling: false };
  const lines = new Map(rows.map((row) => [row, makeLine(row, columns, decorate)]));
  const heads = columns.map((column) => makeHead(column, () => sortBy(column.key)));
  const [head, body] = [element('thead'), element('tbody')];
  const headLine = element('tr');
  headLine.append(...heads.map(({ cell }) => cell));
  head.append(headLine);
  table.replaceChildren(head, body);

  function sortBy(key) {
    sorting.isFalling = sorting.key === key && !sorting.isFalling;
    sorting.key = key;
    refresh();
  }
  function compare(a, b) {
    const [x, y] = [a, b].map((row) => (sorting.key === 'name' ? row.name : read(row, sorting.key).value ?? null));
    if (x === null || y === null) return (x === null) - (y === null); // what was not measured stays below
    const order = typeof x === 'string' ? x.localeCompare(y, 'en', { numeric: true }) : x - y;
    return sorting.isFalling ? -order : order;
  }
  function refresh(labels = {}) {
    for (const { cell, name, column } of heads) {
      if (labels[column.key]) name.textContent = labels[column.key];
      const state = sorting.isFalling ? 'descending' : 'ascending';
      if (column.key === sorting.key) cell.setAttribute('aria-sort', state);
      else cell.removeAttribute('aria-sort');
    }
    fillBars(columns, rows, read, lines);
    for (const [row, line] of lines) {
      columns.forEach(({ key }, i) => i && (line.cells[i].lastChild.textContent = read(row, key).text));
    }
    const ordered = sorting.key === null ? rows : [...rows].sort(compare);
    body.append(...ordered.map((row) => lines.get(row)));
  }

  refresh();
  return {
    refresh,
    line: (row) => lines.get(row),
    show: (isShown) => lines.forEach((line, row) => (line.hidden = !isShown(row))),
  };
}

function makeHead(column, sort) {
  const cell = element('th');
  cell.scope = 'col';
  const button = element('button', '', 'sort');
  button.type = 'button';
  if (column.title) button.title = column.title;
  const name = element('span', column.label);
  const arrow = element('span', '', 'arrow');
  arrow.setAttribute('aria-hidden', 'true');
  button.append(name, arrow);
  button.addEventListener('click', sort);
  cell.append(button);
  return { cell, name, column };
}

function makeLine(row, columns, decorate) {
  const line = element('tr');
  const first = element('th');
  first.scope = 'row';
  decorate(row, first);
  line.append(first);
  for (const column of columns.slice(1)) {
    const cell = element('td');
    if (column.bar) cell.append(element('span', '', 'bar-of-cell'));
    cell.append(element('span'));
    line.append(cell);
  }
  return line;
}

function fillBars(columns, rows, read, lines) {
  columns.forEach(({ key, bar }, i) => {
    if (!bar) return;
    const most = Math.max(...rows.map((row) => read(row, key).value ?? 0));
    for (const row of rows) {
      const share = (read(row, key).value ?? 0) / (most || 1);
      lines.get(row).cells[i].firstChild.style.width = `${Math.round(72 * share)}px`;
    }
  });
}
