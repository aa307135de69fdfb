// index.html: the table of neurons, and one neuron at a time, from the JSON in #data (page_data.py).
// Texts of the corpus are only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const { sites, tokens, metrics, neurons } = data;
const pageTitle = document.title;

const byId = id => document.getElementById(id);
const nameOf = neuron => `${sites[neuron.site]}/${neuron.id}`;
const linkTo = name => "#" + encodeURIComponent(name);
const clip = share => Math.max(0, Math.min(1, share));
const sum = list => list.reduce((a, b) => a + b, 0);

function scoreOf(neuron, metric) {
  return neuron.scores ? neuron.scores[metrics.indexOf(metric)] : null;
}

function number(value) {
  if (missing(value)) return "–";
  return Number.isInteger(value) ? String(value) : String(+value.toPrecision(3));
}

function signed(value) {
  return (value >= 0 ? "+" : "−") + number(Math.abs(value));
}

function percent(share) {
  if (missing(share)) return "–";
  return share === 0 ? "0" : `${+(100 * share).toPrecision(2)} %`;
}

const small = (...children) => el("small", {}, ...children);

// A token in a box; plain: in grey, for tokens that the neuron does not fire on.
function chip(token, plain) {
  return el("span", { class: plain ? "chip plain" : "chip" }, tokens[token]);
}

function hint(text) {
  byId("hint").textContent = text;
}

// ---- the table of neurons -----------------------------------------------------------------------

const scoreColumns = [
  "ngram_r", "token_r", "label_r", "null_r", "init_r", "openai_tar[", "openai_random[",
].flatMap(start => {
  const matching = metrics.filter(m => m.startsWith(start) && !m.includes("five"));
  return matching.slice(0, 1);
});
const columns = [  // key: the value to sort by
  { title: "neuron", key: (neuron, i) => i },
  { title: "label", key: neuron => neuron.text || "" },
  { title: "density", key: neuron => neuron.density, text: percent },
  { title: "max", key: neuron => neuron.max, text: number },
  ...scoreColumns.map(metric => ({
    title: metric, key: neuron => scoreOf(neuron, metric), text: r => r.toFixed(2), meter: true,
  })),
];
const onPhones = /^(neuron|label|density|(ngram|token|label|null|init)_r.*)$/;
const firstRows = 200, moreRows = 400;
const view = { site: "", status: "", text: "", sort: 0, down: false, draw: 0, rows: firstRows };
let order = [];  // the neurons in the table, by their place in `neurons`; "next" follows it

function sample(list, count, seed) {
  const random = generator(seed), pool = list.slice();
  const taken = Math.min(count, pool.length);
  for (let i = 0; i < taken; i++) {
    const j = i + Math.floor(random() * (pool.length - i));
    [pool[i], pool[j]] = [pool[j], pool[i]];
  }
  return pool.slice(0, taken).sort((a, b) => a - b);
}

function labelTokens(neuron) {
  return neuron.label && neuron.label.tokens ? neuron.label.tokens : [];
}

function matches(neuron) {
  if (view.site && sites[neuron.site] !== view.site) return false;
  if (view.status && neuron.status !== view.status) return false;
  const words = labelTokens(neuron).map(row => tokens[row[0]]).join(" ");
  const text = `${nameOf(neuron)} ${neuron.text || ""} ${words}`;
  return text.toLowerCase().includes(view.text.toLowerCase());
}

// Sorts neurons by a column; those without a value come last either way.
function compare(i, j) {
  const key = columns[view.sort].key, sign = view.down ? -1 : 1;
  const a = key(neurons[i], i), b = key(neurons[j], j);
  if (missing(a) !== missing(b)) return missing(a) - missing(b);
  if (a < b) return -sign;
  return a > b ? sign : i - j;
}

function arrange() {
  order = neurons.map((_, i) => i).filter(i => matches(neurons[i]));
  const matching = order.length;
  if (view.draw) order = sample(order, 20, data.seed * 1000003 + view.draw);
  if (view.sort || view.down) order.sort(compare);
  byId("count").textContent = view.draw
    ? `${order.length} of ${matching} neurons, drawn at random: seed ${data.seed}, `
      + `draw ${view.draw}`
    : `${order.length} of ${neurons.length} neurons`;
  showList();
}

