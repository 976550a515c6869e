"""A tar gives its images with the right labels, or says what is wrong with it."""

import io
import json
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from pictures import contents, encoded, write_tar

from flax_skd.io.sources import open_source


def test_a_tar_reads_its_labels_json(tmp_path):
    table = json.dumps({"a.png": 5, "b.png": 2, "unused.png": 1}).encode()
    members = {"b.png": encoded(20), "labels.json": table, "a.png": encoded(10)}
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert contents(source) == [(10, 5, "a.png"), (20, 2, "b.png")]
    assert source.num_classes is None


def test_a_tar_reads_its_class_folders(tmp_path):
    members = {"v/bee/1.png": encoded(20), "v/ant/2.png": encoded(10)}
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert contents(source) == [(20, 1, "v/bee/1.png"), (10, 0, "v/ant/2.png")]
    assert source.num_classes == 2


def test_names_that_begin_with_a_dot_and_a_slash_are_the_same_names(tmp_path):
    # As `tar cf x.tar .` writes them, and `tar rf x.tar bee/3.png` after it.
    members = {"./bee/1.png": encoded(20), "./ant/1.png": encoded(10)}
    members["bee/3.png"] = encoded(30)
    source = open_source(write_tar(tmp_path / "t.tar", members), num_classes=2)
    want = [(10, 0, "ant/1.png"), (20, 1, "bee/1.png"), (30, 1, "bee/3.png")]
    assert contents(source) == want
    table = b'{"ant/1.png": 4, "./bee/1.png": 3, "3.png": 2}'
    text = write_tar(tmp_path / "l.tar", members | {"./labels.json": table})
    assert [label for _, label, _ in contents(open_source(text))] == [4, 3, 2]


@pytest.mark.parametrize("num_classes", [1, 3])
def test_class_folders_of_a_tar_are_as_many_as_the_classes(tmp_path, num_classes):
    members = {"bee/1.png": encoded(20), "ant/2.png": encoded(10)}
    text = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(ValueError, match=r"2 class folders \(ant, bee\).*FILE.json"):
        open_source(text, num_classes=num_classes)


def test_a_tar_of_one_image_a_class_is_labelled_by_order_only_when_asked(tmp_path):
    members = {"s/b.png": encoded(20), "s/a.png": encoded(10)}
    text = write_tar(tmp_path / "t.tar", members)
    source = open_source(text, labels="sorted")
    assert contents(source) == [(10, 0, "s/a.png"), (20, 1, "s/b.png")]
    assert source.num_classes == 2
    with pytest.raises(ValueError, match=r"no labels.*Pass labels='sorted'"):
        open_source(text)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_one_image_a_class_are_as_many_as_the_classes(tmp_path, num_classes):
    text = write_tar(tmp_path / "t.tar", {f"{c}.png": encoded(1) for c in "ab"})
    assert len(open_source(text, labels="sorted", num_classes=2)) == 2
    with pytest.raises(ValueError, match=f"are 2 images for {num_classes} classes"):
        open_source(text, labels="sorted", num_classes=num_classes)


