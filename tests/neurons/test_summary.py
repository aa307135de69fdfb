"""Summaries of scores: counts that add up, NumPy's statistics, layers, models, seeds."""

import numpy as np
import pytest
from made_up_rows import made_up_rows

from crate_mini.neurons import summary
from crate_mini.neurons.protocols import score_row

LLM = "openai_tar[llm:x@A]"


def test_counts_add_up_for_every_metric():
    summarised = summary.summarise(made_up_rows(), {"ngram": "two tokens"}, 3, windows=100)
    assert list(summarised["sites"]) == ["L0", "L1", "L2"]
    expected = {
        "neurons": (30, 28, 1, 1, 0),
        "ngram_r": (30, 28, 1, 1, 0),
        LLM: (10, 7, 1, 1, 1),
    }
    for site in summarised["sites"].values():
        assert site["n"]["few_windows"] == 15
        for name, counts in expected.items():
            assert site["n"][name] == dict(zip(("total", *summary.STATUS), counts))
        for name in ("ngram_r", LLM):
            n = site["n"][name]
            assert n["total"] == n["live"] + n["dead"] + n["undefined"] + n["failed"]
            assert site[name]["n"] == n["live"]
        assert site["density"]["L0"] == pytest.approx(15 * 0.005 + 15 * 0.2)


def test_statistics_of_a_site_equal_numpy():
    rows = made_up_rows()
    scores = [row["scores"]["uniform"]["ngram_r"] for row in rows if row["layer"] == 1]
    live = [score for score in scores if score is not None]
    site = summary.summarise(rows, {}, 3)["sites"]["L1"]
    ngram = site["ngram_r"]
    assert ngram["mean"] == pytest.approx(np.mean(live))
    assert ngram["median"] == pytest.approx(np.median(live))
    assert ngram["deciles"] == pytest.approx(np.quantile(live, np.arange(1, 10) / 10))
    assert ngram["mean_undefined_as_0"] == pytest.approx(np.sum(live) / 30)
    assert ngram["ci95"][0] < ngram["mean"] < ngram["ci95"][1]
    # The failed neuron is unknown, not 0.
    llm = site[LLM]
    assert llm["mean_undefined_as_0"] == pytest.approx(llm["mean"] * 7 / 9)


@pytest.mark.parametrize("layers, kept", [(3, 3), (6, 5), (12, 11)])
def test_the_papers_convention_leaves_the_last_layer_out_at_6_and_12(layers, kept):
    summarised = summary.summarise(made_up_rows(layers=layers), {}, layers)
    means = [summarised["sites"][f"L{i}"]["ngram_r"]["mean"] for i in range(layers)]
    ngram = summarised["overall"]["codes"]["ngram_r"]
    assert ngram["layers"] == list(range(layers))
    assert ngram["mean"] == pytest.approx(np.mean(means))
    assert ngram["paper"]["layers"] == list(range(kept))
    assert ngram["paper"]["mean"] == pytest.approx(np.mean(means[:kept]))
    assert ngram["paper"]["variance"] == pytest.approx(np.var(means[:kept]))


def test_a_layer_without_a_number_is_named():
    stats = {"density": 0, "max": 0, "mean": 0}
    silent = score_row("L3", 3, 0, stats, {}, {"ngram_r": (0.5, "")}, {})
    summarised = summary.summarise([*made_up_rows(), silent], {}, 4)
    ngram = summarised["overall"]["codes"]["ngram_r"]
    assert ngram["without"] == [3] and ngram["layers"] == [0, 1, 2]
    assert ngram["mean"] is not None
    assert summarised["sites"]["L3"]["ngram_r"] == {
        "n": 0,
        "mean": None,
        "ci95": None,
        "redrawn": [],
        "split_sd": None,
        "median": None,
        "deciles": None,
        "mean_undefined_as_0": 0.0,
    }
    summary.table(summarised)


def test_features_of_an_autoencoder_are_a_family_of_their_own():
    rows = made_up_rows() + made_up_rows(1, shift=5, site="L{}.sae-x")
    summarised = summary.summarise(rows, {}, 3)
    names = ["L0", "L1", "L2", "L0.sae-x", "L1.sae-x", "L2.sae-x"]
    assert list(summarised["sites"]) == names
    alone = summary.summarise(made_up_rows(), {}, 3)["overall"]["codes"]
    assert summarised["overall"]["codes"] == alone
    assert set(summarised["overall"]) == {"codes", "sae-x"}
    gain = summary.compare(rows, rows, family="sae-x", other="codes")["ngram_r"]["all"]
    assert gain["difference"] == pytest.approx(5, abs=1)


