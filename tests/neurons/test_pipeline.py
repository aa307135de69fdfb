"""The stages of `interpret.py neurons`, end to end on planted neurons."""

import json

import numpy as np
import pytest
import torch
from planted_workspace import META, planted_workspace

from crate_mini import UserError, stats
from crate_mini.console import results
from crate_mini.neurons import (
    beyond,
    page_excerpts,
    pipeline,
    planted,
    record,
    redraw,
    score,
    summary,
)
from crate_mini.neurons.planted import INDEX
from crate_mini.neurons.protocols import flat_scores
from crate_mini.neurons.simulators import SAW, NgramTable, excerpt_table
from crate_mini.neurons.workspace import Workspace


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """The stage `beyond` is tested elsewhere; here it only takes its turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beyond, "TOKENS", 10_000)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A Workspace after all stages, with tries for all neurons."""
    work = planted_workspace(tmp_path_factory.mktemp("planted"), trie=99)
    pipeline.run(work)
    return work


@pytest.fixture
def again(finished):
    """Make another Workspace on the same texts, by default in the same folder."""

    def make(**changes):
        return planted_workspace(finished.folder.parent, **changes)

    return make


def read_lines(work, name):
    return [json.loads(line) for line in (work.folder / name).read_text().splitlines()]


# ---- what the files hold -------------------------------------------------------------------------


def test_scores_of_planted_neurons(finished):
    rows = read_lines(finished, "scores.jsonl")
    assert [row["neuron"] for row in rows] == list(range(len(planted.EXPLANATIONS)))
    scores = {name: rows[j]["scores"] for name, j in INDEX.items()}
    uniform = {name: by_metric["uniform"] for name, by_metric in scores.items()}
    token_set, third_back = uniform["token set"], "third token back"
    assert token_set["token_r"] > 0.99
    assert token_set["label_r@10"] > 0.99
    assert token_set["f1"] == token_set["auprc"] == 1
    assert abs(token_set["null_r"]) < 0.3
    assert uniform["bigram"]["ngram_r"] > 0.9 > 0.5 > uniform["bigram"]["token_r"]
    assert abs(uniform[third_back]["ngram_r"]) < 0.1 < 0.9 < scores[third_back]["trie_r"]
    assert scores[third_back]["trie_f1"] > 0.8
    assert abs(uniform["noise"]["ngram_r"]) < 0.05
    for by_metric in (token_set, uniform["bigram"], uniform["position"]):
        gain = by_metric["ngram_r"] - by_metric["token_r"]
        assert by_metric["context_gain"] == pytest.approx(gain, abs=2e-6)
    assert scores["token set"]["openai_tar[ngram]"] > 0.99
    assert scores["token set"]["openai_random[ngram]"] > 0.9


def test_status_and_reasons_of_planted_neurons(finished):
    rows = read_lines(finished, "scores.jsonl")
    assert {name: rows[j]["status"] for name, j in INDEX.items()} == {
        "token set": "live",
        "bigram": "live",
        "third token back": "live",
        "position": "live",
        "noise": "live",
        "dead": "dead",
        "always on": "undefined",
        "negative only": "dead",
    }
    reasons = rows[INDEX["always on"]]["why"]
    assert reasons["token_r"] == "true activations are constant"
    for row in rows:
        for name, value in row["scores"]["uniform"].items():
            assert value is not None or name in row["why"]


def test_counts_in_the_summary_add_up(finished):
    content = json.loads((finished.folder / "summary.json").read_text())
    for name, n in content["sites"]["L0"]["n"].items():
        if not name.startswith("few_"):
            assert n["total"] == sum(n[status] for status in summary.STATUS)
            assert n["total"] == len(planted.EXPLANATIONS)
    assert set(content["what_the_simulator_saw"]) == set(SAW) - {"init"}
    assert content["record"] == results.read_json(finished.folder / "record.json")


