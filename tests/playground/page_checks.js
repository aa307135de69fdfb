// A reader of the playground; test_playground_page.py compares what the page shows with Python.

const wait = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
const textOf = element => element.textContent;
const all = (place, selector) => [...place.querySelectorAll(selector)];

async function change(element, value) {
  element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  element.dispatchEvent(new Event("change", { bubbles: true }));
  await wait(60);
}

function shown(panel) {
  const { parts, titles, element } = panel;
  return {
    tokens: all(parts.tokens, ".t").map(textOf),
    colours: all(parts.tokens, ".t").map(token => Number(token.style.getPropertyValue("--a"))),
    boxed: all(parts.tokens, ".t").findIndex(token => token.classList.contains("peak")),
    strong: all(parts.strong, ".neuron").map(row => all(row, "b, .label, .value").map(textOf)),
    specific: all(parts.specific, ".neuron").map(row => all(row, "b, .label, .value").map(textOf)),
    bars: all(parts.next, ".bar").map(bar => all(bar, ".chip, .value").map(textOf)),
    heads: all(parts.attention, ".head").map(head => textOf(head.querySelector(".weight") || head)),
    titles: Object.values(titles).map(textOf),
    kl: textOf(parts.kl),
    amount: textOf(panel.amount),
    before: parts.before.querySelector("p") && textOf(parts.before.querySelector("p")),
    after: parts.after.querySelector("p") && textOf(parts.after.querySelector("p")),
    caption: textOf(parts.caption),
    pressed: all(element, "[data-op][aria-pressed=true]").map(textOf),
  };
}

async function check({ text, hostile, long, steered }) {
  const area = byId("text"), [first, second] = panels;
  const results = { opened: panels.map(shown), title: document.title };
  await change(document.querySelector("#tools input[type=range]"), "0");  // greedy from here on
  await change(area, text);
  await wait(200);
  results.typed = panels.map(shown);

  all(first.parts.tokens, ".t")[6].click();
  all(first.parts.tokens, ".t")[2].click();
  results.pair = panels.map(shown);
  const key = new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true });
  document.activeElement.dispatchEvent(key);
  results.moved = shown(second).boxed;
  results.focused = textOf(document.activeElement);
  first.parts.attention.querySelector(".head").click();
  results.oneHead = shown(first).caption;
  await change(area, text + "!");
  await change(area, text);

  await change(first.numberField, String(steered.neuron));
  await change(first.layerChoice, String(steered.layer));
  results.steered = [];
  for (const [op, multiple, where] of steered.ways) {
    all(first.element, `[data-op=${op}]`)[0].click();
    await change(first.parts.steer.querySelector("select"), where);
    if (op !== "ablate") await change(first.slider, String(multiple));
    await wait(200);
    results.steered.push(shown(first));
  }
  all(first.element, "[data-op=off]")[0].click();
  await wait(300);
  results.off = shown(first);

  await change(area, hostile);
  await wait(200);
  results.hostile = panels.map(shown);
  await change(area, long);
  results.long = shown(first).tokens;
  results.longStatus = textOf(byId("status"));
  await change(area, "");
  results.empty = panels.map(shown);
  results.owned = document.title;
  results.foreign = all(document, "img, iframe, b > b, svg").length;
  report(results);
}
