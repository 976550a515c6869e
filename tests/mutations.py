"""Damage to small files, by rule: bytes, JSON, zips, pickles, npy headers and tars.

Every function takes a `random.Random` and gives the damaged bytes, the same for the
same seed.
"""

import contextlib
import copy
import functools
import io
import json
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from typing import NamedTuple

from pth_files import mapping, number, text, tuple_of

NUMBERS = (
    *(0, 1, -1, 2, 7, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 10**30),
)
NAMES = (
    *("../out", "../../out", "/out", "a/../../out", "..\\out", "C:\\out", "", "."),
    *("..", "x" * 300, "data.pkl", "labels.json", "a/.hidden.png", "nul\0.png"),
    *("\udcff.png", "a/x.png", "images.npy", "d\u00e9j\u00e0/x.png", "-rf"),
)
MARKER = "harmed"  # a directory that every payload would make
BOMB = 48 << 20  # bytes that a bomb unpacks to
CODE = f"__import__('os').mkdir({MARKER!r})"


def damaged(rng, raw):
    """One to three kinds of damage that know nothing of the format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = rng.choice(_BYTES)(rng, raw)
    return raw


def _place(rng, raw):
    """A position; headers lie at both ends."""
    near = rng.choice((64, 512, len(raw)))
    at = rng.randrange(min(near, len(raw)) + 1)
    return at if rng.random() < 0.7 else len(raw) - at


def _flip(rng, raw):
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            at = min(_place(rng, raw), len(out) - 1)
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncate(rng, raw):
    return raw[: _place(rng, raw)]


def _splice(rng, raw):
    a, b = sorted((_place(rng, raw), _place(rng, raw)))
    at = _place(rng, raw)
    return raw[:at] + raw[a:b] + raw[at if rng.random() < 0.5 else at + b - a :]


def _remove(rng, raw):
    at = _place(rng, raw)
    return raw[:at] + raw[at + rng.choice((1, 2, 4, 30, 512)) :]


def _insert(rng, raw):
    at = _place(rng, raw)
    return raw[:at] + rng.randbytes(rng.choice((1, 4, 64, 512))) + raw[at:]


def _overwrite(rng, raw):
    """A length or an offset, perhaps: an extreme number in its place."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(NUMBERS) % (1 << 8 * size)
    at = _place(rng, raw)
    new = value.to_bytes(size, rng.choice(("little", "big")))
    return raw[:at] + new + raw[at + size :]


def _renumber(rng, raw):
    """An extreme number in place of one in digits."""
    found = [m.span() for m in re.finditer(rb"\d+", raw[:4096])]
    if not found:
        return _flip(rng, raw)
    start, end = rng.choice(found)
    return raw[:start] + str(rng.choice(NUMBERS)).encode() + raw[end:]


_BYTES = (_flip, _truncate, _splice, _remove, _insert, _overwrite, _renumber)

_DEEP, _LONG = "@deep@", "@long@"
VALUES = (
    *(None, True, False, "", "../../out", "\ud800", _DEEP, _LONG, "0" * 3000),
    *(float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 0.5, [], {}, [[]]),
    *([1] * 500, {"a": {}}, [None], ["a"], "nan", 3.0, *NUMBERS),
)


