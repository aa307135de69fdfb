// The model of model.py, on one text: letters as there. A vector is a Float32Array; a matrix is
// one too, row after row, with a row for each input. Each layer keeps what it computed for each
// token, so a keystroke costs only the tokens from the first changed one on.

// ---- linear algebra -----------------------------------------------------------------------------

// y += x W, without the rows of W that meet a 0 in x: codes are sparse. Eight rows at a time, which
// reads and writes y less often.
function addProduct(y, x, W) {
  const n = y.length, rows = [];
  for (let i = 0; i < x.length; i++) if (x[i] !== 0) rows.push(i);
  let r = 0;
  for (; r + 8 <= rows.length; r += 8) {
    const [i0, i1, i2, i3, i4, i5, i6, i7] = rows.slice(r, r + 8);
    const x0 = x[i0], x1 = x[i1], x2 = x[i2], x3 = x[i3];
    const x4 = x[i4], x5 = x[i5], x6 = x[i6], x7 = x[i7];
    const w0 = i0 * n, w1 = i1 * n, w2 = i2 * n, w3 = i3 * n;
    const w4 = i4 * n, w5 = i5 * n, w6 = i6 * n, w7 = i7 * n;
    for (let j = 0; j < n; j++) {
      y[j] += x0 * W[w0 + j] + x1 * W[w1 + j] + x2 * W[w2 + j] + x3 * W[w3 + j]
        + x4 * W[w4 + j] + x5 * W[w5 + j] + x6 * W[w6 + j] + x7 * W[w7 + j];
    }
  }
  for (; r < rows.length; r++) {
    const x0 = x[rows[r]], w0 = rows[r] * n;
    for (let j = 0; j < n; j++) y[j] += x0 * W[w0 + j];
  }
  return y;
}

// x W + bias; n outputs; bias may be absent.
function linear(x, W, n, bias) {
  return addProduct(bias ? bias.slice() : new Float32Array(n), x, W);
}

// W x: one dot product for each of n rows.
function dots(W, x, n) {
  const d = x.length, y = new Float32Array(n);
  for (let row = 0, at = 0; row < n; row++) {
    let a = 0, b = 0, i = 0;
    for (; i + 2 <= d; i += 2) {
      a += W[at++] * x[i];
      b += W[at++] * x[i + 1];
    }
    if (i < d) a += W[at++] * x[i];
    y[row] = a + b;
  }
  return y;
}

function transpose(W, rows, columns) {
  const turned = new Float32Array(W.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) turned[j * rows + i] = W[i * columns + j];
  }
  return turned;
}

function layerNorm(x, weight, bias) {
  const d = x.length, y = new Float32Array(d);
  let mean = 0, variance = 0;
  for (let i = 0; i < d; i++) mean += x[i] / d;
  for (let i = 0; i < d; i++) variance += (x[i] - mean) ** 2 / d;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  for (let i = 0; i < d; i++) y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
  return y;
}

// Probabilities (Float64Array) of scores; their logarithms if `log`.
function softmax(scores, log = false) {
  const n = scores.length, result = new Float64Array(n);
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < n; i++) if (scores[i] > largest) largest = scores[i];
  for (let i = 0; i < n; i++) {
    result[i] = Math.exp(scores[i] - largest);
    sum += result[i];
  }
  const shift = largest + Math.log(sum);
  for (let i = 0; i < n; i++) result[i] = log ? scores[i] - shift : result[i] / sum;
  return result;
}

const gelu = x => .5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + .044715 * x ** 3)));

// All but the k largest codes become 0.
function topK(a, k) {
  const order = Array.from(a.keys()).sort((i, j) => a[j] - a[i]);
  for (const j of order.slice(k)) a[j] = 0;
}

// ---- the model ----------------------------------------------------------------------------------

// {name: Float32Array} from bfloat16, the upper halves of float32 numbers.
function unpack({ shapes, weights }) {
  const bytes = atob(weights), words = new Uint32Array(bytes.length / 2), named = {};
  for (let i = 0; i < words.length; i++) {
    words[i] = (bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8) << 16;
  }
  const numbers = new Float32Array(words.buffer);
  let begin = 0;
  for (const [name, ...sizes] of shapes) {
    const end = begin + sizes.reduce((a, b) => a * b, 1);
    named[name] = numbers.slice(begin, end);
    begin = end;
  }
  return named;
}

