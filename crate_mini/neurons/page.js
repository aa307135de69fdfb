"use strict";
// The index, and one neuron at a time, from the JSON in #data. Texts are only ever set as text, not markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { sites, tokens, metrics, neurons } = data;
const $ = id => document.getElementById(id);
const metric = name => n => n.scores ? n.scores[metrics.indexOf(name)] : null;
const name = n => `${sites[n.site]}/${n.id}`;
const missing = v => v === null || v === undefined;
const number = v => missing(v) ? "–" : Number.isInteger(v) ? String(v) : String(+v.toPrecision(3));
const percent = v => missing(v) ? "–" : v === 0 ? "0" : `${+(100 * v).toPrecision(2)} %`;
const share = (v, of) => Math.max(0, Math.min(1, v / of));

function el(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) e.style.setProperty(key, value);
    else if (value !== null && value !== undefined && value !== false) e.setAttribute(key, value);
  }
  e.append(...children.filter(c => c !== null && c !== undefined));
  return e;
}
const chip = (id, plain) => el("span", { class: plain ? "chip plain" : "chip" }, tokens[id]);

// ---- the index: table, filter, order, random draws ----

const columns = [  // [title, value to sort by, how to show it]
  ["neuron", (n, i) => i, null],
  ["label", n => n.text || "", null],
  ["density", n => n.density, percent],
  ["max", n => n.max, number],
  ...["ngram_r", "token_r", "label_r", "null_r", "init_r", "openai_tar[", "openai_random["].flatMap(known =>
    metrics.filter(m => m.startsWith(known) && !m.includes("five")).slice(0, 1))
    .map(m => [m, metric(m), "r"])];
const phone = /^(neuron|label|density|(ngram|token|label|null|init)_r.*)$/;  // there is room for on a phone
const view = { site: "", status: "", text: "", sort: 0, down: false, draw: 0, rows: 200 };
let order = [];  // numbers of the neurons that the table shows, which is also where "next" leads

