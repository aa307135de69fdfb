// The page around model.js: what is shown of each model, and what a reader can change. Texts and
// labels are only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const tokenizer = new Tokenizer(data.vocabulary.ranks);
const texts = data.vocabulary.texts;
const context = Math.min(...data.models.map(model => model.config.block_size));
const most = 8;  // rows of a list of neurons
const bars = 10;  // next tokens, unsteered
const continued = 30;  // tokens of a continuation

// token, other: the two tokens clicked last, the later click first; null for none. dropped: how
// many tokens no longer fit the context.
const view = { ids: [], dropped: 0, token: null, other: null, temperature: .8, seed: 1337 };

// ---- small helpers ------------------------------------------------------------------------------

const byId = id => document.getElementById(id);
const clip = share => Math.max(0, Math.min(1, share));

function number(value, digits = 3) {
  return String(+value.toPrecision(digits)).replace("-", "−");
}

function percent(share) {
  const value = 100 * share;
  return `${value >= 9.95 ? value.toFixed(0) : value >= .1 ? value.toFixed(1) : "< 0.1"} %`;
}

const chip = id => el("span", { class: "chip" }, texts[id]);
const quoted = t => `“${texts[view.ids[t]]}”`;
const shownToken = () => view.token ?? view.ids.length - 1;

function choice(label, names, chosen, onchoose) {
  const change = event => onchoose(event.target.value);
  const options = Object.entries(names).map(
    ([value, name]) => el("option", { value, selected: value === String(chosen) }, name));
  return el("select", { "aria-label": label, onchange: change }, ...options);
}

// ---- one model ----------------------------------------------------------------------------------

class Panel {
  constructor(packed, place) {
    this.name = packed.name;
    this.facts = packed.neurons;
    this.model = new Model(packed);
    this.run = new Run(this.model);
    this.steered = new Run(this.model);
    this.layer = this.model.layers.length - 1;  // of the chosen neuron
    this.neuron = null;
    this.listed = "all";  // layers whose neurons are listed
    this.op = "off";
    this.multiple = 4;
    this.from = "all";
    this.head = null;  // [layer, head], null for the mean of all
    this.parts = {};
    for (const name of ["caption", "tools", "strong", "specific", "next", "steer", "kl", "before",
      "after", "attention"]) {
      this.parts[name] = el("div", { class: name });
    }
    this.parts.tokens = el("div", {
      class: "tokens", role: "group", "aria-label": `tokens, ${this.name}`,
      onkeydown: event => this.move(event),
    });
    this.element = this.build(packed, place);
    this.buildTools();
    this.buildSteering();
  }

