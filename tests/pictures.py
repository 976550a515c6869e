"""Small images that the tests of sources write and read back."""

import io
import tarfile

import numpy as np
from PIL import Image


def encoded(value, *, form="PNG", size=(6, 5)):
    """Bytes of a grey image of one value, which tells images apart."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, form)
    return file.getvalue()


def write_tar(path, members):
    """Returns the description of a tar of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f"tar:{path}"


def value(example):
    """Which image it is."""
    return int(np.asarray(example.image)[0, 0, 0])


def contents(source):
    """(value, label, name) of every example."""
    return [
        (value(e), e.label, e.name) for e in (source[i] for i in range(len(source)))
    ]


def numbered_arrays():
    """Seven images of one value each, and their labels."""
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 4, 4, 3), np.uint8
    )
    return images, np.arange(7) % 3
