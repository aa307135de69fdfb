"use strict";
// One question at a time from the JSON in #data; keys 1 to 9 answer. Texts are only ever set as text. Both
// packets for people begin with this; what differs, asked, option, found and thanks, is in human.js and in
// concept_packet.js, which follow it in one script.
const data = JSON.parse(document.getElementById("data").textContent);
const { questions } = data;
const place = document.getElementById("task"), key = `crate_mini ${data.page}`;
const most = Math.max(1, ...questions.map(q => q.options.length));
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
  const text = JSON.stringify({ schema: 1, page: data.page, ...found() }, null, 1);
  const file = new Blob([text], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(file), download: "answers.json" });
  document.body.append(link);
  link.click();
  link.remove();
}

function show() {
  since = performance.now();
  const q = questions[at], done = answers.filter(a => a).length;
  place.replaceChildren(
    el("progress", { max: questions.length, value: at, "aria-label": "progress" }),
    el("small", {}, q ? `question ${at + 1} of ${questions.length}` : "all questions seen"),
    ...q ? [...asked(q), ...q.options.map((text, k) => el("button", {
      class: "choice", onclick: () => choose(k),
      "aria-pressed": String(answers[at] !== null && answers[at].choice === k) },
      el("kbd", {}, String(k + 1)), option(q, text)))]
      : [el("h2", {}, "Thank you"), ...thanks(`${done} of ${questions.length} questions answered. `)],
    el("footer", {},
      el("button", { onclick: () => move(-1), disabled: at === 0 && "" }, "← back"),
      el("button", { onclick: () => move(1), disabled: at >= questions.length && "" }, "skip →"),
      el("button", { onclick: save, id: "save" }, `save ${done} answers`),
      el("small", {}, "keys: ", el("kbd", {}, "1"), " … ", el("kbd", {}, String(most)), " answer, ",
        el("kbd", {}, "←"), " back")));
  window.scrollTo(0, 0);
}

document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const q = questions[at], k = Number(e.key) - 1;
  if (q && Number.isInteger(k) && k >= 0 && k < q.options.length) choose(k);
  if (e.key === "ArrowLeft") move(-1);
  if (e.key === "ArrowRight") move(1);
});
