"""The study of a GPU where there is none: its stages small on the CPU, and what becomes of failures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crate_mini import UserError, fused
from crate_mini.studies import gpu as study_gpu
from crate_mini.studies import sass

CPU = torch.device("cpu")
SIZES = {"tokens": (64,), "widths": (32,)}
TINY = {"vocab_size": 97, "block_size": 16, "n_embd": 32, "n_head": 2}
built = pytest.mark.skipif(not fused._C, reason="no compiled extension")


def test_floors_say_what_binds():
    top, *rows = study_gpu.floors(CPU, **SIZES)
    assert top["name"] == "ceilings" and top["tflops"] > 0 and top["tb_s"] > 0
    assert [row["name"] for row in rows] == [
        f"{op} 64x32 {way}" for op in ("ista", "mssa") for way in ("forward", "both")
    ]
    for row in rows:
        assert row["binds"] == (
            "products" if row["ms_of_products"] > row["ms_of_bytes"] else "bytes"
        )
        assert row["ms_of_products"] == pytest.approx(row["operations"] / top["tflops"] / 1e9)
    assert rows[1]["operations"] == 12 * 2 * 64 * 32 * 128  # of an ISTA block: twelve products


@built
def test_kernels_decode_and_agreement():
    rows = list(study_gpu.kernels(CPU, None, **SIZES))
    assert len(rows) == 4 and all(
        set(row["ms"]) == {"fused", "eager", "compile", "products"} for row in rows
    )
    assert len(list(study_gpu.decode(CPU, (32,)))) == 3
    (found,) = study_gpu.agree(CPU, 5, 2, **TINY)
    assert found["first"][0] > 4 and 0 <= found["largest_difference"] < 0.05
    assert found["largest_difference"] >= abs(found["last"][0] - found["last"][1])


@built
def test_steps_of_all_contestants(monkeypatch):
    ran = []
    real = study_gpu.ops.use_backend

    def noted(name):
        ran.append(name)
        return real(name)

    monkeypatch.setattr(study_gpu.bench.ops, "use_backend", noted)
    (row,) = study_gpu.steps(CPU, ("1L",), 2, compile=False, **TINY)
    assert set(row["tokens_per_s"]) == {"fused", "eager", "gpt2"} and set(ran) == {
        "fused",
        "reference",
    }
    assert row["tokens_per_s"]["gpt2"] == pytest.approx(1e3 * 32 / row["ms"]["gpt2"]["median"])


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
    assert sass.instructions(text) == [
        (
            "_ZN10crate_mini1aEv",
            {"HMMA": 1, "LDG.E.128": 1, "STG.E.U16": 1, "STG.E.128": 1, "STL": 1},
        ),
        ("_ZN10crate_mini1bEv", {"LDGSTS.E.BYPASS.128": 1, "HGMMA": 1}),
    ]


def test_resources_are_those_of_the_kernel():
    text = """
 Function _Z1av:
  REG:37 STACK:0 SHARED:1024 LOCAL:8 CONSTANT[0]:617 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1bv:
  REG:25 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert sass.resources(text) == {
        "_Z1av": {"registers": 37, "stack": 0, "shared": 1024, "local": 8},
        "_Z1bv": {"registers": 25, "stack": 16, "shared": 0, "local": 0},
    }


@built
def test_the_shipped_tensor_core_kernels_spill_nothing_and_store_16_bytes():
    try:
        rows = [row for row in study_gpu.code(CPU) if "product_v3" in row["name"]]
    except UserError as error:
        pytest.skip(str(error))
    if not rows:
        pytest.skip("no CUDA kernels in this build")
    for row in rows:
        assert row["HMMA"] >= 16 and row["STG.E.128"] >= 1 and row["LDGSTS.E.BYPASS.128"] >= 2, row
        assert not {"LDL", "STL"} & set(row) and row["stack"] == row["local"] == 0, row
        assert 0 < row["registers"] <= 65536 / (2 * 256), row  # so two blocks of 256 threads fit


def test_failures_are_kept_and_the_next_stage_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study_gpu,
        "COMMANDS",
        {
            "build": [(sys.executable, "-c", "print('came so far'); raise SystemExit(3)")],
            "tests": [
                (sys.executable, "-c", "import time; print('slow', flush=True); time.sleep(60)"),
                ("no-such-program",),
            ],
            "floors": [(sys.executable, "-c", "print('fine')")],
        },
    )
    monkeypatch.setitem(study_gpu.LIMITS, "tests", 2)
    path = tmp_path / "found.json"
    assert study_gpu.all_of(["build", "tests", "floors"], path, {"device": "none"}) == 1
    found = json.loads(path.read_text())["stages"]
    codes = {name: [run["code"] for run in one["runs"]] for name, one in found.items()}
    assert codes["build"] == [3] and codes["floors"] == [0] and codes["tests"][0] is None
    assert "No such file" in codes["tests"][1]
    assert found["build"]["runs"][0]["tail"] == ["came so far"]
    assert found["tests"]["runs"][0]["tail"] == ["slow"]
    assert found["build"]["runs"][0]["command"].startswith("python -c")


def test_a_later_call_adds_to_what_the_same_commit_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study_gpu,
        "COMMANDS",
        {
            name: [(sys.executable, "-c", f"raise SystemExit({code})")]
            for name, code in (("build", 1), ("tests", 0))
        },
    )
    path, here = tmp_path / "found.json", {"device": "none", "commit": "a"}
    assert study_gpu.all_of(["build"], path, here) == 1
    assert study_gpu.all_of(["tests"], path, here) == 0  # its own stages, not those before
    found = json.loads(path.read_text())
    assert list(found["stages"]) == ["build", "tests"] and found["command"].endswith(
        "study_gpu build tests"
    )
    for commit in ("b", "b+", "unknown"):  # the last two do not say which source it was
        for name in ("build", "tests"):
            study_gpu.all_of([name], path, {**here, "commit": commit})
        assert (list(json.loads(path.read_text())["stages"]) == ["tests"]) == (commit != "b")
    path.write_text("half a fi")
    assert study_gpu.all_of(["tests"], path, here) == 0


def test_without_an_extension_there_is_no_code_to_count(monkeypatch):
    monkeypatch.setattr(fused, "_C", None)
    with pytest.raises(UserError, match="there is no compiled extension to look into"):
        list(study_gpu.code(CPU))


@built
def test_a_measuring_stage_is_a_process_of_its_own():
    (found,) = (one := study_gpu.stage("code"))["runs"]
    assert found["command"] == "python -m crate_mini.studies.gpu --only code"
    if found["code"]:
        assert found["code"] == 2 and "cuobjdump and nvdisasm are not there" in found["tail"][-1]
    assert bool(one["rows"]) == (found["code"] == 0 and fused._C.build_info()["cuda"])


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    def rows(device):
        yield {"name": "one"}
        raise RuntimeError("the card is gone")

    monkeypatch.setitem(study_gpu.MEASURES, "code", rows)
    with pytest.raises(RuntimeError):
        study_gpu.only("code", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"name": "one"}]


@pytest.mark.parametrize(
    "words, said",
    [
        (("bild",), "unknown stages in 'bild'; choose some of build"),
        (("--only", "build"), "unknown stages"),
        (("tests",), "there is no GPU here"),
    ],
)
def test_bad_words(words, said):
    if torch.cuda.is_available() and words == ("tests",):
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "crate_mini.studies.gpu", *words],
        capture_output=True,
        text=True,
        cwd=Path(study_gpu.__file__).parents[2],
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
