"""The playground's JavaScript computes what PyTorch and tiktoken compute."""

import random
from dataclasses import fields, replace

import pytest
import torch
from browser_runs import run, with_checks
from html_pages import browser
from odd_texts import odd_texts
from tiny_models import VARIANTS, T, V, tiny
from torch.nn.utils import parametrize

from crate_mini import UserError
from crate_mini.data.tokenizer import Tokenizer, load_tokenizer
from crate_mini.generate import generate
from crate_mini.intervene import Intervention, steer
from crate_mini.model import Config
from crate_mini.playground import export
from crate_mini.plots.html import asset, html, shared_script
from crate_mini.steering.next_token import next_token

MODELS = {  # name: (variant of tiny_models, changes)
    **{name: (name, {}) for name in VARIANTS},
    "three steps": ("crate", {"ista_steps": 3, "eta": 0.05, "lam": 0.2, "n_layer": 3}),
    "no biases": ("crate", {"bias": False}),
    "learned thresholds": ("crate", {"learned_lam": True}),
    "unit norm": ("crate", {"unit_norm": True, "eta": 1.0}),
    "decoder, two steps": ("crate", {"separate_decoder": True, "expansion": 3}),
    "residual, top-k": ("crate", {"residual": True, "top_k": 7}),
    "debiased alone": ("crate", {"debias": True}),
    "mssa, mlp, gelu": ("gpt2", {"attention": "mssa", "activation": "gelu", "bias": True}),
    "mhsa, ista": ("crate", {"attention": "mhsa", "n_head": 4, "key_shift": True}),
    "gelu, top-k": ("gpt2", {"activation": "gelu", "top_k": 3}),
    "one layer": ("crate", {"key_shift": True, "query_rank": 2, "n_layer": 1}),
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # with 6 more tokens the window of T = 12 slides
EDITED = [3, 1, 4, 1, 7, 9, 2, 6]
TOLERANCE = dict(atol=1e-3, rtol=1e-3)


def rounded(variant, changes):
    """A tiny model whose weights are bfloat16 numbers; D is divided by its norm before."""
    lm = tiny(variant, **changes)
    if lm.config.unit_norm:
        for block in lm.blocks:
            parametrize.remove_parametrizations(block.sparsifier, "D")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)  # biases are not 0, norms not 1
            parameter.copy_(parameter.bfloat16())
    return lm.eval()


@torch.no_grad()
def interventions(lm):
    last = lm.config.n_layer - 1
    loudest = lm.trunk(torch.tensor([IDS]))[1][last][0, -1].argmax().item()
    return [
        Intervention(0, 5, "set", 2.0),
        Intervention(0, 6, "add", -30.0, positions="last"),
        Intervention(last, 7, "add", 3.0),
        Intervention(last, loudest, "ablate"),
        Intervention(last, 9, "set", 4.0, positions="last"),
    ]


def for_the_page(intervention):
    """An Intervention as Run.steer takes it."""
    return {
        "layer": intervention.layer,
        "neuron": intervention.neuron,
        "op": intervention.op,
        "value": intervention.value,
        "begin": 0 if intervention.positions == "all" else len(IDS) - 1,
    }


def tokenizers():
    """The embedded one, bytes, and one whose ranks no training would give.

    Some of its tokens can only be found whole, and only if spaces are what Python takes for them.
    """
    pydocs = load_tokenizer("pydocs:4095")
    tokens = [pydocs.token_bytes(id) for id in range(256, 2000)]
    tokens += [text.encode() for text in ("qzx", " \ufeff", "!\x85", "\u2028!", "\x85\x85\x85")]
    random.Random(1).shuffle(tokens)
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(tokens)}
    return [pydocs, load_tokenizer("bytes"), Tokenizer("shuffled", ranks)]


def some_ids(tokenizer):
    """Lists of ids, most of which decode to bytes that are not UTF-8, and the end of a text."""
    draws = random.Random(2)
    lists = [draws.choices(range(128, 256), k=9) for _ in range(20)]
    lists += [draws.choices(range(tokenizer.vocab_size), k=9) for _ in range(20)]
    return [[], [tokenizer.eot], *lists, tokenizer.encode("\ufeff漢é")]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """(tiny models, tokenizers, what the JavaScript of the page computed with them)."""
    folder = tmp_path_factory.mktemp("pages")
    lms = {name: rounded(*variant) for name, variant in MODELS.items()}
    known = tokenizers()
    models = []
    for lm in lms.values():
        steerings = [for_the_page(intervention) for intervention in interventions(lm)]
        models.append({"packed": export.packed(lm), "steerings": steerings})
    given = {
        "tokenizers": [export.vocabulary(tokenizer, str, 0)["ranks"] for tokenizer in known],
        "texts": odd_texts(),
        "bytes": some_ids(known[1]),
        "models": models,
        "ids": IDS,
        "edited": EDITED,
    }
    scripts = [asset("crate_mini.playground", name) for name in ("tokenizer.js", "model.js")]
    scripts.insert(0, shared_script())
    page = html("models", "", {}, "\n".join(scripts))
    path = folder / "models.html"
    path.write_bytes(with_checks(page, "model_checks.js", given))
    results = run(path, folder / "profile")
    results["models"] = dict(zip(lms, results["models"]))
    return lms, known, results


# ---- tokens --------------------------------------------------------------------------------------


