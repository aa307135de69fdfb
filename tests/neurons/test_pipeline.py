"""`interpret.py neurons`, its stages end to end on planted neurons, and the selftest."""

import json

import numpy as np
import pytest

from crate_mini import UserError
from crate_mini import stats as metrics
from crate_mini.data import batches as data
from crate_mini.neurons import pipeline as neurons
from crate_mini.neurons import planted as puzzles
from crate_mini.neurons import record as activations
from crate_mini.neurons import score as results
from crate_mini.neurons import selftest, summary
from crate_mini.neurons import simulators as explain

J = puzzles.NEURON


def planted(place, **changes):
    """A Run on planted neurons and the texts that lie in a folder; by default it writes there too."""
    source = place / "puzzles.jsonl"
    if not source.exists():
        puzzles.write_texts(source, 500)
    tokenizer, model = data.load_tokenizer("bytes"), puzzles.Planted()
    corpus = data.open_corpus(str(source), tokenizer, place / "cache", 1.0, log=lambda line: None)
    made = {"folder": place / "out", "controls": ("shuffle",), "log": lambda line: None, **changes}
    return neurons.Run(
        model,
        {"tokenizer": {"spec": "bytes"}},
        tokenizer,
        corpus,
        made.pop("folder"),
        activations.sites(model),
        **made,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished Run, with tries for all neurons."""
    r = planted(tmp_path_factory.mktemp("planted"), trie=99)
    neurons.run(r)
    return r


def lines(r, name):
    return [json.loads(line) for line in (r.folder / name).read_text().splitlines()]


def test_scores_of_planted_neurons(done):
    rows = lines(done, "scores.jsonl")
    assert [row["neuron"] for row in rows] == list(range(len(puzzles.READINGS)))
    score = {name: rows[j]["scores"] for name, j in J.items()}
    uniform = {name: found["uniform"] for name, found in score.items()}
    assert uniform["token set"]["token_r"] > 0.99 and uniform["token set"]["label_r@10"] > 0.99
    assert uniform["bigram"]["ngram_r"] > 0.9 > 0.5 > uniform["bigram"]["token_r"]
    assert (
        abs(uniform["third token back"]["ngram_r"])
        < 0.1
        < 0.9
        < score["third token back"]["trie_r"]
    )
    assert score["third token back"]["trie_f1"] > 0.8
    assert abs(uniform["noise"]["ngram_r"]) < 0.05 and abs(uniform["token set"]["null_r"]) < 0.3
    assert uniform["token set"]["f1"] == uniform["token set"]["auprc"] == 1
    assert (
        score["token set"]["openai_tar[ngram]"] > 0.99
        and score["token set"]["openai_random[ngram]"] > 0.9
    )
    assert {name: rows[j]["status"] for name, j in J.items()} == {
        "token set": "live",
        "bigram": "live",
        "third token back": "live",
        "position": "live",
        "noise": "live",
        "dead": "dead",
        "always on": "undefined",
        "negative only": "dead",
    }
    assert rows[J["always on"]]["why"]["token_r"] == "true activations are constant"
    assert all(
        (value is None) == (name in row["why"]) or value is not None
        for row in rows
        for name, value in row["scores"]["uniform"].items()
    )


def test_counts_in_the_summary_add_up(done):
    found = json.loads((done.folder / "summary.json").read_text())
    for name, n in found["sites"]["L0"]["n"].items():
        if not name.startswith("few_"):
            assert n["total"] == sum(n[k] for k in ("live", "dead", "undefined", "failed"))
            assert n["total"] == len(puzzles.READINGS)
    assert set(found["what_the_simulator_saw"]) == set(explain.SAW) - {"init"}
    assert found["record"] == json.loads((done.folder / "record.json").read_text())


def test_fewer_excerpts_than_the_protocol_asks_for_are_told(done):
    """Seven documents have seven top windows: too few for the ten that CRATE-LM's code scores on."""
    site, selected = done.sites[0], done.read("select", done.sites[0])
    sims, j = done.read("simulate", site), J["noise"]
    found = results.protocol_scores(done, sims, selected, j)
    assert not any(why for _, why in found.values())
    selected.anthropic_crate_score_origin[j, 40:] = ""
    found = results.protocol_scores(done, sims, selected, j)
    value, why = found.pop("anthropic_crate[ngram]")
    assert value is not None and why == "40 excerpts of the protocol's 47"
    assert not any(why for _, why in found.values())
    rows = lines(done, "scores.jsonl")
    rows[j]["why"]["anthropic_crate[ngram]"] = why
    told = summary.summarise(rows, {}, 1)
    assert told["sites"]["L0"]["n"]["few_excerpts"]["anthropic_crate[ngram]"] >= 1
    assert "anthropic_crate[ngram]: " in summary.table(told) and "fewer excerpts" in summary.table(
        told
    )


def test_simulated_values_are_those_of_the_tables(done):
    site, shared = done.sites[0], done.record.shared
    own, sims, selected = (
        done.record.site("L0"),
        done.read("simulate", site),
        done.read("select", site),
    )
    tables = explain.Backoff(
        shared["counts"], own["token_sum"], shared["pairs"], shared["pair_counts"], own["pair_sum"]
    )
    assert np.allclose(sims.uniform_ngram, tables(shared["uniform_score"]), atol=1e-3)
    j = J["bigram"]
    e = done.chosen(selected, "openai_tar", "score", j)
    assert np.allclose(sims.openai_tar_ngram[j, : len(e.doc)], tables(e.tokens, j), atol=1e-6)
    r, _ = metrics.pearson(e.acts.ravel(), tables(e.tokens, j).ravel())
    assert lines(done, "scores.jsonl")[j]["scores"]["openai_tar[ngram]"] == pytest.approx(
        r[0], abs=1e-6
    )
    fit = done.chosen(selected, "openai_tar", "fit", j)
    five = explain.five_table(fit.tokens, fit.acts)(e.tokens)
    assert np.allclose(sims.openai_tar_five[j, : len(e.doc)], five, atol=1e-6)
    assert not set(fit.doc.tolist()) & set(e.doc.tolist())


def test_excerpts_for_the_page(done):
    shown = lines(done, "excerpts.jsonl")
    assert [row["neuron"] for row in shown] == list(range(len(puzzles.READINGS)))
    own = done.record.site("L0")
    for row in shown:
        assert len(row["hist"]) == 50 and sum(row["hist"]) == own["hist"][row["neuron"]].sum()
        for e in (*row["top"], *row["intervals"], *row["random"]):
            assert len(e["tokens"]) == len(e["acts"]) == results.AROUND
            assert e["acts"][e["at"]] == max(e["acts"]) and (e["sim"] is None) == (
                e["part"] == "fit"
            )
        for group in ("top", "intervals"):
            peaks = [max(e["acts"]) for e in row[group]]
            assert peaks == sorted(peaks, reverse=True)
    assert len(shown[J["token set"]]["top"]) == 10 and not shown[J["dead"]]["top"]
    acts = own["uniform_score_acts"].reshape(-1, len(shown)).astype(np.float64)
    other, r = shown[J["bigram"]]["together"][0]
    assert r == pytest.approx(np.corrcoef(acts[:, J["bigram"]], acts[:, other])[0, 1], abs=1e-3)
    assert all(row["atoms"] == [] for row in shown)  # planted neurons write nothing


def test_pages_are_there(done):
    page = (done.folder / "index.html").read_text("utf-8")
    assert all(word in page for word in ("ngram_r", "null_r", "openai_tar[five excerpts]"))
    assert (done.folder / "human.html").exists()
    for name in ("scores.png", "density.png"):
        assert (done.folder / name).read_bytes().startswith(b"\x89PNG")


def test_every_live_neuron_has_its_effect_and_no_dead_one(done):
    for row, shown in zip(
        lines(done, "scores.jsonl"), lines(done, "explain-L0.jsonl"), strict=True
    ):
        assert ("effect" in row) == (row["status"] != "dead") and row.get("effect") == shown.get(
            "effect"
        )
        if "effect" in row:  # a planted neuron moves no logit
            assert (
                row["effect"]["raised"] == [] and row["effect"]["kl"] == 0 == row["effect"]["loss"]
            )
            assert row["effect"]["clamp"] == pytest.approx(row["max"], rel=1e-3)
            assert row["effect"]["far"]["clamp"] == pytest.approx(5 * row["max"], rel=1e-3)


def test_same_seed_same_files_and_any_stage_again(done):
    before = {
        name: (done.folder / name).read_bytes()
        for name in ("scores.jsonl", "excerpts.jsonl", "index.html", "explain-L0.jsonl")
    }
    for start in ("score", "explain", "record"):
        neurons.run(planted(done.folder.parent, trie=99), start)
        for name, content in before.items():
            assert (done.folder / name).read_bytes() == content, (start, name)


def test_a_stage_refuses_what_is_not_of_this_record(done, tmp_path):
    r = planted(done.folder.parent, folder=tmp_path / "out")
    for stages, said in (
        (("recrod",), "--from 'recrod' is no stage; choose one of record"),
        (("record", "scores"), "--until 'scores' is no stage"),
        (("score", "select"), "--until select comes before --from score"),
    ):
        with pytest.raises(UserError, match=said):
            neurons.run(r, *stages)
    with pytest.raises(UserError, match="holds no record"):
        neurons.run(r, "select")
    neurons.run(r, until="explain")
    with pytest.raises(UserError, match="make it with --from simulate"):
        neurons.run(r, "score")
    neurons.run(r, "simulate")
    fresh = planted(done.folder.parent, folder=tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="of another checkpoint or seed"):
        neurons.run(fresh, "select")
    neurons.run(fresh, until="record")
    with pytest.raises(
        UserError, match="of another record than is there now; make it with --from select"
    ):
        neurons.run(fresh, "explain")
    fewer = planted(done.folder.parent, folder=tmp_path / "out", n=5, seed=1)
    neurons.run(fewer, "select", until="explain")
    with pytest.raises(UserError, match="of other neurons"):
        planted(done.folder.parent, folder=tmp_path / "out", n=6, seed=1).explained(fewer.sites[0])
    other = planted(done.folder.parent, folder=tmp_path / "out", n=5, seed=1, tokens=20_000)
    neurons.run(other, until="select")  # its labels may know the documents that score now
    with pytest.raises(UserError, match="of another record than is there now.*--from explain"):
        neurons.run(other, "simulate")


@pytest.mark.parametrize(
    "name, spoil, said",
    [
        ("select-L0.npz", lambda raw: raw[:-99], "--from select"),
        ("explain-L0.jsonl", lambda raw: b"[]\n", "--from explain"),
        ("select-L0.npz", lambda raw: raw[:2000] + bytes(2000) + raw[4000:], "--from select"),
    ],
)
def test_a_damaged_file_is_one_sentence(done, name, spoil, said):
    path = done.folder / name
    raw = path.read_bytes()
    path.write_bytes(spoil(raw))
    with pytest.raises(UserError, match=f"{name} .* make it with {said}"):
        neurons.run(planted(done.folder.parent, trie=99), "simulate")
    path.write_bytes(raw)


def test_a_stop_says_where_to_go_on_and_keeps_what_is_finished(done, monkeypatch):
    said, before = [], (done.folder / "explain-L0.jsonl").read_bytes()

    def interrupted(r):
        raise KeyboardInterrupt

    monkeypatch.setitem(neurons.STAGES, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        neurons.run(planted(done.folder.parent, trie=99, log=said.append), "explain")
    assert said[-1].endswith("--from simulate goes on") and said[0].startswith("explain ")
    assert (done.folder / "explain-L0.jsonl").read_bytes() == before
    monkeypatch.undo()
    neurons.run(planted(done.folder.parent, trie=99), "simulate")


def test_memory_holds_one_site_at_a_time(done):
    r = planted(done.folder.parent, trie=99)
    for stage in ("select", "explain", "simulate", "score"):
        neurons.run(r, stage, until=stage)
        assert r.record.site("L0") == {}, stage


def test_a_lone_neuron_has_no_other_ones_table(done, tmp_path):
    r = planted(done.folder.parent, folder=tmp_path / "out", n=1)
    neurons.run(r, until="score")
    (row,) = lines(r, "scores.jsonl")
    assert "null_r" not in row["scores"]["uniform"] and "token_r" in row["scores"]["uniform"]


def test_a_drawn_few_are_scored_as_among_all(done, tmp_path):
    r = planted(done.folder.parent, folder=tmp_path / "out", n=7, controls=())
    neurons.run(r, until="score")
    rows, every = lines(r, "scores.jsonl"), lines(done, "scores.jsonl")
    assert len(rows) == 7 and len({row["neuron"] for row in rows}) == 7
    for row in rows:
        own = {k: v for k, v in every[row["neuron"]]["scores"]["uniform"].items() if k != "null_r"}
        assert (
            row["scores"]["uniform"] == pytest.approx(own, abs=1e-6, nan_ok=True)
            or None in own.values()
        )


def test_every_neuron_is_as_likely_to_be_drawn(done):
    counts = np.zeros(done.sites[0].width)
    for seed in range(400):
        r = neurons.Run(None, None, None, None, None, done.sites, seed=seed, n=6)
        counts[r.neurons(done.sites[0])] += 1
    expected = 400 * 6 / len(counts)
    assert counts.sum() == 2400 and abs(counts - expected).max() < 4.5 * np.sqrt(expected)


def test_partners_are_others_and_alive():
    live = np.array([1, 0, 1, 1, 0, 1], bool)
    other = results.partners(6, live, np.random.default_rng(0))
    assert live[other].all() and sorted(other[live]) == [0, 2, 3, 5]
    assert (other[live] != np.flatnonzero(live)).all()


def test_match_density_cuts_what_is_recorded(done, tmp_path):
    r = planted(done.folder.parent, folder=tmp_path / "out", density=0.05)
    neurons.run(r, until="record")
    cut, plain = r.record.site("L0"), done.record.site("L0")
    j = J["noise"]
    assert plain["density"][j] > 0.2 and 0.03 < cut["density"][j] < 0.06
    assert cut["max"][j] == plain["max"][j]
    values = cut["uniform_score_acts"][..., j]
    full = plain["uniform_score_acts"][..., j]
    limit = full[values > 0].min()
    assert np.array_equal(values, np.where(full >= limit, full, 0))


def test_untrained_control_is_scored_by_its_own_tables(done, tmp_path, monkeypatch):
    model = puzzles.Planted()
    monkeypatch.setattr(
        activations, "untrained", lambda *_: (model, {"tokenizer": {"spec": "bytes"}})
    )
    r = planted(done.folder.parent, folder=tmp_path / "out", controls=("init",))
    neurons.run(r, until="score")
    for row in lines(r, "scores.jsonl"):  # here the "untrained" model is the model itself
        assert row["scores"]["uniform"]["init_r"] == row["scores"]["uniform"]["ngram_r"]
    neurons.run(
        planted(done.folder.parent, folder=tmp_path / "out", tokens=20_000), until="explain"
    )
    stale = planted(done.folder.parent, folder=tmp_path / "out", controls=("init",), tokens=20_000)
    with pytest.raises(UserError, match="init is of another text, seed or model"):
        neurons.run(stale, "simulate")
    with pytest.raises(UserError, match="scores in .* are of another record than is there now"):
        neurons.run(stale, "report")


def test_selftest_expectations(tmp_path):
    found = selftest.solve(tmp_path, 600, log=lambda line: None)
    passed = {
        name: {p for p, result in results.items() if result["passes"]}
        for name, results in found["simulators"].items()
    }
    always = {"token set", "noise", "dead", "always on", "negative only"}
    assert passed["perfect reader"] == set(J) and passed["token"] == always
    assert passed["ngram"] == always | {"bigram"}
    assert passed["trie"] == always | {"bigram", "third token back"}
    for metric in ("uniform r", "uniform f1", "uniform auprc"):
        assert found["metrics"][metric]["passes"], metric
    assert set(found["metrics"]) >= {
        "openai_tar",
        "openai_random",
        "anthropic_crate",
        "anthropic_2023",
    }
    table = selftest.told(found)
    assert "perfect reader" in table and "8 of 8" in table
    json.dumps(found, allow_nan=False)


def test_spoiling_removes_or_adds_half():
    predicted, rng = np.zeros(200_000), np.random.default_rng(0)
    predicted[:20_000] = 1
    assert selftest.spoiled(predicted, "removed", 0.1, rng).sum() == pytest.approx(10_000, rel=0.05)
    assert selftest.spoiled(predicted, "added", 0.1, rng).sum() == pytest.approx(30_000, rel=0.05)
