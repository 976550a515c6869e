"""A TFDS dataset is read without TensorFlow, or its error says how to prepare it."""

import io
import os
import subprocess
import sys

import pytest
from pictures import encoded

from flax_skd.io.extras import require
from flax_skd.io.sources import open_source


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of five images prepared as array_record."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                file = io.BytesIO(encoded(10 * i))
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    path = tmp_path_factory.mktemp("tfds")
    TinyImages(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def read_tfds(path, *, text):
    """Opens a dataset in a process of its own, as a user would, without the builder."""
    code = (
        "import sys, numpy as np\n"
        "from flax_skd.io.sources import open_source\n"
        f"s = open_source({text!r})\n"
        "e = [s[i] for i in range(len(s))]\n"
        "v = sorted((int(np.asarray(x.image)[0, 0, 0]), x.label) for x in e)\n"
        "print(v, s.num_classes, e[0].name, 'tensorflow' in sys.modules)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TFDS_DATA_DIR": str(path), "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tfds_dataset_is_read_without_tensorflow(prepared):
    done = read_tfds(prepared, text="tfds:tiny_images:train")
    expected = [(10 * i, i % 2) for i in range(5)]
    assert done.stdout.strip() == f"{expected} 2 record 0 False", done.stderr


def test_a_tfds_split_may_be_a_slice(prepared):
    done = read_tfds(prepared, text="tfds:tiny_images:1.0.0:train[:40%]")
    assert done.stdout.count("), (") == 1, done.stderr


def test_tfds_faults_say_what_to_prepare(prepared, monkeypatch):
    monkeypatch.setattr(
        require("tensorflow_datasets").core.constants, "DATA_DIR", str(prepared)
    )
    for text, words in [
        ("tfds:no_such_dataset:train", "knows no 'no_such_dataset'"),
        ("tfds:mnist:train", "not prepared.*file_format='array_record'.*prepare"),
        ("tfds:tiny_images:valid", "(?i)unknown split 'valid'"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_source(text)


def test_an_old_tfrecord_preparation_says_to_prepare_again(prepared, tmp_path):
    target = tmp_path / "tiny_images" / "1.0.0"
    target.mkdir(parents=True)
    for file in (prepared / "tiny_images" / "1.0.0").iterdir():
        data = file.read_bytes().replace(b"array_record", b"tfrecord")
        (target / file.name.replace("array_record", "tfrecord")).write_bytes(data)
    done = read_tfds(tmp_path, text="tfds:tiny_images:train")
    assert "another file format (tfrecord?)" in done.stderr
    assert "download_and_prepare()" in done.stderr