def test_two_models_differ_by_what_was_put_in():
    ours, theirs = made_up_rows(1, shift=1.5, h=200), made_up_rows(2, h=200, layers=2)
    differences = summary.compare(ours, theirs)["ngram_r"]
    assert set(differences) == {"0", "1", "all"}  # layers that both have
    for difference in differences.values():
        low, high = difference["ci95"]
        assert difference["difference"] == pytest.approx(1.5, abs=0.3)
        assert low < 1.5 < high and low > 0
    low, high = summary.compare(made_up_rows(1), made_up_rows(2))["ngram_r"]["all"]["ci95"]
    assert low < 0 < high


def made_up_spread(seed, common, layers=3):
    """Spreads of sites whose means move together by `common` (16,), and a little each."""
    rng = np.random.default_rng(seed)
    spread = {}
    for layer in range(layers):
        moves = common + 0.01 * rng.normal(size=16)
        documents = {str(group): move for group, move in enumerate(moves - moves.mean())}
        spread[f"L{layer}"] = {
            "neurons": 30,
            "documents": {"ngram_r": documents},
            "splits": {"ngram_r": [0.1, 0.3, 0.2, 0.2]},
        }
    return spread


def test_layers_move_together_with_the_documents():
    """The mean over layers is no surer than a layer where all layers hang on the same text."""
    common = np.random.default_rng(0).normal(size=16)
    summarised = summary.summarise(made_up_rows(), {}, 3, spread=made_up_spread(1, common))
    layer = summarised["sites"]["L1"]["ngram_r"]
    of_all = summarised["overall"]["codes"]["ngram_r"]
    widths = [high - low for low, high in (layer["ci95"], of_all["ci95"])]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
    expected = 4 * np.std(common, ddof=1) / 16**0.5  # about two standard errors to each side
    assert widths[0] == pytest.approx(expected, rel=0.25)
    assert layer["redrawn"] == of_all["redrawn"] == ["documents", "splits"]
    assert layer["split_sd"] == pytest.approx(np.std([0.1, 0.3, 0.2, 0.2], ddof=1))
    text = summary.table(summarised)
    assert "±0.082" in text and "(documents, splits): ngram_r" in text
    assert "(neurons): openai_tar" in text


def test_what_other_splits_add_to_an_interval():
    """Half of the text scored: other text moves a mean with twice the variance of other splits."""
    common = np.random.default_rng(0).normal(size=16)
    spread, widths = made_up_spread(1, common, 1), {}
    for share in (0.5, 0.01):
        spread["L0"]["share"] = share
        spread["L0"]["splits"]["ngram_r"] = np.linspace(-4, 4, 30).tolist()
        for seed in (0, 1337):
            site = summary.summarise(made_up_rows(), {}, 3, seed, spread=spread)["sites"]["L0"]
            widths[share, seed] = np.diff(site["ngram_r"]["ci95"])[0]
    sd = np.std(np.linspace(-4, 4, 30), ddof=1)
    for (share, _), width in widths.items():
        assert width == pytest.approx(2 * 1.96 * sd / (1 - share) ** 0.5, rel=0.15)


def test_what_two_models_share_of_the_text_is_not_counted_against_their_difference():
    common = np.random.default_rng(0).normal(size=16)
    ours, theirs = made_up_rows(1, h=200), made_up_rows(2, h=200)
    spreads = made_up_spread(1, common), made_up_spread(2, common)
    alone = summary.compare(ours, theirs)["ngram_r"]["all"]
    paired = summary.compare(ours, theirs, spreads=spreads)["ngram_r"]["all"]
    assert paired["redrawn"] == ["neurons", "documents", "splits"]
    apart = made_up_spread(1, common), made_up_spread(2, -common)
    unlike = summary.compare(ours, theirs, spreads=apart)["ngram_r"]["all"]
    widths = [np.diff(result["ci95"])[0] for result in (alone, paired, unlike)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] > 3 * widths[0]


def test_the_table_has_every_mean_count_and_sentence():
    rows = made_up_rows(layers=8)
    summarised = summary.summarise(rows, {"ngram": "ngram: saw two tokens"}, 8)
    text = summary.table(summarised)
    for name, site in summarised["sites"].items():
        assert name in text and f"{site['ngram_r']['mean']:.3f}" in text
    assert "30 = 28+1+1+0" in text and "10 = 7+1+1+1" in text
    assert text.endswith("ngram: saw two tokens") and "One training seed." in text
    assert "2 training seeds." in summary.table(summarised, seeds=2)
    assert "interpretability score" not in text
    assert max(map(len, text.splitlines())) < 200
