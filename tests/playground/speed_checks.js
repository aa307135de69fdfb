// How long the default models take to answer a keystroke at 64 tokens.

function check({ text, tokens }) {
  const area = byId("text"), words = text.split(" "), letters = [..."abcdefghijkl"];
  while (tokenizer.encode(words.join(" ")).length > tokens) words.pop();
  const typed = words.join(" ");
  const time = act => {
    const start = performance.now();
    act();
    document.body.getBoundingClientRect();
    return performance.now() - start;
  };
  const type = value => time(() => {
    area.value = value;
    retype();
  });
  const times = name => ({
    [`${name}: a letter at the end`]: letters.map(letter => type(typed + letter)),
    [`${name}: a letter at the start`]: letters.map(letter => type(letter + typed)),
  });
  type(typed);
  const results = { tokens: view.ids.length, ...times("plain") };
  const panel = panels[0];
  Object.assign(panel, { op: "set", neuron: 3 });
  Object.assign(results, times("steered"));
  results["the slider"] = letters.map((_, i) => time(() => {
    panel.multiple = 1 + i / 4;
    refresh(panel);
  }));
  report(results);
}
