"""Weights of other projects: logits against forward passes that are written here.

These read the foreign state_dict itself, in float64, and share no code with the model. The files
are synthetic, with the documented keys.
"""

import json
import math
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from crate_mini import UserError
from crate_mini.model import LM, preset
from crate_mini.training import checkpoint
from crate_mini.training.import_weights import export_foreign, import_foreign
from crate_mini.training.settings import parse

D = 12
HEADS = 3
LAYERS = 2
VOCAB = 19
CONTEXT = 7
GPT_MAPS = {
    "attn.c_attn": (3 * D, D),
    "attn.c_proj": (D, D),
    "mlp.c_fc": (4 * D, D),
    "mlp.c_proj": (D, 4 * D),
}
IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


def foreign(layout, bias=False):
    """A random state_dict with the keys, shapes and tying of `layout` (crate, gpt or hf)."""
    shapes = {"transformer.wte.weight": (VOCAB, D), "transformer.wpe.weight": (CONTEXT, D)}
    for i in range(LAYERS):
        block = f"transformer.h.{i}."
        if layout == "crate":
            norms, maps = ("prenorm_1", "prenorm_2"), {"attn.c_proj": (D, D)}
            shapes[block + "attn.c_attn.weight"] = (D, D)
            shapes[block + "ista.weight"] = (4 * D, D)
        else:
            norms, maps = ("ln_1", "ln_2"), GPT_MAPS
        for name in norms:
            add_norm(shapes, block + name, bias)
        for name, (n, m) in maps.items():
            shapes[f"{block}{name}.weight"] = (m, n) if layout == "hf" else (n, m)
            if bias:
                shapes[f"{block}{name}.bias"] = (n,)
    add_norm(shapes, "transformer.ln_f", bias)
    g = torch.Generator().manual_seed(2)
    sd = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    return {**sd, "lm_head.weight": sd["transformer.wte.weight"]}


def add_norm(shapes, name, bias):
    shapes[name + ".weight"] = (D,)
    if bias:
        shapes[name + ".bias"] = (D,)


def norm(x, sd, name):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * sd[name + ".weight"]
    return y + sd.get(name + ".bias", 0)


def attend(q, k, v):
    """Causal softmax attention, head by head, on (B, T, d)."""
    p, out = D // HEADS, []
    later = torch.triu(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool), 1)
    for i in range(HEADS):
        head = slice(i * p, (i + 1) * p)
        scores = q[..., head] @ k[..., head].mT / math.sqrt(p)
        out.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., head])
    return torch.cat(out, -1)


def forward(sd, layout, activation=torch.relu):
    """Logits of IDS as the foreign code computes them from its own state_dict."""
    sd = {name: value.double() for name, value in sd.items()}

    def linear(x, name):
        w = sd[name + ".weight"]
        return x @ (w if layout == "hf" else w.T) + sd.get(name + ".bias", 0)

    x = sd["transformer.wte.weight"][IDS] + sd["transformer.wpe.weight"][: IDS.shape[1]]
    for i in range(LAYERS):
        block = f"transformer.h.{i}."
        if layout == "crate":
            u = linear(norm(x, sd, block + "prenorm_1"), block + "attn.c_attn")
            x = x + linear(attend(u, u, u), block + "attn.c_proj")
            y, W = norm(x, sd, block + "prenorm_2"), sd[block + "ista.weight"]
            a = torch.relu(0.1 * y @ W.T - 0.01)
            a = torch.relu(a + 0.1 * (y @ W.T - a @ W @ W.T) - 0.01)
            x = a @ W
        else:
            qkv = linear(norm(x, sd, block + "ln_1"), block + "attn.c_attn")
            x = x + linear(attend(*qkv.split(D, -1)), block + "attn.c_proj")
            a = activation(linear(norm(x, sd, block + "ln_2"), block + "mlp.c_fc"))
            x = x + linear(a, block + "mlp.c_proj")
    return norm(x, sd, "transformer.ln_f") @ sd["lm_head.weight"].T


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


