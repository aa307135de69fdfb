"use strict";
// One question at a time from the JSON in #data; keys 1 to 9 answer. Texts are only ever set as text.
const data = JSON.parse(document.getElementById("data").textContent);
const { questions } = data;
const place = document.getElementById("task"), key = `crate_mini ${data.page}`;
let choices = questions.map(() => null), at = 0;

try {  // go on where this browser stopped
  const kept = JSON.parse(localStorage.getItem(key));
  if (kept && kept.length === questions.length) choices = kept;
  at = Math.max(0, choices.indexOf(null));
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

function choose(choice) {
  choices[at] = choice;
  try { localStorage.setItem(key, JSON.stringify(choices)); } catch { /* kept in this page only */ }
  at = Math.min(at + 1, questions.length);
  show();
}

function move(step) {
  at = Math.max(0, Math.min(questions.length, at + step));
  show();
}

function save() {
  const text = JSON.stringify({ schema: 1, page: data.page, choices }, null, 1);
  const file = new Blob([text], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(file), download: "answers.json" });
  document.body.append(link);
  link.click();
  link.remove();
}

function question(q) {
  return [
    el("h2", {}, "A model read a text and relied on these words. What did it answer?"),
    el("div", { class: "given" }, el("p", {}, q.given.join(" · "))),
    ...q.options.map((option, k) => el("button", {
      class: "choice", onclick: () => choose(k), "aria-pressed": String(choices[at] === k) },
      el("kbd", {}, String(k + 1)), el("p", {}, option)))];
}

function show() {
  const q = questions[at], done = choices.filter(c => c !== null).length;
  place.replaceChildren(
    el("progress", { max: questions.length, value: at, "aria-label": "progress" }),
    el("small", {}, q ? `question ${at + 1} of ${questions.length}` : "all questions seen"),
    ...q ? question(q) : [el("h2", {}, "Thank you"),
      el("p", {}, `${done} of ${questions.length} questions answered. Save them and send the file back.`)],
    el("footer", {},
      el("button", { onclick: () => move(-1), disabled: at === 0 && "" }, "← back"),
      el("button", { onclick: () => move(1), disabled: at >= questions.length && "" }, "skip →"),
      el("button", { onclick: save, id: "save" }, `save ${done} answers`)));
  window.scrollTo(0, 0);
}

document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const q = questions[at], k = Number(e.key) - 1;
  if (q && Number.isInteger(k) && k >= 0 && k < q.options.length) choose(k);
  if (e.key === "ArrowLeft") move(-1);
});
show();
