"""Sources of text: each format gives back what was written, each broken file one sentence."""

import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from forked import start_script
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.data import formats, pydocs, sources
from crate_mini.data.formats import END, Position
from crate_mini.data.sources import describe, documents, pretokenized
from crate_mini.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    "First document.\nTwo lines.",
    "Zweites: äöü, 中文, 🙂.",
    "  indented, kept\n\n\nwith its blank lines",
    "x",
]


def write(path: Path, docs=DOCS) -> str:
    """Write documents in the format that the name of `path` asks for; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": [*range(len(docs))], "text": docs})
        parquet.write_table(table, path, row_group_size=2)
        return str(path)
    if ".jsonl" in path.suffixes:
        lines = [json.dumps({"meta": {"set": 1}, "text": doc}) + "\n" for doc in docs]
        text = "".join(lines)
    else:
        text = f"\n{END}\n".join(docs)
    path.write_bytes(compress(text.encode(), path.suffix))
    return str(path)


def compress(data: bytes, suffix: str) -> bytes:
    """`data`, compressed if the suffix is that of a compressed file."""
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix, bytes)(data)


KINDS = (".txt", ".md", ".jsonl")
FORMATS = [kind + packing for kind in KINDS for packing in ("", ".gz", ".xz", ".zst")]


@pytest.mark.parametrize("suffix", FORMATS + [".parquet", ".unknown"])
def test_every_format_gives_back_its_documents_and_its_position(tmp_path, suffix):
    source = write(tmp_path / f"corpus{suffix}")
    position = Position()
    assert list(documents(source, position)) == DOCS
    assert position.done == position.total == os.path.getsize(source)


def test_a_folder_is_all_its_files_in_order(tmp_path):
    write(tmp_path / "b" / "2.jsonl.xz", ["two", "three"])
    write(tmp_path / "a" / "1.txt", ["one"])
    write(tmp_path / "c.md", ["four"])
    write(tmp_path / ".git" / "hidden.md", ["never"])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    position = Position()
    assert list(documents(str(tmp_path), position)) == ["one", "two", "three", "four"]
    assert position.done == position.total


def test_line_ends_byte_order_marks_and_empty_documents(tmp_path):
    text = tmp_path / "windows.txt"
    text.write_bytes(f"\ufeffone\r\ntwo\r\n{END}\r\n\ufeffthree\r\n{END} \r\n \n".encode())
    assert list(documents(str(text))) == ["one\ntwo", "three"]
    rows = tmp_path / "windows.jsonl"
    rows.write_bytes('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n'.encode())
    assert list(documents(str(rows))) == ["one", "two"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30)),
    st.integers(1, 40),
)
@example(["a" * 20, "b"], 3)
def test_pieces_do_not_depend_on_where_chunks_end(texts, size):
    text = END.join(texts)
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(formats.pieces(chunks, END)) == text.split(END)
    pieces = list(formats.pieces(chunks, END, longest=10))
    assert "".join(pieces) == text.replace(END, "")
    assert max(map(len, pieces)) <= 10 + len(END) + size


def test_long_running_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONG", 1000)
    monkeypatch.setattr(formats, "CHUNK", 64)
    text = "\n".join(f"line {i} with some words" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    pieces = list(documents(str(tmp_path / "book.txt")))
    assert len(pieces) > 10
    assert "\n".join(pieces) == text


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude42"}')
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["a \ufffd b 🙂"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_streams_end_to_end_are_one_text_and_a_cut_one_is_refused(tmp_path, suffix):
    text = " ".join(hashlib.sha256(str(i).encode()).hexdigest() for i in range(3000))
    whole = compress(text.encode(), suffix)
    two = tmp_path / f"two.txt{suffix}"
    two.write_bytes(whole + compress(b" and more", suffix))
    assert list(documents(str(two))) == [text + " and more"]
    for share in (0.999, 0.5, 0):
        cut = tmp_path / f"cut.txt{suffix}"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="cut.txt.*cannot be read|cut.txt.*ends too early"):
            list(documents(str(cut)))


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("zero.txt", b"abc\0def", "binary"),
        ("latin.txt", "grün".encode("latin-1"), "UTF-8"),
        ("half.txt", "grün".encode()[:3], "UTF-8"),
        ("plain.jsonl", b'{"text": "fine"}\nnot json\n', "line 2 is not JSON"),
        ("other.jsonl", b'\n{"text": "fine"}\n{"content": "x"}\n', 'line 3 has no field "text"'),
        ("number.jsonl", b'{"text": 5}', 'line 1 has no field "text"'),
        ("list.jsonl", b'["text"]', 'line 1 has no field "text"'),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("fake.txt.gz", b"this is not gzip", "cannot be read"),
        ("fake.txt.xz", b"this is not xz", "cannot be read"),
    ],
)
def test_the_error_for_a_bad_file_is_one_sentence_with_its_name(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(documents(str(tmp_path / name)))
    message = str(caught.value)
    assert name in message and words in message and "\n" not in message


def read_all(source):
    return [text.encode() for text in documents(source)]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "nowhere.txt",
        "no/such/folder",
        "a\0b",
        "x" * 5000,
        "pydoc",
        "pile:many",
        "pile:" + "9" * 5000,
    ],
)
def test_a_source_that_does_not_exist_is_refused(source):
    for function in (describe, pretokenized, read_all):
        with pytest.raises(UserError):
            function(source)


def test_pipes_and_devices_are_refused_without_reading(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes here")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source in (str(pipe), "/dev/zero", "/dev/null"):
        for function in (describe, pretokenized, read_all):
            with pytest.raises(UserError, match=f"{source} is a pipe or a device"):
                function(source)
        with pytest.raises(UserError, match="is not a file"):
            load_tokenizer(source)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_padding_after_compressed_text_is_no_damage(tmp_path, suffix):
    packed = tmp_path / f"a.txt{suffix}"
    first, second = compress(b"one ", suffix), compress(b"two", suffix)
    packed.write_bytes(first + b"\0" * 10_000 + second + b"\0" * 8)
    assert list(documents(str(packed))) == ["one two"]
    packed.write_bytes(first + b"\0" * 8 + b"garbage")
    with pytest.raises(UserError, match="cannot be read"):
        list(documents(str(packed)))


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.html").write_text("<p>x</p>")
    (tmp_path / "packed.bin.gz").write_text("token files are mapped, not decompressed")
    with pytest.raises(UserError, match="holds no file of a known kind"):
        list(documents(str(tmp_path)))


def test_descriptions_tell_sources_apart(tmp_path):
    source = write(tmp_path / "a.txt")
    before = describe(source)
    assert before == describe(source)
    assert json.loads(json.dumps(before)) == before
    assert str(tmp_path) not in json.dumps(before)
    write(tmp_path / "a.txt", DOCS + ["more"])
    assert describe(source) != before
    assert describe("pile:5") != describe("pile") != describe("pile-train")
    assert describe("pydocs")["python"] in sys.version


@pytest.mark.parametrize(
    "module, name",
    [("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet"), ("datasets", None)],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    source = "tinystories"
    if name:
        source = str(tmp_path / name)
        Path(source).write_bytes(b"x")
    with pytest.raises(UserError, match=r"pip install -e .\.\["):
        list(documents(source))


@pytest.mark.parametrize("content", [{"body": ["x"], "title": ["y"]}, {"text": [1, 2]}])
def test_parquet_without_text_is_refused(tmp_path, content):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='a.parquet.*no field "text"'):
        list(documents(str(tmp_path / "a.parquet")))


def test_a_parquet_file_with_checksums_shows_every_changed_byte(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    docs = [f"document {i} of the file" for i in range(40)]
    plain = dict(use_dictionary=False, compression="none", write_statistics=False)
    table = pyarrow.table({"text": docs})
    parquet.write_table(table, path, write_page_checksum=True, **plain)
    content = path.read_bytes()
    assert list(documents(str(path))) == docs
    places = range(content.index(b"document 1 "), content.index(b"document 9 "), 7)
    assert len(places) > 20
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match="a.parquet cannot be read"):
            list(documents(str(path)))


# ---- the hub, played by a folder of the same layout ----------------------------------------------

LAYOUT = {
    "tinystories": "TinyStoriesV2-GPT4-train.txt",
    "pile": "val.jsonl.zst",
    "pile-train": "train/00.jsonl.zst",
    "fineweb-edu": "sample/10BT/000_00000.parquet",
    "openwebtext": "plain_text/train-00000-of-00080.parquet",
}


@pytest.mark.parametrize("name", sources.NAMED)
def test_named_corpora_from_files_of_the_same_layout(tmp_path, monkeypatch, name):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "HUB", f"{tmp_path}/")
    repository = "/".join(sources.NAMED[name][1].split("/")[:2])
    docs = [*DOCS[:2], "A longer story.\n\nWith two paragraphs.", "last"]
    write(tmp_path / repository / LAYOUT[name], docs)
    assert list(documents(name)) == docs
    position = Position()
    assert list(documents(f"{name}:2", position)) == docs[:2]
    assert (position.done, position.total) == (2, 2)


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "HUB", f"{tmp_path}/nothing/")
    with pytest.raises(UserError, match="pile from the hub .*finished parts are kept"):
        list(documents("pile"))


# ---- files that hold token ids already -----------------------------------------------------------


def header(magic=20240520, version=1, count=4) -> bytes:
    numbers = [n.to_bytes(4, "little") for n in (magic, version, count)]
    return b"".join(numbers).ljust(1024, b"\0")


def test_pretokenized_files_are_bare_or_have_a_header(tmp_path):
    bare = tmp_path / "bare.bin"
    bare.write_bytes(b"\1\0" * 6)
    head = tmp_path / "head.bin"
    head.write_bytes(header() + b"\2\0" * 4)
    wide = tmp_path / "wide.bin"
    wide.write_bytes(header(20240801, 7) + b"\2\0\0\0" * 4)
    expected = [(bare, 0, 6, "<u2"), (head, 1024, 4, "<u2"), (wide, 1024, 4, "<u4")]
    assert pretokenized(str(tmp_path)) == expected
    text = write(tmp_path / "text" / "a.txt")
    assert pretokenized("pydocs") == pretokenized("pile:3") == pretokenized(text) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"odd",
        header(),
        header(count=5) + b"\2\0" * 4,
        header()[:12],
        header(20240801, 7) + b"\2\0" * 4,
    ],
)
def test_bin_files_without_tokens_are_refused(tmp_path, data):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError, match="a.bin .* does not hold uint16 token ids"):
        pretokenized(str(tmp_path))


@pytest.mark.parametrize("magic, version", [(20240520, 2), (20240801, 1), (20240522, 1)])
def test_headers_of_llm_c_that_mark_something_else_are_refused(tmp_path, magic, version):
    (tmp_path / "a.bin").write_bytes(header(magic, version) + b"\2\0" * 4)
    with pytest.raises(UserError, match=f"a.bin begins with {magic}, {version}"):
        pretokenized(str(tmp_path))


def test_of_a_nanogpt_folder_the_token_files_are_read_and_the_rest_is_named(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\1\0")
    (tmp_path / "meta.pkl").write_bytes(b"a pickle that must not be opened")
    (tmp_path / "prepare.py").write_text("raise SystemExit")
    write(tmp_path / "input.txt")
    write(tmp_path / "readme.md")
    assert [file.path.name for file in pretokenized(str(tmp_path))] == ["train.bin"]
    first, second = sources.notes(str(tmp_path))
    assert "left out input.txt, meta.pkl, prepare.py and 1 more" in first
    assert "meta.pkl" in second and "not opened" in second


# ---- fuzzing: whatever lies in a file, only UserError or text comes out --------------------------

SUFFIXES = st.sampled_from(FORMATS + [".parquet", ".bin", "", ".json", ".tar.gz"])


@settings(max_examples=300, deadline=None)
@given(SUFFIXES, st.binary(max_size=300), st.booleans(), st.randoms(use_true_random=False))
def test_any_bytes_under_any_name(suffix, data, plausible, random):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzz{suffix}"
        if plausible:  # a good file with some bytes changed: gets past the first check
            try:
                write(path)
            except pytest.skip.Exception:
                return
            changed = bytearray(path.read_bytes())
            for byte in data[:3]:
                changed[random.randrange(len(changed))] = byte
            data = bytes(changed)
        path.write_bytes(data)
        for function in (describe, pretokenized, read_all):
            try:
                function(str(path))
            except UserError as error:
                assert "\n" not in str(error)


# ---- pydocs --------------------------------------------------------------------------------------


HASH_PYDOCS = """
import hashlib, sys
from crate_mini.data.sources import documents
text = "\\0".join(documents("pydocs"))
print(hashlib.sha256(text.encode()).hexdigest(), "smtplib" in sys.modules)
"""


@pytest.fixture(scope="module")
def other_process():
    """Another Python, which prints the hash of its pydocs and whether it imported a module."""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    process = start_script(["-c", HASH_PYDOCS], ROOT, environment, fresh=True)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def python_docs(other_process):
    return list(documents("pydocs"))  # takes seconds, in which the other process works too


def test_pydocs_is_english_of_the_expected_size(python_docs):
    assert 1e6 < sum(len(text.encode()) for text in python_docs) < 6e6
    assert len(python_docs) > 300
    assert any(text.startswith("json\n\nJSON (JavaScript Object Notation)") for text in python_docs)
    assert any('The "assert" statement' in text for text in python_docs)
    assert not any(text.startswith(("test.", "site-packages.")) for text in python_docs)


def test_pydocs_repeats_no_paragraph(python_docs):
    seen = set()
    for text in python_docs:
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            assert len(key) < 40 or key not in seen, key
            seen.add(key)


def test_pydocs_is_the_same_in_every_process_and_imports_nothing_it_reads(
    python_docs, other_process
):
    stdout, stderr = other_process.communicate(timeout=300)
    expected = hashlib.sha256("\0".join(python_docs).encode()).hexdigest()
    assert stdout.split() == [expected, "False"], stderr
    assert stderr == ""


def test_docstrings_in_source_order_and_those_of_c_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    """Method."""\n'
        'add_docstr(A.g, r"""\n    A function that is written in C, explained here.\n""")\n'
        'def h():\n  """Last \\d."""\nadd_newdoc("numpy", "short")\nx = """no docstring"""\n'
    )
    assert pydocs.docstrings(path) == [
        "Module.",
        "Class.",
        "Method.",
        "A function that is written in C, explained here.",
        "Last \\d.",
    ]
    path.write_text("print 'Python 2'")
    assert pydocs.docstrings(path) == []


def test_a_python_without_documentation_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="without its documentation"):
        next(documents("pydocs"))