// The first tokens of a label as chips, and its class.
function labelChips(neuron, count) {
  const shown = labelTokens(neuron).slice(0, count);
  if (!shown.length) return neuron.text ? [neuron.text] : [];
  const kind = el("span", { class: "class" }, neuron.label.class || "");
  return [...shown.map(row => chip(row[0])), kind];
}

function row(i) {
  const neuron = neurons[i], name = nameOf(neuron);
  const status = neuron.status === "live" ? null : " " + neuron.status;
  const cells = [
    el("td", {}, el("a", { href: linkTo(name) }, name),
      status && el("span", { class: "status" }, status)),
    el("td", { class: "wider" }, ...labelChips(neuron, 4)),
  ];
  for (const { title, key, text, meter } of columns.slice(2)) {
    const value = key(neuron, i);
    const style = onPhones.test(title) ? "number" : "number more";
    cells.push(el("td", { class: style, "data-name": title },
      missing(value) ? "–" : text(value),
      meter && !missing(value) ? el("span", { class: "meter", "--v": clip(value) }) : null));
  }
  return el("tr", {}, ...cells);
}

function sortBy(column) {
  if (view.sort === column) {
    view.down = !view.down;
  } else {
    view.sort = column;
    view.down = column > 1;  // numbers start with the largest
  }
  arrange();
}

function headCell({ title }, column) {
  let direction = null;
  if (view.sort === column && (column || view.down)) {
    direction = view.down ? "descending" : "ascending";
  }
  const style = onPhones.test(title) ? null : "more";
  return el("th", { scope: "col", class: style, "aria-sort": direction },
    el("button", { onclick: () => sortBy(column) }, title));
}

function showList() {
  const head = el("thead", {}, el("tr", {}, ...columns.map(headCell)));
  const body = el("tbody", {}, ...order.slice(0, view.rows).map(row));
  byId("list").replaceChildren(el("div", { class: "wide" }, el("table", {}, head, body)));
  const rest = order.length - view.rows;
  if (rest > 0) {
    const showMore = () => {
      view.rows += moreRows;
      showList();
    };
    byId("list").append(el("button", { onclick: showMore }, `show more (${rest})`));
  }
}

function choice(key, all, values) {
  const change = event => {
    view[key] = event.target.value;
    view.draw = 0;
    arrange();
    if (key === "site") showCharts(view.site);
  };
  const options = [el("option", { value: "" }, all)];
  options.push(...values.map(value => el("option", { value }, value)));
  return el("select", { "aria-label": key, onchange: change }, ...options);
}

function showTools() {
  const filter = event => {
    Object.assign(view, { text: event.target.value, draw: 0, rows: firstRows });
    arrange();
  };
  const draw = () => {
    Object.assign(view, { draw: view.draw + 1, sort: 0, down: false });
    arrange();
  };
  const reset = () => {
    Object.assign(view, { text: "", draw: 0, sort: 0, down: false, rows: firstRows });
    byId("filter").value = "";
    arrange();
  };
  const statuses = [...new Set(neurons.map(neuron => neuron.status))].sort();
  byId("tools").append(
    el("input", { type: "search", id: "filter", placeholder: "filter by id or token",
      "aria-label": "filter", oninput: filter }),
    sites.length > 1 ? choice("site", "all layers", sites) : "",
    choice("status", "live and dead", statuses),
    el("button", { onclick: draw }, "20 at random"),
    el("button", { onclick: reset }, "all, by id"),
    el("p", { id: "count", role: "status" }));
}

// ---- the charts ---------------------------------------------------------------------------------

// Shows the charts of one site, or of all layers if there are none for it.
function showCharts(site) {
  const blocks = [...document.querySelectorAll(".charts[data-site]")];
  const shown = blocks.some(block => block.dataset.site === site) ? site : "";
  for (const block of blocks) block.hidden = block.dataset.site !== shown;
  if (blocks.length < 2) return;
  byId("tabs").replaceChildren(...blocks.map(block => {
    const name = block.dataset.site, pressed = String(name === shown);
    const show = () => showCharts(name);
    return el("button", { "aria-pressed": pressed, onclick: show }, name || "all layers");
  }));
}

// The neuron whose dot is nearest to the pointer, or null. All dots are one path, "Mx yh0" each.
function nearest(svg, event) {
  const places = svg.dataset.neurons.split(",");
  const toChart = svg.getScreenCTM().inverse();
  const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(toChart);
  const dots = svg.querySelector("path.dots").getAttribute("d").match(/[\d.]+ [\d.]+/g) || [];
  let best = null, distance = 12 * 12;
  dots.forEach((dot, k) => {
    const [x, y] = dot.split(" ").map(Number);
    const d = (x - pointer.x) ** 2 + (y - pointer.y) ** 2;
    if (d < distance && places[k] !== "") {
      best = Number(places[k]);
      distance = d;
    }
  });
  return best;
}

