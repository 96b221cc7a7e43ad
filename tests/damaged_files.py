"""Files as they come from elsewhere: valid ones with bytes changed, cut off or put in, and JSON with other values."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

VALUES = [
    None, True, -1, 0, 5, 2**63, 10**400, 0.5, 1e39, float("nan"), float("inf"), "", "1000", "evil", "\ud800",
    [], {}, [[]], ["a"], [None], {"a": []}, {"": 1},
]  # fmt: skip


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes of a file with a few changes."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "remove", "repeat"]))
        if kind == "cut":
            del data[at:]
        elif kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def other_json(draw, value) -> bytes:
    """A JSON text with some values replaced, or left out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 5)):
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            del holder[key]
    return json.dumps(value).encode()


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


DEEP = [b"[" * n + b"]" * n for n in (60, 900, 990, 100_000)] + [b'{"a":' * 100_000 + b"1" + b"}" * 100_000]


def reads_or_names_the_file(read, path: Path, content: bytes) -> None:
    """Assert that a file is read, or refused with its name; any other exception comes through."""
    path.write_bytes(content)
    said = ""
    try:
        read(path)
    except (ValueError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    if said:
        assert path.name in said
        assert not said.startswith(("Unicode", "JSONDecode"))


def refused(read, path: Path, content: bytes, match: str = "must") -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        read(path)
    assert path.name in str(raised.value)