  build(packed, place) {
    const { config } = packed, { parts } = this;
    const kind = `${config.attention} + ${config.sparsifier}`;
    const loss = packed.loss ? ` · validation loss ${packed.loss.toFixed(2)}` : "";
    const facts = `${kind} · ${config.n_layer} layers, d = ${config.n_embd} · `
      + `${this.model.size.toLocaleString("en")} weights${loss}`;
    const part = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);
    this.titles = {};
    for (const name of ["neurons", "next", "steer", "attention"]) {
      this.titles[name] = el("span", {});
    }
    const heading = data.models.length > 1 ? this.name : "Tokens";
    return el("article", { class: "model", "aria-label": this.name, id: `model-${place}` },
      el("header", {}, el("h2", {}, heading), el("small", {}, facts)),
      el("div", { class: "halves" },
        el("div", {},
          el("section", {}, parts.tokens, parts.caption, parts.tools),
          part(this.titles.neurons,
            el("div", { class: "lists" },
              el("div", {}, el("h4", {}, "strongest, in shares of their maximum"), parts.strong),
              el("div", {}, el("h4", {}, "most specific, in multiples of their mean"),
                parts.specific)))),
        el("div", {},
          part(this.titles.steer, parts.steer),
          part(this.titles.next, parts.next, parts.kl),
          part("Continuation", parts.before, parts.after))),
      part(this.titles.attention, parts.attention));
  }

  maximum() {
    return this.facts[this.layer].max[this.neuron];
  }

  label(layer, neuron) {
    return this.facts[layer].labels[neuron];
  }

  nameOf(layer, neuron) {
    return `L${layer}/${neuron}`;
  }

  // ---- which neuron ----

  buildTools() {
    const layers = this.model.layers.map((_, layer) => [layer, `layer ${layer}`]);
    this.layerChoice = choice("layer of the neuron", Object.fromEntries(layers), this.layer,
      value => this.choose(Number(value), this.neuron));
    this.numberField = el("input", {
      type: "number", min: 0, max: this.model.h - 1, step: 1, "aria-label": "neuron",
      oninput: event => {
        const neuron = event.target.valueAsNumber;
        if (Number.isInteger(neuron) && neuron >= 0 && neuron < this.model.h) {
          this.choose(this.layer, neuron);
        }
      },
    });
    const listed = { all: "list all layers" };
    for (const [layer] of layers) listed[layer] = `list layer ${layer}`;
    this.parts.tools.append(this.layerChoice, this.numberField,
      choice("layers in the lists", listed, this.listed, value => {
        this.listed = value;
        this.showNeurons();
      }));
  }

  choose(layer, neuron) {
    this.layer = layer;
    this.neuron = neuron;
    this.layerChoice.value = String(layer);
    if (this.numberField !== document.activeElement) this.numberField.value = String(neuron);
    refresh(this);
  }

  // The neurons that fire on a token: [{layer, neuron, value, share, ratio}].
  firing(t) {
    const firing = [];
    this.run.layers.forEach(({ codes }, layer) => {
      if (this.listed !== "all" && Number(this.listed) !== layer) return;
      const { max, mean } = this.facts[layer];
      codes[t].forEach((value, neuron) => {
        if (!(value > 0 && max[neuron] > 0)) return;
        const share = value / max[neuron], ratio = value / Math.max(mean[neuron], 1e-9);
        firing.push({ layer, neuron, value, share, ratio });
      });
    });
    return firing;
  }

  showNeurons() {
    const t = shownToken(), firing = t < 0 ? [] : this.firing(t);
    const strong = firing.slice().sort((a, b) => b.share - a.share).slice(0, most);
    const specific = firing.sort((a, b) => b.ratio - a.ratio).slice(0, most);
    const top = specific.length ? specific[0].ratio : 1;
    this.titles.neurons.textContent = t < 0 ? "Neurons" : `Neurons that fire on ${quoted(t)}`;
    this.parts.strong.replaceChildren(
      ...strong.map(row => this.neuronRow(row, row.share, `${row.share.toFixed(2)} max`)));
    this.parts.specific.replaceChildren(
      ...specific.map(row => this.neuronRow(row, row.ratio / top, `${number(row.ratio, 2)} ×`)));
    if (!firing.length) this.parts.strong.append(el("small", {}, "none"));
  }

  neuronRow({ layer, neuron, value }, length, text) {
    const label = this.label(layer, neuron);
    const name = this.nameOf(layer, neuron);
    const chosen = layer === this.layer && neuron === this.neuron;
    return el("button", {
      class: "neuron", "aria-pressed": String(chosen), "--v": clip(length),
      title: `${name}: ${number(value)}  ${label}`,
      onclick: () => this.choose(layer, neuron),
    }, el("b", {}, name), el("span", { class: "label" }, label),
    el("span", { class: "value" }, text));
  }

  // ---- tokens ----

  // How much the shown token attends to each token: one head, or the mean of all.
  attention(t) {
    const heads = this.model.config.n_head, mean = new Float64Array(t + 1);
    if (this.head) return this.run.attention(this.run.layers[this.head[0]], this.head[1], t);
    for (const layer of this.run.layers) {
      for (let head = 0; head < heads; head++) {
        const weights = this.run.attention(layer, head, t);
        for (let s = 0; s <= t; s++) mean[s] += weights[s] / heads / this.run.layers.length;
      }
    }
    return mean;
  }

  showTokens() {
    const t = shownToken(), { tokens } = this.parts;
    const focused = tokens.contains(document.activeElement);
    const weights = t < 0 ? [] : this.attention(t), unit = this.maximum() || 1;
    const heaviest = Math.max(...weights);
    const { codes } = this.run.layers[this.layer];
    const spans = [];
    view.ids.forEach((id, i) => {
      const value = codes[i][this.neuron], share = clip(value / unit);
      const marks = `${i === t ? " peak" : ""}${i === view.other ? " other" : ""}`;
      spans.push(el("button", {
        class: `t${marks}${share > .62 ? " hot" : ""}`, tabindex: i === t ? 0 : -1,
        "aria-pressed": String(i === t || i === view.other),
        "--a": share, "--s": i <= t ? weights[i] / heaviest : 0,
        title: `token ${i}: ${number(value)} (${percent(share)} of the maximum)`
          + (i <= t ? `, attention ${percent(weights[i])}` : ""),
        onclick: () => select(i, this),
      }, texts[id]));
      if (texts[id].includes("↵")) spans.push(el("br", {}));
    });
    tokens.replaceChildren(...spans);
    if (focused) tokens.querySelector(".peak")?.focus();
    this.showCaption();
  }

  showCaption() {
    const label = this.label(this.layer, this.neuron), maximum = this.maximum();
    const facts = maximum > 0 ? `maximum ${number(maximum)}` : "never fired on held-out text";
    const head = this.head ? `head ${this.head[1]} of layer ${this.head[0]}` : "mean of all heads";
    this.parts.caption.replaceChildren(
      el("span", { class: "key act" }, el("b", {}, this.nameOf(this.layer, this.neuron)),
        ` ${label ? `${label} · ` : ""}${facts}`),
      el("span", { class: "key sim" }, `what the boxed token attends to · ${head}`));
  }

  // Arrow keys walk through the tokens.
  move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    view.token = Math.max(0, Math.min(view.ids.length - 1, shownToken() + step));
    refresh();
    this.parts.tokens.querySelector(".peak")?.focus();
  }

  // ---- attention ----

  showAttention() {
    const t = shownToken(), pair = view.other !== null && view.other !== t;
    const [later, earlier] = pair ? [Math.max(t, view.other), Math.min(t, view.other)] : [t, null];
    this.titles.attention.textContent = pair
      ? `Attention: how much ${quoted(later)} attends to ${quoted(earlier)}, in each head`
      : t < 0 ? "Attention" : `Attention: what ${quoted(t)} attends to most, in each head`;
    if (t < 0) return this.parts.attention.replaceChildren();
    const heads = [];
    this.run.layers.forEach((layer, number) => {
      for (let k = 0; k < this.model.config.n_head; k++) {
        heads.push(this.showHead(number, k, this.run.attention(layer, k, later), earlier));
      }
    });
    this.parts.attention.replaceChildren(...heads);
  }

  showHead(layer, head, weights, earlier) {
    const chosen = this.head && this.head[0] === layer && this.head[1] === head;
    const choose = () => {
      this.head = chosen ? null : [layer, head];
      refresh(this);
    };
    const order = Array.from(weights.keys()).sort((i, j) => weights[j] - weights[i]).slice(0, 3);
    const favourites = order.map(
      s => el("span", { class: "favourite" }, chip(view.ids[s]), percent(weights[s])));
    return el("button", {
      class: "head", "aria-pressed": String(!!chosen), onclick: choose,
      "--s": earlier === null ? 0 : weights[earlier],
    }, el("b", {}, `L${layer} h${head}`),
    earlier === null ? null : el("span", { class: "weight" }, percent(weights[earlier])),
    ...favourites);
  }

  // ---- the next token ----

  showNext() {
    const t = shownToken();
    this.titles.next.textContent = t < 0 ? "Next token" : `Next token after ${quoted(t)}`;
    this.parts.kl.replaceChildren();
    if (t < 0) return this.parts.next.replaceChildren();
    const before = this.run.next(t), after = this.op === "off" ? null : this.steered.next(t);
    const ids = new Set([...largest(before, bars), ...after ? largest(after, bars) : []]);
    const height = id => Math.max(before[id], after ? after[id] : -Infinity);
    const shown = [...ids].sort((i, j) => height(j) - height(i)).slice(0, after ? 14 : bars);
    const scale = Math.exp(height(shown[0]));
    this.parts.next.classList.toggle("both", !!after);
    this.parts.next.replaceChildren(...shown.map(id => {
      const p = Math.exp(before[id]), q = after ? Math.exp(after[id]) : null;
      return el("div", { class: "bar" }, chip(id),
        el("span", { class: "track", "--p": p / scale, "--q": (q ?? 0) / scale }),
        el("span", { class: "value" }, after ? `${percent(p)} → ${percent(q)}` : percent(p)));
    }));
    if (after) {
      const nats = divergence(before, after), kl = nats < 1e-4 ? "< 0.0001" : number(nats);
      this.parts.kl.append(
        el("span", {}, `KL ${kl} nats: how far steering moves this prediction`),
        el("small", { class: "key bars" }, "before"), el("small", { class: "key act" }, "after"));
    }
  }

  // ---- steering ----

  buildSteering() {
    const buttons = ["off", "set", "add", "ablate"].map(op => el("button", {
      "data-op": op, onclick: () => {
        this.op = op;
        refresh(this);
      },
    }, op));
    this.slider = el("input", {
      type: "range", min: -8, max: 8, step: .25, value: this.multiple,
      "aria-label": "value in multiples of the neuron's maximum",
      oninput: event => {
        this.multiple = event.target.valueAsNumber;
        if (this.op === "off" || this.op === "ablate") this.op = "set";
        refresh(this);
      },
    });
    this.amount = el("output", {});
    const where = { all: "at every token", last: "from the last token on" };
    this.parts.steer.append(el("div", { class: "ops", role: "group", "aria-label": "steering" },
      ...buttons), choice("where", where, this.from, value => {
      this.from = value;
      refresh(this);
    }), el("label", { class: "slider" }, this.slider, this.amount));
  }

  // What Run.steer takes: null while steering is off.
  steering() {
    if (this.op === "off") return null;
    const value = this.op === "ablate" ? 0 : this.multiple * (this.maximum() || 1);
    const begin = this.from === "all" ? 0 : Math.max(0, view.ids.length - 1);
    return { layer: this.layer, neuron: this.neuron, op: this.op, value, begin };
  }

  showSteering() {
    for (const button of this.parts.steer.querySelectorAll("[data-op]")) {
      button.setAttribute("aria-pressed", String(button.dataset.op === this.op));
    }
    this.titles.steer.textContent = `Steer ${this.nameOf(this.layer, this.neuron)}`;
    const value = number(this.multiple * (this.maximum() || 1));
    const unit = this.maximum() > 0 ? "× its maximum" : "(it has no maximum)";
    const sign = this.op === "add" && this.multiple > 0 ? "+" : "";
    this.amount.textContent = this.op === "ablate" ? "0"
      : `${sign}${number(this.multiple)} ${unit} = ${sign}${value}`;
  }

  // ---- all of it ----

  read() {
    if (this.neuron === null) this.pick();
    this.run.read(view.ids);
    this.steered.steer(this.steering());
    if (this.op !== "off") this.steered.read(view.ids, this.run);
  }

  // The first neuron: of those that fire on the last token, the one nearest to its maximum.
  pick() {
    this.run.read(view.ids);
    const t = shownToken();
    const firing = t < 0 ? [] : this.firing(t).filter(row => row.layer === this.layer);
    const best = firing.sort((a, b) => b.share - a.share)[0];
    this.neuron = best ? best.neuron : 0;
    this.numberField.value = String(this.neuron);
  }

  show() {
    this.showSteering();
    this.showTokens();
    this.showNeurons();
    this.showNext();
    this.showAttention();
  }
}

