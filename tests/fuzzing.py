"""Hostile input to every reader of files, and what each is held to.

A reader must give what it reads or an error of a documented type that names the file;
take memory and time bounded by the file's size; run nothing out of the file; write
nothing. `benchmarks/fuzz_readers.py` gives it many inputs, `test_fuzz.py` a few.
"""

import gc
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import family_files
import mutations
import numpy as np
import orbax.checkpoint as ocp
import pth_files
from flax.traverse_util import unflatten_dict
from pictures import encoded, numbered_arrays, write_tar
from PIL import Image
from safetensors.numpy import load, save_file

from flax_skd.io import checkpoint, conversion, sources, torch_pickle
from flax_skd.io.conversion import ConversionError
from flax_skd.io.examples import BadImageError
from flax_skd.io.torch_archive import TorchFileError, UnsafePickleError
from flax_skd.method import piad, subnet
from flax_skd.method.spec import SubnetSpec

Files = dict[str, bytes]  # by path inside the folder that is read
WEIGHTS = {ConversionError, TorchFileError, UnsafePickleError}
IMAGES = {ValueError, BadImageError}
PIXELS = 1 << 20  # PIL.Image.MAX_IMAGE_PIXELS meanwhile: an image is a constant
# Wide enough for what other threads of a long test run do meanwhile.
MEMORY = 128 << 20, 128  # bytes, and bytes for each byte of input
SECONDS = 20.0, 2e-5  # of all threads, and for each byte of input


class Reader(NamedTuple):
    """One reader.

    Attributes:
      name: in reports.
      read: function of the folder.
      errors: the types it documents; a subclass is another type.
      seeds: whole inputs that are damaged.
      damage: file name's ending -> function (rng, bytes); files of other names stay.
      share: of all inputs, relative.
    """

    name: str
    read: Callable[[pathlib.Path], Any]
    errors: set[type]
    seeds: list[Files]
    damage: dict[str, Callable[[random.Random, bytes], bytes]]
    share: int = 10


def readers(work: pathlib.Path) -> list[Reader]:
    """All of them, with their seeds; `work` is a folder to write those in."""
    params = family_files.random_params(family_files.PLAIN)
    timm = family_files.timm(params, family_files.PLAIN)
    jax_names = family_files.vit_jax(params, family_files.PLAIN)
    zipped, pickled = mutations.zip_damaged, mutations.pickle_damaged

    def in_zip(inner):
        return lambda rng, raw: zipped(rng, raw, inner)

    def read_network(name):
        return lambda folder: family_files.read_timm(folder / name)

    return [
        Reader(
            "pth",
            lambda folder: torch_pickle.load(folder / "x.pth"),
            WEIGHTS - {ConversionError},
            _pth(work),
            {".pth": in_zip(pickled)},
            share=25,
        ),
        Reader(
            "pth of a network",
            read_network("x.pth"),
            WEIGHTS,
            [{"x.pth": _pth_of(work, timm)}],
            {".pth": in_zip(pickled)},
            share=5,
        ),
        Reader(
            "safetensors",
            read_network("x.safetensors"),
            WEIGHTS,
            [{"x.safetensors": _bytes(work, lambda p: save_file(timm, p))}],
            {".safetensors": mutations.header_damaged},
            share=15,
        ),
        Reader(
            "npz of weights",
            read_network("x.npz"),
            WEIGHTS,
            [
                {"x.npz": _bytes(work, lambda p, t=t: np.savez(p, **t))}
                for t in (timm, jax_names)
            ],
            {".npz": in_zip(mutations.npy_damaged)},
            share=10,
        ),
        Reader(
            "folder of Hugging Face",
            conversion.read,
            WEIGHTS,
            _hf(work, family_files.huggingface(params, family_files.PLAIN)),
            {
                ".json": mutations.json_damaged,
                ".safetensors": mutations.header_damaged,
            },
            share=10,
        ),
        Reader(
            "npz of images",
            lambda folder: (
                _open(f"npz:{folder / 'x.npz'}")
                and _open(f"npz:{folder / 'x.npz'}:test")
            ),
            IMAGES,
            _npz_images(work),
            {".npz": in_zip(mutations.npy_damaged)},
            share=15,
        ),
        Reader(
            "tar",
            lambda folder: _open(f"tar:{folder / 'x.tar'}"),
            IMAGES,
            _tars(work),
            {".tar": mutations.tar_damaged},
            share=15,
        ),
        Reader(
            "labels",
            lambda folder: _open(
                f"tar:{folder / 'x.tar'}", labels=str(folder / "labels.json")
            ),
            IMAGES,
            [{**_tars(work)[1], "labels.json": b'{"a.png": 0, "b.png": 1}'}],
            {".json": mutations.json_damaged},
            share=5,
        ),
        Reader(
            "encoded images",
            lambda folder: _open(f"folder:{folder}"),
            IMAGES,
            _pictures(),
            {"": mutations.damaged},
            share=10,
        ),
        Reader(
            "sub-network",
            checkpoint.load_subnet,
            {ValueError},
            _subnets(work, params),
            {
                ".json": mutations.json_damaged,
                ".safetensors": mutations.header_damaged,
            },
            share=5,
        ),
        Reader(
            "super-network",
            checkpoint.load_supernet,
            {ValueError},
            _supernets(work, params),
            {
                ".json": mutations.json_damaged,
                ".safetensors": mutations.header_damaged,
            },
            share=5,
        ),
    ]