def json_damaged(rng, raw):
    """A value of JSON replaced by one of another type or size, or plain damage."""
    if rng.random() < 0.15:
        return damaged(rng, raw)
    value = [json.loads(raw)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        _edit(rng, value)
    deep = "[" * rng.choice((50, 5000, 100_000))
    written = json.dumps(value[0] if value else None)
    written = written.replace(f'"{_DEEP}"', deep)
    return written.replace(f'"{_LONG}"', "9" * rng.choice((400, 6000))).encode()


def _edit(rng, node):
    """Changes one place below a node, wherever it lies."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = copy.deepcopy(node[key])
            continue
        what = rng.random()
        if what < 0.75:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(("", "x", "__class__", "../out"))] = copy.deepcopy(
                node[key]
            )
        else:
            node.extend(copy.deepcopy(node[key]) for _ in range(rng.choice((1, 100))))
        return


class Member(NamedTuple):
    """One member of a zip, with what its headers claim."""

    name: str
    data: bytes
    method: int = 0
    size: int | None = None
    stored_size: int | None = None
    crc: int | None = None
    flags: int = 0


def members_of(raw):
    """The members of a whole zip."""
    out, at = [], 0
    while raw[at : at + 4] == b"PK\x03\x04":
        head = struct.unpack("<4s5H3I2H", raw[at : at + 30])
        start = at + 30 + head[9] + head[10]
        name = raw[at + 30 : at + 30 + head[9]].decode()
        extra = raw[at + 30 + head[9] : start]
        size = head[7]
        if size == 0xFFFFFFFF:  # zip64, as numpy writes
            size = struct.unpack("<Q", extra[12:20])[0]
        out.append(Member(name, raw[start : start + size], head[3]))
        at = start + size
    return out


def zipped(members):
    """A zip of these members, whatever they claim."""
    body, directory = b"", b""
    for m in members:
        name = m.name.encode("utf-8", "surrogateescape")
        plain = m.data if m.method == 0 else b""
        crc = zlib.crc32(plain) if m.crc is None else m.crc
        stored = len(m.data) if m.stored_size is None else m.stored_size
        size = len(m.data) if m.size is None else m.size
        numbers = (crc, stored % 2**32, size % 2**32, len(name))
        flags = m.flags if name.isascii() else m.flags | 0x800
        head = struct.pack("<5H3IH", 20, flags, m.method, 0, 33, *numbers)
        directory += b"PK\1\2\x14\0" + head + struct.pack("<4H2I", *[0] * 5, len(body))
        directory += name
        body += b"PK\3\4" + head + b"\0\0" + name + m.data
    end = (0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + struct.pack("<4H2IH", *end)


@functools.cache
def _bombs():
    return {method: packed(method, bytes(BOMB)) for method in (8, 12)}


def packed(method, data):
    """Bytes as a zip holds them under a method: 8 deflate, 12 bzip2, 14 LZMA."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x", data)
    return members_of(file.getvalue())[0].data


def _bomb(rng, member):
    """Says it is small or large; unpacks to 48 MB either way."""
    method = rng.choice((8, 12))
    size = rng.choice((len(member.data), 16, BOMB, 2**32 - 1))
    head = b""
    if method == 8 and rng.random() < 0.5:
        # What a reader looks at first is right, what follows is the bomb.
        stored = member.data[: rng.choice((len(member.data), 80, 1000))]
        length = struct.pack("<HH", len(stored), len(stored) ^ 0xFFFF)
        head = b"\0" + length + stored if len(stored) < 2**16 else b""
    data = head + _bombs()[method]
    return member._replace(method=method, data=data, size=size)


def zip_damaged(rng, raw, inner):
    """Members renamed, doubled, dropped, repacked, blown up or changed by `inner`."""
    if rng.random() < 0.25:
        return damaged(rng, raw)
    members = members_of(raw)
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(members))
        m, what = members[i], rng.random()
        if what < 0.5:
            members[i] = m._replace(data=inner(rng, m.name, m.data))
        elif what < 0.58:
            members.append(m._replace(name=rng.choice(NAMES)))
        elif what < 0.64:
            members.insert(0, rng.choice(members))
        elif what < 0.68 and len(members) > 1:
            del members[i]
        elif what < 0.74:
            method = rng.choice((8, 12))
            data, crc = packed(method, m.data), zlib.crc32(m.data)
            members[i] = Member(m.name, data, method, len(m.data), crc=crc)
        elif what < 0.84:
            members[i] = _bomb(rng, m)
        else:
            field = rng.choice(("size", "stored_size", "flags", "method", "crc"))
            most = 16 if field in ("flags", "method") else 32
            value = rng.choice(NUMBERS) % 2**most
            members[i] = m._replace(**{field: value})
    return zipped(members)


