// text.html: a text whose tokens are coloured by one neuron at a time, from the JSON in #data
// (text_page.py). Texts and labels are only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const { tokens, breaks, neurons, lists } = data;
const byId = id => document.getElementById(id);
const shown = { list: 0, neuron: null, token: null };
const firstRows = 60;

const percent = share => `${+(100 * share).toPrecision(2)} %`;

function levelAt(neuron, token) {
  const place = neuron.at.indexOf(token);
  return place < 0 ? 0 : neuron.levels[place] / 100;
}

// ---- the text -----------------------------------------------------------------------------------

const spans = tokens.map((token, k) => {
  const choose = () => chooseToken(shown.token === k ? null : k);
  const press = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose();
  };
  const attributes = { class: "t", role: "button", tabindex: 0, onclick: choose, onkeydown: press };
  return el("span", attributes, token);
});

function showText() {
  const children = spans.flatMap((span, k) => (breaks[k] ? [span, el("br", {})] : [span]));
  byId("text").replaceChildren(...children);
}

function colour() {
  const neuron = neurons[shown.neuron];
  spans.forEach((span, k) => {
    const share = neuron ? levelAt(neuron, k) : 0;
    span.style.setProperty("--a", share > 0 ? (.08 + .92 * share).toFixed(3) : 0);
    span.classList.toggle("hot", share > .62);
    span.classList.toggle("peak", Boolean(neuron) && k === neuron.peak && share > 0);
    span.classList.toggle("chosen", k === shown.token);
    span.title = neuron ? `${percent(share)} of the maximum` : "";
  });
}

// One sentence on the neuron that colours the text, with a link to its page if there is one.
function describe() {
  const neuron = neurons[shown.neuron];
  if (!neuron) {
    byId("about").textContent = "No neuron fires on this text.";
    return;
  }
  const link = neuron.page
    ? el("a", { href: "index.html#" + encodeURIComponent(neuron.page) }, " its page →")
    : null;
  byId("about").replaceChildren(
    el("b", {}, neuron.name), neuron.label ? ` ${neuron.label}` : "",
    neuron.property ? `; given its token: ${neuron.property}` : "",
    `. Largest value here ${neuron.value}, on held-out text ${neuron.max}.`, link || "");
}

// ---- the lists ----------------------------------------------------------------------------------

function row(i) {
  const neuron = neurons[i];
  const share = shown.token === null ? neuron.strength : levelAt(neuron, shown.token);
  const where = shown.token === null ? "at its peak" : "on this token";
  const facts = `${percent(share)} of its maximum ${where}; ${neuron.lift} times its usual mean; `
    + `fires on ${percent(neuron.density)} of tokens`;
  const attributes = { class: "neuron", "aria-pressed": String(i === shown.neuron),
    onclick: () => chooseNeuron(i) };
  return el("button", attributes,
    el("b", {}, neuron.name),
    el("span", {}, [neuron.label, neuron.property].filter(Boolean).join("; ") || "no label yet",
      el("span", { class: "meter", "--v": Math.min(1, share) })),
    el("small", {}, facts));
}

function numbers() {
  if (shown.token === null) return lists[shown.list][1];
  const firing = neurons.map((_, i) => i).filter(i => levelAt(neurons[i], shown.token) > 0);
  const order = (i, j) =>
    levelAt(neurons[j], shown.token) - levelAt(neurons[i], shown.token) || i - j;
  return firing.sort(order).slice(0, firstRows);
}

function showList() {
  const tabs = lists.map(([title], k) => el("button", {
    "aria-pressed": String(shown.token === null && shown.list === k),
    onclick: () => chooseList(k) }, title));
  if (shown.token !== null) {
    tabs.push(el("button", { "aria-pressed": "true", onclick: () => chooseToken(null) },
      `on “${tokens[shown.token]}” ×`));
  }
  byId("tabs").replaceChildren(...tabs);
  const rows = numbers().map(row);
  const none = el("p", { class: "legend" }, "None of the neurons on this page.");
  byId("list").replaceChildren(...(rows.length ? rows : [none]));
}

function draw() {
  colour();
  describe();
  showList();
}

function chooseNeuron(i) {
  shown.neuron = i;
  draw();
}

function chooseToken(k) {
  shown.token = k;
  if (k !== null && numbers().length) shown.neuron = numbers()[0];
  draw();
}

function chooseList(k) {
  Object.assign(shown, { list: k, token: null });
  if (numbers().length) shown.neuron = numbers()[0];
  draw();
}

showText();
chooseList(lists[0][1].length ? 0 : 1);