def older(work: pathlib.Path) -> Reader:
    """Super-networks of earlier versions, by orbax: slow, and it warns as it fails."""
    params = family_files.random_params(family_files.PLAIN)
    files = _supernets(work, params)[1]
    flat = load(files["arrays.safetensors"])
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as saver:
        tree = unflatten_dict(flat, sep=".")
        saver.save(work / "older", args=ocp.args.PyTreeSave(tree))
    arrays = {f"arrays/{name}": x for name, x in _folder(work / "older").items()}
    shutil.rmtree(work / "older")
    return Reader(
        "super-network of an earlier version",
        checkpoint.load_supernet,
        {ValueError},
        [{"supernet.json": files["supernet.json"], **arrays}],
        {"supernet.json": mutations.json_damaged, "": mutations.damaged},
        share=1,
    )


def _bytes(work: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> bytes:
    path = work / "seed.npz"  # numpy wants the suffix
    write(path)
    content = path.read_bytes()
    path.unlink()
    return content


def _pth(work) -> list[Files]:
    six = {"0": np.arange(6, dtype=np.float32)}
    one = pth_files.tensor("0", 6, (2, 3), (3, 1))
    tops = (
        pth_files.mapping({"x": one}),
        pth_files.mapping({"model": pth_files.mapping({"x": one, "y": one})}),
    )
    return [
        {"x.pth": _bytes(work, lambda p, t=t: pth_files.write(p, t, six))} for t in tops
    ]


def _pth_of(work, tensors) -> bytes:
    storages = {str(i): v for i, v in enumerate(tensors.values())}
    items = {}
    for key, (name, v) in zip(storages, tensors.items()):
        strides = [s // v.itemsize for s in v.strides]
        items[name] = pth_files.tensor(key, v.size, v.shape, strides)
    top = pth_files.mapping({"model": pth_files.mapping(items)})
    return _bytes(work, lambda p: pth_files.write(p, top, storages))


def _hf(work, tensors) -> list[Files]:
    folder = work / "hf"
    folder.mkdir()
    family_files.write_hf(folder, tensors)
    one = _folder(folder)
    weights = one["model.safetensors"]
    index = b'{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}'
    shards = {"a.safetensors": weights, "model.safetensors.index.json": index}
    shutil.rmtree(folder)
    rest = {k: v for k, v in one.items() if k != "model.safetensors"}
    return [one, {**rest, **shards}]


def _folder(folder: pathlib.Path) -> Files:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _npz_images(work) -> list[Files]:
    images, labels = numbered_arrays()
    pictures = [encoded(10), encoded(20, form="JPEG")]
    split = {
        "test_bytes": np.frombuffer(b"".join(pictures), np.uint8),
        "test_offsets": np.cumsum([0, *map(len, pictures)]),
        "test_labels": np.array([0, 1]),
        "classes": np.array(["a", "b", "c"]),
    }
    both = {"images": images, "labels": labels, **split}
    return [{"x.npz": _bytes(work, lambda p: np.savez(p, **both))}]


def _tars(work) -> list[Files]:
    folders = {f"{c}/x.png": encoded(1) for c in "ab"}
    table = {"labels.json": b'{"a.png": 0, "b.png": 1}'}
    listed = {f"{c}.png": encoded(1, form="BMP") for c in "ab"} | table
    return [
        {"x.tar": _bytes(work, lambda p, t=t: write_tar(p, t))}
        for t in (folders, listed)
    ]


def _pictures() -> list[Files]:
    whole = {"b/x.png": encoded(3)}
    forms = ("PNG", "JPEG", "WEBP", "BMP")
    return [
        {f"a/x.{form.lower()}": encoded(9, form=form, size=(40, 30)), **whole}
        for form in forms
    ]


def _subnets(work, params) -> list[Files]:
    spec = family_files.PLAIN
    widths = SubnetSpec((4, 0), (3, 0), (12, 5))
    cut = subnet.extract(params, widths)
    network = checkpoint.Subnet(cut, spec, widths, {"parent": "x", "level": 3})
    checkpoint.save_subnet(work / "small", network)
    return _with_and_without_sums(work / "small")


def _supernets(work, params) -> list[Files]:
    spec = family_files.PLAIN
    network = checkpoint.Supernet(params, spec, piad.uniform(spec, steps=3), {})
    checkpoint.save_supernet(work / "super", network)
    return _with_and_without_sums(work / "super")


def _with_and_without_sums(folder: pathlib.Path) -> list[Files]:
    """Without sums, as earlier versions wrote them, damage gets to the reader."""
    (facts,) = folder.glob("*.json")
    found = []
    for _ in range(2):
        found.append(_folder(folder))
        fields = json.loads(facts.read_bytes())
        fields.pop("files", None)
        facts.write_text(json.dumps(fields))
    shutil.rmtree(folder)
    return found


def _open(description: str, **options: Any) -> bool:
    """Opens a source and decodes a few of its images."""
    source = sources.open_source(description, **options)
    for index in range(min(len(source), 3)):
        source[index]
    return True


def damage(reader: Reader, seed: int, index: int) -> Files:
    """Input `index`: the same for the same seed."""
    rng = random.Random(f"{seed}/{reader.name}/{index}")
    whole = rng.choice(reader.seeds)
    files = dict(whole)
    rules = {name: _rule(reader, name) for name in files}
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice([n for n, how in rules.items() if how and files[n]] or [""])
        if name:
            # Only a whole file has the structure that a rule looks for.
            how = rules[name] if files[name] is whole[name] else mutations.damaged
            files[name] = how(rng, files[name])
    if len(files) > 1 and rng.random() < 0.02:
        del files[rng.choice(list(files))]
    return files


def _rule(reader: Reader, name: str):
    return next((f for end, f in reader.damage.items() if name.endswith(end)), None)


class Outcome(NamedTuple):
    """`read` or the name of the error, seconds of all threads, peak bytes above the
    start as Python counts them and as the system does."""

    name: str
    seconds: float
    traced: int
    resident: int


class Fault(AssertionError):
    """A reader did what it must not."""


class Box:
    """A folder that files are put into and read from, watched.

    Use as a context: the working directory lies inside it, so that nothing that a file
    makes anywhere goes unseen, and warnings are errors.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root

    def __enter__(self):
        (self.root / "cwd").mkdir()
        (self.root / "above" / "given").mkdir(parents=True)
        self.folder = self.root / "above" / "given"
        self._home = os.getcwd()
        os.chdir(self.root / "cwd")
        self._bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        self._pixels, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("error")
        _watch()
        gc.collect()
        tracemalloc.start()
        return self

    def __exit__(self, *error):
        tracemalloc.stop()
        self._warnings.__exit__(*error)
        Image.MAX_IMAGE_PIXELS = self._pixels
        sys.dont_write_bytecode = self._bytecode
        os.chdir(self._home)

    def check(self, reader: Reader, files: Files) -> Outcome:
        """Reads one input and holds the reader to what it promises.

        Raises:
          Fault: says what it did.
        """
        self._fill(files)
        size, before = sum(map(len, files.values())), _listing(self.root)
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        resident, start = _reset_peak(), time.process_time()
        _ACTS.clear()
        _ARMED.append(True)
        try:
            reader.read(self.folder)
            name = "read"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (a panic of Rust is no Exception)
            name = self._judge(reader, error)
        finally:
            _ARMED.clear()
        outcome = Outcome(
            name,
            time.process_time() - start,
            tracemalloc.get_traced_memory()[1] - base,
            _peak() - resident,
        )
        wrong = {
            "did": list(_ACTS),
            "wrote": _listing(self.root) ^ before,
            "seconds": outcome.seconds > SECONDS[0] + SECONDS[1] * size,
            "memory": max(outcome[2:]) > MEMORY[0] + MEMORY[1] * size,
        }
        if any(wrong.values()):
            told = {what: found for what, found in wrong.items() if found}
            raise Fault(f"{told}: {outcome} of {size} bytes")
        return outcome

    def warm(self, reader: Reader, files: Files) -> None:
        """Reads a whole input, so that what is imported and compiled once is there.

        Raises:
          Fault: if it is refused.
        """
        self._fill(files)
        try:
            reader.read(self.folder)
        except Exception as error:
            raise Fault(f"{reader.name} refuses a whole file: {error}") from error

    def _fill(self, files: Files) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _judge(self, reader: Reader, error: BaseException) -> str:
        name = type(error).__name__
        if type(error) not in reader.errors:
            raise Fault(f"{name} is not documented: {error!s:.500}") from error
        if str(self.folder) not in str(error):
            raise Fault(f"{name} does not name the file: {error!s:.500}") from error
        return name


def _listing(root: pathlib.Path) -> set[tuple[str, int, int]]:
    out = set()
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            out.add((path, info.st_mode, 0 if name in names else info.st_mtime_ns))
    return out


_ARMED: list[bool] = []
_ACTS: list[str] = []
_WATCHED: list[bool] = []
_HARMFUL = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.mkdir"),
    *("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod"),
    *("os.chown", "os.truncate", "os.kill", "subprocess.Popen", "shutil."),
    *("pickle.find_class", "socket.connect", "socket.bind", "urllib.Request"),
    *("ctypes.dlopen", "tempfile."),
)


def _watch() -> None:
    """Hooks into the interpreter, once: what is done while a file is read."""
    if not _WATCHED:
        _WATCHED.append(True)
        sys.addaudithook(_audit)


def _audit(event: str, args: tuple) -> None:
    if not _ARMED:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
    if writes or event.startswith(_HARMFUL):
        _ACTS.append(f"{event}{args!r:.200}")


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _reset_peak() -> int:
    """Forgets the largest resident size so far, where the system can; gives today's."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _peak()


def _peak() -> int:
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    except OSError:  # elsewhere: of the whole process so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
