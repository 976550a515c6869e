"""The allow-list reader of `.pth` files: weights come out, nothing in them is run.

A `.pth` file is a zip of raw storages and one pickle that says how tensors view them.
Python's own unpickler would call whatever the pickle names, so this module walks the
opcodes itself: a global is only ever a name, and the few names that are known build
arrays and containers.
"""

import os
import pickletools
import re
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

from flax_skd.io.torch_archive import (
    DTYPES,
    Storage,
    TorchArchive,
    TorchFileError,
    UnsafePickleError,
)

_ENTRIES = (
    *("model", "state_dict", "model_state", "model_state_dict"),
    *("model_ema", "state_dict_ema"),
)
_LITERALS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_MAX_KEY = 1 << 60
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_DAMAGE = (
    *(ValueError, TypeError, LookupError, OverflowError, EOFError, OSError),
    # A zip that is encrypted, or compressed as zipfile cannot read, is a RuntimeError.
    *(struct.error, zipfile.BadZipFile, RuntimeError),
    Warning,  # where warnings are errors: of invalid escapes
)


class _Global(NamedTuple):
    """A name from the pickle. Nothing is imported for it."""

    name: str


class _Inert:
    """Stands for an `argparse.Namespace`: holds nothing, whatever it is given."""

    __slots__ = ()


def load(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a PyTorch `.pth` file without torch.

    Args:
      path: a file written by `torch.save` of torch 1.6 or newer (a zip).
      entry: which of the file's dictionaries to take, such as `model_ema`; None takes
        the only one there is.

    Returns:
      The state dict: read-only arrays in their stored type, bfloat16 as float32.

    Raises:
      UnsafePickleError: if the file names a class or function that is not a tensor's.
      TorchFileError: if it is cut short, damaged, of an older format, or holds no
        state dict or several.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        _check_format(file.read(512), name)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                size = os.fstat(file.fileno()).st_size
                saved = _Reader(TorchArchive(archive, size)).run()
            return _state_dict(saved, entry)
        except TorchFileError as error:
            raise type(error)(f"{name}: {error}") from error
        except _DAMAGE as error:
            raise TorchFileError(
                f"{name} is cut short or damaged ({type(error).__name__}: {error}): "
                "fetch the file again."
            ) from error


def _check_format(start: bytes, name: str):
    if start.startswith(b"PK\x03\x04"):
        return
    if start[257:262] == b"ustar":
        found = "the tar format of torch before 0.1.10"
    elif start[:1] == b"\x80":
        found = "the raw pickle format of torch before 1.6"
    else:
        found = f"no PyTorch file, or cut short (it starts with {start[:8]!r})"
    raise TorchFileError(
        f"{name} is {found}, and only the zip format is read: re-save it with a "
        "current torch (torch.save(torch.load(path), new_path)) or as safetensors."
    )


class _Reader:
    """Walks the pickle of one archive over a stack of inert values."""

    def __init__(self, archive: TorchArchive):
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, arg, _ in pickletools.genops(self.archive.program()):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, arg)
        return self.stack.pop()

    def _step(self, op: str, arg: Any):
        if op in _LITERALS:
            self.stack.append(_CONSTANTS.get(op, arg))
        elif op in _EMPTY:
            self.stack.append(_EMPTY[op]())
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[arg])
        elif op == "GLOBAL":
            self.stack.append(_allowed(arg.replace(" ", ".", 1)))
        elif op not in ("PROTO", "FRAME"):
            step = getattr(self, f"_op_{op.lower()}", None)
            if step is None:
                raise UnsafePickleError(f"pickle opcode {op} is refused.")
            step()

    def _op_mark(self):
        self.marks.append(self.stack)
        self.stack = []

    def _items(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _op_tuple(self):
        items = self._items()
        self.stack.append(tuple(items))

    def _short_tuple(self, count: int):
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def _op_tuple1(self):
        self._short_tuple(1)

    def _op_tuple2(self):
        self._short_tuple(2)

    def _op_tuple3(self):
        self._short_tuple(3)

    def _extend(self, items: list[Any]):
        if type(self.stack[-1]) is not list:
            raise TorchFileError("the pickle appends to something that is no list.")
        self.stack[-1].extend(items)

    def _op_append(self):
        self._extend([self.stack.pop()])

    def _op_appends(self):
        self._extend(self._items())

    def _update(self, items: list[Any]):
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise TorchFileError("the pickle sets items of something that is no dict.")
        for key, value in zip(items[::2], items[1::2]):
            # Plain keys only: the hash of nested shared tuples takes forever.
            # Small ones, too: any number of large integers have one hash.
            plain = type(key) in (str, int, float, bool, type(None))
            if not plain or (type(key) is int and not -_MAX_KEY < key < _MAX_KEY):
                raise UnsafePickleError(
                    f"dictionary key of type {type(key).__name__} is refused, and "
                    "integers from 2**60 on."
                )
            self.stack[-1][key] = value

    def _op_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _op_setitems(self):
        self._update(self._items())

    def _op_stack_global(self):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_allowed(f"{module:s}.{name:s}"))

    def _op_build(self):
        # State beside the items (`_metadata` of a state dict, a Namespace's fields)
        # is not needed, so it is dropped, not applied.
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, _Inert):
            raise UnsafePickleError("setting state on this object is refused.")

    def _op_newobj(self):
        self._op_reduce()

    def _op_reduce(self):
        args, called = self.stack.pop(), self.stack.pop()
        if type(called) is not _Global or type(args) is not tuple:
            raise UnsafePickleError("calling something that is no name is refused.")
        if called.name == "collections.OrderedDict" and args == ():
            self.stack.append({})
        elif called.name == "torch.Size" and len(args) == 1 and type(args[0]) is tuple:
            # A list would be copied at every call: a short pickle could take all memory.
            self.stack.append(args[0])
        elif called.name == "argparse.Namespace":
            self.stack.append(_Inert())
        elif called.name == "torch._utils._rebuild_tensor_v2":
            self.stack.append(self.archive.tensor(*args[:4]))
        elif called.name == "torch._utils._rebuild_parameter":
            if not isinstance(args[0], np.ndarray):
                raise TorchFileError("a parameter without a tensor.")
            self.stack.append(args[0])
        else:
            raise UnsafePickleError(f"calling {called.name} like this is refused.")

    def _op_binpersid(self):
        match self.stack.pop():
            case ("storage", _Global(kind), str(key), str(), int(numel)):
                pass
            case _:
                raise UnsafePickleError("a persistent id that is no storage.")
        if kind not in DTYPES or not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise TorchFileError(f"storage {key[:40]!r} of type {kind} is not known.")
        self.stack.append(Storage(key, DTYPES[kind], numel))


