"""An npz gives its images with the right labels, or says what is wrong with it."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from mutations import members_of, packed, zipped
from pictures import contents, encoded, numbered_arrays, value

from flax_skd.io.sources import ArraySource, open_source


@pytest.fixture
def arrays():
    return numbered_arrays()


def test_an_npz_of_arrays_is_read(tmp_path, arrays):
    np.savez_compressed(tmp_path / "a.npz", images=arrays[0], labels=arrays[1])
    source = open_source(f"npz:{tmp_path / 'a.npz'}", num_classes=3)
    assert contents(source) == contents(ArraySource(*arrays))


def encoded_npz(path, **changes):
    files = [encoded(v) for v in (10, 20, 30)]
    fields = {
        "train_bytes": np.frombuffer(b"".join(files), np.uint8),
        "train_offsets": np.cumsum([0, *map(len, files)]),
        "train_labels": np.asarray([1, 0, 1], np.uint8),
        "classes": np.asarray(["ant", "bee"]),
    }
    np.savez(path, **(fields | changes))
    return f"npz:{path}:train"


def test_an_npz_of_encoded_images_is_read_by_split(tmp_path):
    source = open_source(encoded_npz(tmp_path / "a.npz"))
    assert [pair[:2] for pair in contents(source)] == [(10, 1), (20, 0), (30, 1)]
    assert source.num_classes == 2


def test_fewer_classes_than_the_networks_are_told_and_not_refused(tmp_path, caplog):
    path = encoded_npz(tmp_path / "a.npz")
    assert open_source(path, num_classes=2).num_classes == 2 and not caplog.text
    assert open_source(path, num_classes=5).num_classes == 5
    assert "states 2 classes and the network has 5: label i is read" in caplog.text
    caplog.clear()
    assert open_source("digits:test", num_classes=12).num_classes == 12
    assert "digits:test states 10 classes and the network has 12" in caplog.text


def test_positions_count_from_either_end_and_no_further(tmp_path):
    source = open_source(encoded_npz(tmp_path / "a.npz"))
    assert value(source[-1]) == 30
    with pytest.raises(IndexError):
        source[3]


def test_an_npz_of_other_contents_says_what_it_holds(tmp_path):
    path = encoded_npz(tmp_path / "a.npz").removesuffix(":train")
    with pytest.raises(ValueError, match="holds classes, train_bytes.*npz:PATH:train"):
        open_source(path)
    with pytest.raises(ValueError, match="and not test_bytes"):
        open_source(f"{path}:test")


@pytest.mark.parametrize(
    "offsets", [[0, 5, 3, 9], [-1, 2, 3, 4], [0, 1, 2, 10**9], [0.0, 1, 2, 3], [0]]
)
def test_offsets_that_leave_the_bytes_are_refused(tmp_path, offsets):
    text = encoded_npz(tmp_path / "a.npz", train_offsets=np.asarray(offsets))
    with pytest.raises(ValueError, match="offsets must be ints"):
        open_source(text)


def test_an_npz_with_objects_runs_no_code(tmp_path):
    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    labels = np.asarray([Touch()], object)
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 2, 2, 3), np.uint8), labels=labels)
    with pytest.raises(ValueError, match="does not serve"):
        open_source(f"npz:{tmp_path / 'a.npz'}")
    assert not marker.exists()


def test_an_array_that_claims_more_than_its_file_is_refused(tmp_path):
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**13, 1, 1, 3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    with pytest.raises(ValueError, match="images claims 30000000000000 bytes"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_an_npz_that_inflates_without_measure_is_refused(tmp_path):
    images = np.zeros((1, 4096, 4096, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="bytes in so small a file"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("method", [8, 12])
def test_a_member_that_unpacks_to_more_than_it_says_costs_no_memory(tmp_path, method):
    path = tmp_path / "a.npz"
    numbers = np.zeros((1, 2, 2, 3), np.uint8)
    np.savez(path, images=numbers, labels=np.zeros(1, int))
    members = members_of(path.read_bytes())
    bomb = packed(method, members[0].data + bytes(40 << 20))
    lying = members[0]._replace(data=bomb, method=method, size=len(members[0].data))
    path.write_bytes(zipped([lying, *members[1:]]))
    tracemalloc.start()
    with pytest.raises(ValueError, match="a.npz does not serve"):
        open_source(f"npz:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21