def test_too_few_excerpts_are_counted(finished):
    """Seven documents have seven top windows, fewer than the ten that the paper's code scores."""
    site, metric = finished.sites[0], "anthropic_crate[ngram]"
    selected, simulated = finished.read("select", site), finished.read("simulate", site)
    j = INDEX["noise"]
    scores = score.protocol_scores(finished, simulated, selected, j)
    assert not any(reason for _, reason in scores.values())
    selected.anthropic_crate_score_origin[j, 40:] = ""
    scores = score.protocol_scores(finished, simulated, selected, j)
    value, reason = scores.pop(metric)
    assert value is not None
    assert reason == "40 excerpts of the protocol's 47"
    assert not any(reason for _, reason in scores.values())
    rows = read_lines(finished, "scores.jsonl")
    rows[j]["why"][metric] = reason
    content = summary.summarise(rows, {}, 1)
    assert content["sites"]["L0"]["n"]["few_excerpts"][metric] >= 1
    table = summary.table(content)
    assert f"{metric}: " in table
    assert "fewer excerpts" in table


def test_simulated_values_are_those_of_the_tables(finished):
    site, shared = finished.sites[0], finished.record.shared
    arrays = finished.record.site("L0")
    selected, simulated = finished.read("select", site), finished.read("simulate", site)
    ngram = NgramTable(
        shared["counts"],
        arrays["token_sum"],
        shared["pairs"],
        shared["pair_counts"],
        arrays["pair_sum"],
    )
    expected = ngram(shared["uniform_score"])
    assert np.allclose(simulated.uniform_ngram, expected, atol=1e-3)
    j = INDEX["bigram"]
    held_out = finished.selected(selected, "openai_tar", "score", j)
    n = len(held_out.doc)
    expected = ngram(held_out.tokens, j)
    assert np.allclose(simulated.openai_tar_ngram[j, :n], expected, atol=1e-6)
    r, _ = stats.pearson(held_out.acts.ravel(), expected.ravel())
    scored = read_lines(finished, "scores.jsonl")[j]["scores"]["openai_tar[ngram]"]
    assert scored == pytest.approx(r[0], abs=1e-6)
    fit = finished.selected(selected, "openai_tar", "fit", j)
    expected = excerpt_table(fit.tokens, fit.acts)(held_out.tokens)
    assert np.allclose(simulated.openai_tar_five[j, :n], expected, atol=1e-6)
    assert not set(fit.doc.tolist()) & set(held_out.doc.tolist())


def test_excerpts_for_the_page(finished):
    lines = read_lines(finished, "excerpts.jsonl")
    assert [line["neuron"] for line in lines] == list(range(len(planted.EXPLANATIONS)))
    arrays = finished.record.site("L0")
    for line in lines:
        assert len(line["hist"]) == 50
        assert sum(line["hist"]) == arrays["hist"][line["neuron"]].sum()
        for excerpt in (*line["top"], *line["intervals"], *line["random"]):
            assert len(excerpt["tokens"]) == len(excerpt["acts"]) == page_excerpts.TOKENS
            assert excerpt["acts"][excerpt["at"]] == max(excerpt["acts"])
            assert (excerpt["sim"] is None) == (excerpt["part"] == "fit")
        for group in ("top", "intervals"):
            peaks = [max(excerpt["acts"]) for excerpt in line[group]]
            assert peaks == sorted(peaks, reverse=True)
    assert len(lines[INDEX["token set"]]["top"]) == 10
    assert not lines[INDEX["dead"]]["top"]


def test_related_neurons_for_the_page(finished):
    lines = read_lines(finished, "excerpts.jsonl")
    acts = finished.record.site("L0")["uniform_score_acts"].astype(np.float64)
    acts = acts.reshape(-1, len(lines))
    j = INDEX["bigram"]
    other, r = lines[j]["together"][0]
    assert r == pytest.approx(np.corrcoef(acts[:, j], acts[:, other])[0, 1], abs=1e-3)
    assert all(line["atoms"] == [] for line in lines)  # planted neurons write nothing


def test_pages_and_figures_are_there(finished):
    text = (finished.folder / "index.html").read_text("utf-8")
    for word in ("ngram_r", "null_r", "openai_tar[five excerpts]"):
        assert word in text
    assert (finished.folder / "human.html").exists()
    for name in ("scores.png", "density.png"):
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG")


def test_every_neuron_but_a_dead_one_has_its_effect(finished):
    rows = read_lines(finished, "scores.jsonl")
    explained = read_lines(finished, "explain-L0.jsonl")
    for row, line in zip(rows, explained, strict=True):
        assert ("effect" in row) == (row["status"] != "dead")
        assert row.get("effect") == line.get("effect")
        if "effect" in row:  # a planted neuron moves no logit
            effect = row["effect"]
            assert effect["raised"] == []
            assert effect["kl"] == effect["loss"] == 0
            assert effect["clamp"] == pytest.approx(row["max"], rel=1e-3)
            assert effect["far"]["clamp"] == pytest.approx(5 * row["max"], rel=1e-3)