function listenToChart(svg) {
  svg.addEventListener("pointermove", event => {
    const i = nearest(svg, event);
    if (i === null) return hint("");
    const score = `${data.headline} ${number(scoreOf(neurons[i], data.headline))}`;
    hint(`${nameOf(neurons[i])}   density ${percent(neurons[i].density)}   ${score}`);
  });
  svg.addEventListener("pointerleave", () => hint(""));
  svg.addEventListener("click", event => {
    const i = nearest(svg, event);
    if (i !== null) location.hash = linkTo(nameOf(neurons[i]));
  });
}

// ---- excerpts of one neuron ---------------------------------------------------------------------

const groups = [  // [group, title, note]
  ["top", "highest values", "of both parts"],
  ["intervals", "across the range", "windows whose peak lies in each fifth of it"],
  ["random", "uniformly random", "windows drawn from all"],
];

function excerpt(neuron, [peak, doc, scored, ids, acts, simulated]) {
  const scale = 10 ** neuron.digits, top = neuron.max || 1;
  const spans = ids.map((id, k) => {
    const value = acts[k] / scale, share = clip(value / top);
    let text = `“${tokens[id]}”   ${value}  (${percent(share)} of max)`;
    let simulatedShare = 0;
    if (simulated) {
      simulatedShare = clip(simulated[k] / scale / top);
      text += `   simulated ${simulated[k] / scale}`;
    }
    const style = `t${k === peak ? " peak" : ""}${share > .62 ? " hot" : ""}`;
    return el("span", { class: style, "data-hint": text,
      "--a": share > 0 ? (.08 + .92 * share).toFixed(3) : 0,
      "--s": simulatedShare.toFixed(3) }, tokens[id]);
  });
  const part = scored
    ? el("span", { class: "part scored" }, "score")
    : el("span", { class: "part" }, "fit");
  const side = el("div", { class: "side" },
    el("b", {}, number(acts[peak] / scale)), part, ` doc ${doc}`);
  return el("div", { class: "excerpt" }, side, el("p", {}, ...spans));
}

function legend(neuron) {
  return el("p", { class: "legend" },
    el("span", {}, "value", el("i", { class: "ramp" }), number(neuron.max)),
    el("span", {}, "simulated", el("i", { class: "ramp sim" }), "same scale"),
    el("span", {}, el("span", { class: "part" }, "fit"),
      " seen by the tables, so not simulated"),
    el("span", {}, el("span", { class: "part scored" }, "score"), " held out"));
}

function excerpts(neuron) {
  const shown = groups.filter(([group]) => neuron[group]);
  if (neuron.status === "dead" || !shown.length) {
    const notice = neuron.status === "dead"
      ? "Dead: never positive on the recorded tokens, so there is nothing to show."
      : "No excerpts were kept for this neuron.";
    return el("div", { class: "excerpts" }, el("p", { class: "notice" }, notice));
  }
  const parts = shown.flatMap(([group, title, note]) => {
    const rows = group === "intervals" ? fifths(neuron)
      : neuron[group].map(shownExcerpt => excerpt(neuron, shownExcerpt));
    return [el("h3", {}, title, small(note)), ...rows];
  });
  return el("div", { class: "excerpts" }, legend(neuron), ...parts);
}

// Excerpts by the fifth of the range that holds their peak, each with its share of the neuron's
// total activation, estimated from the bins of the histogram.
function fifths(neuron) {
  const mass = neuron.hist.map((count, bin) => count * (bin + .5));
  const peakOf = ([peak, , , , acts]) => acts[peak] / 10 ** neuron.digits;
  const fifthOf = shown => Math.min(4, Math.floor(5 * peakOf(shown) / neuron.max));
  return [4, 3, 2, 1, 0].flatMap(k => {
    const chosen = neuron.intervals.filter(shown => fifthOf(shown) === k);
    if (!chosen.length) return [];
    const part = sum(mass.slice(k * mass.length / 5, (k + 1) * mass.length / 5));
    const title = `${20 * k} to ${20 * k + 20} % of the largest value: `
      + `${percent(part / sum(mass))} of the total activation`;
    return [el("p", { class: "fifth" }, title), ...chosen.map(shown => excerpt(neuron, shown))];
  });
}

