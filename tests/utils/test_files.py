"""The readers of files that others wrote: whatever the bytes, an array or an error with the file's name."""

import errno
import io
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from damaged_files import DEEP, damaged, reads_or_names_the_file, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddim_fast.utils.files import (
    check_safetensors,
    csv_rows,
    json_lines,
    npz_array,
    read_json,
    reading,
    safetensors_tensor,
)
from ddim_fast.utils.pictures import read_picture

SAMPLES = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 1, 3, 4)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def compressed():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=SAMPLES)
    return buffer.getvalue()


def picture(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, kind)
    return buffer.getvalue()


READERS = {
    "json": (read_json, json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()),
    "jsonl": (lambda path: list(json_lines(path)), b'{"a": 1, "b": [1, 2]}\n{"a": 2, "b": [3, 4]}\n'),
    "csv": (lambda path: list(csv_rows(path)), b'a,"b"\n1,2\n"3",4\n'),
    "npz": (lambda path: npz_array(path, "samples"), npz(samples=SAMPLES)),
    "compressed": (lambda path: npz_array(path, "samples"), compressed()),
    "safetensors": (
        lambda path: safetensors_tensor(path, "samples"),
        safetensors.torch.save({"samples": torch.from_numpy(SAMPLES)}),
    ),
    "header": (check_safetensors, safetensors.torch.save({"samples": torch.from_numpy(SAMPLES)})),
    "png": (lambda path: read_picture(path, "L", (3, 2)), picture("PNG")),
    "jpeg": (lambda path: read_picture(path, "RGB", (3, 2)), picture("JPEG")),
    "gif": (lambda path: read_picture(path, "RGB", (3, 2)), picture("GIF")),
    "webp": (lambda path: read_picture(path, "RGB", (3, 2)), picture("WEBP")),
    "tiff": (lambda path: read_picture(path, "RGB", (3, 2)), picture("TIFF")),
}
EACH = pytest.mark.parametrize("kind", READERS)


@EACH
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_named(tmp_path_factory, kind, data):
    read, content = READERS[kind]
    reads_or_names_the_file(read, tmp_path_factory.getbasetemp() / f"damaged.{kind}", data.draw(damaged(content)))


@EACH
def test_files_cut_off_anywhere_are_refused(tmp_path, kind):
    read, content = READERS[kind]
    path = tmp_path / "cut"
    for end in range(0, len(content), max(1, len(content) // 40)):
        reads_or_names_the_file(read, path, content[:end])
    if kind not in ("jsonl", "csv"):  # of which every beginning is a file
        for end in (0, 1, len(content) // 3):
            refused(read, path, content[:end])
    path.write_bytes(content)
    read(path)


@EACH
def test_what_cannot_be_opened(tmp_path, kind):
    read, _ = READERS[kind]
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(OSError, match=path.name):
            read(path)


@pytest.mark.parametrize("content", DEEP, ids=lambda content: str(len(content)))
def test_json_nested_deeply(tmp_path, content):
    refused(read_json, tmp_path / "deep", content, "nested more deeply")
    refused(lambda path: list(json_lines(path)), tmp_path / "deep", content, "nested more deeply")


def test_json_as_editors_save_it(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "x").write_text('{"é": [1]}', encoding=encoding)
        assert read_json(tmp_path / "x") == {"é": [1]}
    nested = json.dumps(json.loads("[" * 50 + "]" * 50)).encode()
    (tmp_path / "x").write_bytes(nested)
    assert json.dumps(read_json(tmp_path / "x")).encode() == nested


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b,a\n1,2,3\n", "a name of its own, got 'a' twice"),
        (b'a\n"1', "unexpected end of data"),
        (b"a,b\n1\n", "line 2 of .* must have a value for each of the 2 columns, got 1"),
        (b"a\n1,2\n", "got 2"),
        (b"a\n\xff\n", "UTF-8"),
    ],
)
def test_csv_that_is_unclear(tmp_path, content, said):
    refused(lambda path: list(csv_rows(path)), tmp_path / "rows.csv", content, said)


def test_csv_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n")
    assert list(csv_rows(tmp_path / "rows.csv")) == [{"a": "1", "b": "2"}]


def test_json_lines_with_a_name_twice(tmp_path):
    refused(
        lambda path: list(json_lines(path)), tmp_path / "x", b'{"a": 1}\n{"a": 1, "a": 2}', "line 2 .* got 'a' twice"
    )
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n')
    assert list(json_lines(tmp_path / "x")) == [{"a": 1}]
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf\n{"a": 1}\n')
    assert list(json_lines(tmp_path / "x")) == [{"a": 1}], "a mark on a line of its own is no row"


@pytest.mark.parametrize(("line", "kind"), [(b"[1]", "list"), (b"1", "int"), (b'"a"', "str"), (b"null", "NoneType")])
def test_json_lines_that_are_no_objects(tmp_path, line, kind):
    refused(
        lambda path: list(json_lines(path)),
        tmp_path / "x",
        b'{"a": 1}\n' + line,
        f"line 2 of .* must be a JSON object, got {kind}",
    )


def test_arrays_that_are_no_numbers(tmp_path):
    read, path = READERS["npz"][0], tmp_path / "x.npz"
    refused(read, path, npz(other=SAMPLES), "must hold an array called samples, got other")
    others = safetensors.torch.save({"other": torch.from_numpy(SAMPLES)})
    refused(READERS["safetensors"][0], path, others, "must hold an array called samples, got other")
    for array in (np.array(["a"]), np.array([1j]), np.array([b"a"]), np.array([(1,)], dtype=[("a", int)])):
        refused(read, path, npz(samples=array), "must be numbers, got dtype")
    buffer = io.BytesIO()
    np.save(buffer, SAMPLES)
    refused(read, path, buffer.getvalue(), "a bare array")


def test_no_picture_is_handed_to_another_program(tmp_path, monkeypatch):
    import PIL.EpsImagePlugin

    called = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: called.append(args))
    refused(READERS["png"][0], tmp_path / "x.png", picture("EPS"), "must be a picture")
    assert called == []


def test_a_picture_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    refused(READERS["png"][0], tmp_path / "x.png", picture("PNG"), "exceeds limit")


def test_only_the_systems_errors_are_not_the_files(tmp_path):
    """A full disk, while a file is copied, says nothing of the file; a place before its beginning does."""
    path = tmp_path / "x.npz"
    path.write_bytes(b"")
    for number, kind in ((errno.EINVAL, ValueError), (None, ValueError), (errno.ENOSPC, OSError)):
        with pytest.raises(kind, match=r"must be a file|No space"), reading(path, "a file"):
            raise OSError(*(() if number is None else (number, os.strerror(number))))
