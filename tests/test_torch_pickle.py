"""What `.pth` files give, and that nothing in them is ever run."""

import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import members_of, zipped
from pth_files import ORDERED, mapping, number, tensor, text, tuple_of, write

from flax_skd.io import torch_pickle
from flax_skd.io.torch_archive import TorchFileError, UnsafePickleError

SIX = {"0": np.arange(6, dtype=np.float32)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def test_contiguous_transposed_and_offset_views_are_read(path):
    items = {
        "plain": tensor("0", 6, (2, 3), (3, 1)),
        "turned": tensor("0", 6, (3, 2), (1, 3)),
        "tail": tensor("0", 6, (2,), (1,), offset=4),
        "scalar": tensor("0", 6, (), (), offset=5),
    }
    got = torch_pickle.load(write(path, mapping(items), SIX))
    x = SIX["0"].reshape(2, 3)
    np.testing.assert_array_equal(got["plain"], x)
    np.testing.assert_array_equal(got["turned"], x.T)
    np.testing.assert_array_equal(got["tail"], [4, 5])
    assert got["scalar"] == 5 and list(got) == list(items)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("HalfStorage", np.float16([1.5, -2])),
        ("DoubleStorage", np.float64([1e300, 3])),
        ("LongStorage", np.int64([-1, 2**40])),
        ("ByteStorage", np.uint8([0, 255])),
        ("BoolStorage", np.array([True, False])),
    ],
)
def test_every_storage_type_keeps_its_values_and_type(path, kind, values):
    top = mapping({"x": tensor("0", 2, (2,), (1,), kind=kind)})
    got = torch_pickle.load(write(path, top, {"0": values}))["x"]
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)


def test_bfloat16_becomes_the_float32_of_the_same_value(path):
    bits = np.array([0x3FC0, 0xC000], np.uint16)  # 1.5 and -2
    top = mapping({"x": tensor("0", 2, (2,), (1,), kind="BFloat16Storage")})
    got = torch_pickle.load(write(path, top, {"0": bits}))["x"]
    np.testing.assert_array_equal(got, np.float32([1.5, -2]))
    assert got.dtype == np.float32


def test_a_training_checkpoint_with_parameters_and_arguments_is_unwrapped(path):
    parameter = tuple_of(tensor("0", 6, (6,), (1,)), b"\x88", ORDERED)
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + parameter + b"R"
    arguments = b"cargparse\nNamespace\n)\x81" + mapping({"lr": number(3)}) + b"b"
    model = ORDERED + b"(" + text("w") + parameter + b"u"
    model += mapping({"_metadata": ORDERED}) + b"b"  # as Module.state_dict has it
    items = {"model": model, "args": arguments, "epoch": number(7)}
    got = torch_pickle.load(write(path, mapping(items), SIX))
    assert list(got) == ["w"]
    np.testing.assert_array_equal(got["w"], SIX["0"])


def test_several_state_dicts_are_an_error_until_one_is_chosen(path):
    inner = mapping({"w": tensor("0", 6, (6,), (1,))})
    write(path, mapping({"model": inner, "model_ema": inner}), SIX)
    with pytest.raises(TorchFileError, match=r"'model', 'model_ema'.*entry="):
        torch_pickle.load(path)
    assert list(torch_pickle.load(path, entry="model_ema")) == ["w"]


@pytest.mark.parametrize("top", [mapping({"epoch": number(3)}), b"}", number(3)])
def test_a_file_without_a_state_dict_says_so(path, top):
    with pytest.raises(TorchFileError, match="state dict"):
        torch_pickle.load(write(path, top))


def test_a_state_dict_under_a_name_of_ones_own_is_found_by_it(path):
    inner = mapping({"w": tensor("0", 6, (6,), (1,))})
    write(path, mapping({"net": inner, "epoch": number(3)}), SIX)
    with pytest.raises(TorchFileError, match=r"'net', 'epoch'.*model\.entry=NAME"):
        torch_pickle.load(path)
    assert list(torch_pickle.load(path, entry="net")) == ["w"]


class _Harmful:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval])
def test_code_in_the_pickle_is_refused_by_name_and_not_run(
    path, tmp_path, function, protocol
):
    victim = tmp_path / "victim"
    argument = (
        str(victim)
        if function is os.mkdir
        else f"__import__('os').mkdir({str(victim)!r})"
    )
    raw = pickle.dumps({"model": [_Harmful(function, argument)]}, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
    with pytest.raises(UnsafePickleError, match=function.__name__):
        torch_pickle.load(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (b"cnumpy._core.multiarray\nscalar\n", "numpy._core.multiarray.scalar"),
        (b"cpathlib\nPosixPath\n", "pathlib.PosixPath"),
        (b"ctorch.nn\nLinear\n", "torch.nn.Linear"),
        (b"\x82\x01", "EXT1"),
        (b"(icollections\nOrderedDict\n", "INST"),
        (b"}" + tuple_of(b"}", b"}") + number(1) + b"s", "key of type tuple"),
        (b"ctorch\nSize\n" + mapping({"__call__": number(1)}) + b"b", "setting state"),
        (ORDERED + tuple_of(number(1)) + b"R", "calling something"),
        (text("0") + b"Q", "persistent id"),
        (b"ctorch\nSize\n]\x85R", "calling torch.Size like this"),
        (b"}" + number(2**61 - 1) + b"Ns", "integers from"),
    ],
)
def test_anything_outside_the_allow_list_is_refused(path, top, message):
    with pytest.raises(UnsafePickleError, match=message):
        torch_pickle.load(write(path, top))


