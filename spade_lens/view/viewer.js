// @ts-check
// A table to look into: rows are layers, columns are positions of a text, or prompts.
// It reads the JSON of its own page and asks no network. Every token is written as text.
"use strict";

(() => {
  /** @typedef {"probability" | "nats" | "rank" | "yes"} Kind */
  /** What colours a cell. Without values it is the probability of the top token.
   * @typedef {{name: string, short: string, kind: Kind, log: boolean, values: (number | null)[] | null}} Measure
   */
  /** Numbers lie flat as [lens layer column], those of top tokens as [lens layer column k].
   * @typedef {object} Data
   * @property {string} columns what the columns are
   * @property {string[]} lenses
   * @property {number[]} looks the number of each lens' colour and dashes
   * @property {number[]} layers
   * @property {string[]} labels what stands above each column
   * @property {string[]} names what each column is, in words
   * @property {number[]} targets numbers of words, -1 where there is none
   * @property {number} k
   * @property {string[]} words
   * @property {number[]} tokens numbers of words, -1 where there is none
   * @property {(number | null)[]} logprobs their negative log-probabilities in thousandths of a nat
   * @property {Measure[]} measures probabilities like these; nats in thousandths
   */
  /** @typedef {Record<string, string | number>} Attributes */
  /** @typedef {{lens: number, column: number}} Column */
  /** @typedef {{lens: number, layer: number, column: number}} Cell all by number */

  const PAGE = 32; // columns shown at once: more cost time, and nobody sees them
  const INFINITE = 1e5; // what is higher stands for infinity
  const LIGHT = { base: [255, 255, 255], high: [8, 81, 156], low: [158, 57, 4] };
  const DARK = { base: [28, 34, 41], high: [158, 202, 225], low: [253, 180, 120] };
  const DASHES = ["", "6 3", "2 2", "8 3 2 3", "4 2", "10 3", "1 3"];
  const TICKS = [0, 0.1, 1, 10, 100, 1000, 1e4, 1e5];

  /** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
  function at(id, kind) {
    const found = document.getElementById(id);
    if (!(found instanceof kind)) throw new Error(`The page has no ${id}.`);
    return found;
  }

  /** @type {Data} */
  const data = JSON.parse(at("data", HTMLElement).textContent || "");
  const { lenses, layers, labels, names, words, measures, k } = data;
  const [nLayers, nColumns] = [layers.length, labels.length];
  const table = at("table", HTMLTableElement);
  const body = table.tBodies[0];
  const strip = at("strip", HTMLElement);
  const map = at("map", HTMLCanvasElement);
  const lensChoice = at("lens", HTMLSelectElement);
  const measureChoice = at("measure", HTMLSelectElement);
  const numbers = at("numbers", HTMLInputElement);
  const query = at("find", HTMLInputElement);
  const [back, next, all] = ["back", "next", "all"].map((id) => at(id, HTMLButtonElement));
  const course = at("course", HTMLElement);
  const darkness = matchMedia("(prefers-color-scheme: dark)");

  // What is shown. `minus` is the lens that is subtracted from the only one of `shown`.
  let shown = [0];
  let minus = -1;
  let measure = measures[0];
  let range = [0, nColumns]; // the columns chosen, of which a page is shown
  let first = 0;
  let active = { lens: 0, layer: nLayers - 1, column: 0 };
  /** @type {Cell | null} */
  let pinned = null;
  /** @type {Set<number> | null} */
  let wanted = null; // the words that are searched for
  /** @type {Map<string, number>} */
  const highs = new Map();

  /** Fill an element: strings become text and never markup.
   * @template {Element} T @param {T} made
   * @param {Attributes} attributes @param {(Node | string)[]} children */
  function filled(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
    made.append(...children);
    return made;
  }
  /** @template {keyof HTMLElementTagNameMap} T @param {T} tag
   * @param {Attributes} attributes @param {...(Node | string)} children */
  const make = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
  /** @param {string} tag @param {Attributes} attributes @param {...(Node | string)} children */
  const draw = (tag, attributes, ...children) =>
    filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  /** A token in a sentence: letters from right to left stay among themselves. @param {string} text */
  const bdi = (text) => make("bdi", {}, text);

  // Numbers
  /** @param {Cell} cell */
  const indexOf = ({ lens, layer, column }) => (lens * nLayers + layer) * nColumns + column;

  /** The value of one lens. @param {Measure} of @param {Cell} cell @returns {number | null} */
  function valueAt(of, cell) {
    const value = of.values ? of.values[indexOf(cell)] : data.logprobs[indexOf(cell) * k];
    if (value === null) return null;
    if (of.kind === "probability") return Math.exp(-value / 1000);
    return of.kind === "nats" ? value / 1000 : value;
  }

  /** The value that the table shows: of a lens, or a difference; ∞ minus ∞ is none. @param {Cell} cell */
  function valueOf(cell) {
    const value = valueAt(measure, cell);
    if (minus < 0 || value === null) return value;
    const other = valueAt(measure, { ...cell, lens: minus });
    return other === null || (measure.kind === "nats" && Math.min(value, other) > INFINITE) ? null : value - other;
  }

  /** Every cell of some lenses. @param {number[]} some @returns {Generator<Cell>} */
  function* cellsOf(some) {
    for (const lens of some)
      for (let layer = 0; layer < nLayers; layer++)
        for (let column = 0; column < nColumns; column++) yield { lens, layer, column };
  }

  /** The highest finite value of what is shown: colours end there. @returns {number} */
  function highest() {
    const key = `${measure.name} ${minus < 0 ? "" : shown[0]} ${minus}`;
    let high = highs.get(key) ?? 0;
    if (high) return high;
    for (const cell of cellsOf(minus < 0 ? [...lenses.keys()] : shown)) {
      const value = Math.abs(valueOf(cell) ?? 0);
      if (value > high && value < INFINITE) high = value;
    }
    highs.set(key, high || 1);
    return high || 1;
  }

  /** From 0 (pale) to 1 (strong, sure); a difference from -1 to 1. @param {number} value */
  function shadeOf(value) {
    const high = highest();
    const size = Math.min(Math.abs(value), high);
    const part = measure.log ? Math.log1p(size) / Math.log1p(high) : size / high;
    if (minus >= 0) return Math.sign(value) * part;
    return measure.kind === "nats" || measure.kind === "rank" ? 1 - part : value;
  }

  /** @param {number} shade @returns {[number, number, number]} */
  function colourOf(shade) {
    const { base, high, low } = darkness.matches ? DARK : LIGHT;
    const end = shade < 0 ? low : high;
    const mix = (/** @type {number} */ i) => Math.round(base[i] + Math.abs(shade) * (end[i] - base[i]));
    return [mix(0), mix(1), mix(2)];
  }

  /** Black or white, whichever is read better: the contrast is 4.5 or more. @param {number[]} colour */
  function inkOn(colour) {
    const [r, g, b] = colour.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  }

  /** @param {number | null} value @param {Kind} kind @param {number} [digits] */
  function plain(value, kind, digits = kind === "nats" ? 2 : 3) {
    if (value === null || (value > INFINITE && kind === "nats")) return value === null ? "–" : "∞";
    if (kind === "yes") return value ? "yes" : "no";
    if (kind === "rank") return String(value);
    return kind === "probability" && value > 0 && value < 0.0005 ? value.toExponential(0) : value.toFixed(digits);
  }

  /** A value as the table shows it, a difference with its sign. @param {number | null} value */
  function written(value) {
    if (minus < 0 || value === null) return plain(value, measure.kind);
    return (value < 0 ? "−" : "+") + plain(Math.abs(value), measure.kind === "yes" ? "rank" : measure.kind);
  }

  /** The top tokens of a cell, best first. @param {Cell} cell */
  function topOf(cell) {
    const found = [];
    for (let i = indexOf(cell) * k; i < (indexOf(cell) + 1) * k; i++) {
      const [word, logprob] = [data.tokens[i], data.logprobs[i]];
      if (logprob !== null) found.push({ word, text: words[word], probability: Math.exp(-logprob / 1000) });
    }
    return found;
  }

  /** The place of a word that is searched for among the top tokens, -1 if none. @param {Cell} cell */
  function placeOf(cell) {
    const start = indexOf(cell) * k;
    for (let i = 0; wanted && i < k; i++) if (wanted.has(data.tokens[start + i])) return i;
    return -1;
  }

  // The table
  const perPage = () => Math.max(1, Math.floor(PAGE / shown.length));
  const end = () => Math.min(first + perPage(), range[1]);
  /** @param {Column} a @param {Column} b */
  const sameColumn = (a, b) => a.lens === b.lens && a.column === b.column;
  /** @param {Cell} a @param {Cell | null} b */
  const same = (a, b) => b !== null && a.layer === b.layer && sameColumn(a, b);
  /** @param {number} lens */
  const lensName = (lens) => lenses[lens] + (minus < 0 ? "" : ` minus ${lenses[minus]}`);
  /** @param {Cell} cell @param {number | null} value @returns {value is number} */
  const isColoured = (cell, value) => value !== null && (!wanted || placeOf(cell) >= 0);
  /** @param {Cell} cell @returns {HTMLElement | null} */
  const tdOf = ({ lens, layer, column }) => body.querySelector(`[data-at="${lens} ${layer} ${column}"]`);

  /** The columns of the table, from left to right. @returns {Column[]} */
  function columnsShown() {
    const found = [];
    for (let column = first; column < end(); column++)
      for (const lens of shown) found.push({ lens, column });
    return found;
  }

  /** @param {Cell} cell @param {number} x its number in the table, from the left */
  function tableCell(cell, x) {
    const value = valueOf(cell);
    const top = topOf(cell);
    const [place, number] = [placeOf(cell), written(value)];
    const found = place < 0 ? "" : `#${place + 1} ${plain(top[place].probability, "probability", 2)}`;
    const text = found || (numbers.checked || minus >= 0 || !top.length ? number : top[0].text);
    const tops = top.slice(0, 3).map((t) => `${t.text} ${plain(t.probability, "probability")}`).join(", ");
    const where = `${lensName(cell.lens)}, layer ${layers[cell.layer]}, ${labels[cell.column]}`;
    const said = `${where}, ${names[cell.column]}: ${tops || "not read"}; ${measure.short} ${number}`;
    const td = make("td", { role: "gridcell", tabindex: -1, "aria-colindex": x + 2 }, text);
    td.setAttribute("aria-label", found ? `Found at place ${place + 1}. ${said}` : said);
    td.setAttribute("aria-selected", String(same(cell, pinned)));
    td.dataset.at = `${cell.lens} ${cell.layer} ${cell.column}`;
    td.classList.toggle("own", !found && measures.some((m) => m.kind === "yes" && valueAt(m, cell) === 1));
    td.classList.toggle("first", shown.length > 1 && cell.lens === shown[0]);
    const coloured = isColoured(cell, value);
    td.classList.toggle("away", !coloured);
    if (coloured) {
      const colour = colourOf(shadeOf(value));
      td.style.backgroundColor = `rgb(${colour.join(",")})`;
      td.style.color = inkOn(colour);
    }
    return td;
  }

  /** @param {Column} of @param {number} x */
  function columnHead({ lens, column }, x) {
    const several = shown.length > 1;
    const label = !several || lens === shown[0] ? labels[column] : "";
    const title = `${labels[column]}, ${names[column]}${several ? `, ${lenses[lens]}` : ""}`;
    const th = make("th", { scope: "col", "aria-colindex": x + 2, title, "aria-label": title });
    if (!several) th.append(label);
    else if (nColumns === 1) th.append(lenses[lens]);
    else th.append(label || "\u00a0", make("br", {}), lenses[lens]);
    return th;
  }

  function render() {
    const columns = columnsShown();
    const focused = body.contains(document.activeElement);
    if (!columns.some((c) => sameColumn(c, active))) active = { ...columns[0], layer: active.layer };
    const heads = columns.map(columnHead);
    const corner = make("th", { scope: "col" }, "layer");
    table.tHead?.replaceChildren(make("tr", { "aria-rowindex": 1 }, corner, ...heads));
    const rows = layers.map((number, layer) => {
      const cells = columns.map((column, x) => tableCell({ ...column, layer }, x));
      const head = make("th", { scope: "row" }, String(number));
      return make("tr", { "aria-rowindex": nLayers - layer + 1 }, head, ...cells);
    });
    body.replaceChildren(...rows.reverse());
    table.setAttribute("aria-rowcount", String(nLayers + 1));
    table.setAttribute("aria-colcount", String(columns.length + 1));
    at("table-name", HTMLElement).textContent =
      `${shown.map(lensName).join(", ")}: ${measure.name} by layer (the output on top) and ${data.columns}`;
    activate(active, focused);
    renderLegend();
    renderPlaces();
    renderCourse();
  }

  /** Make a cell the one that the keyboard reaches. @param {Cell} cell @param {boolean} focus */
  function activate(cell, focus) {
    const old = tdOf(active);
    if (old) old.tabIndex = -1;
    active = cell;
    const td = tdOf(cell);
    if (td) td.tabIndex = 0;
    if (focus) td?.focus();
  }

  function renderLegend() {
    const stops = [...Array(11).keys()].map((n) => `rgb(${colourOf(minus < 0 ? n / 10 : n / 5 - 1).join(",")})`);
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
    const bounded = measure.kind === "probability" || measure.kind === "yes";
    const high = bounded && minus < 0 ? 1 : highest();
    const ends = minus >= 0 ? [-high, high] : bounded ? [0, high] : [high, 0];
    const scale = measure.log ? " (colours on a logarithmic scale)" : "";
    const [low, top] = ends.map(written);
    at("legend", HTMLElement).replaceChildren(make("span", {}, low), bar, make("span", {}, top + scale));
  }

  // The text above, the map of all columns, and paging
  function renderPlaces() {
    const part = range[0] > 0 || range[1] < nColumns;
    for (const [column, span] of [...strip.children].entries()) {
      span.classList.toggle("shown", column >= first && column < end());
      span.setAttribute("aria-selected", String(part && column >= range[0] && column < range[1]));
    }
    const chosen = part ? `, ${range[1] - range[0]} chosen` : "";
    at("range", HTMLElement).textContent = `${first + 1} to ${end()} of ${nColumns}${chosen}`;
    back.disabled = first <= range[0];
    next.disabled = end() >= range[1];
    back.hidden = next.hidden = nColumns <= perPage();
    all.hidden = !part;
    map.hidden = nColumns <= perPage();
    const pen = map.hidden ? null : map.getContext("2d");
    if (!pen) return;
    [map.width, map.height] = [nColumns, nLayers * shown.length];
    const image = pen.createImageData(map.width, map.height);
    for (const cell of cellsOf(shown)) {
      const value = valueOf(cell);
      const colour = colourOf(isColoured(cell, value) ? shadeOf(value) : 0);
      const y = shown.indexOf(cell.lens) * nLayers + nLayers - 1 - cell.layer;
      image.data.set([...colour, 255], 4 * (y * nColumns + cell.column));
    }
    pen.putImageData(image, 0, 0);
  }

  /** Show the page that holds a column. @param {number} column */
  function goTo(column) {
    if (column < range[0] || column >= range[1]) range = [0, nColumns];
    first = range[0] + Math.floor((column - range[0]) / perPage()) * perPage();
    active = { ...active, column };
    render();
    tdOf(active)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Show some columns only, both ends included. @param {number} a @param {number} b */
  function choose(a, b) {
    range = [Math.min(a, b), Math.max(a, b) + 1];
    first = range[0];
    render();
  }

  // What a cell holds, and its column over the layers
  /** @param {Cell} cell */
  function showHere(cell) {
    const { layer, column } = cell;
    const title = make("p", {}, `Layer ${layers[layer]}, `, bdi(labels[column]), ` (${names[column]})`);
    if (data.targets[column] >= 0) title.append("; target ", bdi(words[data.targets[column]]));
    const blocks = lenses.map((name, lens) => {
      const rows = topOf({ lens, layer, column }).map(({ word, text, probability }) => {
        const number = make("td", {}, plain(probability, "probability"));
        const row = make("tr", wanted?.has(word) ? { class: "found" } : {}, make("td", {}, text), number);
        const part = `${(100 * probability).toFixed(1)}%`;
        row.style.background = `linear-gradient(to right, var(--bar) ${part}, transparent ${part})`;
        return row;
      });
      const rest = measures.slice(1).map((m) => `${m.short} ${plain(valueAt(m, { lens, layer, column }), m.kind)}`);
      const tops = make("table", { "aria-label": `${name}: top tokens and their probabilities` }, ...rows);
      const about = make("p", { class: "help" }, rows.length ? rest.join("; ") : "not read at this layer");
      return make("div", {}, make("h3", {}, name), tops, about);
    });
    at("here", HTMLElement).replaceChildren(title, make("div", { class: "lenses" }, ...blocks));
  }

  /** @param {number} lens */
  function look(lens) {
    const n = data.looks[lens];
    return { fill: "none", stroke: `var(--line-${n})`, "stroke-width": 2, "stroke-dasharray": DASHES[n] };
  }

  function renderCourse() {
    const help = "Pin a cell to see its column over the layers, for every lens.";
    if (!pinned) return course.replaceChildren(make("p", { class: "help" }, help));
    const { layer: pin, column } = pinned;
    const lines = lenses.map((_, lens) => layers.map((_, layer) => valueAt(measure, { lens, layer, column })));
    const key = lenses.map((name, lens) => {
      const sample = draw("path", { d: "M0 5H30", ...look(lens) });
      return make("span", {}, draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, sample), name);
    });
    const rows = layers.map((number, layer) => {
      const cells = lines.map((line, lens) => {
        const [top] = topOf({ lens, layer, column });
        return make("td", {}, bdi(top ? top.text : "–"), ` ${plain(line[layer], measure.kind)}`);
      });
      const attributes = /** @type {Attributes} */ (layer === pin ? { class: "pinned" } : {});
      return make("tr", attributes, make("th", { scope: "row" }, String(number)), ...cells);
    });
    const titles = ["layer", ...lenses].map((title) => make("th", { scope: "col" }, title));
    const head = make("thead", {}, make("tr", {}, ...titles));
    const name = `Top token and ${measure.name} by layer`;
    const values = make("table", { "aria-label": name }, head, make("tbody", {}, ...rows.reverse()));
    const free = make("button", { type: "button" }, "Unpin");
    free.addEventListener("click", () => pinCell(null));
    course.replaceChildren(
      make("p", {}, `Layer ${layers[pin]}, `, bdi(labels[column]), ` (${names[column]}) `, free),
      make("p", { class: "help" }, measure.name),
      make("p", { class: "key" }, ...key),
      chart(lines, pin),
      make("div", { class: "values", tabindex: 0, role: "region", "aria-label": name }, values),
    );
  }

  /** @param {(number | null)[][]} lines by lens and layer @param {number} pin */
  function chart(lines, pin) {
    const { kind, log } = measure;
    const width = Math.max(220, course.clientWidth);
    const [left, right, top, bottom] = [46, width - 12, 10, 160];
    const finite = lines.flat().map((value) => (value === null || value > INFINITE ? 0 : value));
    const most = kind === "nats" || kind === "rank" ? Math.max(...finite, 0.1) : 1;
    const scaled = (/** @type {number} */ value) => (log ? Math.log1p(value) : value);
    const y = (/** @type {number} */ value) => {
      const part = Math.min(scaled(value) / scaled(most), 1);
      return kind === "rank" ? top + part * (bottom - top) : bottom - part * (bottom - top); // 0 is best
    };
    const span = layers[nLayers - 1] - layers[0];
    const x = (/** @type {number} */ n) => left + (span ? (layers[n] - layers[0]) / span : 0.5) * (right - left);
    const said = `${measure.name} over the layers, a line for every lens; the table below has the values`;
    const svg = draw("svg", { viewBox: `0 0 ${width} 190`, role: "img", "aria-label": said });
    svg.append(draw("path", { class: "frame", d: `M${left} ${top}V${bottom}H${right}` }));
    const write = (/** @type {number} */ x, /** @type {number} */ y, /** @type {string} */ text, anchor = "middle") =>
      svg.append(draw("text", { x, y, "text-anchor": anchor }, text));
    const ticks = log ? TICKS.filter((t) => t <= most && (t !== 0.1 || most < 1)) : [0, most / 2, most];
    for (const t of ticks) write(left - 5, y(t) + 4, log ? String(t) : t.toFixed(most < 10 ? 1 : 0), "end");
    const step = Math.ceil(nLayers / Math.max(2, Math.floor((right - left) / 40)));
    for (let n = 0; n < nLayers; n += step) write(x(n), bottom + 15, String(layers[n]));
    write((left + right) / 2, bottom + 28, "layer");
    svg.append(draw("path", { class: "pin", d: `M${x(pin)} ${top}V${bottom}` }));
    for (const [lens, line] of lines.entries()) {
      const known = [...line.entries()].filter((point) => point[1] !== null);
      const points = known.map(([n, value]) => ({ n, cx: x(n), cy: y(value ?? 0) }));
      const path = points.map(({ n, cx, cy }) => `${n && line[n - 1] !== null ? "L" : "M"}${cx} ${cy}`);
      svg.append(draw("path", { d: path.join(""), ...look(lens) }));
      for (const { cx, cy } of points) svg.append(draw("circle", { cx, cy, r: 2.5, fill: look(lens).stroke }));
    }
    return svg;
  }

  /** Pin a cell, or free it if it is pinned. @param {Cell | null} cell */
  function pinCell(cell) {
    pinned = cell && same(cell, pinned) ? null : cell;
    for (const td of body.querySelectorAll("td")) td.setAttribute("aria-selected", String(same(cellOf(td), pinned)));
    if (pinned) showHere(pinned);
    renderCourse();
  }

  /** @param {HTMLElement} td @returns {Cell} */
  function cellOf(td) {
    const [lens, layer, column] = (td.dataset.at || "").split(" ").map(Number);
    return { lens, layer, column };
  }

  /** The cell of the table that an event came from. @param {Event} event */
  function cellUnder(event) {
    const td = event.target instanceof Element && event.target.closest("td");
    return td ? cellOf(td) : null;
  }

  // Search
  /** @param {string} text */
  const bare = (text) => text.replaceAll("·", " ").trim().toLowerCase();

  function search() {
    const asked = bare(query.value);
    const occurs = new Set(data.tokens);
    /** @param {(word: string) => boolean} fits */
    const matching = (fits) => new Set([...words.keys()].filter((n) => occurs.has(n) && fits(bare(words[n]))));
    wanted = asked ? matching((word) => word === asked) : null;
    let said = wanted?.size === 0 ? "No such token. Tokens that begin so: " : "";
    if (said) wanted = matching((word) => word.startsWith(asked));
    if (wanted?.size === 0) said = `Not among the top ${k} anywhere.`;
    else if (wanted) {
      const found = [...cellsOf(shown)].filter((cell) => placeOf(cell) >= 0);
      said += `among the top ${k} of ${found.length} of ${shown.length * nLayers * nColumns} cells`;
      if (found.length) {
        const low = found.reduce((a, b) => (b.layer < a.layer ? b : a));
        said += `; lowest at layer ${layers[low.layer]}, ${labels[low.column]}, ${names[low.column]}`;
      }
    }
    at("found", HTMLElement).textContent = said;
    render();
  }

  // What users do
  /** @param {number} down @param {number} across */
  function move(down, across) {
    let columns = columnsShown();
    let x = columns.findIndex((column) => sameColumn(column, active)) + across;
    const layer = Math.min(Math.max(active.layer - down, 0), nLayers - 1);
    const off = x < 0 ? -1 : x >= columns.length ? 1 : 0;
    const start = Math.max(range[0], first + off * perPage());
    if (off && start !== first && start < range[1]) {
      first = start;
      columns = columnsShown();
      x = off > 0 ? 0 : columns.length - 1;
      active = { ...columns[x], layer };
      render();
    }
    activate({ ...columns[Math.min(Math.max(x, 0), columns.length - 1)], layer }, true);
  }

  table.addEventListener("keydown", (event) => {
    if (!cellUnder(event)) return;
    const columns = columnsShown();
    const x = columns.findIndex((column) => sameColumn(column, active));
    const whole = event.ctrlKey ? nLayers : 0;
    /** @type {Record<string, [number, number]>} */
    const steps = {
      ...{ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] },
      ...{ PageUp: [-nLayers, 0], PageDown: [nLayers, 0] },
      ...{ Home: [-whole, -x], End: [whole, columns.length - 1 - x] },
    };
    if (steps[event.key]) move(...steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") pinCell({ ...active });
    else if (event.key === "Escape") pinCell(null);
    else return;
    event.preventDefault();
  });
  /** @param {string} type @param {(cell: Cell) => void} act */
  const onCell = (type, act) =>
    table.addEventListener(type, (event) => {
      const cell = cellUnder(event);
      if (cell) act(cell);
    });
  onCell("focusin", (cell) => activate(cell, false));
  onCell("focusin", showHere);
  onCell("mouseover", showHere);
  onCell("click", pinCell);
  table.addEventListener("mouseleave", () => pinned && showHere(pinned));

  lensChoice.addEventListener("change", () => {
    const [lens, other = -1] = lensChoice.value.split(" ").map(Number);
    shown = lensChoice.value === "all" ? [...lenses.keys()] : [lens];
    minus = other;
    first = range[0] + Math.floor((first - range[0]) / perPage()) * perPage();
    search();
  });
  measureChoice.addEventListener("change", () => {
    measure = measures[Number(measureChoice.value)];
    render();
  });
  numbers.addEventListener("change", render);
  query.addEventListener("input", search);
  back.addEventListener("click", () => goTo(Math.max(range[0], first - perPage())));
  next.addEventListener("click", () => goTo(end()));
  all.addEventListener("click", () => choose(0, nColumns - 1));
  map.addEventListener("click", (event) => goTo(Math.floor((event.offsetX / map.clientWidth) * nColumns)));
  darkness.addEventListener("change", render);
  addEventListener("resize", renderCourse);

  let anchor = -1; // where a choice of columns began
  /** @param {Event} event */
  const placeUnder = (event) => [...strip.children].indexOf(/** @type {Element} */ (event.target));

  /** @param {number} column */
  function focusPlace(column) {
    for (const span of strip.querySelectorAll('[tabindex="0"]')) span.setAttribute("tabindex", "-1");
    const span = /** @type {HTMLElement} */ (strip.children[column]);
    span.tabIndex = 0;
    span.focus();
  }

  strip.addEventListener("pointerdown", (event) => {
    if (!event.shiftKey || anchor < 0) anchor = placeUnder(event);
  });
  strip.addEventListener("pointerup", (event) => {
    const column = placeUnder(event);
    if (column < 0 || anchor < 0) return;
    if (column === anchor) goTo(column);
    else choose(anchor, column);
    focusPlace(column);
  });
  strip.addEventListener("keydown", (event) => {
    const column = placeUnder(event);
    if (column < 0) return;
    /** @type {Record<string, number>} */
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -nColumns, End: nColumns };
    if (steps[event.key]) {
      const to = Math.min(Math.max(column + steps[event.key], 0), nColumns - 1);
      if (!event.shiftKey) anchor = -1;
      else if (anchor < 0) anchor = column;
      if (event.shiftKey) choose(anchor, to);
      focusPlace(to);
    } else if (event.key === "Enter" || event.key === " ") goTo(column);
    else if (event.key === "Escape") choose(0, nColumns - 1);
    else return;
    event.preventDefault();
  });

  // The start
  lensChoice.append(...lenses.map((name, lens) => make("option", { value: lens }, name)));
  if (lenses.length > 1) {
    const differences = lenses.flatMap((one, a) =>
      lenses.slice(0, a).map((other, b) => make("option", { value: `${a} ${b}` }, `${one} minus ${other}`)),
    );
    lensChoice.append(make("option", { value: "all" }, "all, side by side"));
    lensChoice.append(make("optgroup", { label: "Difference" }, ...differences));
  }
  measureChoice.append(...measures.map((m, n) => make("option", { value: n }, m.name)));
  if (nColumns === 1 && lenses.length > 1) {
    lensChoice.value = "all"; // one reading: lenses stand side by side
    shown = [...lenses.keys()];
  }
  at("places", HTMLElement).hidden = nColumns < 2;
  at("places-name", HTMLElement).textContent = data.columns === "position" ? "Text" : "Prompts";
  for (const [column, label] of labels.entries()) {
    const about = { title: names[column], "aria-label": `${label}, ${names[column]}` };
    strip.append(make("span", { role: "option", tabindex: column ? -1 : 0, ...about }, label));
  }
  render();
})();
