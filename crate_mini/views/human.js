"use strict";
// One question at a time from the JSON in #data; keys 1 to 5 answer. Texts are only ever set as text.
const data = JSON.parse(document.getElementById("data").textContent);
const { questions } = data;
const place = document.getElementById("task"), key = `crate_mini ${data.page}`;
let answers = questions.map(() => null), at = 0, since = performance.now();

try {  // go on where this browser stopped; a browser that keeps nothing for files just starts anew
  const kept = JSON.parse(localStorage.getItem(key));
  if (kept && kept.length === questions.length) answers = kept;
  at = Math.max(0, answers.indexOf(null));
} catch { /* nothing kept */ }

function el(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) e.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

function excerpt(e) {
  return el("p", {}, ...e.tokens.map((text, k) => {
    const share = e.values ? e.values[k] : 0;
    const span = el("span", { class: `t${k === e.at ? " peak" : ""}${share > .62 ? " hot" : ""}` }, text);
    span.style.setProperty("--a", share > 0 ? .08 + .92 * share : 0);
    return span;
  }));
}

function choose(choice) {
  answers[at] = { choice, seconds: Math.round((performance.now() - since) / 100) / 10 };
  try { localStorage.setItem(key, JSON.stringify(answers)); } catch { /* kept in this page only */ }
  at = Math.min(at + 1, questions.length);
  show();
}

function move(step) {
  at = Math.max(0, Math.min(questions.length, at + step));
  show();
}

function save() {
  const found = questions.map((q, i) => ({ task: q.task, site: q.site, neuron: q.neuron, answer: q.answer,
    choice: answers[i] ? answers[i].choice : null, seconds: answers[i] ? answers[i].seconds : null }));
  const { page, model, sha256, seed } = data;
  const text = JSON.stringify({ schema: 1, page, model, sha256, seed, answers: found }, null, 1);
  const file = new Blob([text], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(file), download: "answers.json" });
  document.body.append(link);
  link.click();
  link.remove();
}

function footer() {
  const done = answers.filter(a => a).length;
  return [el("footer", {},
    el("button", { onclick: () => move(-1), disabled: at === 0 && "" }, "← back"),
    el("button", { onclick: () => move(1), disabled: at >= questions.length && "" }, "skip →"),
    el("button", { onclick: save, id: "save" }, `save ${done} answers`),
    el("small", {}, "keys: ", el("kbd", {}, "1"), " … ", el("kbd", {}, "5"), " answer, ",
      el("kbd", {}, "←"), " back"))];
}

function question(q) {
  const intruder = q.task === "intruder";
  return [
    el("h2", {}, intruder ? "Which excerpt does not belong?" : "Which label describes these excerpts?"),
    el("p", {}, intruder
      ? "Four of these are where one neuron fires hardest, one is another neuron’s. The box marks where."
      : "Colour is how strongly one neuron fires on each token; these texts were not used to make the label. "
        + "A label names the tokens it fires on most, each with its share."),
    ...intruder ? [] : [el("div", { class: "given" }, ...q.given.map(excerpt))],
    ...q.options.map((option, k) => el("button", {
      class: "choice", onclick: () => choose(k),
      "aria-pressed": String(answers[at] !== null && answers[at].choice === k) },
      el("kbd", {}, String(k + 1)), intruder ? excerpt(option) : el("p", {}, option)))];
}

function show() {
  since = performance.now();
  const q = questions[at];
  place.replaceChildren(
    el("progress", { max: questions.length, value: at, "aria-label": "progress" }),
    el("small", {}, q ? `question ${at + 1} of ${questions.length}` : "all questions seen"),
    ...q ? question(q) : [
      el("h2", {}, "Thank you"),
      el("p", {}, `${answers.filter(a => a).length} of ${questions.length} questions answered. `
        + "Save them, then count them with"),
      el("p", {}, el("code", {}, "python interpret.py report CKPT --answers answers.json"))],
    ...footer());
  window.scrollTo(0, 0);
}

document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const q = questions[at], k = Number(e.key) - 1;
  if (q && Number.isInteger(k) && k >= 0 && k < q.options.length) choose(k);
  if (e.key === "ArrowLeft") move(-1);
  if (e.key === "ArrowRight") move(1);
});
show();