def _allowed(name: str) -> _Global:
    known = (
        *("collections.OrderedDict", "torch.Size", "argparse.Namespace"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    )
    if name not in known and name not in DTYPES:
        raise UnsafePickleError(
            f"the file asks for {name[:200]}, which is refused and was not run; only "
            "tensors and plain containers are read. If you trust the file, save its "
            "state dict alone with torch, or as safetensors."
        )
    return _Global(name)


def _state_dict(saved: Any, entry: str | None) -> dict[str, np.ndarray]:
    if type(saved) is not dict:
        raise TorchFileError(
            f"it holds a {type(saved).__name__}, not a state dict: save "
            "model.state_dict()."
        )
    found = [k for k in _ENTRIES if type(saved.get(k)) is dict and saved[k]]
    if entry is not None:
        if entry not in saved or type(saved[entry]) is not dict:
            raise TorchFileError(f"it has no dictionary {entry!r}, only {found}.")
        saved = saved[entry]
    elif len(found) > 1:
        raise TorchFileError(
            f"it holds several state dicts, {found}: choose one by entry= "
            "(--config.model.entry=NAME)."
        )
    elif found:
        saved = saved[found[0]]
    strange = [k for k, v in saved.items() if not isinstance(v, np.ndarray)]
    if strange or not saved or not all(type(k) is str for k in saved):
        raise TorchFileError(
            "it holds no state dict: expected tensors by name, at the top or under "
            f"one of {', '.join(_ENTRIES)}; not tensors: {strange[:8]}. Under another "
            "name, give it by entry= (--config.model.entry=NAME)."
        )
    return saved
