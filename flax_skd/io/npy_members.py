"""Arrays inside an npz: members of a zip, read no further than their headers say.

`numpy.load` believes both headers of a member, the zip's and the array's, and what a
member unpacks to may be a thousand times what either says.
"""

import io
import math
import zipfile

import numpy as np


def check(infos: list[zipfile.ZipInfo], *, most: int) -> None:
    """Looks at members before one is read.

    Args:
      infos: of the members.
      most: bytes that all of them may unpack to.

    Raises:
      ValueError: if they say more, or one is packed in a way numpy has not.
    """
    for info in infos:
        # Others unpack a whole block at once, whatever is asked of them.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{info.filename} is packed by method {info.compress_type}, which "
                "numpy never uses: re-save it with numpy.savez"
            )
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} is stored in another size than it has")
    total = sum(info.file_size for info in infos)
    if total > most:
        raise ValueError(
            f"it unpacks to more than {most} bytes, {total} bytes in so small a file: "
            "re-save it with numpy.savez"
        )


def read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, read-only; its header is held against its member's size.

    Args:
      archive: open.
      info: of a member that `check` let pass.

    Raises:
      ValueError: if it holds Python objects, or its header and its size disagree.
      Exception: of a dozen kinds, by zipfile, zlib and numpy, if it is damaged.
    """
    with archive.open(info) as stream:
        # With a size, since without one all is unpacked before it is counted.
        raw = stream.read(info.file_size)
    file = io.BytesIO(raw)
    if np.lib.format.read_magic(file) == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError(
            f"{info.filename} holds Python objects, which are never unpickled: re-save "
            "it as plain arrays"
        )
    claimed, held = math.prod(shape) * dtype.itemsize, len(raw) - file.tell()
    if claimed != held:
        name = info.filename.removesuffix(".npy")
        raise ValueError(f"{name} claims {claimed} bytes, its member has {held}")
    values = np.frombuffer(raw, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran else "C")
