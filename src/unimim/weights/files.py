"""What is read from a file of weights: tensors and plain data, verified; nothing in it is run, imported or followed."""

import argparse
import io
import json
import math
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unimim.errors import MissingFileError, UserError

ENCODERS = ("student.backbone.", "backbone.")
"""Where a checkpoint of pretraining, and one of fine-tuning, has the encoder."""
ENTRIES = ("state_dict", "model", "module", "teacher", "student", "model_ema", "state_dict_ema")
"""Where training scripts keep a state dict. DINO's and iBOT's own evaluations take the teacher, those of others the model."""
CHECKSUM = "unimim.checksum"
"""The key under which checkpoints and exports keep the `checksum` of their tensors."""
FOLDER = 0x10
"""A bit in the zip's directory: torch reads zeros for an entry that has it, and no other checksum covers it."""
CHANGED = f"its tensors are not those that were written; where that is meant, delete its entry {CHECKSUM!r}"
RUNS = (
    *(
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "shutil",
        "socket",
        "importlib",
        "runpy",
        "ctypes",
        "pty",
        "code",
        "webbrowser",
    ),
    *("eval", "exec", "compile", "execfile", "open", "input", "apply", "__import__"),
)
"""Modules and built-in functions that no file of weights has a use for."""
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Pickles name the types of tensors by them."""
DEEPEST = 32
"""Levels of nested lists and dicts in plain data."""


def read_file(path: str | Path) -> Any:
    """Reads a `.safetensors` file or a file of `torch.save`, and verifies it.

    A pickle may hold tensors and plain data only; an `argparse.Namespace` counts as plain data, because the official codes keep
    their arguments beside the weights. What a checkpoint of ours says of its backbone is checked too (`check_description`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, a folder of shards, a pickle that wants to run code, or says of its
            backbone what no file may say.
    """
    path = Path(path)
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, inert=True)
    check_description(content, path)
    return content


def read_safetensors(path: Path) -> Any:
    """Reads a `.safetensors` file: its tensors, and what an export of ours says of the backbone.

    Raises:
        FileNotFoundError, ValueError: as `read_file`.
    """
    from safetensors import SafetensorError, safe_open

    check_start(path)
    try:
        with safe_open(path, "pt") as tensors:
            metadata = tensors.metadata() or {}
            weights = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (it is no dict)
        described = json.loads(metadata["backbone"]) if "backbone" in metadata else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as weights, it may be truncated ({type(error).__name__})") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != header_checksum(weights, metadata.get("backbone", "")):
        raise UserError(damaged(path, CHANGED))
    return weights if described is None else {"state_dict": weights, "backbone": described}


def read_pickle(path: Path, mmap: bool = False, verify: bool = True, map_location: Any = "cpu", inert: bool = False) -> Any:
    """Reads a file of `torch.save`, and verifies it.

    Of a zip, torch's format since 1.6, the CRC of every entry is verified, and the tensors by the checksum that our own
    checkpoints keep. Older files have no checksum of any kind.

    Args:
        mmap: leaves the tensors of a zip on the disk until they are used.
        verify: False leaves the verification to a later call, where only some of many files will be used.
        map_location: where the tensors go, as in torch.load.
        inert: whether the pickle may hold other objects, as official scripts save them; each becomes an `Inert`.

    Raises:
        FileNotFoundError, ValueError: as `read_file`.
    """
    check_start(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            zipped = zipfile.is_zipfile(path)
            if not zipped or not verify:
                return unpickled(path, mmap and zipped, map_location, inert)
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if inert and any(entry.filename.endswith("constants.pkl") for entry in entries):
                    check_entries(archive, entries)
                    return read_torchscript(archive)
                check_directory(entries)
                storages = [entry for entry in entries if "/data/" in entry.filename]
                check_entries(archive, [entry for entry in entries if entry not in storages])
                check_entries(archive, storages, read=False)
                content = unpickled(path, mmap, map_location, inert)
                if is_changed(content):
                    raise zipfile.BadZipFile(CHANGED)
                if not isinstance(content, dict) or CHECKSUM not in content or not is_covered(content):
                    check_entries(archive, storages)
                return content
    except zipfile.BadZipFile as error:
        raise UserError(damaged(path, error)) from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({wanted[1]}, which could run code)" if wanted else ""
        raise UserError(
            f"{path} is refused: its pickle holds more than tensors and plain data{what}; whoever trusts it can save its "
            f"state_dict() alone"
        ) from error
    except Exception as error:  # each format has its own exceptions for a damaged file: all mean the same to the user
        raise UserError(f"{path} cannot be read as weights, it may be truncated ({type(error).__name__})") from error


def unpickled(path: Path, mmap: bool, map_location: Any, inert: bool) -> Any:
    """Returns the content of a file of `torch.save`: by torch's restricted unpickler, else by `InertUnpickler`.

    Raises:
        UnpicklingError: it holds other objects, and may not; what it holds is no dict.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as refused:
        if not inert:
            raise
        try:
            content = torch.load(path, map_location=map_location, weights_only=False, pickle_module=inert_pickle, mmap=mmap)
        except Exception as error:  # an object for which `Inert` cannot stand
            raise refused from error
        if type(content) not in (dict, OrderedDict):
            raise
        return content


def check_start(path: Path) -> None:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder of shards, the file is empty, or begins as no file of weights does.
    """
    if is_in_shards(path):
        check_shards(path)
        raise UserError(
            f"{path} is a folder of shards: make it one file with python -m lightning_fabric.utilities.consolidate_checkpoint "
            f"{path} --output_file FILE"
        )
    if not path.is_file():
        raise MissingFileError(f"there is no file {path} to read weights from")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path} holds no weights, it is empty")
    if path.suffix != ".safetensors" and not start.startswith((b"PK", b"\x80")):
        raise UserError(f"{path} holds no weights, it starts with {start[:24]!r} (a web page, or a pointer of Git LFS?)")


def check_directory(entries: list[zipfile.ZipInfo]) -> None:
    """Checks what the directory of a zip says of its entries, where torch would read other bytes than zipfile.

    Raises:
        BadZipFile: an entry is marked as a folder, or is not stored as it is.
    """
    for entry in entries:
        if entry.external_attr & FOLDER or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"its directory says of {entry.filename} what no file of torch.save has")


def check_entries(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], read: bool = True) -> None:
    """Compares the header of each entry of a zip with the directory, and reads it to its end, where its CRC is compared.

    Raises:
        BadZipFile: an entry has another header, or another CRC.
    """
    for entry in entries:
        with archive.open(entry) as content:
            while read and content.read(2**20):
                pass


def damaged(path: str | Path, why: object) -> str:
    """One line for a file whose bytes changed after it was written."""
    return f"{path} is damaged ({why}): copy or download it again, or take an earlier checkpoint"


def checksum(content: Any) -> int:
    """Returns the CRC-32 of all tensors in nested dicts, lists and tuples: of the name, dtype, shape and bytes of each."""
    total = 0
    for name, tensor in tensors_in(content, ""):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(content_of(tensor.cpu()), total)
    return total


def is_changed(content: Any) -> bool:
    """Returns whether a content has a checksum that is not the one of its tensors."""
    return isinstance(content, dict) and CHECKSUM in content and content[CHECKSUM] != checksum(content)


def save(content: dict[str, Any], file: Any) -> None:
    """Writes a file of torch.save that `read_pickle` can verify, with the CRCs of its entries and a checksum of its tensors."""
    as_set = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save({**content, CHECKSUM: checksum(content)}, file)
    finally:
        torch.serialization.set_crc32_options(as_set)


def header_checksum(weights: dict[str, Tensor], described: str) -> str:
    """Returns the checksum that stands in the header of a `.safetensors` file, of the tensors and of the rest of the header."""
    return str(zlib.crc32(described.encode(), checksum(dict(sorted(weights.items())))))


def tensors_in(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested dicts, lists and tuples with their names, but for those that `has_bytes` leaves out."""
    if isinstance(content, Tensor):
        if has_bytes(content):
            yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, part in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors_in(part, f"{name}.{key}")


def has_bytes(tensor: Tensor) -> bool:
    """Returns whether a tensor's content is its own plain bytes: it is not sparse, quantized, on meta, or of a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_quantized and not tensor.is_meta


def is_covered(content: Any) -> bool:
    """Returns whether `checksum` counts every tensor in the content."""
    if isinstance(content, Tensor):
        return has_bytes(content)
    if isinstance(content, (dict, list, tuple)):
        return all(map(is_covered, content.values() if isinstance(content, dict) else content))
    return content is None or isinstance(content, (bool, int, float, str, bytes, torch.dtype, torch.device))


def content_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor on the CPU; those of a contiguous one are not copied."""
    return tensor.detach().resolve_conj().resolve_neg().flatten().view(torch.uint8).numpy().data


# Plain data


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """
    Args:
        where: the file and the key, for the message.

    Raises:
        ValueError: the value is not None, a boolean, a number, a string, or a list or dict of these; a dict names a class.
    """
    if isinstance(value, dict) and depth < DEEPEST:
        if "class_path" in value:
            raise UserError(refusal(where, f"the class {value['class_path']!r}"))
        for key, part in value.items():
            if not isinstance(key, (str, int)):
                raise UserError(refusal(where, f"a dict with the key {key!r}"))
            check_plain(part, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)) and depth < DEEPEST:
        for place, part in enumerate(value):
            check_plain(part, f"{where}[{place}]", depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(refusal(where, f"a {type(value).__name__}"))


def refusal(where: str, what: str) -> str:
    """One line for a value that is more than data."""
    return f"{where} is refused: it is {what}, where only names, numbers, strings, booleans, lists and dicts of these may stand"


def description(content: Any) -> dict[str, Any] | None:
    """Returns what a checkpoint of ours, or a file exported from one, says of its backbone; None of other files.

    Keys: name, model_args, mean, std.
    """
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    found = content.get("backbone")
    return found if isinstance(found, dict) and {"name", "model_args", "mean", "std"} <= set(found) else None


def check_description(content: Any, path: str | Path) -> None:
    """Checks what a checkpoint of ours says of itself, before anything is made of it.

    Raises:
        ValueError: the name is not one of timm's own architectures (a hub or a folder, say), model_args are not plain data,
            mean or std no three numbers, classes no list of strings, or metrics no dict of numbers.
    """
    described = description(content)
    if described is None:
        return
    name = described["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
        raise UserError(f"{path}: backbone.name is refused: it is {name!r}, where only a name of timm's own may stand")
    if not isinstance(described["model_args"], dict):
        raise UserError(refusal(f"{path}: backbone.model_args", f"a {type(described['model_args']).__name__}"))
    check_plain(described["model_args"], f"{path}: backbone.model_args")
    for key in ("mean", "std"):
        values = described[key]
        three = isinstance(values, (list, tuple)) and len(values) == 3 and all(map(is_number, values))
        if not three or not all(math.isfinite(value) for value in values) or (key == "std" and min(values) <= 0):
            raise UserError(f"{path}: backbone.{key} is refused: it is {values!r}, where three numbers have to stand")
    classes, metrics = content.get("classes", []), content.get("metrics", {})
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(refusal(f"{path}: classes", "no list of strings"))
    if not isinstance(metrics, dict) or not all(isinstance(k, str) and is_number(v) for k, v in metrics.items()):
        raise UserError(refusal(f"{path}: metrics", "no dict of numbers"))
    if not isinstance(content.get("pretrained_from"), (str, type(None))):
        raise UserError(refusal(f"{path}: pretrained_from", f"a {type(content['pretrained_from']).__name__}"))


def is_number(value: Any) -> bool:
    """Returns whether a value is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# State dicts


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Returns `state_dict_in` the content of a file.

    Raises:
        FileNotFoundError, ValueError: as `read_file` and `state_dict_in`.
    """
    return state_dict_in(read_file(path), path)


def state_dict_in(content: Any, path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors in the content of a file, as `chosen_in` chooses them; of a checkpoint of ours, the encoder's.

    Raises:
        ValueError: as `chosen_in`.
    """
    if description(content):
        whole = content["state_dict"]
        encoder = next((prefix for prefix in ENCODERS if any(name.startswith(prefix) for name in whole)), "")
        return {name.removeprefix(encoder): value for name, value in whole.items() if name.startswith(encoder)}
    return chosen_in(content, path, key)[0]


def chosen_in(content: Any, path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Returns the state dict in the content of a file, and where it was found; empty where the file is nothing else.

    Where a file has several, as one of DINO has a teacher and a student, the first of `ENTRIES` is taken.

    Args:
        key: the entry to take; of one within another, both with a dot between.

    Raises:
        ValueError: there is no state dict, or none at this entry, or other objects stand among its tensors.
    """
    whole, taken, beside = content, [], []
    for entry in key.split(".") if key else ():
        known = [name for name, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
        if entry not in known:
            raise UserError(
                f"{path} has no entry {entry!r} to take weights from (checkpoint_key); it has {', '.join(map(str, known))}"
            )
        content = content[entry]
        taken.append(entry)
    while isinstance(content, dict) and not is_state_dict(content):
        entries = [name for name in ENTRIES if isinstance(content.get(name), dict)]
        if not entries:
            break
        content = content[entries[0]]
        taken.append(entries[0])
        beside += entries[1:]
    if isinstance(content, dict) and {Tensor, Inert} <= {base for value in content.values() for base in type(value).__mro__}:
        raise UserError(f"{path} is refused: its pickle holds more than tensors and plain data among its weights")
    if not is_state_dict(content):
        names = f"; it has {', '.join(map(str, whole))}" if isinstance(whole, dict) and len(whole) < 30 else ""
        raise UserError(f"{path} holds no state dict (a dict of names to tensors){names}")
    where = ".".join(taken)
    return content, f"{where}, beside {' and '.join(beside)} (checkpoint_key takes another)" if beside else where


def is_state_dict(content: Any) -> bool:
    """Returns whether it is a dict of names to tensors."""
    return isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def load_strictly(module: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Loads every key or none.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape; the first few are listed.
    """
    if found := misfits(module, state_dict):
        raise UserError(f"{source} does not fit {type(module).__name__}, nothing was loaded: {found}")
    module.load_state_dict(state_dict)


def misfits(module: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> str:
    """Returns the first keys that do not fit, in one line; nothing where all do.

    Args:
        strict: whether keys may neither be missing nor unexpected; of another shape they may never be.
    """
    expected = module.state_dict()
    return listed(
        of_another_shape=[
            f"{key} {tuple(state_dict[key].shape)} for {tuple(expected[key].shape)}"
            for key in expected
            if key in state_dict and getattr(state_dict[key], "shape", None) != getattr(expected[key], "shape", None)
        ],
        missing=[key for key in expected if strict and key not in state_dict],
        unexpected=[key for key in state_dict if strict and key not in expected],
    )


def listed(**problems: list[str]) -> str:
    """Returns '2 missing (a, b); 1 unexpected (c)', the first few of each kind, or nothing."""
    return "; ".join(f"{len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys)


# Objects beside the weights


class Inert(dict[Any, Any]):
    """Stands for an object of any class in a file: nothing is imported by its name, and what it was made of is thrown away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Keeps the attributes of a module of TorchScript, for its tensors."""
        if isinstance(state, dict):
            self.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Stands for what a call would give."""
        return Inert()

    def append(self, value: Any) -> None:
        """Takes what a list or a set takes."""

    extend = add = append


class InertUnpickler(pickle.Unpickler):
    """A pickle of whose names only those of tensors and plain containers are looked up; all others are `Inert`.

    Nothing that a file names is imported or called. A name that no training script saves, and that could run code, ends the
    reading all the same, because whoever wrote it meant no good.
    """

    plain: ClassVar[dict[str, tuple[str, ...]]] = {
        "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
        "torch": ("Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
        "collections": ("OrderedDict",),
        "argparse": ("Namespace",),
    }

    def find_class(self, module: str, name: str) -> Any:
        """
        Raises:
            UnpicklingError: the name is one of those that could run code.
        """
        if name in self.plain.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] in RUNS or (module in ("builtins", "__builtin__") and name in RUNS):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return type(name, (Inert,), {"__module__": module})


inert_pickle = SimpleNamespace(
    Unpickler=InertUnpickler, load=lambda file, **options: InertUnpickler(file, **options).load(), __name__="inert"
)
"""What torch.load takes as a module of pickle."""


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Reads the tensors of a TorchScript archive, as CLIP's weights are published, by their names; its code is not run.

    Raises:
        UnpicklingError: it holds what is no data.
    """
    (place,) = (name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))

    class Modules(InertUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in STORAGES:
                return STORAGES[name]
            return strided if name == "_rebuild_tensor_v2" else super().find_class(module, name)

        def persistent_load(self, pid: Any) -> Tensor:
            _, dtype, key, _, _ = pid
            return torch.frombuffer(bytearray(archive.read(f"{place}data/{key}")), dtype=dtype)

    def strided(storage: Tensor, offset: int, size: Any, stride: Any, *more: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)

    found: dict[str, Tensor] = {}

    def collect(part: Any, name: str) -> None:
        for key, value in part.items():
            if isinstance(value, Tensor):
                found[f"{name}{key}"] = value
            elif isinstance(value, Inert):
                collect(value, f"{name}{key}.")

    with archive.open(f"{place}data.pkl") as file:
        collect(Modules(file).load(), "")
    return found


# Shards


def is_in_shards(path: str | Path) -> bool:
    """Returns whether a path is a checkpoint of `ModelParallelStrategy`: a folder with a file of each process."""
    return (Path(path) / "meta.pt").is_file()


def check_checkpoint(path: str | Path) -> None:
    """Verifies a file of a training, or a folder of shards, before Lightning reads it.

    Raises:
        FileNotFoundError, ValueError: as `read_file` and `check_shards`.
    """
    if is_in_shards(path):
        check_shards(Path(path))
    else:
        read_pickle(Path(path), mmap=True)


def check_shards(folder: Path) -> None:
    """Verifies every file of a folder of shards, and that no pickle in it runs code: Lightning and torch would let it.

    torch's writer waits until each shard is on the disk, then writes `.metadata`, which says where in which file each part is;
    Lightning writes `meta.pt` last. Each part is a file of `torch.save`: its CRCs are verified, and its shape and dtype are
    compared with what `.metadata` says of it.

    Raises:
        ValueError: a file is missing, damaged, or wants to run code.
    """
    read_pickle(folder / "meta.pt", mmap=True)
    try:
        metadata = read_metadata(folder / ".metadata")
        expected = {
            (name, tuple(chunk.offsets)): (tuple(chunk.sizes), tensor.properties.dtype)
            for name, tensor in metadata.state_dict_metadata.items()
            for chunk in getattr(tensor, "chunks", [])
        }
        found = {}
        for index, part in metadata.storage_data.items():
            name = part.relative_path
            if Path(name).name != name:
                raise pickle.UnpicklingError(f".metadata names the file {name!r} outside of the folder")
            with (folder / name).open("rb") as file:
                file.seek(part.offset)
                content = io.BytesIO(file.read(part.length))
            with zipfile.ZipFile(content) as archive:
                check_directory(archive.infolist())
                check_entries(archive, archive.infolist())
            content.seek(0)
            value = torch.load(content, map_location="cpu", weights_only=True)
            if index.offset is not None:
                found[index.fqn, tuple(index.offset)] = tuple(value.shape), value.dtype
        if found != expected:
            raise EOFError("the parts are not those of .metadata")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder} is refused: it holds more than tensors and plain data, or is damaged ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # of a damaged pickle and of parts that are cut off, many kinds: all mean the same to the user
        raise UserError(damaged(folder, f"{type(error).__name__}: {error}".splitlines()[0])) from error


def read_metadata(path: Path) -> Any:
    """Reads the `.metadata` of a folder of shards, a pickle, and makes nothing but the classes that torch writes there.

    Raises:
        UnpicklingError: it names another class or function.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return MetadataUnpickler(file).load()


class MetadataUnpickler(pickle.Unpickler):
    """A pickle of torch.distributed.checkpoint's metadata, of whose names only those of plain records are looked up."""

    records: ClassVar[dict[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
        "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "collections": ("OrderedDict",),
    }

    def find_class(self, module: str, name: str) -> Any:
        """
        Raises:
            UnpicklingError: the name is not one of `records`.
        """
        if name not in self.records.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which could run code")
        return super().find_class(module, name)