def test_intervals_are_of_the_documents_of_the_record(finished):
    rows = read_lines(finished, "scores.jsonl")
    shared, true = finished.record.shared, finished.record.site("L0")["uniform_score_acts"]
    expected = finished.read("simulate", finished.sites[0]).uniform_ngram
    docs = shared["uniform_score_doc"]
    assert len(np.unique(docs)) < len(docs)
    intervals = redraw.neuron_intervals(true, expected, docs, finished.seed)
    of_windows = redraw.neuron_intervals(true, expected, np.arange(len(docs)), finished.seed)
    live = [j for j, row in enumerate(rows) if "ngram_r" in row["ci95"]]
    written = [rows[j]["ci95"]["ngram_r"] for j in live]
    np.testing.assert_allclose(written, intervals[live], atol=1e-4)
    assert not np.allclose(written, of_windows[live], atol=2e-4)
    content = json.loads((finished.folder / "summary.json").read_text())
    for metric in ("ngram_r", "f1", "openai_tar[ngram]", "anthropic_2023[ngram]"):
        assert content["sites"]["L0"][metric]["redrawn"] == ["documents"], metric
        shifts = content["spread"]["L0"]["documents"][metric]
        assert len(shifts) == redraw.GROUPS
        assert sum(shifts.values()) == pytest.approx(0, abs=1e-6)


# ---- stages again, alone, interrupted ------------------------------------------------------------


def test_every_stage_alone_writes_the_same_files_again(finished, again):
    names = ("scores.jsonl", "excerpts.jsonl", "index.html", "explain-L0.jsonl")
    before = {name: (finished.folder / name).read_bytes() for name in names}
    for stage in pipeline.STAGES:
        pipeline.run(again(trie=99), stage, until=stage)
        for name, content in before.items():
            assert (finished.folder / name).read_bytes() == content, (stage, name)


@pytest.mark.parametrize(
    "stages, message",
    [
        (("recrod",), "--from 'recrod' is not a stage; choose record, select"),
        (("record", "scores"), "--until 'scores' is not a stage"),
        (("score", "select"), "--until select comes before --from score"),
    ],
)
def test_unknown_stages_and_empty_ranges_get_one_sentence(stages, message, again, tmp_path):
    with pytest.raises(UserError, match=message):
        pipeline.run(again(folder=tmp_path / "out"), *stages)


def test_a_stage_refuses_files_of_another_record(again, tmp_path):
    folder = tmp_path / "out"
    work = again(folder=folder)
    with pytest.raises(UserError, match="holds no record"):
        pipeline.run(work, "select")
    pipeline.run(work, until="explain")
    with pytest.raises(UserError, match="make it with --from simulate"):
        pipeline.run(work, "score")
    pipeline.run(work, "simulate", until="simulate")
    other_seed = again(folder=folder, seed=1)
    with pytest.raises(UserError, match="of another checkpoint or seed"):
        pipeline.run(other_seed, "select")
    pipeline.run(other_seed, until="record")
    with pytest.raises(UserError, match="of another record; make it again with --from select"):
        pipeline.run(other_seed, "explain")
    fewer = again(folder=folder, n=5, seed=1)
    pipeline.run(fewer, "select", until="explain")
    with pytest.raises(UserError, match="of other neurons"):
        again(folder=folder, n=6, seed=1).explanations(fewer.sites[0])
    other_record = again(folder=folder, n=5, seed=1, tokens=20_000)
    pipeline.run(other_record, until="select")  # its labels may know the documents that score now
    with pytest.raises(UserError, match="it is of another record.*--from explain"):
        pipeline.run(other_record, "simulate")


def truncated(content):
    return content[:-99]


def overwritten(content):
    return content[:2000] + bytes(2000) + content[4000:]


def replaced(content):
    return b"[]\n"


@pytest.mark.parametrize(
    "name, damage, stage",
    [
        ("select-L0.npz", truncated, "select"),
        ("explain-L0.jsonl", replaced, "explain"),
        ("select-L0.npz", overwritten, "select"),
    ],
)
def test_a_damaged_file_gets_one_sentence(finished, again, name, damage, stage):
    path = finished.folder / name
    content = path.read_bytes()
    path.write_bytes(damage(content))
    try:
        with pytest.raises(UserError, match=f"{name} .* make it .*--from {stage}"):
            pipeline.run(again(trie=99), "simulate")
    finally:
        path.write_bytes(content)


