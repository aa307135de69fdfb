"""Labels: a neuron in a few words, read off its n-gram table.

A label lists the tokens that the neuron fires on, tokens before them that add activation, and the
class of tokens (digits, word starts, ..., or the position) that its activation follows best, or
that holds nearly all of it.
"""

import numpy as np

from crate_mini.neurons.metrics import rounded

LABEL_TOKENS = 10  # tokens in a label
STEADY = 100.0  # pseudo-count that ranks them: a label shows tokens both loud and frequent
CLEAR = 0.5  # correlation from which a class is named
PURE = 0.8  # or else the share of activation on the class, corrected for chance


def token_classes(tokens):
    """{class: (V,) bool} from fixed tests on the text of each token (bytes); they may overlap."""
    texts = [token.decode("utf-8", "replace") for token in tokens]
    members = {}
    for name, test in CLASSES.items():
        members[name] = np.array([bool(test(text)) for text in texts])
    return members


def _is_newline(text):
    return "\n" in text


def _is_blank(text):
    return not text.strip() and "\n" not in text


def _is_digit(text):
    return text.strip().isdigit()


def _is_punctuation(text):
    return text.strip() and not any(c.isalnum() or c == "\ufffd" for c in text)


def _is_capital(text):
    return text.strip()[:1].isupper()


def _is_word_start(text):
    return text[:1] == " " and text[1:2].isalpha()


def _is_suffix(text):
    return text[:1].islower()


CLASSES = {
    "newline": _is_newline,
    "blank": _is_blank,
    "digit": _is_digit,
    "punctuation": _is_punctuation,
    "capital": _is_capital,
    "word start": _is_word_start,
    "suffix": _is_suffix,
}


def class_fit(table, members):
    """(C, h): correlation of each neuron's token table with each class, over the text.

    table: an NgramTable; members (C, V) bool.
    """
    weights = table.counts / max(table.counts.sum(), 1)  # (V,) share of the text
    values = table.values[:-1].astype(np.float64)
    x = values - weights @ values  # (V, h), centred
    variances = weights @ x**2  # (h,)
    shares = members @ weights  # (C,)
    covariances = (members * weights) @ x
    products = np.outer(shares * (1 - shares), variances)
    varies = (products > 0) & (variances > 1e-12 * np.abs(values).max(0) ** 2)
    return np.where(varies, covariances / np.sqrt(np.where(varies, products, 1)), 0)


def class_purity(table, members):
    """(C, h): how much of each neuron's activation lies on each class, corrected for chance.

    1: all that is above the neuron's mean; 0: as much as on tokens drawn from the text. A neuron
    that fires on some capitals and nothing else follows the class badly, and is pure. Arguments as
    class_fit.
    """
    weights = table.counts / max(table.counts.sum(), 1)
    values = table.values[:-1].astype(np.float64)
    excess = weights[:, None] * np.maximum(values - weights @ values, 0)  # (V, h)
    total = excess.sum(0)
    varies = total > 1e-6 * np.abs(values).max(0)  # else a constant, up to rounding
    on_class = np.where(varies, members @ excess / np.where(varies, total, 1), 0)
    shares = (members @ weights)[:, None]
    return np.where(shares < 1, (on_class - shares) / np.where(shares < 1, 1 - shares, 1), 0)


def position_fit(acts, start):
    """(h,): correlation with the position in the context, or with being its first token.

    Whichever is larger: that with log(1 + position) or that with (position == 0). acts (W, w, h) of
    windows that begin start (W,) tokens into their context.
    """
    position = (start[:, None] + np.arange(acts.shape[1])).ravel()
    y = acts.reshape(len(position), -1).astype(np.float32)
    largest = np.abs(y).max(0, initial=0)
    y = y / np.where(largest > 0, largest, 1)  # so that no square overflows
    y = y - y.mean(0)
    best = np.zeros(y.shape[1], np.float32)
    for x in (np.log1p(position), position == 0):
        x = (x - x.mean()).astype(np.float32)
        norms = np.sqrt((x**2).sum() * (y**2).sum(0))
        r = x @ y / np.maximum(norms, 1e-30)
        best = np.where(abs(r) > abs(best), r, best)
    return best