relu = torch.relu
CASES = [("crate", True, relu), ("gpt", False, relu), ("gpt", True, relu), ("hf", True, gelu)]


@pytest.mark.parametrize("layout,bias,activation", CASES)
def test_import_gives_their_logits_and_export_their_file(layout, bias, activation):
    sd = foreign(layout, bias)
    lm = import_foreign(sd, n_head=HEADS)
    back = export_foreign(lm)
    assert back.keys() == sd.keys() and all(torch.equal(back[name], sd[name]) for name in sd)
    torch.testing.assert_close(
        lm.double()(IDS), forward(sd, layout, activation), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "layout,kind",
    [
        ("crate", {}),
        ("gpt", dict(kind="gpt2")),
        ("gpt", dict(kind="gpt2", bias=True)),
        ("hf", dict(kind="gpt2", bias=True, activation="gelu")),
    ],
)
def test_export_gives_our_logits_and_import_our_model(layout, kind):
    lm = LM(
        preset("2L", n_embd=D, n_head=HEADS, vocab_size=VOCAB, block_size=CONTEXT, **kind)
    ).eval()
    g = torch.Generator().manual_seed(3)
    # Biases and norms too: their initial values would hide a mix-up.
    with torch.no_grad():
        for w in lm.parameters():
            w.copy_(torch.randn(w.shape, generator=g) * 0.4)
    sd = export_foreign(lm)
    imported = import_foreign(sd, n_head=HEADS)
    assert imported.config == lm.config
    weights = lm.state_dict()
    for name, w in imported.state_dict().items():
        assert torch.equal(w, weights[name]), name
    activation = gelu if layout == "hf" else torch.relu
    torch.testing.assert_close(
        lm.double()(IDS), forward(sd, layout, activation), rtol=1e-9, atol=1e-9
    )


def test_nanogpt_with_gelu_and_imported_weights_are_copies():
    sd = foreign("gpt")
    lm = import_foreign(sd, n_head=HEADS, activation="gelu")
    want = forward(sd, "gpt", gelu)
    for value in sd.values():
        value.zero_()
    torch.testing.assert_close(lm.double()(IDS), want, rtol=1e-9, atol=1e-9)


def test_a_model_is_exported_in_the_layout_that_it_came_in():
    """nanoGPT's biased GELU model has the numbers of Hugging Face's, not its layout."""
    sd = foreign("gpt", True)
    lm = import_foreign(sd, n_head=HEADS, activation="gelu")
    back = export_foreign(lm)
    assert back.keys() == sd.keys() and all(torch.equal(back[name], sd[name]) for name in sd)
    again = import_foreign(back, n_head=HEADS, activation="gelu")
    assert again.config == lm.config and torch.equal(again(IDS), lm(IDS))
    theirs = export_foreign(lm, "hf")
    first = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(theirs[first], sd[first].T)
    assert torch.equal(import_foreign(theirs, n_head=HEADS)(IDS), lm(IDS))
    plain = import_foreign(foreign("gpt"), n_head=HEADS, activation="gelu")
    del plain.foreign_layout  # as after a checkpoint of ours
    assert export_foreign(plain).keys() == foreign("gpt").keys()
    refused("bias=False", export_foreign, plain, "hf")
    refused("attention=", export_foreign, plain, "crate")
    refused("choose one of crate, gpt, hf", export_foreign, plain, "onnx")


