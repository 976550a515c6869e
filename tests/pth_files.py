"""`.pth` files written opcode by opcode, since torch is no dependency."""

import struct
import zipfile

import numpy as np

ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def numbers(*values):
    return tuple_of(*map(number, values))


def mapping(items):
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def tensor(key, numel, size, stride, offset=0, kind="FloatStorage"):
    """What torch.save writes for one tensor."""
    storage = tuple_of(
        *(text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key)),
        *(text("cpu"), number(numel)),
    )
    args = tuple_of(
        *(storage + b"Q", number(offset), numbers(*size), numbers(*stride)),
        *(b"\x89", ORDERED),
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R"


def state_dict(arrays, storages):
    """Tensors by name, float32; their values are added to `storages`."""
    items = {}
    for name, value in arrays.items():
        key, strides = str(len(storages)), [step // 4 for step in value.strides]
        items[name] = tensor(key, value.size, value.shape, strides)
        storages[key] = value
    return mapping(items)


def write(path, top, storages=(), compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + top + b".")
        archive.writestr("archive/byteorder", "little")
        for key, values in dict(storages).items():
            archive.writestr(f"archive/data/{key}", np.asarray(values).tobytes())
        for name in extra:
            archive.writestr(name, b"")
    return path
