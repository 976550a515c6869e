"""Where the demo may write: an empty folder, or one that a demo filled."""

import pytest

from flax_skd.run import demo

OLD = (*demo.PARTS, *demo.FILES)


def fill(folder, names):
    """Folders with a file in each, and files, by name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if "." in name:
            (folder / name).write_text("words")
        else:
            (folder / name).mkdir()
            (folder / name / "inside.txt").write_text("words")


def names(folder):
    return {p.name for p in folder.rglob("*")}


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_that_no_demo_made_are_left_as_they_are(tmp_path, overwrite):
    fill(tmp_path, ["train", "supernet", "list.png"])
    before = names(tmp_path)
    with pytest.raises(ValueError, match="holds no flax_skd_demo.txt.*Name a new fold"):
        demo.run(str(tmp_path), overwrite=overwrite)
    assert names(tmp_path) == before


def test_a_demo_that_stopped_is_replaced_if_asked(tmp_path):
    path = demo._fresh(str(tmp_path / "new"), False)
    fill(path, ["train", "sweep.json", "notes.txt"])
    with pytest.raises(ValueError, match="new is not empty: pass --overwrite"):
        demo._fresh(str(path), False)
    assert "train" in names(path)
    demo._fresh(str(path), True)
    assert names(path) == {demo.MARKER, "notes.txt"}
    assert "deletes train, contracted" in (path / demo.MARKER).read_text()


def test_a_whole_demo_of_an_earlier_version_is_replaced_and_a_part_of_one_is_not(
    tmp_path,
):
    fill(tmp_path / "whole", OLD)
    assert names(demo._fresh(str(tmp_path / "whole"), True)) == {demo.MARKER}
    fill(tmp_path / "part", OLD[:-1])
    with pytest.raises(ValueError, match="replaces a demo and nothing else"):
        demo._fresh(str(tmp_path / "part"), True)
    assert set(OLD[:-1]) <= names(tmp_path / "part")


def test_a_file_is_no_folder_for_a_demo(tmp_path):
    (tmp_path / "file").write_text("words")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        demo.run(str(tmp_path / "file"), overwrite=True)
    assert (tmp_path / "file").read_text() == "words"
