// What the JavaScript of the playground computes; test_playground_model.py compares it with Python.

function state(run, ids) {
  return {
    codes: run.layers.map(layer => ids.map((_, t) => Array.from(layer.codes[t]))),
    next: ids.map((_, t) => Array.from(run.next(t))),
  };
}

function fresh(model, ids, steering) {
  const run = new Run(model);
  run.steer(steering);
  run.read(ids);
  return run;
}

// Whether a run that has read other texts, steered otherwise, is in the state of a fresh one.
function cachedEqualsUncached(model, steerings, ids, edited) {
  const run = new Run(model), plain = new Run(model), follower = new Run(model);
  for (const steering of [null, ...steerings, steerings[0], null]) {
    run.steer(steering);
    follower.steer(steering);
    for (const text of [ids, edited, ids.slice(0, 3), [], edited, ids]) {
      run.read(text);
      plain.read(text);
      follower.read(text, plain);
      const expected = JSON.stringify(state(fresh(model, text, steering), text));
      if (JSON.stringify(state(run, text)) !== expected) return false;
      if (JSON.stringify(state(follower, text)) !== expected) return false;
    }
  }
  return true;
}

function checkModel({ packed, steerings }, ids, edited) {
  const model = new Model(packed), run = fresh(model, ids, null), last = ids.length - 1;
  const heads = Array.from({ length: packed.config.n_head }, (_, head) => head);
  const steered = steerings.map(steering => {
    const other = fresh(model, ids, steering);
    return {
      ...state(other, ids),
      kl: divergence(run.next(last), other.next(last)),
      greedy: [...continuation(other, ids, 6, 0, 1)],
      begin: other.steering.begin,  // in the last window
    };
  });
  return {
    ...state(run, ids),
    steered,
    size: model.size,
    attention: run.layers.map(
      layer => heads.map(head => Array.from(run.attention(layer, head, last)))),
    cached: cachedEqualsUncached(model, steerings, ids, edited),
    greedy: [...continuation(run, ids, 6, 0, 1)],
    drawn: [1, 2].map(seed => [...continuation(run, ids, 6, 1, seed)]),
  };
}

function check({ tokenizers, texts, bytes, models, ids, edited }) {
  const known = tokenizers.map(ranks => new Tokenizer(ranks));
  report({
    ids: known.map(tokenizer => texts.map(text => tokenizer.encode(text))),
    decoded: known.map(tokenizer => bytes.map(list => tokenizer.decode(list))),
    models: models.map(model => checkModel(model, ids, edited)),
  });
}