@browser
def test_ids_of_odd_texts_are_those_of_python(computed):
    _, known, page = computed
    texts = odd_texts()
    assert len(texts) >= 100
    for tokenizer, ids in zip(known, page["ids"]):
        for text, ids_of_page in zip(texts, ids):
            assert ids_of_page == tokenizer.encode(text), (tokenizer.name, text)


@browser
def test_ids_decode_to_the_text_of_python(computed):
    _, known, page = computed
    assert page["decoded"][1] == [known[1].decode(ids) for ids in some_ids(known[1])]


# ---- the model -----------------------------------------------------------------------------------


@torch.no_grad()
def state(lm):
    """(codes (L, T, h), log-probabilities of the next token (T, V)) of IDS."""
    ids = torch.tensor([IDS])
    return torch.cat(lm.trunk(ids)[1]), lm(ids)[0].log_softmax(-1)


def assert_same_state(page, lm):
    codes, next_tokens = state(lm)
    torch.testing.assert_close(torch.tensor(page["codes"]), codes, **TOLERANCE)
    torch.testing.assert_close(torch.tensor(page["next"]), next_tokens, **TOLERANCE)


def attention_of_the_last_token(lm):
    """[weights (K, T)] of each layer, from the queries and keys that the model attends with."""
    seen = []

    def record(q, k, v):
        scores = q[0, :, -1:] @ k[0].mT / q.shape[-1] ** 0.5
        seen.append(scores[:, 0].softmax(-1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("crate_mini.model.attend", record)
        lm(torch.tensor([IDS]))
    return torch.stack(seen)


@browser
@pytest.mark.parametrize("name", MODELS)
def test_codes_predictions_and_attention_are_those_of_pytorch(name, computed):
    lms, _, page = computed
    lm, results = lms[name], page["models"][name]
    assert results["size"] == sum(w.numel() for w in lm.parameters())
    assert_same_state(results, lm)
    attention = torch.tensor(results["attention"])
    torch.testing.assert_close(attention, attention_of_the_last_token(lm), **TOLERANCE)


@browser
@pytest.mark.parametrize("name", MODELS)
def test_steering_is_that_of_pytorch(name, computed):
    lms, _, page = computed
    lm = lms[name]
    plain, _ = state(lm)
    for intervention, results in zip(interventions(lm), page["models"][name]["steered"]):
        with steer(lm, [intervention]):
            assert_same_state(results, lm)
            greedy = generate(lm, torch.tensor([IDS]), 6, temperature=0)
        assert results["greedy"] == greedy[0, len(IDS) :].tolist(), intervention
        slid = len(IDS) + 5 - T  # tokens that had left the window before the last one was drawn
        first = 0 if intervention.positions == "all" else len(IDS) - 1 - slid
        assert results["begin"] == first, intervention
        kl = next_token(lm, IDS, [intervention]).kl
        assert results["kl"] == pytest.approx(kl, abs=1e-3, rel=1e-3), intervention
        changed = (torch.tensor(results["codes"]) - plain).abs().max()
        assert changed > 0.01, intervention


@browser
@pytest.mark.parametrize("name", MODELS)
def test_continuations_slide_as_those_of_pytorch(name, computed):
    lms, _, page = computed
    greedy = generate(lms[name], torch.tensor([IDS]), 6, temperature=0)
    assert len(IDS) + 6 > T
    assert page["models"][name]["greedy"] == greedy[0, len(IDS) :].tolist()
    first, second = page["models"][name]["drawn"]
    assert len(first) == 6 and first != second and max(first) < V


@browser
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_from_the_last_text_changes_no_bit(name, computed):
    assert computed[2]["models"][name]["cached"]


# ---- what a page cannot run ----------------------------------------------------------------------


def test_models_of_this_file_take_every_value_of_every_setting():
    configs = [tiny(*MODELS[name][:1], **MODELS[name][1]).config for name in MODELS]
    for f in fields(Config):
        if f.name in ("vocab_size", "block_size", "n_embd", "l1"):
            continue
        values = {getattr(config, f.name) for config in configs}
        assert values >= set(export.RUNS[f.name] or ()), f.name
        assert len(values) >= 2, f.name


def test_every_field_of_the_config_is_known_and_read():
    assert set(export.RUNS) == {f.name for f in fields(Config)}
    script = asset("crate_mini.playground", "model.js") + asset("crate_mini.playground", "page.js")
    elsewhere = {"bias", "residual", "separate_decoder", "learned_lam", "unit_norm", "key_shift"}
    for name in set(export.RUNS) - elsewhere - {"l1"}:
        assert name in script, name


def test_an_unknown_field_is_refused_by_name(monkeypatch):
    export.check(Config(), "out/x/best")
    monkeypatch.delitem(export.RUNS, "key_shift")
    with pytest.raises(UserError, match="out/x/best has the setting key_shift=False"):
        export.check(Config(), "out/x/best")


def test_an_unknown_value_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(export.RUNS, "attention", ("mssa",))
    with pytest.raises(UserError, match="attention='mhsa', and the playground runs only mssa"):
        export.check(replace(Config(), attention="mhsa"), "out/x/best")


def test_a_model_too_large_for_a_page_is_refused(monkeypatch):
    monkeypatch.setattr(export, "MOST_WEIGHTS", 10)
    with pytest.raises(UserError, match="weights, and a page holds at most 10"):
        export.packed(tiny("crate"))
