"""Safetensors files whose tables of contents lie: each is refused in one sentence."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.export import safetensors
from crate_mini.training import foreign_files

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def file_of(header, data, length=None):
    """The bytes of a file with this header, a dict or its text."""
    text = header if isinstance(header, str) else json.dumps(header)
    text = text.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^\S+ is damaged, truncated or not a checkpoint; \S+"):
        foreign_files.read(path)


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}


def test_the_sound_file_is_read_in_any_order_of_its_names(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in (TWO, dict(reversed(TWO.items())), {"__metadata__": {"a": "b"}, **TWO}):
        path.write_bytes(file_of(header, bytes(range(12))))
        content, _ = foreign_files.read(path)
        assert content["b"].tolist() == [8, 9, 10, 11] and content["a"].shape == (2,)
    path.write_bytes(file_of({}, b""))
    assert foreign_files.read(path) == ({}, {})


@pytest.mark.parametrize(
    "b",
    [
        entry("U8", [4], 4, 8),  # overlaps a
        entry("U8", [4], 7, 11),
        entry("U8", [3], 9, 12),  # leaves a hole
        entry("U8", [3], 8, 11),  # leaves the end
        entry("U8", [5], 8, 13),  # beyond the end
        entry("U8", [2, 3], 8, 12),  # of another shape
        entry("F16", [4], 8, 12),  # of another type
        entry("U8", [-2, -2], 8, 12),
        entry("U8", [True, 4], 8, 12),
        entry("U8", [4.0], 8, 12),
        entry("U8", ["4"], 8, 12),
        entry("U8", 4, 8, 12),
        entry("U8", [4], 12, 8),
        entry("U8", [4], 8.0, 12.0),
        entry("U8", [4], -4, 0),
        entry("U8", [2**62, 4], 8, 12),
        entry("C64", [4], 8, 12),
        entry(["U8"], [4], 8, 12),
        {"dtype": "U8", "shape": [4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [8]},
        {"dtype": "U8", "shape": [4], "data_offsets": None},
        [],
        None,
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_the_data_is_refused(tmp_path, b):
    assert_refused(tmp_path / "model.safetensors", file_of({**TWO, "b": b}, bytes(12)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02",
        file_of("[]", b""),
        file_of("7", b""),
        file_of('{"a": ' * 100_000, b""),
        file_of(TWO, bytes(12), length=2**63),
        file_of(TWO, bytes(12), length=foreign_files.MAX_SAFETENSORS_HEADER + 1),
        file_of(TWO, bytes(12), length=10_000),
        file_of(TWO, bytes(12), length=0),
        file_of(TWO, bytes(13)),
        file_of(TWO, bytes(11)),
        file_of('{"a": {}, "a": {}}', b""),
        file_of(json.dumps(TWO).replace('"b"', '"a"'), bytes(12)),  # one name for two tensors
    ],
    ids=range(13),
)
def test_what_is_no_table_is_refused(tmp_path, content):
    assert_refused(tmp_path / "model.safetensors", content)


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtypes=st.lists(st.sampled_from(list(SIZES)), min_size=4, max_size=4),
    moved=st.integers(0, 3),
    by=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
)
def test_a_file_is_read_as_written_or_refused_when_one_entry_has_moved(
    tmp_path_factory, shapes, dtypes, moved, by
):
    path = tmp_path_factory.getbasetemp() / "moved.safetensors"
    tensors = {}
    for name, (shape, dtype) in enumerate(zip(shapes, dtypes)):
        tensors[str(name)] = torch.ones(shape, dtype=foreign_files.SAFETENSORS_DTYPES[dtype])
    safetensors.write(path, tensors)
    content, _ = foreign_files.read(path)
    assert content.keys() == tensors.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in tensors.items())
    if str(moved) not in tensors or by == (0, 0):
        return
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header[str(moved)]["data_offsets"]
    header[str(moved)]["data_offsets"] = [begin + by[0], end + by[1]]
    if begin == end and by[0] == by[1] and any_empty_place(header, moved):
        return  # an empty tensor may lie at any border of two others
    assert_refused(path, file_of(header, raw[8 + length :]))


def any_empty_place(header, moved):
    """Whether the moved, empty tensor lies where another begins or ends."""
    place = header[str(moved)]["data_offsets"][0]
    others = [value for name, value in header.items() if name not in ("__metadata__", str(moved))]
    return any(place in other["data_offsets"] for other in others)