PREFIXES = [
    "",
    "_orig_mod.",
    "module.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model.",
    "model._orig_mod.",
    "module.model._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_training_checkpoint_with_its_arguments(tmp_path, prefix):
    sd = foreign("crate", True)
    args = dict(
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=D,
        block_size=CONTEXT,
        bias=False,
        vocab_size=VOCAB,
        dropout=0.0,
    )
    extra = {
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}},
        "iter_num": 600000,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out"},
    }
    path = tmp_path / "ckpt.pt"
    wrapped = {prefix + name: value for name, value in sd.items()}
    torch.save({"model": wrapped, "model_args": args, **extra}, path)
    lm, meta = checkpoint.load(path)
    assert meta["tokenizer"]["spec"] is None and meta["config"]["n_head"] == HEADS
    assert not lm.training
    torch.testing.assert_close(lm.double()(IDS), forward(sd, "crate"), rtol=1e-9, atol=1e-9)
    torch.save({"model": sd, "model_args": args}, path)
    assert checkpoint.load(path)[1]["sha256"] == meta["sha256"]  # results are of these weights
    next(iter(sd.values())).view(-1)[0] += 1
    torch.save({"model": sd, "model_args": args}, path)
    assert checkpoint.load(path)[1]["sha256"] != meta["sha256"]


def test_names_of_blocks_that_were_compiled_alone_and_of_two_copies():
    sd = foreign("crate", True)
    blocks = {name.replace(".h.0.", ".h.0._orig_mod."): value for name, value in sd.items()}
    logits = import_foreign(sd, n_head=HEADS)(IDS)
    assert torch.equal(import_foreign(blocks, n_head=HEADS)(IDS), logits)
    copies = {**sd, **{f"module.{name}": value for name, value in sd.items()}}
    assert torch.equal(import_foreign(copies, n_head=HEADS)(IDS), logits)
    copies["module.transformer.ln_f.weight"] = sd["transformer.ln_f.weight"] + 1
    refused("two different tensors for transformer.ln_f.weight", import_foreign, copies)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"state_dict": sd, "hyper_parameters": {"n_head": HEADS}},
        lambda sd: {"model": {"state_dict": sd}, "config": {"n_head": HEADS, "lr": 0.1}},
        lambda sd: {"state_dict": {"model": sd, "model_args": {"n_head": HEADS}}},
        lambda sd: {"module": sd, "epoch": 3, "config": {"num_attention_heads": HEADS}},
        lambda sd: {"model": sd, "config": {"n_head": 1}, "model_args": {"n_head": HEADS}},
    ],
)
def test_dicts_around_a_state_dict_tell_the_heads(wrap):
    sd = foreign("crate", True)
    lm = import_foreign(wrap(sd))
    assert lm.config.n_head == HEADS
    torch.testing.assert_close(lm.double()(IDS), forward(sd, "crate"), rtol=1e-9, atol=1e-9)


def test_what_weights_do_not_show_is_told_or_given_or_noted(tmp_path):
    path = tmp_path / "nano.pt"
    torch.save({"model": foreign("gpt"), "model_args": {"n_head": HEADS}}, path)
    lines = []
    assert checkpoint.load(path, log=lines.append)[0].config.activation == "relu"
    assert len(lines) == 1 and "activation: relu is assumed" in lines[0]
    assert "--activation gelu" in lines[0]
    lm, _ = checkpoint.load(path, log=lines.append, activation="gelu", block_size=4)
    assert (lm.config.activation, lm.config.block_size, len(lines)) == ("gelu", 4, 1)
    want = forward(foreign("gpt"), "gpt", gelu)[:, :4]
    torch.testing.assert_close(lm.double()(IDS[:, :4]), want, rtol=1e-9, atol=1e-9)
    facts = tmp_path / "config.json"
    facts.write_text('{"activation": "gelu", "n_layer": 2}')
    assert checkpoint.load(path, log=lines.append)[0].config.activation == "gelu"
    assert len(lines) == 1
    refused("activation='relu' differs from the 'gelu'", checkpoint.load, path, activation="relu")
    refused("n_head=2 differs from the 3", checkpoint.load, path, n_head=2)
    refused(f"block_size=8 is more than the {CONTEXT} pos", checkpoint.load, path, block_size=8)
    for content, words in (
        ('{"activation": "swish"}', "expected relu or gelu"),
        ('{"n_head": "3"}', "n_head='3'; expected a number"),
        ('{"n_head": true}', "n_head=True; expected a number"),
        ("[1]", "move it away"),
        ("{", "move it away"),
    ):
        facts.write_text(content)
        refused(words, checkpoint.load, path)
    facts.write_text('{"n_head": 2}')
    assert checkpoint.load(path)[0].config.n_head == HEADS  # what the file itself says counts
    torch.save(foreign("crate", True), path)
    facts.write_text(json.dumps({"n_head": HEADS}))
    assert checkpoint.load(path)[0].config.n_head == HEADS
    refused("has no effect", checkpoint.load, path, activation="gelu")


