"""Two thousand hostile files: documented errors, bounded cost, nothing run or written."""

import json

import fuzzing
import mutations
import pth_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

INPUTS = {
    "pth": 340,
    "pth of a network": 60,
    "safetensors": 200,
    "npz of weights": 120,
    "folder of Hugging Face": 140,
    "npz of images": 220,
    "tar": 244,
    "labels": 96,
    "encoded images": 160,
    "sub-network": 60,
    "super-network": 60,
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    found = fuzzing.readers(tmp_path_factory.mktemp("seeds"))
    return {reader.name: reader for reader in found}


@pytest.fixture(scope="module")
def box(readers, tmp_path_factory):
    with fuzzing.Box(tmp_path_factory.mktemp("box")) as box:
        for reader in readers.values():
            for files in reader.seeds:
                box.warm(reader, files)
        yield box


def test_every_reader_has_its_share_of_two_thousand_inputs(readers):
    assert set(INPUTS) == set(readers)
    assert sum(INPUTS.values()) + 2 * 150 == 2000


@pytest.mark.parametrize("name", INPUTS)
def test_a_reader_holds_to_what_it_promises_whatever_it_is_given(box, readers, name):
    reader, seen = readers[name], set()
    for index in range(INPUTS[name]):
        try:
            found = box.check(reader, fuzzing.damage(reader, 0, index))
        except fuzzing.Fault as fault:
            pytest.fail(f"{name}, input {index}: {fault}")
        seen.add(found.name)
    assert len(seen) > 1 and seen <= {"read", *(e.__name__ for e in reader.errors)}


OPCODES = (
    *(b"}", b"]", b")", b"(", b"t", b"u", b"s", b"e", b"a", b"R", b"b", b"\x81"),
    *(b"\x85", b"\x86", b"\x87", b"\x93", b"\x94", b"q\x00", b"h\x00", b"N", b"\x88"),
    *(b"Q", b"0", b"2", b".", b"K\x01", b"cos\nsystem\n", b"ctorch\nSize\n"),
    *(b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"),
    pth_files.text("0"),
    pth_files.number(6),
    pth_files.tensor("0", 6, (2, 3), (3, 1)),
    pth_files.mapping({"x": pth_files.tensor("0", 6, (6,), (1,))}),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(OPCODES), max_size=12))
def test_any_program_of_known_opcodes_is_a_state_dict_or_refused(box, readers, ops):
    members = mutations.members_of(readers["pth"].seeds[0]["x.pth"])
    program = b"\x80\x02" + b"".join(ops) + b"."
    new = [m._replace(data=program) if m.name.endswith(".pkl") else m for m in members]
    found = box.check(readers["pth"], {"x.pth": mutations.zipped(new)})
    assert found.name in ("read", "TorchFileError", "UnsafePickleError")


# A few letters of each kind: all of Unicode takes a minute to look up at first.
TEXT = st.text(st.sampled_from("a.\x00\u00e9\u6f22\U0001f600"), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({"a.png": VALUES, "b.png": VALUES}) | VALUES)
def test_any_json_is_a_table_of_labels_or_refused(box, readers, value):
    seed = readers["labels"].seeds[0]
    written = json.dumps(value).encode()
    found = box.check(readers["labels"], {**seed, "labels.json": written})
    whole = isinstance(value, dict) and all(
        type(value.get(name)) is int and 0 <= value[name] < 2**31
        for name in ("a.png", "b.png")
    )
    assert found.name == ("read" if whole else "ValueError")


def nameless(folder):
    raise ValueError("wrong")


@pytest.mark.parametrize(
    ("what", "read"),
    [
        ("os.mkdir", lambda folder: (folder.parent.parent / "cwd" / "x").mkdir()),
        ("open.*wrote", lambda folder: (folder / "made").write_bytes(b"")),
        ("memory", lambda folder: bytes(fuzzing.MEMORY[0] + (1 << 22))),
        ("KeyError is not documented", lambda folder: {}["x"]),
        ("does not name the file: wrong", nameless),
    ],
)
def test_the_watch_sees_what_is_run_written_and_spent(box, readers, what, read):
    reader, files = readers["labels"], readers["labels"].seeds[0]
    with pytest.raises(fuzzing.Fault, match=what):
        box.check(reader._replace(read=read), files)