// Places of the n largest entries, the largest first.
function largest(values, n) {
  const top = [];
  for (let i = 0; i < values.length; i++) {
    if (top.length === n && !(values[i] > values[top[n - 1]])) continue;
    let place = top.length;
    while (place && values[i] > values[top[place - 1]]) place--;
    top.splice(place, 0, i);
    top.length = Math.min(top.length, n);
  }
  return top;
}

// ---- the whole page -----------------------------------------------------------------------------

// The clicked token is shown; with the one clicked before it, it makes the pair for attention.
function select(t, panel) {
  const before = view.token;
  view.token = t;
  view.other = before === null || before === t ? null : before;
  refresh();
  panel.parts.tokens.querySelector(".peak")?.focus();
}

function retype() {
  const all = tokenizer.encode(byId("text").value), before = view.ids;
  view.dropped = Math.max(0, all.length - context);
  view.ids = all.slice(view.dropped);
  const changed = view.ids.length !== before.length || view.ids.some((id, i) => id !== before[i]);
  if (changed) Object.assign(view, { token: null, other: null });
  refresh();
}

// Computes and shows everything, or one model only; the continuations follow when there is time.
function refresh(only) {
  const start = performance.now();
  const shown = only ? [only] : panels;
  for (const panel of shown) {
    panel.read();
    panel.show();
  }
  const time = performance.now() - start, n = view.ids.length;
  const long = view.dropped
    ? ` · too long: the model reads the last ${context}, ${view.dropped} are left out` : "";
  const count = `${n} ${n === 1 ? "token" : "tokens"}`;
  byId("status").textContent = `${count} · ${time.toFixed(0)} ms${long}`;
  byId("status").classList.toggle("long", view.dropped > 0);
  continueAll();
}