def test_a_stop_keeps_finished_stages_and_says_how_to_resume(finished, again, monkeypatch):
    messages, before = [], (finished.folder / "explain-L0.jsonl").read_bytes()

    def interrupted(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "simulate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(again(trie=99, log=messages.append), "explain")
    assert messages[0].startswith("explain ")
    assert messages[-1].endswith("resume with --from simulate")
    assert (finished.folder / "explain-L0.jsonl").read_bytes() == before
    pipeline.run(again(trie=99), "simulate", until="simulate")


def test_memory_holds_one_site_at_a_time(again, tmp_path):
    work = again(folder=tmp_path / "out", n=5, trie=1)
    pipeline.run(work, until="record")
    for stage in ("select", "explain", "simulate", "score"):
        pipeline.run(work, stage, until=stage)
        assert work.record.site("L0") == {}, stage


# ---- which neurons, and their controls -----------------------------------------------------------


def test_a_lone_neuron_has_no_partner(again, tmp_path):
    work = again(folder=tmp_path / "out", n=1)
    pipeline.run(work, until="score")
    (row,) = read_lines(work, "scores.jsonl")
    assert "null_r" not in row["scores"]["uniform"]
    assert "token_r" in row["scores"]["uniform"]


def test_drawn_neurons_score_as_they_do_among_all(finished, again, tmp_path):
    work = again(folder=tmp_path / "out", n=7, controls=())
    pipeline.run(work, until="score")
    rows, all_rows = read_lines(work, "scores.jsonl"), read_lines(finished, "scores.jsonl")
    assert len({row["neuron"] for row in rows}) == len(rows) == 7
    for row in rows:
        among_all = dict(all_rows[row["neuron"]]["scores"]["uniform"])
        del among_all["null_r"]
        scores = row["scores"]["uniform"]
        assert scores.keys() == among_all.keys()
        for metric, value in scores.items():
            assert value == pytest.approx(among_all[metric], abs=1e-6)


def test_every_neuron_is_as_likely_to_be_drawn(finished):
    site = finished.sites[0]
    counts = np.zeros(site.width)
    for seed in range(400):
        work = Workspace(None, None, None, None, None, finished.sites, seed=seed, n=6)
        counts[work.neurons(site)] += 1
    expected = 400 * 6 / len(counts)
    assert counts.sum() == 2400
    assert abs(counts - expected).max() < 4.5 * np.sqrt(expected)


def test_partners_are_others_and_alive():
    live = np.array([1, 0, 1, 1, 0, 1], bool)
    partner = score.partners(6, live, np.random.default_rng(0))
    assert live[partner].all()
    assert sorted(partner[live]) == [0, 2, 3, 5]
    assert (partner[live] != np.flatnonzero(live)).all()


def test_match_density_thresholds_what_is_recorded(finished, again, tmp_path):
    work = again(folder=tmp_path / "out", density=0.05)
    pipeline.run(work, until="score")
    matched, plain = work.record.site("L0"), finished.record.site("L0")
    assert matched["density"].max() <= 0.05
    j = INDEX["noise"]
    assert plain["density"][j] > 0.2
    assert 0.045 < matched["density"][j] <= 0.05
    content = results.read_json(work.folder / "summary.json")
    assert content["cut"] == work.record.header["cut"]
    reached, loss = content["cut"]["density"]["L0"], content["cut"]["loss"]
    assert reached["max"] == pytest.approx(matched["density"].max())
    assert reached["silenced"] == np.isinf(matched["limits"]).sum() >= 1  # it is always on
    assert loss["uncut"] == loss["sites"]["L0"]  # no planted neuron moves a logit
    notes = " ".join(summary.cut_notes(content["cut"]))
    for text in (notes, summary.table(content)):
        assert "does not run that way" in text and "5.549" in text
    codes = torch.rand(9, len(matched["max"]))
    assert (work.recorded(work.sites[0]).encode(codes) == 0).any()  # what tries are fitted to
    assert matched["max"][j] == plain["max"][j]
    values = matched["uniform_score_acts"][..., j]
    full = plain["uniform_score_acts"][..., j]
    limit = full[values > 0].min()
    assert np.array_equal(values, np.where(full >= limit, full, 0))


def test_scores_do_not_depend_on_the_scale_of_activations(finished, again, tmp_path):
    """float16 held none above 65,504; a power of two changes no digit, so all is equal."""
    work = again(folder=tmp_path / "out", trie=99)
    code = work.model.blocks[0]["sparsifier"]["code"]
    code.register_forward_hook(lambda module, inputs, codes: codes * 2.0**40)
    pipeline.run(work)
    rows = read_lines(work, "scores.jsonl")
    for row, plain in zip(rows, read_lines(finished, "scores.jsonl"), strict=True):
        for name in ("why", "status", "density"):
            assert row[name] == plain[name], (row["neuron"], name)
        scores = flat_scores(row["scores"])  # a label's means are rounded to decimal digits
        assert scores == pytest.approx(flat_scores(plain["scores"]), abs=1e-4), row["neuron"]
        assert row["max"] == pytest.approx(plain["max"] * 2.0**40, rel=1e-5)
        assert row["label"]["class"] == plain["label"]["class"]


def test_init_r_is_of_the_untrained_model_with_its_own_tables(
    finished, again, tmp_path, monkeypatch
):
    """Neither the activations nor the table may be the trained model's, which fires otherwise."""

    def shifted(module, inputs, codes):
        return codes.roll(1, -1)

    untrained = planted.PlantedModel()
    untrained.blocks[0]["sparsifier"]["code"].register_forward_hook(shifted)
    monkeypatch.setattr(record, "untrained_control", lambda *_: (untrained, META))
    work = again(folder=tmp_path / "out", controls=("init",))
    pipeline.run(work, until="score")
    plain = [row["scores"]["uniform"] for row in read_lines(finished, "scores.jsonl")]
    rows = [row["scores"]["uniform"] for row in read_lines(work, "scores.jsonl")]
    compared = 0
    for j, scores in enumerate(rows):
        expected = plain[j - 1]["ngram_r"]
        if scores["ngram_r"] is not None and expected is not None:
            assert scores["ngram_r"] == plain[j]["ngram_r"]
            assert scores["init_r"] == pytest.approx(expected, abs=1e-6)
            compared += abs(scores["ngram_r"] - expected) > 0.1
    assert compared >= 3  # where the two differ, so that swapped tables would be noticed


def test_intervals_are_of_their_own_neuron_and_as_wide_as_its_score_varies(finished):
    """Against a jackknife over documents, computed here."""
    site, shared = finished.sites[0], finished.record.shared
    true = finished.record.site("L0")["uniform_score_acts"].astype(np.float64)
    simulated = finished.read("simulate", site).uniform_ngram.astype(np.float64)
    docs = shared["uniform_score_doc"]
    checked = 0
    for row in read_lines(finished, "scores.jsonl"):
        j, r = row["neuron"], row["scores"]["uniform"]["ngram_r"]
        if "ngram_r" not in row["ci95"]:
            continue
        low, high = row["ci95"]["ngram_r"]
        assert low - 0.005 <= r <= high + 0.005, row["label"]
        x, y = true[..., j], simulated[..., j]
        left_out = []
        for doc in np.unique(docs):
            kept = docs != doc
            left_out.append(np.corrcoef(x[kept].ravel(), y[kept].ravel())[0, 1])
        n = len(left_out)
        deviation = np.sqrt((n - 1) * np.var(left_out))
        if deviation > 0.002:
            assert 0.5 < (high - low) / (2 * 1.96 * deviation) < 1.8, row["label"]
            checked += 1
    assert checked >= 3


def test_untrained_control_is_scored_by_its_own_tables(again, tmp_path, monkeypatch):
    model, folder = planted.PlantedModel(), tmp_path / "out"
    monkeypatch.setattr(record, "untrained_control", lambda *_: (model, META))
    work = again(folder=folder, controls=("init",))
    pipeline.run(work, until="score")
    for row in read_lines(work, "scores.jsonl"):  # here the "untrained" model is the model itself
        assert row["scores"]["uniform"]["init_r"] == row["scores"]["uniform"]["ngram_r"]
    pipeline.run(again(folder=folder, tokens=20_000), until="explain")
    stale = again(folder=folder, controls=("init",), tokens=20_000)
    with pytest.raises(UserError, match="init is of another text, seed or model"):
        pipeline.run(stale, "simulate")
    with pytest.raises(UserError, match="scores in .* are of another record than the one there"):
        pipeline.run(stale, "report")