def test_usual_heads_are_assumed_with_a_note_only_where_nothing_tells_them(tmp_path):
    wide = LM(preset("1L", vocab_size=300, block_size=8))
    path = tmp_path / "crate.pt"
    torch.save(export_foreign(wide), path)
    lines = []
    assert checkpoint.load(path, log=lines.append)[0].config.n_head == 4
    assert len(lines) == 1 and "4 are assumed" in lines[0]
    assert checkpoint.load(path, log=lines.append, n_head=8)[0].config.n_head == 8
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    assert checkpoint.load(path, log=lines.append)[0].config.n_head == 2
    assert len(lines) == 1


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [257, 320, 50256, 50257, 50304, 50305])
def test_only_a_vocabulary_of_gpt2s_size_is_taken_for_gpt2s(tmp_path, rows):
    lm = LM(preset("1L", n_embd=8, n_head=2, vocab_size=rows, block_size=4))
    torch.save({"model": export_foreign(lm), "model_args": {"n_head": 2}}, tmp_path / "a.pt")
    _, meta = checkpoint.load(tmp_path / "a.pt")
    if 50257 <= rows <= 50304:
        assert meta["tokenizer"]["spec"] == "gpt2"
        refused("--tokenizer gpt2", checkpoint.open_tokenizer, "a.pt", meta, "bytes")
        return
    refused("does not name its tokenizer", checkpoint.open_tokenizer, "a.pt", meta)
    assert checkpoint.open_tokenizer("a.pt", meta, "bytes").name == "bytes"
    assert meta["tokenizer"]["spec"] == "bytes"  # for whatever opens it next
    if rows < 4096:
        advice = f"FILE:{rows - 1}"
        refused(advice, checkpoint.open_tokenizer, "a.pt", meta, "pydocs:4095")


def test_a_vocabulary_too_small_for_any_tokenizer_is_refused_without_impossible_advice(tmp_path):
    path = tmp_path / "characters.pt"
    torch.save({"model": foreign("gpt"), "model_args": {"n_head": HEADS}}, path)
    refused(f"has {VOCAB} ids, and every tokenizer here has 257", checkpoint.open_model, path)