// ---- facts about one neuron ---------------------------------------------------------------------

const fires = neuron => neuron.hist && neuron.hist.some(count => count > 0);
const numberCells = (...contents) => contents.map(c => el("td", { class: "number" }, c));
const factRow = (name, ...values) => el("tr", {}, el("td", {}, name), ...numberCells(...values));

function titled(title, ...children) {
  return el("div", {}, el("h3", {}, title), ...children);
}

function table(title, rows) {
  if (!rows.length) return null;
  return titled(title, el("table", {}, el("tbody", {}, ...rows)));
}

// A quantile of the positive values, interpolated within a bin of the histogram.
function quantile(neuron, share) {
  let left = share * sum(neuron.hist);
  const bin = neuron.hist.findIndex(count => (left -= count) <= 0);
  return neuron.max * (bin + 1 + left / neuron.hist[bin]) / neuron.hist.length;
}

function numbers(neuron) {
  const rows = [
    factRow("status", neuron.status),
    factRow("density", percent(neuron.density)),
    factRow("max", number(neuron.max)),
    factRow("mean", number(neuron.mean)),
  ];
  if (fires(neuron)) {
    const quartiles = [.25, .5, .75].map(share => number(quantile(neuron, share)));
    rows.push(factRow("quartiles when it fires", quartiles.join(", ")));
  }
  return table("In numbers", rows);
}

function histogram(neuron) {
  if (!fires(neuron)) return null;
  const highest = Math.max(...neuron.hist);
  const bars = neuron.hist.map(
    count => el("i", { "--v": Math.log1p(count) / Math.log1p(highest) }));
  const about = `counts of positive values up to the largest, ${number(neuron.max)}`;
  return titled("Positive values",
    el("div", { class: "histogram", role: "img", "aria-label": about }, ...bars),
    el("p", { class: "ends" }, el("span", {}, "0"),
      el("span", {}, `log count, highest bar ${number(highest)}`),
      el("span", {}, number(neuron.max))));
}

// A row for each score, with its note, and for each missing score that has a reason.
function scores(neuron) {
  const rows = [];
  metrics.forEach((metric, k) => {
    const score = neuron.scores && neuron.scores[k];
    const reason = neuron.why && neuron.why[metric];
    const bounds = neuron.ci95 && neuron.ci95[metric];
    if (!missing(score)) {
      const interval = bounds ? bounds.map(v => v.toFixed(2)).join(" to ") : "";
      const title = el("span", {}, `${metric} `, small(reason || ""));
      rows.push(factRow(title, small(interval), score.toFixed(3)));
    } else if (reason) {
      rows.push(el("tr", {}, el("td", { colspan: 3 }, `${metric}: `, small(reason))));
    }
  });
  return table("Scores", rows);
}

function label(neuron) {
  const rows = labelTokens(neuron).map(([token, mean, count, share]) =>
    factRow(chip(token), number(mean), number(count), percent(share)));
  if (!rows.length) return null;
  const head = ["mean", "count", "share"].map(word => small(word));
  rows.unshift(el("tr", {}, el("td", {}), ...numberCells(...head)));
  return table("Label: tokens it fires on", rows);
}

function tokensBefore(neuron) {
  const before = neuron.label && neuron.label.left;
  if (!before || !before.length) return null;
  return titled("Tokens before", ...before.map(token => chip(token, true)));
}

function effects(effect) {
  if (!effect) return null;
  const bounds = ([low, high]) => `[${number(low)}, ${number(high)}]`;
  const within = interval => interval ? ` ${bounds(interval)}` : "";
  const cost = level => `KL ${number(level.kl)} nats${within(level.kl_ci95)}, `
    + `loss ${signed(level.loss)} nats${within(level.loss_ci95)}`;
  const changes = (rows, sign) => (rows || []).map(([token, change, low, high, holds]) => {
    const interval = missing(low) ? "" : bounds([low, high]);
    const name = el("span", {}, chip(token, !holds), small(holds === 0 ? " one half only" : ""));
    return factRow(name, small(interval), sign + number(Math.abs(change)));
  });
  const documents = effect.documents ? `, from ${effect.documents} documents` : "";
  const parts = [
    el("p", { class: "note" }, `Raised to ${number(effect.clamp)}, its largest value, at the last `
      + `token of ${effect.positions} held-out texts${documents}: ${cost(effect)}. Changes of `
      + "log-probability, with 95 % intervals over documents:"),
    table("raised", changes(effect.raised, "+")),
    table("lowered", changes(effect.lowered, "−")),
  ];
  const far = effect.far;
  if (!missing(far.kl)) {
    const strongest = (rows, plain) => el("p", {}, ...rows.slice(0, 5).map(
      ([token]) => chip(token, plain)));
    parts.push(el("div", {},
      el("p", { class: "note" }, `Raised to ${number(far.clamp)} instead: ${cost(far)}; raised `
        + "and lowered most:"),
      strongest(far.raised, false), strongest(far.lowered, true)));
  }
  return titled("Effect on the next token", ...parts);
}