def npy_damaged(rng, name, raw):
    """Another header over the same bytes: shape, type, order, version, length."""
    if rng.random() < 0.3 or raw[:6] != b"\x93NUMPY":
        return damaged(rng, raw)
    length = struct.unpack("<H", raw[8:10])[0]
    header, body = raw[10 : 10 + length].decode("latin1"), raw[10 + length :]
    what = rng.random()
    if what < 0.4:
        shape = tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(4)))
        header = re.sub(r"\([\d, ]*\)", repr(shape), header)
    elif what < 0.7:
        kinds = "|O >f8 <f2 |V2 |V0 |S0 <U9 <f16 |b1 <i8 <c8 (2,)f4 <M8[s] |V1000000"
        kind = rng.choice(kinds.split())
        header = re.sub(r"'descr': '[^']*'", f"'descr': '{kind}'", header)
        if kind == "|O":
            body = payload(rng, b"")
    elif what < 0.8:
        header = rng.choice(("(" * 9000, "{" * 900, "[]", "1", "{'descr': 1}", CODE))
    else:
        header = header.replace("False", rng.choice(("True", "2", "None")))
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\xff\0"))
    length = len(header) if rng.random() < 0.8 else rng.choice(NUMBERS)
    sized = struct.pack("<H", length % 2**16)
    if version != b"\1\0":
        sized = struct.pack("<I", length % 2**32)
    return raw[:6] + version + sized + header.encode() + body


def _code(module, name, argument):
    called = b"c" + f"{module}\n{name}\n".encode()
    return called + tuple_of(text(argument)) + b"R"


def _growing(count):
    """A list that is copied over and over, by a call that is allowed."""
    size = b"ctorch\nSize\nq\x02"
    copies = b"h\x02h\x01\x85R" * count
    return b"]q\x01(" + b"K\x01" * count + b"e" + size + copies


PAYLOADS = (
    _code("os", "mkdir", MARKER),
    _code("builtins", "exec", CODE),
    _code("builtins", "eval", CODE),
    _code("posix", "system", f"mkdir {MARKER}"),
    b"(" + text(MARKER) + b"ios\nmkdir\n",
    b"(cos\nmkdir\n" + text(MARKER) + b"o",
    text("os") + text("mkdir") + b"\x93" + tuple_of(text(MARKER)) + b"R",
    text("os") + text("mkdir") + b"\x93" + tuple_of(text(MARKER)) + b"\x81",
    b"cos\nmkdir\n" + tuple_of(text(MARKER)) + b"}\x92",
    b"cargparse\nNamespace\n)R" + mapping({"__class__": text(MARKER)}) + b"b",
    b"cnumpy.core.multiarray\n_reconstruct\n" + tuple_of(text(MARKER)) + b"R",
    b"ccollections\nOrderedDict\n" + tuple_of(text(MARKER)) + b"R",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    b"ctorch._utils\n_rebuild_parameter\n" + tuple_of(number(1)) + b"R",
    *(b"\x82\x01", b"P0\n", b"S'\\z'\n", b"V\\ud800\n", b"L" + b"9" * 5000 + b"L\n"),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 8),
    *(b"r\xff\xff\xff\x7f", b"(" * 3000, b"]" * 3000, b"0" * 9, b"2" * 9, b"1" * 9),
    *(b"}" * 2000, b"\x94" * 2000, b"Q" * 3, b"u", b"e", b"b", b"R", b"\x93", b"."),
    b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(3000)) + b"u",
    b"}" + tuple_of(*[b")"] * 30) + b"Ns",
    _growing(400),
)


def payload(rng, raw):
    """A pickle that does harm if it is run, or takes all memory or time."""
    return b"\x80\x02" + rng.choice(PAYLOADS) + raw + b"."