@pytest.mark.parametrize(
    "lie",
    [
        {"size": (7,), "stride": (1,)},
        {"size": (2, 3), "stride": (3, 2)},
        {"size": (2,), "stride": (1,), "offset": 5},
        {"size": (6,), "stride": (-1,), "offset": 5},
        {"size": (2,), "stride": (1,), "offset": -2},
        {"size": (10**6, 10**6), "stride": (0, 0)},
        {"size": (0, 10**18), "stride": (1, 1)},
        {"size": (2**70,), "stride": (1,)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": (6,), "stride": (1, 1)},
        {"size": (6,), "stride": (1,), "numel": 10**15},
        {"size": (6,), "stride": (1,), "key": "1"},
        {"size": (6,), "stride": (1,), "key": "../data.pkl"},
        {"size": (6,), "stride": (1,), "kind": "ComplexFloatStorage"},
    ],
)
def test_a_tensor_that_lies_about_its_storage_is_refused(path, lie):
    top = mapping({"x": tensor(**{"key": "0", "numel": 6} | lie)})
    with pytest.raises(TorchFileError, match="weights.pth"):
        torch_pickle.load(write(path, top, SIX))


def test_tensors_that_repeat_one_storage_without_end_are_refused(path):
    storage = {"0": np.zeros(4096, np.float32)}
    items = {f"x{i}": tensor("0", 4096, (4096,), (1,)) for i in range(20)}
    with pytest.raises(TorchFileError, match="repeat"):
        torch_pickle.load(write(path, mapping(items), storage))


def test_a_memo_index_and_nested_containers_cost_nothing(path):
    top = b"]r\xff\xff\xff\x7f" + b"]" * 100_000 + b"a" * 100_000
    with pytest.raises(TorchFileError, match="holds a list"):
        torch_pickle.load(write(path, top))


def test_compressed_duplicate_and_escaping_members_are_refused(path):
    top = mapping({"x": tensor("0", 6, (6,), (1,))})
    with pytest.raises(TorchFileError, match="compressed"):
        torch_pickle.load(write(path, top, SIX, zipfile.ZIP_DEFLATED))
    with pytest.raises(UnsafePickleError, match="member name"):
        torch_pickle.load(write(path, top, SIX, extra=["../../etc/x"]))
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, top, SIX, extra=["archive/data/0"])
    with pytest.raises(TorchFileError, match="twice"):
        torch_pickle.load(path)


def test_a_member_that_claims_to_be_stored_in_gigabytes_is_refused(path):
    top = mapping({"x": tensor("0", 6, (6,), (1,))})
    members = members_of(write(path, top, SIX).read_bytes())
    path.write_bytes(zipped([members[0]._replace(stored_size=2**31), *members[1:]]))
    tracemalloc.start()
    with pytest.raises(TorchFileError, match="claims 2147483648 bytes stored"):
        torch_pickle.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_text_of_wrong_escapes_is_an_error_where_warnings_are(path):
    with pytest.raises(TorchFileError, match="weights.pth"):
        torch_pickle.load(write(path, b"S'\\z'\n"))


def test_a_torchscript_archive_is_refused_by_name(path):
    write(path, mapping({}), extra=["archive/constants.pkl"])
    with pytest.raises(TorchFileError, match="TorchScript"):
        torch_pickle.load(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"storages".ljust(257, b"\0") + b"ustar", "tar format"),
        (b"<html>", "no PyTorch file"),
        (b"", "cut short"),
    ],
)
def test_other_formats_are_refused_by_name_with_what_to_do(path, start, message):
    path.write_bytes(start)
    with pytest.raises(TorchFileError, match=f"{message}.*re-save"):
        torch_pickle.load(path)


def test_a_file_cut_short_anywhere_is_named_in_the_error(path):
    top = mapping({"x": tensor("0", 6, (2, 3), (3, 1))})
    whole = write(path, top, SIX).read_bytes()
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        with pytest.raises(TorchFileError, match="weights.pth"):
            torch_pickle.load(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_flipped_bits_give_the_tensors_or_a_documented_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "weights.pth"
    top = mapping({"x": tensor("0", 6, (2, 3), (3, 1))})
    raw = bytearray(write(path, top, SIX).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) * 8 - 1))
        raw[at // 8] ^= 1 << at % 8
    path.write_bytes(raw)
    try:
        got = torch_pickle.load(path)
    except TorchFileError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(v, np.ndarray) for v in got.values())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_pickle_with_flipped_bits_runs_nothing_and_ends(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "weights.pth"
    top = bytearray(mapping({"x": tensor("0", 6, (2, 3), (3, 1))}))
    for _ in range(data.draw(st.integers(1, 4))):
        top[data.draw(st.integers(0, len(top) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = torch_pickle.load(write(path, bytes(top), SIX))
    except TorchFileError as error:
        assert str(path) in str(error)
    else:
        assert all(v.size <= 6 for v in got.values())