// Similar neurons with a number each; links to those that are on this page.
function relatives(title, list, site) {
  const rows = (list || []).map(([id, value]) => {
    const other = neurons.find(neuron => neuron.site === site && neuron.id === id);
    const name = `${sites[site]}/${id}`;
    const shown = other
      ? [el("a", { href: linkTo(name) }, name), " ", ...labelChips(other, 1)]
      : [name];
    return factRow(el("span", {}, ...shown), value.toFixed(2));
  });
  return table(title, rows);
}

function facts(neuron) {
  return el("aside", {},
    numbers(neuron),
    histogram(neuron),
    scores(neuron),
    label(neuron),
    tokensBefore(neuron),
    effects(neuron.effect),
    relatives("Nearest atoms, by cosine", neuron.atoms, neuron.site),
    relatives("Neurons that fire with it, by r", neuron.together, neuron.site));
}

// ---- from page to page --------------------------------------------------------------------------

let current = -1;  // the neuron shown, by its place in `neurons`; -1: the table

// The neuron that many rows further down the table, or undefined.
function neighbour(step) {
  const place = order.indexOf(current);
  return place < 0 ? undefined : order[place + step];
}

function go(step) {
  const i = neighbour(step);
  if (i !== undefined) location.hash = linkTo(nameOf(neurons[i]));
}

function stepButton(step, text, key) {
  const disabled = neighbour(step) === undefined ? "" : null;
  const press = () => go(step);
  return el("button", { onclick: press, disabled, "aria-keyshortcuts": key }, text);
}

function showNeuron() {
  const neuron = neurons[current], name = nameOf(neuron);
  const toTable = () => { location.hash = ""; };
  const keys = [["j", " next "], ["k", " previous "], ["Esc", " back"]];
  byId("neuron").replaceChildren(
    el("nav", {},
      el("button", { onclick: toTable, id: "back" }, "← all neurons"),
      small("keys: ", ...keys.flatMap(([key, text]) => [el("kbd", {}, key), text])),
      el("span", { class: "spring" }),
      stepButton(-1, "previous", "k"),
      stepButton(1, "next", "j")),
    el("header", {},
      el("p", { class: "eyebrow" }, `layer ${sites[neuron.site]}`),
      el("h1", {}, name),
      el("p", { class: "lead" }, neuron.text || "no label")),
    el("div", { class: "columns" }, excerpts(neuron), facts(neuron)));
}

let scrolled = 0;  // where the table was left

function route() {
  let name = "";
  try {
    name = decodeURIComponent(location.hash.slice(1));
  } catch { /* not a name of ours */ }
  if (current < 0) scrolled = window.scrollY;
  current = name ? neurons.findIndex(neuron => nameOf(neuron) === name) : -1;
  const showsNeuron = current >= 0;
  hint("");
  byId("index").hidden = showsNeuron;
  byId("neuron").hidden = !showsNeuron;
  document.title = showsNeuron ? `${name} · neurons` : pageTitle;
  if (showsNeuron) showNeuron();
  window.scrollTo(0, showsNeuron ? 0 : scrolled);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
  } else if (current < 0) {
    if (event.key === "/") {
      event.preventDefault();
      byId("filter").focus();
    }
  } else if (event.key === "Escape") {
    location.hash = "";
  } else if (event.key === "j" || event.key === "ArrowRight") {
    go(1);
  } else if (event.key === "k" || event.key === "ArrowLeft") {
    go(-1);
  }
}

document.querySelectorAll("svg[data-neurons]").forEach(listenToChart);
for (const kind of ["pointerover", "click"]) {
  byId("neuron").addEventListener(kind, event => hint(event.target.dataset.hint || ""));
}
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", route);
showTools();
showCharts("");
arrange();
route();