def label_neurons(table, tokens, position=None, shown=LABEL_TOKENS, clear=CLEAR):
    """The label of each neuron of an NgramTable; tokens: bytes of each id; position: position_fit.

    tokens    up to `shown` x [id, mean, count, share of all activation], the largest share first:
              the tokens above the neuron's mean that rank highest when shrunk by STEADY
    rest      mean over all tokens that are not shown (it follows from the shares)
    left      up to 5 ids; after them a shown token fires more than it does on average
    class     the class, or "position", that correlates by `clear` or more; else the class that
              holds at least PURE of the activation (class_purity); else "mixed"
    """
    members = token_classes(tokens)
    in_class = np.stack(list(members.values()))[:, : len(table.counts)]
    fits, purity = class_fit(table, in_class), class_purity(table, in_class)
    # Of two classes that hold all of it, the smaller says more.
    purity -= 1e-3 * (in_class @ table.counts / max(table.counts.sum(), 1))[:, None]
    position = np.zeros_like(fits[0]) if position is None else abs(position)
    fits = np.vstack([fits, position])
    names = [*members, "position"]
    labels = []
    for j in range(len(table.mean)):
        top = _top_tokens(table, j, shown)
        labels.append(
            {
                "tokens": _token_rows(table, j, top),
                "rest": _rest(table, j, top),
                "left": _left(table, j, top),
                "class": _class(names, fits[:, j], purity[:, j], clear),
            }
        )
    return labels


def _class(names, fits, purity, clear):
    """The class of one neuron; fits: of all names, purity: of all but the last, the position."""
    if fits.max() >= clear:
        return names[fits.argmax()]
    return names[purity.argmax()] if purity.max() >= PURE else "mixed"


def _top_tokens(table, j, shown):
    """Ids of the tokens that neuron j prefers, both loud and frequent, by their share of it."""
    mean = table.mean[j]
    excess = table.token_sum[:, j] - mean * table.counts
    steady = excess / (table.counts + STEADY)
    top = np.argsort(-steady, kind="stable")[:shown]
    top = top[steady[top] > 1e-6 * abs(mean)]
    return top[np.argsort(-table.token_sum[top, j], kind="stable")]


def _token_rows(table, j, top):
    total = table.token_sum[:, j].sum()
    rows = []
    for i in top:
        share = rounded(table.token_sum[i, j] / total) if total > 0 else None
        rows.append([int(i), rounded(table.values[i, j]), int(table.counts[i]), share])
    return rows


def _rest(table, j, top):
    """Mean activation of neuron j over all tokens but `top`."""
    activation = table.token_sum[:, j].sum() - table.token_sum[top, j].sum()
    count = table.counts.sum() - table.counts[top].sum()
    return rounded(activation / max(count, 1))


def _left(table, j, top, most=5, share=0.05):
    """Ids before the tokens `top` that add at least `share` of the activation that those carry."""
    ends_in_top = np.isin(table.pairs[:, 1], top)
    pairs = table.pairs[ends_in_top]
    excess = table.pair_values[ends_in_top, j] - table.values[pairs[:, 1], j]
    gains = np.maximum(excess * table.pair_counts[ends_in_top], 0)
    by_left = np.bincount(pairs[:, 0], gains, minlength=1)
    order = np.argsort(-by_left, kind="stable")[:most]
    least = max(share * table.token_sum[top, j].sum(), 0)
    return order[by_left[order] > least].tolist()


def label_text(label, token, n=5):
    """A label in one line: its class and its first n tokens with their shares of activation.

    token: from an id to its text. A label of a language model is its text.
    """
    if label.get("text"):
        return label["text"]
    words = []
    for id, _, _, share in label.get("tokens", [])[:n]:
        percent = "" if share is None else f" {100 * share:.2g} %"
        words.append(f"“{token(id)}”{percent}")
    return ": ".join(part for part in (label.get("class"), ", ".join(words)) if part)