// The same draws on every machine: mulberry32, seeded with the page's seed and the number of the draw.
function generator(seed) {
  let a = seed >>> 0;
  return () => {
    a = a + 0x6D2B79F5 | 0;
    let t = Math.imul(a ^ a >>> 15, 1 | a);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}

function sample(list, count, seed) {
  const random = generator(seed), pool = list.slice(), taken = Math.min(count, pool.length);
  for (let i = 0; i < taken; i++) {
    const j = i + Math.floor(random() * (pool.length - i));
    [pool[i], pool[j]] = [pool[j], pool[i]];
  }
  return pool.slice(0, taken).sort((a, b) => a - b);
}

function arrange() {
  const words = view.text.toLowerCase();
  order = neurons.map((_, i) => i).filter(i => {
    const n = neurons[i];
    return (!view.site || sites[n.site] === view.site) && (!view.status || n.status === view.status)
      && (!words || `${name(n)} ${n.text || ""} ${words_of(n)}`.toLowerCase().includes(words));
  });
  const among = order.length;
  if (view.draw) order = sample(order, 20, data.seed * 1000003 + view.draw);
  const value = columns[view.sort][1], sign = view.down ? -1 : 1;
  if (view.sort || view.down) order.sort((i, j) => {  // what has no value stays at the end
    const a = value(neurons[i], i), b = value(neurons[j], j);
    return missing(a) - missing(b) || (a < b ? -sign : a > b ? sign : i - j);
  });
  $("count").textContent = view.draw
    ? `${order.length} of ${among} neurons, drawn at random: seed ${data.seed}, draw ${view.draw}`
    : `${order.length} of ${neurons.length} neurons`;
  list();
}

function words_of(n) {
  return n.label && n.label.tokens ? n.label.tokens.map(t => tokens[t[0]]).join(" ") : "";
}

function row(i) {
  const n = neurons[i], cells = [
    el("td", {}, el("a", { href: "#" + encodeURIComponent(name(n)) }, name(n)),
      n.status === "live" ? null : el("span", { class: "status" }, " " + n.status)),
    el("td", { class: "wider" }, ...label(n, 4))];
  for (const [title, value, show] of columns.slice(2)) {
    const v = value(n, i);
    cells.push(el("td", { class: phone.test(title) ? "number" : "number more", "data-name": title },
      missing(v) ? "–" : show === "r" ? v.toFixed(2) : show(v),
      show === "r" && !missing(v) ? el("span", { class: "meter", "--v": share(v, 1) }) : null));
  }
  return el("tr", {}, ...cells);
}

function label(n, count) {
  if (!n.label || !n.label.tokens || !n.label.tokens.length) return n.text ? [n.text] : [];
  return [...n.label.tokens.slice(0, count).map(t => chip(t[0])),
    el("span", { class: "class" }, n.label.class || "")];
}

function list() {
  const direction = c => view.sort !== c || !(c || view.down) ? null : view.down ? "descending" : "ascending";
  const turn = c => {  // figures start with the largest
    [view.sort, view.down] = [c, view.sort === c ? !view.down : c > 1];
    arrange();
  };
  const head = el("tr", {}, ...columns.map(([title], c) => el("th", {
    scope: "col", class: phone.test(title) ? null : "more", "aria-sort": direction(c) },
    el("button", { onclick: () => turn(c) }, title))));
  const rest = order.length - view.rows;
  $("list").replaceChildren(
    el("div", { class: "wide" }, el("table", {}, el("thead", {}, head),
      el("tbody", {}, ...order.slice(0, view.rows).map(row)))),
    rest > 0 ? el("button", { onclick: () => { view.rows += 400; list(); } }, `show more (${rest})`) : "");
}

function tools() {
  const choice = (key, all, values) => el("select", { "aria-label": key, onchange: e => {
    view[key] = e.target.value; view.draw = 0; arrange();
    if (key === "site") show_charts(view.site);
  } }, el("option", { value: "" }, all), ...values.map(v => el("option", { value: v }, v)));
  $("tools").append(
    el("input", { type: "search", placeholder: "filter by id or token", "aria-label": "filter", id: "filter",
      oninput: e => { view.text = e.target.value; view.draw = 0; view.rows = 200; arrange(); } }),
    sites.length > 1 ? choice("site", "all layers", sites) : null || "",
    choice("status", "live and dead", [...new Set(neurons.map(n => n.status))].sort()),
    el("button", { onclick: () => {
      Object.assign(view, { draw: view.draw + 1, sort: 0, down: false });
      arrange();
    } }, "20 at random"),
    el("button", { onclick: () => {
      Object.assign(view, { text: "", draw: 0, sort: 0, down: false, rows: 200 });
      $("filter").value = "";
      arrange();
    } }, "all, by id"),
    el("p", { id: "count", role: "status" }));
}

function show_charts(site) {
  const blocks = [...document.querySelectorAll(".charts[data-site]")];
  const wanted = blocks.some(b => b.dataset.site === site) ? site : "";
  blocks.forEach(b => { b.hidden = b.dataset.site !== wanted; });
  $("tabs").replaceChildren(...blocks.length < 2 ? [] : blocks.map(b => el("button", {
    "aria-pressed": String(b.dataset.site === wanted), onclick: () => show_charts(b.dataset.site) },
    b.dataset.site || "all layers")));
}

// The dot nearest to the pointer, among those drawn as "Mx yh0" in one path.
function nearest(svg, event) {
  const path = svg.querySelector("path.dots"), at = svg.dataset.neurons.split(",");
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  let best = null, distance = 12 * 12;
  (path.getAttribute("d").match(/[\d.]+ [\d.]+/g) || []).forEach((pair, k) => {
    const [x, y] = pair.split(" ").map(Number), d = (x - point.x) ** 2 + (y - point.y) ** 2;
    if (d < distance && at[k] !== "") [best, distance] = [Number(at[k]), d];
  });
  return best;
}

for (const svg of document.querySelectorAll("svg[data-neurons]")) {
  svg.addEventListener("pointermove", e => {
    const n = neurons[nearest(svg, e)];
    const score = n && number(metric(data.headline)(n));
    hint(n ? `${name(n)}   density ${percent(n.density)}   ${data.headline} ${score}` : "");
  });
  svg.addEventListener("pointerleave", () => hint(""));
  svg.addEventListener("click", e => {
    const i = nearest(svg, e);
    if (i !== null) location.hash = encodeURIComponent(name(neurons[i]));
  });
}

// ---- one neuron ----

function hint(text) { $("hint").textContent = text; }

function excerpt(n, [at, doc, scored, ids, acts, sim]) {
  const scale = 10 ** n.digits, value = list => list.map(v => v / scale);
  const real = value(acts), simulated = sim ? value(sim) : null, top = n.max || 1;
  const spans = ids.map((id, k) => {
    const a = share(real[k], top), s = simulated ? share(simulated[k], top) : 0;
    const text = `“${tokens[id]}”   ${real[k]}  (${percent(a)} of max)`
      + (simulated ? `   simulated ${simulated[k]}` : "");
    return el("span", {
      class: `t${k === at ? " peak" : ""}${a > .62 ? " hot" : ""}`, "data-hint": text,
      "--a": a > 0 ? (.08 + .92 * a).toFixed(3) : 0, "--s": s.toFixed(3) }, tokens[id]);
  });
  return el("div", { class: "excerpt" },
    el("div", { class: "side" }, el("b", {}, number(real[at])),
      el("span", { class: scored ? "part scored" : "part" }, scored ? "score" : "fit"), ` doc ${doc}`),
    el("p", {}, ...spans));
}

function excerpts(n) {
  const blocks = [["top", "highest values", "of both parts"],
    ["intervals", "across the range", "windows whose peak lies in each fifth of it"],
    ["random", "uniformly random", "windows as the draw fell"]];
  const found = blocks.filter(([key]) => n[key]);
  const nothing = n.status === "dead" ? "Dead: never positive on the recorded tokens; nothing to show."
    : found.length ? "" : "No excerpts were kept for this neuron.";
  if (nothing) return el("div", { class: "excerpts" }, el("p", { class: "notice" }, nothing));
  return el("div", { class: "excerpts" },
    el("p", { class: "legend" },
      el("span", {}, "value", el("i", { class: "ramp" }), number(n.max)),
      el("span", {}, "simulated", el("i", { class: "ramp sim" }), "same scale"),
      el("span", {}, el("span", { class: "part" }, "fit"), " seen by the tables, so not simulated"),
      el("span", {}, el("span", { class: "part scored" }, "score"), " held out")),
    ...found.flatMap(([key, title, note]) => [
      el("h3", {}, title, el("small", {}, note)),
      ...key === "intervals" ? fifths(n) : n[key].map(e => excerpt(n, e))]));
}

// Of all that the neuron fires, how much lies in each fifth of its range; from the histogram's bins.
function fifths(n) {
  const mass = n.hist.map((c, bin) => c * (bin + .5)), all = mass.reduce((a, b) => a + b, 0);
  const fifth = e => Math.min(4, Math.floor(5 * e[4][e[0]] / 10 ** n.digits / n.max));
  return [4, 3, 2, 1, 0].flatMap(k => {
    const some = n.intervals.filter(e => fifth(e) === k);
    const part = mass.slice(k * mass.length / 5, (k + 1) * mass.length / 5).reduce((a, b) => a + b, 0);
    return some.length ? [el("p", { class: "fifth" }, `${20 * k} to ${20 * k + 20} % of the largest value: `
      + `${percent(part / all)} of all that it fires`), ...some.map(e => excerpt(n, e))] : [];
  });
}

const fires = n => n.hist && n.hist.some(c => c > 0);
const signed = v => (v >= 0 ? "+" : "−") + number(Math.abs(v));

function histogram(n) {
  if (!fires(n)) return null;
  const highest = Math.max(...n.hist), top = Math.log1p(highest);
  const bars = n.hist.map(c => el("i", { "--v": Math.log1p(c) / top }));
  return el("div", {}, el("h3", {}, "Positive values"),
    el("div", { class: "histogram", role: "img",
      "aria-label": `counts of positive values up to the largest, ${number(n.max)}` }, ...bars),
    el("p", { class: "ends" }, el("span", {}, "0"),
      el("span", {}, `log count, highest bar ${number(highest)}`), el("span", {}, number(n.max))));
}

// A quantile of the positive values, as far as the histogram's bins tell.
function quantile(n, share) {
  let left = share * n.hist.reduce((a, b) => a + b, 0);
  const bin = n.hist.findIndex(c => (left -= c) <= 0);
  return n.max * (bin + 1 + left / n.hist[bin]) / n.hist.length;
}

function table(title, rows) {
  return rows.length ? el("div", {}, el("h3", {}, title), el("table", {}, el("tbody", {}, ...rows))) : null;
}
const cells = (...contents) => contents.map(c => el("td", { class: "number" }, c));
const pair = (left, ...right) => el("tr", {}, el("td", {}, left), ...cells(...right));
const chips = (title, ids) => ids && ids.length
  ? el("div", {}, el("h3", {}, title), ...ids.map(t => chip(t, true))) : null;

// A row for each score that there is, with what is to be said of it, and for each that is missing.
function scores(n) {
  return metrics.map((m, k) => {
    const score = n.scores && n.scores[k], why = n.why && n.why[m], bounds = n.ci95 && n.ci95[m];
    if (missing(score)) return why && el("tr", {}, el("td", { colspan: 3 }, `${m}: `, el("small", {}, why)));
    const interval = bounds ? bounds.map(v => v.toFixed(2)).join(" to ") : "";
    const title = el("span", {}, `${m} `, el("small", {}, why || ""));
    return pair(title, el("small", {}, interval), score.toFixed(3));
  }).filter(Boolean);
}

function effects(effect) {
  const rows = (list, sign) => (list || []).map(t => pair(chip(t[0], true), sign + number(Math.abs(t[1]))));
  return el("div", {}, el("h3", {}, "Effect on the next token"),
    el("p", { class: "note" }, `Raised to ${number(effect.clamp)}, its largest value, at the last token of `
      + `${effect.positions} held-out texts: KL ${number(effect.kl)} nats, loss ${signed(effect.loss)} nats. `
      + "Changes of log-probability:"),
    table("raised", rows(effect.raised, "+")), table("lowered", rows(effect.lowered, "−")),
    effect.far.kl === undefined ? null : el("div", {},
      el("p", { class: "note" }, `Raised to ${number(effect.far.clamp)} instead: KL ${number(effect.far.kl)} `
        + `nats, loss ${signed(effect.far.loss)} nats; raised and lowered most:`),
      ...["raised", "lowered"].map(k =>
        el("p", {}, ...effect.far[k].slice(0, 5).map(t => chip(t[0], k !== "raised"))))));
}

// Neurons that write alike, and that fire alike: links where they are on this page.
function relatives(title, list, site) {
  return table(title, (list || []).map(([id, value]) => {
    const other = neurons.find(n => n.site === site && n.id === id), text = `${sites[site]}/${id}`;
    return pair(el("span", {}, other ? el("a", { href: "#" + encodeURIComponent(text) }, text) : text, " ",
      ...other ? label(other, 1) : []), value.toFixed(2));
  }));
}

function side(n) {
  const tag = n.label || {};
  return el("aside", {},
    table("In numbers", [pair("status", n.status), pair("density", percent(n.density)),
      pair("max", number(n.max)), pair("mean", number(n.mean)),
      fires(n) ? pair("quartiles, when it fires",
        [.25, .5, .75].map(q => number(quantile(n, q))).join(", ")) : ""]),
    histogram(n),
    table("Scores", scores(n)),
    tag.tokens && tag.tokens.length ? table("Label: tokens it fires on", [
      el("tr", {}, el("td", {}), ...cells(...["mean", "count", "share"].map(h => el("small", {}, h)))),
      ...tag.tokens.map(t => pair(chip(t[0]), number(t[1]), number(t[2]), percent(t[3])))]) : null,
    chips("Tokens before", tag.left), n.effect ? effects(n.effect) : null,
    relatives("Atoms nearest to its own, by cosine", n.atoms, n.site),
    relatives("Neurons that fire with it, by r", n.together, n.site));
}

function open_neuron(i) {
  const n = neurons[i], k = order.indexOf(i);
  const there = by => k >= 0 && order[k + by] !== undefined;
  const go = by => { if (there(by)) location.hash = encodeURIComponent(name(neurons[order[k + by]])); };
  const step = (by, text, key) => el("button", { onclick: () => go(by), disabled: !there(by) && "",
    "aria-keyshortcuts": key }, text);
  const keys = [["j", " next "], ["k", " previous "], ["Esc", " back"]];
  $("neuron").replaceChildren(
    el("nav", {}, el("button", { onclick: () => { location.hash = ""; }, id: "back" }, "← all neurons"),
      el("small", {}, "keys: ", ...keys.flatMap(([key, what]) => [el("kbd", {}, key), what])),
      el("span", { class: "spring" }), step(-1, "previous", "k"), step(1, "next", "j")),
    el("header", {}, el("p", { class: "eyebrow" }, `layer ${sites[n.site]}`), el("h1", {}, name(n)),
      el("p", { class: "lead" }, n.text || "no label")),
    el("div", { class: "columns" }, excerpts(n), side(n)));
  open_neuron.go = go;
}

let scrolled = 0;
function route() {
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { /* not a name of ours */ }
  const i = wanted ? neurons.findIndex(n => name(n) === wanted) : -1;
  if ($("neuron").hidden) scrolled = window.scrollY;
  hint("");
  $("index").hidden = i >= 0;
  $("neuron").hidden = i < 0;
  document.title = i >= 0 ? `${name(neurons[i])} · neurons` : title;
  if (i >= 0) open_neuron(i);
  window.scrollTo(0, i >= 0 ? 0 : scrolled);
}
const title = document.title;

document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
  if (e.key === "/" && $("neuron").hidden) { e.preventDefault(); $("filter").focus(); }
  if ($("neuron").hidden) return;
  if (e.key === "Escape") location.hash = "";
  if (e.key === "j" || e.key === "ArrowRight") open_neuron.go(1);
  if (e.key === "k" || e.key === "ArrowLeft") open_neuron.go(-1);
});
for (const kind of ["pointerover", "click"]) {
  $("neuron").addEventListener(kind, e => hint(e.target.dataset && e.target.dataset.hint || ""));
}
window.addEventListener("hashchange", route);
tools();
show_charts("");
arrange();
route();