let job = 0;  // a newer one ends the older

function continueAll() {
  const mine = ++job, tasks = [];
  for (const panel of panels) {
    panel.parts.before.replaceChildren();
    panel.parts.after.replaceChildren();
    if (!view.ids.length) continue;
    tasks.push(task(panel, panel.run, panel.parts.before, "unsteered"));
    if (panel.op !== "off") tasks.push(task(panel, panel.steered, panel.parts.after, "steered"));
  }
  const slice = () => {
    const end = performance.now() + 8;
    while (mine === job && tasks.length && performance.now() < end) {
      if (tasks[0].next().done) tasks.shift();
    }
    if (mine === job && tasks.length) setTimeout(slice);
  };
  setTimeout(slice, 30);
}

// Text with its line breaks marked, and no empty lines.
function marked(text) {
  return text.replace(/\n+/g, run => "↵".repeat(run.length) + "\n");
}

// Writes a continuation, token by token.
function* task(panel, run, place, title) {
  const ids = [], text = el("span", {});
  const end = marked(tokenizer.decode(view.ids.slice(-6)).trimStart());
  place.replaceChildren(el("small", {}, title), el("p", {}, el("i", {}, end), text));
  for (const id of continuation(run, view.ids, continued, view.temperature, view.seed)) {
    ids.push(id);
    text.textContent = marked(tokenizer.decode(ids));
    yield;
  }
  run.steer(run === panel.steered ? panel.steering() : null);  // where its window began
}

