"""The study of a GPU, where there is none: small stages on the CPU, and what is kept."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from crate_mini import UserError, fused
from crate_mini.console import results
from crate_mini.studies import __main__ as studies
from crate_mini.studies import benchmarks, expected, gpu

CPU = torch.device("cpu")
SIZES = {"tokens": (64,), "widths": (32,)}
TINY = {"vocab_size": 97, "block_size": 16, "n_embd": 32, "n_head": 2}
built = pytest.mark.skipif(not fused._C, reason="no compiled extension")


# ---- the stages ----------------------------------------------------------------------------------


def test_floors_name_what_binds():
    top, *rows = gpu.floors(CPU, **SIZES)
    assert top["name"] == "ceilings" and top["tflops"] > 0 and top["tb_s"] > 0
    assert [row["name"] for row in rows] == [
        "ista 64x32 forward",
        "ista 64x32 both",
        "mssa 64x32 forward",
        "mssa 64x32 both",
    ]
    for row in rows:
        products_bind = row["ms_of_products"] > row["ms_of_bytes"]
        assert row["binds"] == ("products" if products_bind else "bytes")
        assert row["ms_of_products"] == pytest.approx(row["operations"] / top["tflops"] / 1e9)
    assert rows[1]["operations"] == 12 * 2 * 64 * 32 * 128  # of an ISTA block: twelve products


@built
def test_kernels_decode_and_agreement():
    rows = list(gpu.kernels(CPU, None, **SIZES))
    assert len(rows) == 4
    for row in rows:
        assert set(row["ms"]) == {"fused", "eager", "compile", "products"}
    assert len(list(gpu.decode(CPU, (32,)))) == 3
    [row] = gpu.agree(CPU, 5, 2, **TINY)
    assert row["first"][0] > 4 and 0 <= row["largest_difference"] < 0.05
    assert row["largest_difference"] >= abs(row["last"][0] - row["last"][1])


@built
def test_steps_of_all_contestants(monkeypatch):
    backends = []
    use_backend = benchmarks.ops.use_backend

    def recorded(name):
        backends.append(name)
        return use_backend(name)

    monkeypatch.setattr(benchmarks.ops, "use_backend", recorded)
    [row] = gpu.steps(CPU, ("1L",), 2, compile=False, **TINY)
    assert set(row["tokens_per_s"]) == {"fused", "eager", "gpt2"}
    assert set(backends) == {"fused", "reference"}
    assert row["tokens_per_s"]["gpt2"] == pytest.approx(1e3 * 32 / row["ms"]["gpt2"]["median"])


# ---- machine code --------------------------------------------------------------------------------


def test_instructions_are_counted_by_kernel():
    text = """
        Function : _ZN10crate_mini1aEv
        /*0000*/  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0010*/  LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/  @P1 STG.E.U16 desc[UR6][R36.64], R18 ;
        /*0030*/  STG.E.128 desc[UR6][R36.64], R18 ;
        /*0040*/  STL [R1], R4 ;
        Function : _ZN10crate_mini1bEv
        /*0000*/  LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        /*0000*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
    """
    first = {"HMMA": 1, "LDG.E.128": 1, "STG.E.U16": 1, "STG.E.128": 1, "STL": 1}
    second = {"LDGSTS.E.BYPASS.128": 1, "HGMMA": 1}
    assert gpu.instructions(text) == [
        ("_ZN10crate_mini1aEv", first),
        ("_ZN10crate_mini1bEv", second),
    ]


def test_resources_are_those_of_the_kernel():
    text = """
 Function _Z1av:
  REG:37 STACK:0 SHARED:1024 LOCAL:8 CONSTANT[0]:617 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1bv:
  REG:25 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert gpu.resources(text) == {
        "_Z1av": {"registers": 37, "stack": 0, "shared": 1024, "local": 8},
        "_Z1bv": {"registers": 25, "stack": 16, "shared": 0, "local": 0},
    }


@built
def test_the_shipped_tensor_core_kernels_spill_nothing_and_store_16_bytes():
    try:
        rows = [row for row in gpu.code(CPU) if "product_v3" in row["name"]]
        rows = [row for row in rows if row["arch"] != "sm_75"]  # where it is empty
    except UserError as error:
        pytest.skip(str(error))
    if not rows:
        pytest.skip("no CUDA kernels in this build")
    for row in rows:
        assert row["HMMA"] >= 16 and row["STG.E.128"] >= 1 and row["LDGSTS.E.BYPASS.128"] >= 2, row
        assert not {"LDL", "STL"} & set(row) and row["stack"] == row["local"] == 0, row
        assert 0 < row["registers"] <= 65536 / (2 * 256), row  # so that two blocks of 256 fit


def test_the_report_on_spills_is_that_of_all_architectures_we_build():
    """In results/sass.json, and in the line that sums it up."""
    file = json.loads((results.ROOT / "results" / "sass.json").read_text())
    rows = file["stages"]["code"]["rows"]
    [default] = re.findall('^ARCHS = "(.*)"', (results.ROOT / "setup.py").read_text(), re.M)
    archs = [f"sm_{arch}" for arch in default.split()]
    assert {row["arch"] for row in rows} == set(archs)
    for row in rows:
        assert row["stack"] == row["local"] == 0 and not {"LDL", "STL"} & set(row), row
    report = " ".join((results.ROOT / "results" / "README.md").read_text().split())
    named = f"{', '.join(archs[:-1])} and {archs[-1]}"
    assert f"The CUDA files compile for {named}: no kernel spills" in report
    assert f"`sass.json`, commit {file['machine']['commit']}" in report


def test_without_an_extension_there_is_no_code_to_count(monkeypatch):
    monkeypatch.setattr(fused, "_C", None)
    with pytest.raises(UserError, match="no compiled extension to look into"):
        list(gpu.code(CPU))


# ---- what is expected, how long it takes, where it is kept ---------------------------------------


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("NVIDIA A100-SXM4-80GB", 170e3, 230e3),
        ("NVIDIA H200", 430e3, 620e3),
        ("NVIDIA GeForce RTX 4090", 110e3, 160e3),
        ("Tesla T4", 28e3, 38e3),
    ],
)
def test_what_a_card_should_reach_is_written_down_before_it_runs(name, low, high):
    rows = {row["name"]: row for row in expected.expectations(name)}
    rates = rows["S 16x1024"]["tokens_per_s"]
    assert low < rates["crate"] < high
    assert 1.1 < rates["gpt2"] / rates["crate"] < 1.3, "the twin does fewer operations"
    assert rows["B 16x1024"]["tokens_per_s"]["crate"] < rates["crate"]
    wide, narrow = (rows[f"ista 65536x{d} both"]["compile_over_fused"] for d in (768, 128))
    assert max(wide) < 1 <= min(narrow)


def test_the_readme_weighs_the_heads_bytes_against_those_in_place():
    """bf16 logits less their maximum are rounded again, by less than a step of bf16 each."""
    text = " ".join((results.ROOT / "README.md").read_text().split())
    assert f"moves {expected.LOGIT} bytes per logit" in text
    assert f"in bf16, would move {expected.LOGIT_IN_PLACE}, but round every logit twice" in text
    logits = torch.randn(4, 99, generator=torch.Generator().manual_seed(0)).mul(5).bfloat16()
    assert torch.logsumexp(logits, -1).dtype == torch.bfloat16, "PyTorch sums in float32 now"
    in_place = logits - logits.amax(-1, keepdim=True)
    exact = logits.double() - logits.double().amax(-1, keepdim=True)
    assert not torch.equal(in_place.double(), exact)
    assert (in_place.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_the_readme_has_what_is_expected():
    """The table of cards, and the kernel's chances at each width."""
    text = (results.ROOT / "README.md").read_text(encoding="utf-8")
    cards = re.findall(r"^\| ([A-Z0-9 ]+?)(?: \(float16\))? \| ([\d |]+) \|$", text, re.M)
    assert [name for name, _ in cards] == ["H200", "H100", "A100", "RTX 4090", "T4"]
    for name, cells in cards:
        S, B, *_ = expected.expectations(name)
        rates = [rate for row in (S, B) for rate in row["tokens_per_s"].values()]
        assert cells == " | ".join(str(round(rate / 1000)) for rate in rates)
    paragraph = text.split("Our CUDA kernel of ISTA")[1].split("therefore `auto`")[0]
    for d, (low, high) in expected.KERNELS.items():
        assert str(d) in paragraph and f"{low} to {high}" in paragraph


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L40S", "RTX 4090 Laptop GPU", "T400"])
def test_an_unknown_card_gets_no_rates(name):
    rows = expected.expectations(name)
    assert rows and not any("tokens_per_s" in row for row in rows)


def test_few_shapes_are_measured_largest_first_against_the_best_compiler(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        benchmarks, "problem", lambda op, N, d, dtype, device: shapes.append((N, d))
    )
    list(gpu.problems(CPU))
    assert shapes == 2 * [(65536, 768), (65536, 128), (8192, 768), (8192, 128)]
    monkeypatch.setattr(gpu, "problems", lambda device: [("a", 1, 1, problem)])
    modes = []
    problem = SimpleNamespace(cases=lambda name, mode: modes.append(mode) or [])
    list(gpu.kernels(CPU))
    assert modes == ["max-autotune-no-cudagraphs"]


def test_the_default_stages_fit_into_fifteen_minutes_by_their_limits():
    assert sum(map(gpu.most_seconds, gpu.IN_15_MINUTES)) <= 15 * 60
    assert gpu.account(["build", "sanitize"]) == (
        "limits    build 200 s, sanitize 1200 s; at most 23:20 minutes"
    )
    assert gpu.Settings().stages == gpu.IN_15_MINUTES
    first = "build", "tests", "steps", "agree"
    assert gpu.IN_15_MINUTES[:4] == first and "kernels" in gpu.IN_15_MINUTES
    assert "--hypothesis-profile=brief" in gpu.PYTEST


@pytest.mark.parametrize(
    "device, folder",
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx-3060-laptop-gpu"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_lie_in_a_folder_of_the_card(device, folder):
    path = gpu.default_path(("build",), {"device": device, "commit": "1a2b+"})
    assert path.parent.name == folder and path.name == "1a2b.json"


def test_tools_are_looked_for_in_the_toolkit_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.tool("cuobjdump-of-a-test") is None
    program = tmp_path / "bin" / "cuobjdump-of-a-test"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert gpu.tool("cuobjdump-of-a-test") == str(program)


@pytest.mark.parametrize("capability, name", [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")])
def test_the_study_builds_for_the_card_at_hand(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu.architecture() == name


# ---- running stages ------------------------------------------------------------------------------


def python(script):
    return sys.executable, "-c", script


def test_failures_are_kept_and_the_next_stage_runs(tmp_path, monkeypatch):
    slow = python("import time; print('slow', flush=True); time.sleep(60)")
    commands = {
        "build": [python("print('this far'); raise SystemExit(3)")],
        "tests": [slow, ("no-such-program",)],
        "floors": [python("print('fine')")],
    }
    monkeypatch.setattr(gpu, "COMMANDS", commands)
    monkeypatch.setitem(gpu.LIMITS, "tests", 2)
    path = tmp_path / "results.json"
    assert gpu.run_stages(["build", "tests", "floors"], path, {"device": "none"}) == 1
    stages = json.loads(path.read_text())["stages"]
    codes = {name: [run["code"] for run in stage["runs"]] for name, stage in stages.items()}
    assert codes["build"] == [3] and codes["floors"] == [0] and codes["tests"][0] is None
    assert "No such file" in codes["tests"][1]
    assert stages["build"]["runs"][0]["tail"] == ["this far"]
    assert stages["tests"]["runs"][0]["tail"] == ["slow"]
    assert stages["build"]["runs"][0]["command"].startswith("python -c")


def test_a_later_call_adds_to_what_the_same_commit_found(tmp_path, monkeypatch):
    commands = {
        "build": [python("raise SystemExit(1)")],
        "tests": [python("raise SystemExit(0)")],
    }
    monkeypatch.setattr(gpu, "COMMANDS", commands)
    path, machine = tmp_path / "results.json", {"device": "none", "commit": "a"}
    assert gpu.run_stages(["build"], path, machine) == 1
    assert gpu.run_stages(["tests"], path, machine) == 0  # of its own stages, not the earlier
    file = json.loads(path.read_text())
    assert list(file["stages"]) == ["build", "tests"]
    assert file["command"] == "python -m crate_mini.studies gpu build tests"
    for commit in ("b", "b+", "unknown"):  # the last two do not tell which source it was
        for name in ("build", "tests"):
            gpu.run_stages([name], path, {**machine, "commit": commit})
        only_the_last = list(json.loads(path.read_text())["stages"]) == ["tests"]
        assert only_the_last == (commit != "b")
    path.write_text("half a fi")
    assert gpu.run_stages(["tests"], path, machine) == 0


@built
def test_a_measuring_stage_is_a_process_of_its_own():
    outcome = gpu.run_stage("code")
    [run] = outcome["runs"]
    assert run["command"] == "python -m crate_mini.studies gpu --only code"
    if run["code"]:
        assert run["code"] == 2 and "cuobjdump and nvdisasm are missing" in run["tail"][-1]
    measured = run["code"] == 0 and fused._C.build_info()["cuda"]
    assert bool(outcome["rows"]) == measured


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    def rows(device):
        yield {"name": "one"}
        raise RuntimeError("the card is gone")

    monkeypatch.setitem(gpu.MEASURES, "code", rows)
    with pytest.raises(RuntimeError):
        gpu.measure("code", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"name": "one"}]


@pytest.mark.parametrize(
    "words, message",
    [
        (["bild"], "'bild' is unknown (did you mean build?); choose build, tests, steps"),
        (["--only", "build"], "--only 'build' is unknown"),
        (["--only", "code"], "--only code needs --json"),
        (["tests"], "no GPU here"),
    ],
)
def test_bad_words(words, message, monkeypatch):
    if torch.cuda.is_available() and words == ["tests"]:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["studies", "gpu", *words])
    with pytest.raises(UserError) as caught:
        studies.main()
    assert message in str(caught.value)


def test_a_bad_word_is_one_sentence_on_the_command_line():
    command = [sys.executable, "-m", "crate_mini.studies", "gpu", "bild"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=results.ROOT)
    assert done.returncode == 2 and "bild" in done.stderr and done.stderr.count("\n") == 1
