// Tells the page around this one how wide it is, once its texts are long and a neuron is steered.

function check() {
  byId("text").value = `${"wide".repeat(60)} <b>two</b> three four five six seven eight nine ten`;
  retype();
  for (const panel of panels) {
    panel.op = "set";
    refresh(panel);
    const tokens = [...panel.parts.tokens.querySelectorAll(".t")];
    tokens[3].click();
    [...panel.parts.tokens.querySelectorAll(".t")][9].click();
  }
  const root = document.documentElement;
  const small = [...document.querySelectorAll("button:not(.t), select, input")].filter(
    element => element.getBoundingClientRect().height < 24).length;
  parent.postMessage({ width: root.clientWidth, needed: root.scrollWidth, small }, "*");
  report({});
}