class Model {
  constructor(packed) {
    const config = packed.config, weights = unpack(packed);
    this.config = config;
    this.d = config.n_embd;
    this.h = config.expansion * config.n_embd;
    this.tokens = weights.tokens;
    this.positions = weights.positions;
    this.norm = [weights.norm, weights["norm.bias"]];
    this.layers = [];
    for (let layer = 0; layer < config.n_layer; layer++) {
      const start = `${layer}.`, own = {};
      for (const [name, weight] of Object.entries(weights)) {
        if (name.startsWith(start)) own[name.slice(start.length)] = weight;
      }
      if (config.sparsifier === "ista") this.prepare(own);
      if (own.key_gate) own.share = own.key_gate.map(gate => 1 / (1 + Math.exp(-gate)));
      this.layers.push(own);
    }
    this.size = packed.shapes.reduce(
      (total, [, ...sizes]) => total + sizes.reduce((a, b) => a * b, 1), 0);
  }

  prepare(own) {
    own.atoms = transpose(own.D, this.d, this.h);
    own.decoder ??= own.atoms;
    own.lam = own.log_lam
      ? own.log_lam.map(Math.exp) : new Float32Array(this.h).fill(this.config.lam);
  }

  // One ISTA step from a, null for the zero start, with r = x - D a.
  istaStep(own, a, r) {
    const step = linear(r, own.D, this.h), eta = this.config.eta;
    for (let j = 0; j < step.length; j++) {
      step[j] = Math.max(0, (a ? a[j] : 0) + eta * (step[j] - own.lam[j]));
    }
    return step;
  }

  ista(own, x) {
    const { ista_steps, eta, debias } = this.config;
    let a = this.istaStep(own, null, x);
    for (let step = 1; step < ista_steps; step++) {
      const r = linear(a, own.atoms, this.d);
      for (let i = 0; i < r.length; i++) r[i] = x[i] - r[i];
      a = this.istaStep(own, a, r);
    }
    if (debias) a.forEach((value, j) => { if (value) a[j] += eta * own.lam[j]; });
    return a;
  }

  mlp(own, x) {
    const a = linear(x, own.fc, this.h, own["fc.bias"]), smooth = this.config.activation === "gelu";
    for (let j = 0; j < a.length; j++) a[j] = smooth ? gelu(a[j]) : Math.max(0, a[j]);
    return a;
  }

  // The codes of a stream z in one layer.
  codes(own, z) {
    const x = layerNorm(z, own["sparsifier.norm"], own["sparsifier.norm.bias"]);
    const a = this.config.sparsifier === "ista" ? this.ista(own, x) : this.mlp(own, x);
    if (this.config.top_k) topK(a, this.config.top_k);
    return a;
  }

  // What codes write to the stream.
  decode(own, a) {
    if (this.config.sparsifier === "ista") return linear(a, own.decoder, this.d);
    return linear(a, own.proj, this.d, own["proj.bias"]);
  }

  // [query, key, value] of a stream z in one layer; the key is not shifted yet.
  project(own, z) {
    const d = this.d, x = layerNorm(z, own["attention.norm"], own["attention.norm.bias"]);
    if (this.config.attention === "mhsa") {
      const qkv = linear(x, own.qkv, 3 * d, own["qkv.bias"]);
      return [qkv.slice(0, d), qkv.slice(d, 2 * d), qkv.slice(2 * d)];
    }
    const u = linear(x, own.U, d);
    if (!this.config.query_rank) return [u, u, u];
    return [addProduct(u.slice(), linear(u, own.A, this.config.query_rank), own.B), u, u];
  }

  logits(z) {
    return dots(this.tokens, layerNorm(z, ...this.norm), this.config.vocab_size);
  }
}

// ---- one text -----------------------------------------------------------------------------------

// What a layer keeps of each token: query, key before and after the shift, value, codes, and the
// stream that the layer leaves.
const PARTS = ["q", "raw", "k", "v", "codes", "out"];

// A model that reads a text.
class Run {
  constructor(model) {
    this.model = model;
    this.ids = [];
    this.steering = null;
    this.layers = model.layers.map(
      own => ({ own, length: 0, ...Object.fromEntries(PARTS.map(part => [part, []])) }));
  }

  // steering: null, or {layer, neuron, op, value, begin}, as Intervention in intervene.py: the
  // value that op "set" or "add" takes, and the first token that is steered; op "ablate" sets 0.
  steer(steering) {
    if (JSON.stringify(this.steering) === JSON.stringify(steering)) return;
    for (const changed of [this.steering, steering].filter(Boolean)) {
      for (const layer of this.layers.slice(changed.layer)) {
        layer.length = Math.min(layer.length, changed.begin);
      }
    }
    this.steering = steering;
  }

