"""Class folders give every image with its label, or say what is wrong with them."""

import errno
import os

import numpy as np
import pytest
from pictures import contents, encoded

from flax_skd.io.data import eval_batches
from flax_skd.io.sources import BadImageError, open_source

pytest.importorskip("PIL")


def test_a_folder_gives_sorted_classes_and_every_known_suffix(tmp_path):
    forms = {"a.JPG": "JPEG", "b.png": "PNG", "c.webp": "WEBP", "d.bmp": "BMP"}
    for label, folder in enumerate(["ant", "bee"]):
        (tmp_path / folder).mkdir()
        for i, (name, form) in enumerate(forms.items()):
            data = encoded(100 * label + i, form=form)
            (tmp_path / folder / name).write_bytes(data)
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "bee" / "._a.jpg").write_text("not an image either")
    source = open_source(f"folder:{tmp_path}")
    found = contents(source)
    assert source.num_classes == 2
    assert [(label, name) for _, label, name in found] == [
        (label, f"{folder}/{name}")
        for label, folder in enumerate(["ant", "bee"])
        for name in forms
    ]
    assert (
        np.abs(np.subtract([v for v, *_ in found[4:]], [100, 101, 102, 103])).max() < 3
    )


def test_a_folder_without_images_says_where_images_lie(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match="no image found; images lie in .*CLASS/NAME"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("num_classes", [1, 3])
def test_class_folders_are_as_many_as_the_classes_or_an_error(tmp_path, num_classes):
    # A folder too few or too many shifts the labels of all after it.
    for name in ("a", "c", "lost+found", "__MACOSX", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded(1))
    assert len(open_source(f"folder:{tmp_path}", num_classes=2)) == 2
    words = rf"2 class folders \(a, c\) and the network {num_classes} classes.*empty"
    with pytest.raises(ValueError, match=words):
        open_source(f"folder:{tmp_path}", num_classes=num_classes)


def test_an_empty_folder_is_a_class_without_images(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "x.png").write_bytes(encoded(1))
    assert open_source(f"folder:{tmp_path}", num_classes=3)[0].label == 2


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(1))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("folder:~")) == 1


# What is wrong with one file.


@pytest.fixture
def with_broken_link(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "nowhere.png")
    return open_source(f"folder:{tmp_path}")


def test_a_link_to_nowhere_is_a_bad_image(with_broken_link, spec):
    words = r"folder:.*: a/1.png cannot be read \(No such file.*on_bad_image"
    with pytest.raises(BadImageError, match=words):
        list(eval_batches(with_broken_link, spec, batch_size=3))
    batches = eval_batches(with_broken_link, spec, batch_size=3, on_bad_image="skip")
    (batch,) = batches
    assert batch["weight"].tolist() == [1, 0, 1] and batches.num_skipped == 1


def test_a_link_to_itself_and_a_file_that_is_gone_are_bad_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop.png").symlink_to("loop.png")
    (tmp_path / "a" / "x.png").write_bytes(encoded(1))
    source = open_source(f"folder:{tmp_path}")
    (tmp_path / "a" / "x.png").unlink()
    for index in range(2):
        with pytest.raises(BadImageError, match="a/.*.png cannot be read"):
            source[index]


def test_a_disk_that_fails_is_no_bad_image(with_broken_link, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pathlib.Path.read_bytes", fails)
    with pytest.raises(OSError, match="Input/output error"):
        with_broken_link[0]


# Folders in class folders.


def test_an_image_that_lies_deeper_is_named_and_not_left_out(tmp_path):
    for folder in ("a", "b", "b/more/still"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match="b/more/still/x.png lies deeper than CLASS"):
        open_source(f"folder:{tmp_path}")


def test_a_folder_of_anything_else_in_a_class_folder_does_no_harm(tmp_path):
    for folder in ("a", "a/.thumbs", "a/@eaDir", "a/boxes", "a/folder.png"):
        (tmp_path / folder).mkdir()
    for name in ("a/x.png", "a/.thumbs/x.png", "a/@eaDir/x.png"):
        (tmp_path / name).write_bytes(encoded(7))
    (tmp_path / "a/boxes/x.txt").write_text("1 2 3 4")
    assert contents(open_source(f"folder:{tmp_path}")) == [(7, 0, "a/x.png")]


def test_an_image_behind_a_link_to_a_folder_is_named_too(tmp_path):
    for folder in ("root/a", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(encoded(1))
    (tmp_path / "root/a/more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a/more/x.png lies deeper than CLASS/NAME"):
        open_source(f"folder:{tmp_path}/root")


def test_a_link_to_its_own_folder_is_no_endless_walk(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a/x.png").write_bytes(encoded(1))
    (tmp_path / "b/again").symlink_to(tmp_path / "b")
    assert len(open_source(f"folder:{tmp_path}", num_classes=2)) == 1