def test_labels_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    text = write_tar(tmp_path / "t.tar", {"b.png": encoded(20)})
    (tmp_path / "l.json").write_text('{"b.png": 7}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source(text, labels="~/l.json")[0].label == 7


def test_labels_may_lie_outside_the_tar(tmp_path):
    text = write_tar(tmp_path / "t.tar", {"s/b.png": encoded(20)})
    (tmp_path / "l.json").write_text('{"b.png": 7}')
    source = open_source(text, labels=str(tmp_path / "l.json"), num_classes=8)
    assert contents(source) == [(20, 7, "s/b.png")]
    with pytest.raises(ValueError, match=r"labels = 'nowhere.json' cannot be read"):
        open_source(text, labels="nowhere.json")


@pytest.mark.parametrize("table", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_labels_that_are_no_table_are_refused(tmp_path, table):
    members = {"a.png": encoded(1), "labels.json": table}
    with pytest.raises(ValueError, match=r"labels.json in .*(is not JSON|must hold)"):
        open_source(write_tar(tmp_path / "t.tar", members))


def test_images_without_a_label_are_counted_and_named(tmp_path):
    members = {f"{c}.png": encoded(1) for c in "abcde"}
    members["labels.json"] = b'{"a.png": 0}'
    with pytest.raises(
        ValueError, match=r"no label for 4 of 5 images: b.png, c.png, d.png, \.\.\."
    ):
        open_source(write_tar(tmp_path / "t.tar", members))


def test_only_plain_members_inside_the_tar_count(tmp_path):
    path = tmp_path / "t.tar"
    (tmp_path / "secret.png").write_bytes(encoded(99))
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.SYMTYPE, "a/soft.png"),
            (tarfile.LNKTYPE, "a/hard.png"),
            (tarfile.FIFOTYPE, "a/pipe.png"),
            (tarfile.CHRTYPE, "a/device.png"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
        for name in ("../out.png", "/root.png", "a/._x.png", "a/x.png", "b/y.png"):
            info = tarfile.TarInfo(name)
            info.size = len(encoded(5))
            tar.addfile(info, io.BytesIO(encoded(5)))
    found = contents(open_source(f"tar:{path}"))
    assert found == [(5, 0, "a/x.png"), (5, 1, "b/y.png")]


def test_a_tar_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no image found; looked for .jpg"):
        open_source(write_tar(tmp_path / "t.tar", {"a.txt": b"text"}))


def test_a_compressed_or_foreign_file_is_no_tar(tmp_path):
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    (tmp_path / "text.tar").write_text("words " * 1000)
    for name in ("t.tar.gz", "text.tar"):
        with pytest.raises(ValueError, match="does not read as a tar.*uncompressed"):
            open_source(f"tar:{tmp_path / name}")


def test_a_tar_cut_short_or_damaged_within_is_not_a_smaller_tar(tmp_path):
    members = {f"{c}/x.png": encoded(1) for c in "abc"}
    write_tar(tmp_path / "t.tar", members)
    whole = (tmp_path / "t.tar").read_bytes()
    with tarfile.open(tmp_path / "t.tar") as tar:
        last = tar.getmember("c/x.png")
    damaged = bytearray(whole)
    damaged[last.offset] ^= 255
    for data in (whole[: last.offset_data + 20], whole[: last.offset + 99], damaged):
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(ValueError, match="does not read as a tar"):
            open_source(f"tar:{tmp_path / 'bad.tar'}")


def test_a_tar_whose_header_points_backwards_does_not_hang(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = -1024
    (tmp_path / "bad.tar").write_bytes(
        info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * tarfile.BLOCKSIZE)
    )
    with pytest.raises(ValueError, match="does not read as a tar"):
        open_source(f"tar:{tmp_path / 'bad.tar'}")


def test_a_header_that_asks_for_gigabytes_gets_what_there_is(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8**11 - 1
    path = tmp_path / "bad.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * tarfile.BLOCKSIZE))
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not read as a tar"):
        open_source(f"tar:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_random_damage_to_a_tar_gives_an_error_or_a_source(tmp_path):
    members = {f"{c}/x.png": encoded(1) for c in "abc"} | {"labels.json": b"{}"}
    write_tar(tmp_path / "t.tar", members)
    whole = (tmp_path / "t.tar").read_bytes()[: 12 * 512]
    rng, outcomes = np.random.default_rng(0), []
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "bad.tar").write_bytes(data[: rng.integers(1, len(data))])
        try:
            outcomes.append(len(open_source(f"tar:{tmp_path / 'bad.tar'}")))
        except ValueError:
            outcomes.append(None)
    assert None in outcomes
    assert all(count is None or count > 0 for count in outcomes)


def test_sources_of_files_survive_pickling(tmp_path):
    members = {"a/x.png": encoded(10), "b/y.png": encoded(20)}
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_name_that_two_images_share_is_no_label(tmp_path):
    members = {f"{c}/1.png": encoded(1) for c in "ab"}
    members["labels.json"] = b'{"1.png": 3, "a/1.png": 4}'
    with pytest.raises(ValueError, match="no label for 1 of 2 images: b/1.png"):
        open_source(write_tar(tmp_path / "t.tar", members))
