"""The study of the front: its points, made-up and real, its table and its figure."""

import json

import pytest
import torch
from tiny_saes import small_corpus, tiny_model

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.sae import autoencoder
from crate_mini.sae.autoencoder import SAE, replace_codes
from crate_mini.sae.evaluate import loss_in_context
from crate_mini.studies import front, runner
from crate_mini.training import checkpoint


def beyond(kind, kept):
    """beyond.json of a model whose coverage falls with the layer; autoencoders have .3 and .4."""
    sites = {}
    for layer in (0, 1):
        coverage = 0.2 - 0.1 * layer + (kept or 0) / 1000
        minus = {"difference": coverage - 0.05, "ci95": [coverage - 0.06, coverage - 0.04]}
        entry = {"coverage": coverage, "ci95": [coverage - 0.01, coverage + 0.01], "density": 0.5}
        sets = {"neurons": entry, "rotation": {**entry, "neurons_minus": minus}}
        for k in () if kept else front.KEPT:
            of_features = {**entry, "coverage": 0.3 + 0.1 * layer, "density": k / 512}
            sets[f"sae x1-k{k}"] = of_features
        sites[f"L{layer}"] = {"sets": sets}
    return {"sites": sites}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A checkout in tmp_path whose scripts only leave what the study reads; [words of each]."""
    calls = []

    def run_script(words, log):
        calls.append(words)
        folder = tmp_path / words[words.index("--out") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        if "beyond" in words:
            kind, _, kept = folder.name.partition("-top")
            content = beyond(kind, int(kept) if kept else None)
            (folder / "beyond.json").write_text(json.dumps(content))
        return 1.0

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_script", run_script)
    monkeypatch.setattr(front, "loss_increase", lambda ckpt, folder, name: 0.25)
    return calls


def train(place, kind):
    """Leave the checkpoints of one kind of model where the study `models` does."""
    for name, loss in ((kind, 4.0), *((f"{kind}-top{kept}", 4.1) for kept in front.KEPT)):
        folder = place / "out" / "study" / f"{name}-1337" / "last"
        folder.mkdir(parents=True)
        meta = {"config": {"n_layer": 2}, "training": {"val_loss": loss}}
        (folder / "config.json").write_text(json.dumps(meta))


def test_every_point_has_the_loss_and_the_coverage_of_the_codes_it_is_for(parts, tmp_path, capsys):
    train(tmp_path, "crate+")
    train(tmp_path, "gpt2")
    front.run(front.Settings(("crate+", "gpt2")))
    study = json.loads((tmp_path / "results" / "front.json").read_text())
    points = {(p["model"], p["codes"], p["kept"]): p for p in study["points"]}
    assert len(points) == len(study["points"]) == 2 * (1 + 2 * len(front.KEPT))
    dense = points["crate+", "own", None]
    assert dense["loss"] == 4.0 and dense["coverage"] == pytest.approx(0.15)
    assert dense["ci95"] == pytest.approx([0.14, 0.16])
    assert dense["minus_rotation"] == pytest.approx(0.10)
    top = points["gpt2", "own", 16]
    assert top["loss"] == 4.1 and top["coverage"] == pytest.approx(0.166)
    spliced = points["gpt2", "sae", 32]
    assert spliced["loss"] == 4.25 and spliced["coverage"] == pytest.approx(0.35)
    assert spliced["density"] == pytest.approx(32 / 512) and "minus_rotation" not in spliced
    text = capsys.readouterr().out
    assert "| crate+ | all | 4.000 | 50.0 | 0.150 [0.140, 0.160] | 0.100 [0.090, 0.110] |" in text
    assert "| GPT-2 twin | autoencoders, 32 features | 4.250 | 6.2 | 0.350" in text
    assert (tmp_path / "results" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_autoencoders_come_before_the_stage_that_reads_them_and_only_of_dense_models(
    parts, tmp_path
):
    train(tmp_path, "gpt2")
    front.run(front.Settings(("gpt2",)))
    texts = [" ".join(map(str, words)) for words in parts]
    saes = [i for i, text in enumerate(texts) if " sae " in text]
    assert len(saes) == 2 and all("gpt2-1337/last" in texts[i] for i in saes)
    assert max(saes) < min(i for i, text in enumerate(texts) if "--from beyond" in text)


def test_missing_models_are_named_with_the_command_that_trains_them(parts, tmp_path):
    train(tmp_path, "gpt2")
    with pytest.raises(UserError, match="for crate, crate-top8, .*models --only crate,crate-top8"):
        front.run(front.Settings(("gpt2", "crate")))
    with pytest.raises(UserError, match="--models llama is unknown; choose some of crate, crate+"):
        front.run(front.Settings(("llama",)))


def test_splicing_costs_what_all_layers_together_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    corpus, model = small_corpus(tmp_path), tiny_model("gpt2")
    settings = {"data": str(tmp_path / "text.txt"), "seed": 1, "val_fraction": 0.1}
    folder = tmp_path / "last"
    checkpoint.save(
        folder,
        model,
        tokenizer={"spec": "bytes", "hash": load_tokenizer("bytes").hash},
        training={"settings": settings, "corpus": corpus.meta},
    )
    h = model.config.n_code
    for layer in range(len(model.blocks)):
        identity = SAE(h, h, layer, k=h)
        identity.load_state_dict({**identity.state_dict(), "W": torch.eye(h), "E": torch.eye(h)})
        autoencoder.save(tmp_path, identity, model, {})
        nothing = SAE(h, h, layer, k=1)
        nothing.load_state_dict({**nothing.state_dict(), "W": torch.zeros(h, h)})
        autoencoder.save(tmp_path, nothing, model, {})
    assert front.loss_increase(folder, tmp_path, f"x1-k{h}") == pytest.approx(0, abs=1e-5)

    def loss(layers):
        tokens = min(front.TOKENS, corpus.n_tokens["val"] - 1)
        blocks = corpus.blocks("val", 8, model.config.block_size, tokens)
        hooks = [replace_codes(model, layer, torch.zeros_like) for layer in layers]
        with front.ExitStack() as stack, torch.no_grad():
            for hook in hooks:
                stack.enter_context(hook)
            return loss_in_context(model, blocks, "zeros", tokens)

    increase = front.loss_increase(folder, tmp_path, "x1-k1")
    assert increase == pytest.approx(loss((0, 1)) - loss(()), rel=1e-4)
    assert abs(increase - (loss((1,)) - loss(()))) > 1e-3