  // Reads ids, at most block_size of them; what their beginning shares with the last is kept.
  // plain: a Run that has read the same ids and is not steered; what equals it is taken from it.
  read(ids, plain = null) {
    let same = 0;
    while (same < ids.length && ids[same] === this.ids[same]) same++;
    this.ids = Array.from(ids);
    this.layers.forEach((layer, number) => {
      layer.length = Math.min(layer.length, same);
      for (; layer.length < ids.length; layer.length++) {
        const t = layer.length;
        if (plain && !this.isSteered(number, t)) {
          for (const part of PARTS) layer[part][t] = plain.layers[number][part][t];
        } else {
          this.readToken(number, t);
        }
      }
    });
  }

  // Whether steering reaches token t of a layer.
  isSteered(number, t) {
    return this.steering && number >= this.steering.layer && t >= this.steering.begin;
  }

  readToken(number, t) {
    const layer = this.layers[number], { own } = layer, model = this.model;
    const before = number ? this.layers[number - 1].out[t] : this.embedding(t);
    [layer.q[t], layer.raw[t], layer.v[t]] = model.project(own, before);
    layer.k[t] = own.share ? this.shifted(layer, t) : layer.raw[t];
    const z = before.slice();
    const written = linear(this.attend(layer, t), own.out, model.d, own["out.bias"]);
    for (let i = 0; i < z.length; i++) z[i] += written[i];
    const a = model.codes(own, z);
    this.change(number, t, a);
    const out = model.decode(own, a);
    if (model.config.residual) for (let i = 0; i < out.length; i++) out[i] += z[i];
    layer.codes[t] = a;
    layer.out[t] = out;
  }

  embedding(t) {
    const { model, ids } = this, d = model.d;
    const z = model.tokens.slice(ids[t] * d, (ids[t] + 1) * d);
    for (let i = 0; i < d; i++) z[i] += model.positions[t * d + i];
    return z;
  }

  // The key of token t mixed with the key before it.
  shifted(layer, t) {
    const { share } = layer.own, key = layer.raw[t].slice();
    for (let i = 0; i < key.length; i++) {
      key[i] += share[i] * ((t ? layer.raw[t - 1][i] : 0) - key[i]);
    }
    return key;
  }

  // How much token t attends to each token up to itself, in one head.
  attention(layer, head, t) {
    const p = this.model.d / this.model.config.n_head, begin = head * p, q = layer.q[t];
    const scores = new Float64Array(t + 1);
    for (let s = 0; s <= t; s++) {
      const k = layer.k[s];
      let score = 0;
      for (let i = begin; i < begin + p; i++) score += q[i] * k[i];
      scores[s] = score / Math.sqrt(p);
    }
    return softmax(scores);
  }

  // The values that token t attends to, head by head.
  attend(layer, t) {
    const d = this.model.d, heads = this.model.config.n_head, p = d / heads;
    const y = new Float32Array(d);
    for (let head = 0; head < heads; head++) {
      const weights = this.attention(layer, head, t);
      for (let s = 0; s <= t; s++) {
        const v = layer.v[s], weight = weights[s];
        for (let i = head * p; i < (head + 1) * p; i++) y[i] += weight * v[i];
      }
    }
    return y;
  }

  change(number, t, a) {
    if (!this.isSteered(number, t) || number > this.steering.layer) return;
    const { neuron, op, value } = this.steering;
    if (op === "set") a[neuron] = value;
    if (op === "add") a[neuron] += value;
    if (op === "ablate") a[neuron] = 0;
  }

  // Log-probabilities (Float64Array) of the token after token t.
  next(t) {
    const last = this.layers[this.layers.length - 1];
    return softmax(this.model.logits(last.out[t]), true);
  }
}

// KL(before || after) in nats, of log-probabilities.
function divergence(before, after) {
  let sum = 0;
  before.forEach((p, i) => { sum += Math.exp(p) * (p - after[i]); });
  return Math.max(0, sum);
}

// An id drawn with probability proportional to p ** (1 / temperature); the likeliest at 0.
function draw(logProbs, temperature, random) {
  let best = 0;
  logProbs.forEach((p, i) => { if (p > logProbs[best]) best = i; });
  if (!temperature) return best;
  const chances = softmax(logProbs.map(p => p / temperature));
  let rest = random();
  const id = chances.findIndex(chance => (rest -= chance) < 0);
  return id < 0 ? best : id;
}

// Yields n ids that continue those a Run has read. Beyond the context its window slides, as in
// generate.py; a steered run goes on being steered.
function* continuation(run, ids, n, temperature, seed) {
  const random = generator(seed), all = Array.from(ids), size = run.model.config.block_size;
  const begin = run.steering ? run.steering.begin : 0;
  for (let i = 0; i < n; i++) {
    const slid = Math.max(0, all.length - size);
    if (slid && run.steering) run.steer({ ...run.steering, begin: Math.max(0, begin - slid) });
    run.read(all.slice(slid));
    const id = draw(run.next(run.ids.length - 1), temperature, random);
    all.push(id);
    yield id;
  }
}
