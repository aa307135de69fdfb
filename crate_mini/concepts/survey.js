// The questions of packet.html, behind quiz.js: what did the model say, by a concept's words alone?
function asked(q) {
  return [el("h2", {}, "A model read a text and relied on these words. What did it answer?"),
    el("div", { class: "given" }, el("p", {}, q.given.join(" · ")))];
}

function option(q, name) {
  return el("p", {}, name);
}

function found() {
  return { choices: answers.map(a => a && a.choice) };
}

function thanks(done) {
  return [el("p", {}, done + "Save them and send the file back.")];
}

show();