def pickle_damaged(rng, name, raw):
    """Opcodes put in, taken out and repeated, at the borders of others."""
    if not name.endswith("data.pkl") or rng.random() < 0.2:
        return damaged(rng, raw)
    borders = _borders(raw)
    for _ in range(rng.choice((1, 1, 2))):
        i, j = sorted((rng.choice(borders), rng.choice(borders)))
        what = rng.random()
        if what < 0.5:
            raw = raw[:i] + rng.choice(PAYLOADS) + raw[i:]
        elif what < 0.65:
            raw = raw[:i] + raw[j:]
        elif what < 0.8:
            raw = raw[:j] + raw[i:]
        else:
            new = number(rng.choice(NUMBERS)) if what < 0.95 else text("x")
            after = next((b for b in borders if b > i), i)
            raw = raw[:i] + new + raw[after:]
    return raw


def _borders(raw):
    """Where opcodes begin, up to the first that is none."""
    out = [0]
    with contextlib.suppress(ValueError, Warning):
        for _, _, at in pickletools.genops(raw):
            out.append(at)
    return out


def header_damaged(rng, raw):
    """The JSON of a safetensors file changed, its length kept true or not."""
    if rng.random() < 0.3:
        return damaged(rng, raw)
    length = struct.unpack("<Q", raw[:8])[0]
    head = json_damaged(rng, raw[8 : 8 + length])
    claim = len(head) if rng.random() < 0.85 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", claim) + head + raw[8 + length :]


_KINDS = b"0\x0012345678SLKxgDVMNX9"


def tar_damaged(rng, raw):
    """Members renamed, retyped, resized, linked outside; checksums made right."""
    if rng.random() < 0.2:
        return damaged(rng, raw)
    out, heads = bytearray(raw), _headers(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, what = rng.choice(heads), rng.random()
        if what < 0.3:
            name = rng.choice(NAMES).encode("utf-8", "surrogateescape")[:100]
            out[at : at + 100] = name.ljust(100, b"\0")
        elif what < 0.55:
            out[at + 156] = rng.choice(_KINDS)
            out[at + 157 : at + 257] = b"/etc/passwd".ljust(100, b"\0")
        elif what < 0.8:
            out[at + 124 : at + 136] = _size(rng)
        elif what < 0.9:
            field = at + rng.choice((0, 100, 136, 257, 263, 329, 345, 386, 482))
            out[field : field + 8] = rng.randbytes(8)
        else:
            out[at:at] = _extended(rng)
            heads = _headers(bytes(out))
    for at in _headers(bytes(out)) if rng.random() < 0.95 else ():
        _sum(out, at)
    return bytes(out)


def _headers(raw):
    return [
        at
        for at in range(0, len(raw) - 511, 512)
        if raw[at + 257 : at + 262] == b"ustar"
    ]


def _sum(out, at):
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])


def _size(rng):
    value = rng.choice(NUMBERS)
    if rng.random() < 0.5:
        return (b"%011o\0" % (max(value, 0) % 8**11))[:12]
    return (b"\x80" if value >= 0 else b"\xff") + (value % 2**88).to_bytes(11, "big")


def _extended(rng):
    """An extended header, true or lying, and its one block of records."""
    name, value = rng.choice(NAMES), str(rng.choice(NUMBERS))
    records = (
        *(("path", name), ("size", value), ("linkpath", "/etc/passwd")),
        *(("GNU.sparse.size", value), ("GNU.sparse.map", "0,1," * 9 + value)),
        *(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")),
        *(("hdrcharset", "BINARY"), ("mtime", "nan"), ("GNU.sparse.name", name)),
    )
    body = b""
    for key, told in rng.sample(records, rng.choice((1, 2, 3))):
        line = f" {key}={told}\n".encode("utf-8", "surrogateescape")
        length = len(line) + len(str(len(line) + 2))
        body += str(length).encode() + line
    info = tarfile.TarInfo("pax")
    info.type = rng.choice((b"x", b"g", b"L", b"K"))
    info.size = len(body) if rng.random() < 0.8 else rng.choice(NUMBERS) % 8**11
    return info.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")