let waiting = false;

// Keystrokes that came while the page was busy are answered together.
function soon() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    retype();
  });
}

function buildTools() {
  const text = el("textarea", {
    id: "text", rows: 3, spellcheck: "false", autocomplete: "off", autocapitalize: "off",
    maxlength: 10000, "aria-label": "text", oninput: soon,
  });
  text.value = data.text;
  const temperature = el("input", {
    type: "range", min: 0, max: 1.5, step: .1, value: view.temperature,
    "aria-label": "temperature of the continuations",
    oninput: event => {
      view.temperature = event.target.valueAsNumber;
      byId("temperature").textContent = `temperature ${view.temperature.toFixed(1)}`;
      continueAll();
    },
  });
  const again = () => {
    view.seed++;
    continueAll();
  };
  byId("tools").append(text, el("div", { class: "row" },
    el("span", { id: "status", role: "status" }),
    el("label", { class: "slider" }, temperature,
      el("output", { id: "temperature" }, `temperature ${view.temperature.toFixed(1)}`)),
    el("button", { onclick: again }, "draw another continuation")));
}

buildTools();
const panels = data.models.map((packed, place) => new Panel(packed, place));
byId("models").classList.toggle("two", panels.length > 1);
byId("models").append(...panels.map(panel => panel.element));
retype();
