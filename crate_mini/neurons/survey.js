// The questions of human.html: what does one neuron fire on? quiz.js comes before this in one
// script and calls asked, option, resultFields and thanks.

function excerpt(shown) {
  return el("p", {}, ...shown.tokens.map((text, k) => {
    const share = shown.values ? shown.values[k] : 0;
    const style = `t${k === shown.at ? " peak" : ""}${share > .62 ? " hot" : ""}`;
    const span = el("span", { class: style }, text);
    span.style.setProperty("--a", share > 0 ? .08 + .92 * share : 0);
    return span;
  }));
}

function asked(question) {
  if (question.task === "intruder") {
    return [
      el("h2", {}, "Which excerpt does not belong?"),
      el("p", {}, "In four of these one neuron fires most strongly; the fifth belongs to another "
        + "neuron. The box marks the token on which it fires."),
    ];
  }
  return [
    el("h2", {}, "Which label describes these excerpts?"),
    el("p", {}, "The colour shows how strongly one neuron fires on each token; its label was not "
      + "made from these texts. A label names the tokens that a neuron fires on most, each with "
      + "its share of the activation."),
    el("div", { class: "given" }, ...question.given.map(excerpt)),
  ];
}

function option(question, content) {
  return question.task === "intruder" ? excerpt(content) : el("p", {}, content);
}

function resultFields() {
  const { model, sha256, seed } = data;
  const given = questions.map((question, i) => ({
    task: question.task,
    site: question.site,
    neuron: question.neuron,
    answer: question.answer,
    choice: answers[i] ? answers[i].choice : null,
    seconds: answers[i] ? answers[i].seconds : null,
  }));
  return { model, sha256, seed, answers: given };
}

function thanks(done) {
  return [
    el("p", {}, done + "Save them, then count them with"),
    el("p", {}, el("code", {}, "python interpret.py report CKPT --answers answers.json")),
  ];
}

show();
