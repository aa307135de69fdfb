// The questions of human.html, behind quiz.js: what does one neuron fire on?
function excerpt(e) {
  return el("p", {}, ...e.tokens.map((text, k) => {
    const share = e.values ? e.values[k] : 0;
    const span = el("span", { class: `t${k === e.at ? " peak" : ""}${share > .62 ? " hot" : ""}` }, text);
    span.style.setProperty("--a", share > 0 ? .08 + .92 * share : 0);
    return span;
  }));
}

function asked(q) {
  const intruder = q.task === "intruder";
  return [
    el("h2", {}, intruder ? "Which excerpt does not belong?" : "Which label describes these excerpts?"),
    el("p", {}, intruder
      ? "Four of these are where one neuron fires hardest, one is another neuron’s. The box marks where."
      : "Colour is how strongly one neuron fires on each token; these texts were not used to make the label. "
        + "A label names the tokens it fires on most, each with its share."),
    ...intruder ? [] : [el("div", { class: "given" }, ...q.given.map(excerpt))]];
}

function option(q, one) {
  return q.task === "intruder" ? excerpt(one) : el("p", {}, one);
}

function found() {
  const { model, sha256, seed } = data;
  return { model, sha256, seed, answers: questions.map((q, i) => ({
    task: q.task, site: q.site, neuron: q.neuron, answer: q.answer,
    choice: answers[i] ? answers[i].choice : null, seconds: answers[i] ? answers[i].seconds : null })) };
}

function thanks(done) {
  return [el("p", {}, done + "Save them, then count them with"),
    el("p", {}, el("code", {}, "python interpret.py report CKPT --answers answers.json"))];
}

show();