def test_train_takes_what_import_weights_do_not_tell(tmp_path, capsys):
    path = tmp_path / "nano.pt"
    torch.save({"state_dict": foreign("gpt")}, path)
    init = ["--init", str(path), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    refused("number of heads; give it, as in train.py --n-head 4", parse, init)
    refused(f"has {VOCAB} ids", parse, [*init, "--n-head", "3"])
    lm = LM(preset("1L", "gpt2", n_embd=12, n_head=3, vocab_size=300, block_size=16))
    torch.save(export_foreign(lm), path)
    flags = ["--n-head", "2", "--activation", "gelu", "--block-size", "8"]
    capsys.readouterr()
    s, config, start = parse([*init, *flags])
    assert (config.n_head, config.activation, config.block_size) == (2, "gelu", 8)
    assert len(start["weights"]["positions.weight"]) == 8 and s.tokenizer == "bytes"
    assert capsys.readouterr().out == ""
    refused("--block-size 32 is more than the 16", parse, [*init, *flags, "--block-size", "32"])
    refused("--n-embd 24 differs from the 12", parse, [*init, *flags, "--n-embd", "24"])
    refused("does not name its tokenizer", parse, [*init[:-2], *flags])


# ---- files ---------------------------------------------------------------------------------------


def safetensors(sd):
    """The bytes of a .safetensors file, as its specification defines them."""
    table, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in sd.items():
        raw = t.numpy().tobytes()
        table[name] = {
            "dtype": "F32",
            "shape": [*t.shape],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("stem", ["", "transformer."])
def test_a_hugging_face_folder(tmp_path, kind, stem):
    sd = foreign("hf", True)
    del sd["lm_head.weight"]
    theirs = {stem + name.removeprefix("transformer."): t for name, t in sd.items()}
    mask = torch.ones(1, 1, CONTEXT, CONTEXT).tril()  # in old files
    theirs[stem + "h.0.attn.bias"] = mask
    config = {"model_type": "gpt2", "n_head": HEADS, "n_embd": D}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind.endswith("bin"):
        torch.save(theirs, tmp_path / kind)
    else:
        (tmp_path / kind).write_bytes(safetensors(theirs))
    lm, _ = checkpoint.load(tmp_path)
    want = forward(foreign("hf", True), "hf", gelu)
    torch.testing.assert_close(lm.double()(IDS), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_hugging_face_folder_of_several_parts(tmp_path, suffix, index):
    sd = foreign("hf", True)
    del sd["lm_head.weight"]
    names = sorted(sd)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)]
    weight_map = {}
    for i, file in enumerate(files):
        part = {name: sd[name] for name in names[i::3]}
        weight_map |= dict.fromkeys(part, file)
        if suffix == ".bin":
            torch.save(part, tmp_path / file)
        else:
            (tmp_path / file).write_bytes(safetensors(part))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": HEADS}))
    table = tmp_path / f"{stem}{suffix}.index.json"
    if index:
        table.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    want = forward(sd | {"lm_head.weight": sd["transformer.wte.weight"]}, "hf", gelu)
    for path in [tmp_path, table] if index else [tmp_path]:
        lm, _ = checkpoint.load(path)
        torch.testing.assert_close(lm.double()(IDS), want, rtol=1e-9, atol=1e-9)
    refused("give the folder of all parts", checkpoint.load, tmp_path / files[1])
    if index:
        table.write_text(json.dumps({"weight_map": {**weight_map, "other": files[0]}}))
        refused("names other, which .* lacks", checkpoint.load, tmp_path)
        for content in ({"weight_map": {"a": "../a.bin"}}, {"weight_map": [1]}, [], {}):
            table.write_text(json.dumps(content))
            refused("index.json is damaged", checkpoint.load, tmp_path)
        table.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / files[2]).unlink()
    refused(f"{files[2]} is missing, one of 3 parts", checkpoint.load, tmp_path)


