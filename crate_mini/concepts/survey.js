// The questions of packet.html. quiz.js comes before this in one script and calls asked, option,
// resultFields and thanks.
function asked(q) {
  return [el("h2", {}, "A model read a text and relied on these words. What did it answer?"),
    el("div", { class: "given" }, el("p", {}, q.given.join(" · ")))];
}

function option(q, name) {
  return el("p", {}, name);
}

function resultFields() {
  return { choices: answers.map(a => a && a.choice) };
}

function thanks(done) {
  return [el("p", {}, done + "Save your answers and send us the file.")];
}

show();
