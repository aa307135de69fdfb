"""Exports: what other tools read, and the same model to the bit when it comes back."""

import contextlib
import io
import json
import math
import struct
import sys
from unittest import mock

import pytest
import torch
from forked import ROOT
from tiny_checkpoints import H, save_checkpoint, write_text
from tiny_models import VARIANTS, T, V, tiny

from crate_mini import UserError, model
from crate_mini.console import results, terminal
from crate_mini.data.tokenizer import PATTERN, load_tokenizer
from crate_mini.export import __main__, command, folders, safetensors
from crate_mini.export.tokenizer_json import last_merge, tokenizer_json
from crate_mini.generate import generate
from crate_mini.sae import autoencoder
from crate_mini.training import checkpoint
from crate_mini.training.foreign_files import SAFETENSORS_DTYPES, read
from crate_mini.training.import_weights import import_foreign

MODELS = {
    **VARIANTS,
    "crate, unit norm": ("crate", {"unit_norm": True}),
    "crate, learned threshold": ("crate", {"learned_lam": True, "ista_steps": 3, "eta": 0.2}),
    "crate, no bias": ("crate", {"bias": False, "expansion": 2}),
    "mhsa + ista": ("crate", {"attention": "mhsa", "key_shift": True}),
    "gpt2, biases": ("gpt2", {"bias": True}),
    "gpt2, gelu": ("gpt2", {"bias": True, "activation": "gelu"}),
    "gpt2, gelu, no bias": ("gpt2", {"activation": "gelu"}),
    "gpt2, no residual": ("gpt2", {"residual": False}),
}
AS_GPT2 = {"gpt2", "gpt2, biases", "gpt2, gelu", "gpt2, gelu, no bias"}
NANOGPT = {"crate": "transformer.h.1.ista.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}
IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
META = {"tokenizer": {"spec": None, "hash": None}, "training": {}, "sha256": "0" * 64}


def made(name):
    """A tiny model of MODELS, no weight of which keeps its initial value."""
    with mock.patch.dict(VARIANTS, {name: MODELS[name]}):
        lm = tiny(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for w in lm.parameters():
            w.add_(torch.randn(w.shape, generator=generator) * 0.05)
    return lm


def equal(lm, other):
    """Whether two models have the same Config and the same weights, to the bit."""
    ours, theirs = lm.state_dict(), other.state_dict()
    same = [torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    return lm.config == other.config and ours.keys() == theirs.keys() and all(same)


def export(*words):
    """What `python -m crate_mini.export WORDS` prints."""
    output = io.StringIO()
    argv = ["export", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(output):
        __main__.main()
    return output.getvalue()


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_a_folder_read_back_is_the_same_model_to_the_bit(tmp_path, name, to):
    lm = made(name)
    folders.WRITERS[to](tmp_path, lm, META, None)
    back, meta = checkpoint.load(tmp_path)
    assert equal(lm, back) and not back.training
    assert torch.equal(lm(IDS), back(IDS))
    assert meta["config"]["key_shift"] == lm.config.key_shift
    config = json.loads((tmp_path / "config.json").read_text())
    is_gpt2 = to == "hf" and name in AS_GPT2
    assert config["model_type"] == ("gpt2" if is_gpt2 else "crate_mini")
    if is_gpt2:
        activation = {"relu": "relu", "gelu": "gelu_new"}[lm.config.activation]
        assert config["activation_function"] == activation
        del config["crate_mini"]  # as any other GPT-2 of Hugging Face
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.testing.assert_close(import_foreign(tmp_path)(IDS), lm(IDS))


@pytest.mark.parametrize("kind", ["crate", "gpt2", "gpt2, biases", "gpt2, gelu"])
def test_nanogpts_file_read_back_is_the_same_model_to_the_bit(tmp_path, kind):
    lm = made(kind)
    folders.nanogpt(tmp_path, lm, META, None)
    notes = []
    back, _ = checkpoint.load(tmp_path / "ckpt.pt", log=notes.append)
    assert equal(lm, back) and not notes
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    names = "n_layer n_head n_embd block_size bias vocab_size dropout"  # of nanoGPT's GPTConfig
    assert sorted(content["model_args"]) == sorted(names.split())
    assert NANOGPT[kind.split(",")[0]] in content["model"]


@pytest.mark.parametrize(
    "name", ["crate+", "crate, key shift", "gpt2, key shift", "gpt2, top-k", "mhsa + ista"]
)
def test_what_nanogpt_cannot_express_is_refused_with_what_can(tmp_path, name):
    with pytest.raises(UserError, match="has no place .*; write it with --to safetensors or --to"):
        folders.nanogpt(tmp_path, made(name), META, None)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run")
        yield save_checkpoint(folder / "best", write_text(folder / "text.txt"))


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_an_export_takes_the_checkpoints_place(ckpt, tmp_path, to):
    """Its tokenizer, held-out text and training facts come along."""
    output = export(ckpt, "--to", to, "--out", tmp_path / "there")
    assert output.startswith("files ") and "\nopen  " in output
    lm, meta, tokenizer = checkpoint.open_model(tmp_path / "there")
    original, original_meta = checkpoint.load(ckpt)
    assert equal(lm, original) and tokenizer.name == "bytes"
    corpus = checkpoint.held_out(tmp_path / "there", meta, tokenizer, log=pytest.fail)
    assert corpus.n_tokens["val"] > 0
    entry = json.loads((tmp_path / "there" / "config.json").read_text())["crate_mini"]
    assert entry["sha256"] == original_meta["sha256"] and entry["commit"] == results.commit()
    assert entry["command"].startswith("python -m crate_mini.export")
    again = export(tmp_path / "there", "--to", "nanogpt")
    assert str(tmp_path / "export-nanogpt" / "ckpt.pt") in again


def test_an_autoencoder_has_saelens_folder(ckpt, tmp_path):
    lm, _ = checkpoint.load(ckpt)
    for settings in ({"k": 8}, {"l1": 1e-4}):
        sae = autoencoder.SAE(H, 256, layer=1, **settings)
        torch.nn.init.normal_(sae.c)
        facts = autoencoder.save(tmp_path, sae, lm, {})
        path = tmp_path / f"sae-L1-{facts['name']}.pt"
        export(ckpt, "--to", "saelens", "--sae", path, "--out", tmp_path / "sae")
        config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
        weights, _ = read(tmp_path / "sae" / "sae_weights.safetensors")
        x = torch.randn(5, H)
        pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        if config["architecture"] == "topk":
            kept = pre.topk(config["k"])
            features = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
        else:
            features = pre.relu()
        assert torch.equal(features, sae.encode(x))
        assert torch.equal(features @ weights["W_dec"] + weights["b_dec"], sae.decode(features))
        assert (config["d_in"], config["d_sae"]) == (H, 256) and config["apply_b_dec_to_input"]
        assert config["metadata"]["hook_name"] == "blocks.1.sparsifier.code"
        assert lm.get_submodule(config["metadata"]["hook_name"]) is lm.blocks[1].sparsifier.code


def export_error(*words):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        terminal.run(lambda: export(*words))
    assert end.value.code == 2 and errors.getvalue().count("\n") == 1
    return errors.getvalue()


def test_bad_input_is_answered_in_one_sentence(ckpt, tmp_path):
    assert "--to 'onnx' is unknown" in export_error(ckpt, "--to", "onnx")
    assert "--to saelens --sae FILE" in export_error(ckpt, "--to", "saelens")
    assert "--to saelens --sae FILE" in export_error(ckpt, "--sae", "x.pt")
    assert "holds a checkpoint" in export_error(ckpt, "--out", ckpt)
    assert "is not a folder" in export_error(ckpt, "--out", ckpt / "config.json")
    assert "No checkpoint in" in export_error(tmp_path / "none")
    twin = save_checkpoint(tmp_path / "twin", ckpt.parent / "text.txt", "crate+")
    out = tmp_path / "nano"
    message = export_error(twin, "--to", "nanogpt", "--out", out)
    assert "ista_steps=1 has no place" in message and not out.exists()
    with pytest.raises(SystemExit) as end:
        export("--help")
    assert end.value.code == 0


def test_a_damaged_export_is_refused(tmp_path):
    folders.plain(tmp_path, made("crate"), META, None)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    entry = good["crate_mini"]
    for change in (
        {"config": {**entry["config"], "n_layer": 1}},
        {"config": {**entry["config"], "n_embd": 32}},
        {"config": {**entry["config"], "other": 1}},
        {"config": None},
        {"tokenizer": None},
    ):
        path.write_text(json.dumps({**good, "crate_mini": {**entry, **change}}))
        with pytest.raises(UserError, match="weights and config.json do not fit"):
            checkpoint.load(tmp_path)
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="n_head=4 has no effect"):
        checkpoint.load(tmp_path, n_head=4)


# ---- safetensors ---------------------------------------------------------------------------------


def test_safetensors_as_its_specification_says(tmp_path):
    tensors = {}
    for i, (name, dtype) in enumerate(SAFETENSORS_DTYPES.items()):
        tensors[f"ä {name}"] = torch.arange(i + 3).to(dtype)
    tensors["transposed"] = torch.randn(3, 4).T
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 2), torch.tensor(math.pi)
    path = tmp_path / "a.safetensors"
    safetensors.write(path, tensors, {"who": "us"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt", "who": "us"}
    ends = [0]
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        assert begin == ends[-1] and header[name]["shape"] == list(tensor.shape)
        ends.append(end)
        assert end - begin == tensor.numel() * tensor.element_size()
    assert len(data) == 8 + length + ends[-1]
    back, _ = read(path)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with pytest.raises(UserError, match="complex64; expected one of F64"):
        safetensors.write(path, {"z": torch.zeros(2, dtype=torch.complex64)})


def test_the_package_reads_what_is_written_without_it(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    lm = made("crate+")
    folders.plain(tmp_path, lm, META, None)
    theirs = package.load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == lm.state_dict().keys()
    assert all(torch.equal(theirs[name], w) for name, w in lm.state_dict().items())


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_our_logits(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    lm = made(name)
    folders.hugging_face(tmp_path, lm, META, None)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, trust_remote_code=name not in AS_GPT2).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, lm(IDS), rtol=1e-4, atol=1e-4)
        logits = lm.double()(IDS)
        torch.testing.assert_close(theirs.double()(IDS).logits, logits, rtol=1e-9, atol=1e-9)
        loss = theirs(IDS, labels=IDS).loss.double()
        expected = lm(IDS[:, :-1], IDS[:, 1:]).double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    if name in AS_GPT2:
        return
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS[:, :5]), 1)
    mask = torch.tensor([[0] * 3 + [1] * 5] * 2)
    with torch.no_grad():
        beside = theirs(padded, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(beside, theirs(IDS[:, :5]).logits, rtol=1e-9, atol=1e-9)
        words = {"max_new_tokens": T, "do_sample": False}
        assert theirs.generate(IDS[:, :5], **words).shape == (2, 5 + T)  # beyond the context


@pytest.mark.parametrize("name", [name for name in MODELS if name not in AS_GPT2])
def test_a_text_read_in_parts_with_the_kv_cache_has_the_logits_of_one_call(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folders.hugging_face(tmp_path, made(name), META, None)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, trust_remote_code=True).eval().double()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0  # padding of the first text
    for words in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            whole = theirs(IDS, **words).logits
            for ends in ((1, 2, 3, T), (T - 1, T), range(1, T + 1)):
                cache, begin, parts = None, 0, []
                for end in ends:
                    mask_so_far = {key: value[:, :end] for key, value in words.items()}
                    ids = IDS[:, begin:end]
                    output = theirs(ids, past_key_values=cache, use_cache=True, **mask_so_far)
                    cache, begin = output[modelling(theirs).CACHE], end
                    parts.append(output.logits)
                real = mask.bool() if words else slice(None)
                torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real])
    layer = cache.layers[0]
    assert layer.keys.shape[2] == T
    attention = json.loads((tmp_path / "config.json").read_text())["crate_mini"]["config"][
        "attention"
    ]
    expected = 0 if attention == "mssa" else layer.keys.numel()  # u is kept once
    assert layer.values.numel() == expected
    assert modelling(theirs).CACHE not in theirs(IDS)  # none that was not asked for


def modelling(theirs):
    """The module that came with an exported folder."""
    return sys.modules[type(theirs).__module__]


@pytest.mark.parametrize("name", ["crate", "crate+", "gpt2, key shift"])
def test_generation_with_the_kv_cache_is_that_without(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folders.hugging_face(tmp_path, made(name), META, None)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, trust_remote_code=True).eval().double()
    read = []
    theirs.tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    prompt = IDS[:, :5]
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    for words in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        words = {"max_new_tokens": T, "do_sample": False, **words}  # beyond the context
        read.clear()
        cached = theirs.generate(prompt, use_cache=True, **words)
        assert read == [5, *[1] * (T - 5), *[T] * 4]  # the window slides at the end
        assert torch.equal(cached, theirs.generate(prompt, use_cache=False, **words))
    ours = checkpoint.load(tmp_path)[0].double()
    assert torch.equal(
        theirs.generate(prompt, max_new_tokens=T, do_sample=False), generate(ours, prompt, T, 0)
    )
    start = theirs(prompt, use_cache=True)[modelling(theirs).CACHE]
    two_words = {"max_new_tokens": 4, "do_sample": False, modelling(theirs).CACHE: start}
    with pytest.raises(ValueError, match="the cache holds 5 tokens and the text has 5, so none is"):
        theirs.generate(prompt, **two_words)
    longer = theirs.generate(IDS[:, :7], **two_words)
    assert torch.equal(longer, theirs.generate(IDS[:, :7], max_new_tokens=4, do_sample=False))


def test_transformers_reads_text_as_our_tokenizer_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    for spec in ("bytes", "pydocs:600", "pydocs:4095"):
        ours = load_tokenizer(spec)
        folders.write_tokenizer(tmp_path, ours, 64)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert theirs.eos_token_id == ours.eot
        for text in ODD_TEXTS:
            assert theirs(text)["input_ids"] == ours.encode(text), text
            assert theirs.decode(ours.encode(text)) == text


ODD_TEXTS = [
    "The function returns\n\n  the value.",
    "a  b\t\tc \r\n x",
    "日本語 né  \u3000x",
    "it's we'll 123abc ½ ²",
    "   ",
    "\n",
    "𝔘\u0301 e\u0301 👩‍👩‍👧",
    "(*args, **kwargs) -> None:\n        ...",
]


def test_the_modelling_file_is_complete_and_travels_with_its_folder(tmp_path):
    files, _ = folders.hugging_face(tmp_path, made("crate"), META, None)
    assert "modeling_crate_mini.py" in files
    text = (tmp_path / "modeling_crate_mini.py").read_text()
    assert text == (ROOT / "crate_mini/export/modeling_crate_mini.py").read_text()
    assert "from crate_mini" not in text and "import crate_mini" not in text
    fields = {f for f in model.Config.__dataclass_fields__ if f not in ("l1",)}
    for field in fields - {"bias", "lam"}:
        assert f"c.{field}" in text or f'"{field}"' in text, f"the file does not know {field}"
    twin, _ = folders.hugging_face(tmp_path / "..", made("gpt2"), META, None)
    assert "modeling_crate_mini.py" not in twin


# ---- tokenizer.json ------------------------------------------------------------------------------


def test_merges_rebuild_every_token_from_two_of_lower_rank():
    tokenizer = load_tokenizer("pydocs:900")
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.eot)]
    ranks = {token: id for id, token in enumerate(tokens)}
    for token in tokens:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            assert left + right == token
            assert max(ranks[left], ranks[right]) < ranks[token]
    content = tokenizer_json(tokenizer)
    assert len(content["model"]["merges"]) == 900 - 256
    assert content["added_tokens"][0]["id"] == tokenizer.eot
    assert sorted(content["model"]["vocab"].values()) == list(range(900))
    assert r" ?\p{L}++" in PATTERN  # GPT-2's split, which ByteLevel applies


def test_settings_name_every_format():
    assert set(command.Settings.__dataclass_fields__["to"].metadata["choices"]) == {
        "safetensors",
        "hf",
        "nanogpt",
        "saelens",
    }


def test_an_export_may_be_written_again_but_not_over_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"crate_mini": {"format": 1}}')  # as an export has it
    command.check_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1, "config": {}}')
    with pytest.raises(UserError, match="holds a checkpoint"):
        command.check_folder(tmp_path)
