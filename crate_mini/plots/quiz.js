// One question at a time from the JSON in #data; keys 1 to 9 answer. Texts are set as text, never
// as markup. A survey page is this script followed by one of a chapter, which defines
//   asked(question)            elements that ask it
//   option(question, content)  the element of one option
//   resultFields()             what the saved file holds besides the page
//   thanks(done)               elements at the end; done: a sentence about what was answered
const data = JSON.parse(document.getElementById("data").textContent);
const { questions } = data;
const place = document.getElementById("task");
const storageKey = `crate_mini ${data.page}`;
const mostOptions = Math.max(1, ...questions.map(question => question.options.length));
let answers = questions.map(() => null);
let position = 0;
let shownSince = performance.now();

try {  // continue where this browser stopped; some browsers keep nothing for files on disk
  const kept = JSON.parse(localStorage.getItem(storageKey));
  if (kept && kept.length === questions.length) answers = kept;
  position = Math.max(0, answers.indexOf(null));
} catch { /* nothing kept */ }

function choose(choice) {
  const seconds = Math.round((performance.now() - shownSince) / 100) / 10;
  answers[position] = { choice, seconds };
  try {
    localStorage.setItem(storageKey, JSON.stringify(answers));
  } catch { /* kept in this page only */ }
  position = Math.min(position + 1, questions.length);
  show();
}

function move(step) {
  position = Math.max(0, Math.min(questions.length, position + step));
  show();
}

function save() {
  const result = { schema: 1, page: data.page, ...resultFields() };
  const file = new Blob([JSON.stringify(result, null, 1)], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(file), download: "answers.json" });
  document.body.append(link);
  link.click();
  link.remove();
}

function optionButton(question, content, number) {
  const answer = answers[position];
  const attributes = {
    class: "choice",
    onclick: () => choose(number),
    "aria-pressed": String(answer !== null && answer.choice === number),
  };
  return el("button", attributes,
    el("kbd", {}, String(number + 1)), option(question, content));
}

function show() {
  shownSince = performance.now();
  const question = questions[position];
  const done = answers.filter(answer => answer).length;
  const count = question
    ? `question ${position + 1} of ${questions.length}` : "all questions seen";
  const content = question
    ? [...asked(question),
      ...question.options.map((text, number) => optionButton(question, text, number))]
    : [el("h2", {}, "Thank you"),
      ...thanks(`${done} of ${questions.length} questions answered. `)];
  place.replaceChildren(
    el("progress", { max: questions.length, value: position, "aria-label": "progress" }),
    el("small", {}, count),
    ...content,
    el("footer", {},
      el("button", { onclick: () => move(-1), disabled: position === 0 && "" }, "← back"),
      el("button", { onclick: () => move(1), disabled: position >= questions.length && "" },
        "skip →"),
      el("button", { onclick: save, id: "save" }, `save ${done} answers`),
      el("small", {}, "keys: ", el("kbd", {}, "1"), " … ", el("kbd", {}, String(mostOptions)),
        " answer, ", el("kbd", {}, "←"), " back")));
  window.scrollTo(0, 0);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const question = questions[position];
  const number = Number(event.key) - 1;
  const inRange = Number.isInteger(number) && number >= 0;
  if (question && inRange && number < question.options.length) choose(number);
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