def test_transformers_itself(tmp_path):
    """Against the real library, where the optional extra is installed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=D, n_layer=LAYERS, n_head=HEADS
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = checkpoint.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(IDS), theirs.double()(IDS).logits, rtol=1e-9, atol=1e-9
        )
    sd = theirs.state_dict()
    for name, value in export_foreign(ours).items():
        assert torch.equal(value.double(), sd[name]), name


def test_half_precision_files_become_float32():
    half = {name: value.half() for name, value in foreign("gpt").items()}
    lm = import_foreign(half, n_head=HEADS)
    assert {w.dtype for w in lm.parameters()} == {torch.float32}


def test_what_cannot_be_imported_is_refused():
    crate, gpt = foreign("crate", True), foreign("gpt")
    first = "transformer.h.0."
    refused("number of heads", import_foreign, gpt)
    refused("does not divide", import_foreign, gpt, n_head=5)
    for match, sd in (
        ("untied head", {**gpt, "lm_head.weight": gpt["lm_head.weight"] + 1}),
        ("crate_overcomplete", {**crate, first + "ista.weight": torch.zeros(D, D)}),
        ("mlp.extra", {**gpt, first + "mlp.extra": torch.zeros(1)}),
    ):
        refused(match, import_foreign, sd, n_head=HEADS)
    refused("is not a CRATE-LM", import_foreign, {"some.weight": torch.zeros(1)})
    refused("no state_dict", import_foreign, {"model": [1], "model_args": {}})
    refused("no state_dict", import_foreign, {"model": {"a": 1}})
    for name in (first + "ln_1.weight", first + "mlp.c_proj.weight", "transformer.ln_f.weight"):
        match = f"{name} of shape"
        missing = {key: value for key, value in gpt.items() if key != name}
        refused(match, import_foreign, missing, n_head=HEADS)
        refused(match, import_foreign, {**gpt, name: torch.zeros(2, 3)}, n_head=HEADS)


OTHER_MODELS = {
    "model_type": "opt",
    "activation_function": "silu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_by_inverse_layer_idx": True,
}


def test_other_models_of_hugging_face_are_refused_by_what_differs(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(foreign("hf", True)))
    for name, value in (*OTHER_MODELS.items(), *((name, [1]) for name in OTHER_MODELS)):
        facts = {"model_type": "gpt2", "n_head": HEADS, name: value}
        (tmp_path / "config.json").write_text(json.dumps(facts))
        refused(name, checkpoint.load, tmp_path)
    (tmp_path / "config.json").unlink()
    refused("Cannot read", checkpoint.load, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(residual=True),
        dict(separate_decoder=True),
        dict(learned_lam=True),
        dict(unit_norm=True),
        dict(query_rank=2),
        dict(key_shift=True),
        dict(top_k=3),
        dict(debias=True),
        dict(eta=0.2),
        dict(lam=0.2),
        dict(ista_steps=3),
        dict(expansion=2),
        dict(attention="mhsa"),
        dict(bias=False),
    ],
)
def test_variants_have_no_foreign_form(change):
    lm = LM(preset("1L", n_embd=D, n_head=HEADS, vocab_size=VOCAB, block_size=CONTEXT, **change))
    refused(next(iter(change)), export_foreign, lm)


class Code:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_files_that_would_run_code_or_hold_something_else(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save({"model": foreign("gpt"), "extra": Code()}, path)
    refused("run code", checkpoint.load, path)
    for content in ([1, 2], torch.zeros(3), 5):
        torch.save(content, path)
        refused("expected a dict", checkpoint.load, path)
    path.write_bytes(b"")
    refused("damaged", checkpoint.load, path)
    refused("No such file", import_foreign, tmp_path / "nowhere.pt")
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    torch.save({"model": foreign("crate", True), "model_args": {"n_head": HEADS}}, folder / "a.pt")
    torch.save(foreign("gpt"), folder / "b.pt", _use_new_zipfile_serialization=False)
    (folder / "c.safetensors").write_bytes(safetensors(foreign("hf", True)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(
    name=st.sampled_from(["a.pt", "b.pt", "c.safetensors"]),
    seed=st.integers(0, 2**32),
    flips=st.integers(0, 20),
    cut=st.booleans(),
    head=st.booleans(),
)
def test_damaged_files_never_give_a_traceback(
    files, tmp_path_factory, name, seed, flips, cut, head
):
    draw, data = random.Random(seed), bytearray(files[name])
    # The first kilobyte holds the structure, the rest is mostly numbers.
    size = min(len(data), 1000) if head else len(data)
    for _ in range(flips):
        data[draw.randrange(size)] = draw.randrange(256)
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(data[: draw.randrange(len(data))] if cut else data)
    try:
        assert isinstance(import_foreign(path, n_head=HEADS), LM)
    except UserError as error:
        assert "\n" not in str(error)
