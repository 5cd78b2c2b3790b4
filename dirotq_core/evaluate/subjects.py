"""What is evaluated: pipelines, transformers and folders of images; what they are, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.source import download
from ..files import checkpoint_files, read_headers, read_json
from ..inspect import inspect_checkpoint
from ..loading import is_ours
from .images import SUFFIXES

#: The part of a pipeline that draws.
DENOISERS = ("transformer", "unet")


@dataclass(frozen=True)
class Size:
    """Of the denoiser. bytes: of its tensors. bits: average per parameter. linear_bits: per quantized weight.

    method, activation_bits: of a DiRotQ checkpoint; the bits an average over layers where sites have their own.
    """

    bytes: int
    bits: float | None = None
    linear_bits: float | None = None
    method: str | None = None
    activation_bits: float | None = None


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        kind: "pipeline", "transformer" (drawn with the reference's other parts) or "images".
        activation_bits: set before drawing; None for the checkpoint's own.
        control: the reference with other seeds.
    """

    name: str
    path: Path
    kind: str
    size: Size | None = None
    quantized: bool = False
    activation_bits: int | None = None
    control: bool = False


def parse_subject(text: str) -> tuple[str, str]:
    """(name, source) of ``NAME=SOURCE`` or of a source, which is then named by its last part."""
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        path = Path(text).resolve() if Path(text).exists() else Path(text)  # "." has a name, too
        name, source = path.name.removesuffix(".safetensors"), text
    if not source or not name or not _plain(name):
        raise ValueError(
            f"{text!r} must be SOURCE or NAME=SOURCE, with a name of letters, digits, spaces and -._+, got {name!r}"
        )
    return name, source


def _plain(name: str) -> bool:
    """Whether it can be a folder's name."""
    return all(c.isalnum() or c in " -._+," for c in name) and name.strip(" .") == name


def open_subject(name: str, source: str, converted: Path) -> Subject:
    """Find out what `source` is; a Hub id is downloaded, a single file converted into the folder `converted`.

    Raises:
        ValueError: it is nothing that can be evaluated.
    """
    path = Path(source)
    if path.is_file():
        stat = path.stat()
        path = _unpack(path, converted / f"{name}-{stat.st_size:x}-{stat.st_mtime_ns:x}")
    elif not path.is_dir():
        path = download(source, weights=True)
    if (path / "model_index.json").is_file():
        denoiser = next((path / part for part in DENOISERS if (path / part / "config.json").is_file()), None)
        if denoiser is None:
            raise ValueError(f"{path} is a pipeline without a {' or '.join(DENOISERS)}")
        return Subject(name, path, "pipeline", measure(denoiser), _is_quantized(denoiser))
    if (path / "config.json").is_file():
        return Subject(name, path, "transformer", measure(path), _is_quantized(path))
    if any(f.suffix.lower() in SUFFIXES for f in path.rglob("*")):
        return Subject(name, path, "images")
    raise ValueError(f"{path} is neither a pipeline, nor a transformer, nor a folder of images")


def _unpack(file: Path, folder: Path) -> Path:
    from ..single_file import convert

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(file, folder)
    return folder


def _is_quantized(folder: Path) -> bool:
    return is_ours(read_json(folder / "config.json"))


def is_quantized(subject: Subject) -> bool:
    """Whether its denoiser is, by whichever package. Of images it is not known."""
    return subject.size is not None and subject.size.bits != 16


def measure(folder: Path) -> Size:
    """Of a denoiser's folder. The bits of what another package has quantized are not known.

    A dense one counts 16 bits a parameter, whatever its file has: in 16 bit it draws.
    """
    if _is_quantized(folder):
        result = inspect_checkpoint(folder)
        return Size(
            result.total_bytes, result.average_bits, result.quantized_bits, result.config.method,
            result.activation_bits,
        )  # fmt: skip
    entries = read_headers(checkpoint_files(folder)).values()
    if read_json(folder / "config.json").get("quantization_config"):
        return Size(sum(e.bytes for e in entries))
    return Size(sum(2 * e.bytes // e.dtype.itemsize for e in entries), 16.0)


def check_architectures(reference: Subject, subjects: Sequence[Subject]) -> None:
    """ValueError unless all draw with the reference's kind of model."""
    for subject in subjects:
        if subject.kind == "images":
            continue
        if reference.kind == "images":
            if subject.kind == "transformer":
                raise ValueError(f"{subject.path} is a transformer alone; give a pipeline as reference to draw with")
            continue
        theirs, mine = _denoiser(reference), _denoiser(subject)
        if mine.get("_class_name") != theirs.get("_class_name"):
            raise ValueError(
                f"{subject.path} is a {mine.get('_class_name')} and the reference {reference.path} a "
                f"{theirs.get('_class_name')}; only models of one architecture are compared"
            )
        changed = [k for k in sorted(theirs.keys() | mine.keys()) if _of_shape(k) and theirs.get(k) != mine.get(k)]
        if subject.kind == "transformer" and changed:
            raise ValueError(
                f"{subject.path} has {changed[0]} {mine.get(changed[0])!r} and the reference {reference.path} "
                f"{theirs.get(changed[0])!r}; its pipeline cannot draw with it"
            )


def _of_shape(name: str) -> bool:
    return not name.startswith("_") and name != "quantization_config"


def _denoiser(subject: Subject) -> dict[str, Any]:
    folders = [subject.path / part for part in DENOISERS] if subject.kind == "pipeline" else [subject.path]
    return next(read_json(f / "config.json") for f in folders if (f / "config.json").is_file())


def with_activation_bits(subjects: Sequence[Subject], bits: Sequence[int]) -> list[Subject]:
    """Each DiRotQ checkpoint once for each of `bits`; the others as they are. ValueError if none is one."""
    if not bits:
        return list(subjects)
    if not any(s.quantized for s in subjects):
        raise ValueError("activation bits can be set of DiRotQ checkpoints only, and none is among the models")
    for subject in filter(lambda s: s.quantized, subjects):
        choices = inspect_checkpoint(subject.path).config.activation_choices
        wrong = next((b for b in bits if b not in choices), None)
        if wrong is not None:
            raise ValueError(f"activation bits of {subject.path} must be of {choices}, got {wrong}")
    return [_with_bits(s, b) if b else s for s in subjects for b in (bits if s.quantized else (0,))]


def _with_bits(subject: Subject, bits: int) -> Subject:
    assert subject.size is not None  # it is a checkpoint
    size = replace(subject.size, activation_bits=bits)
    return replace(subject, name=f"{subject.name}, A{bits}", activation_bits=bits, size=size)


def check_names(subjects: Sequence[Subject]) -> None:
    """ValueError if two rows would have one name."""
    names = [s.name.casefold() for s in subjects]
    twice = next((s.name for s in subjects if names.count(s.name.casefold()) > 1), None)
    if twice is not None:
        raise ValueError(f"two rows are called {twice!r}; name them: NAME=SOURCE")


def load_pipeline(subject: Subject, reference: Subject, dtype: Any, device: str, offload: bool) -> Any:
    """The pipeline that draws `subject`'s pictures, on `device`, or there part by part with `offload`."""
    import diffusers

    if subject.kind == "pipeline":
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(subject.path), torch_dtype=dtype, local_files_only=True
        )
    else:
        cls = getattr(diffusers, _denoiser(subject)["_class_name"])
        transformer = cls.from_pretrained(str(subject.path), torch_dtype=dtype, local_files_only=True)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(reference.path), transformer=transformer, torch_dtype=dtype, local_files_only=True
        )
    if subject.activation_bits is not None:
        from ..build import set_activation_bits

        set_activation_bits(pipeline.transformer, subject.activation_bits)
    pipeline.set_progress_bar_config(disable=True)
    if offload and device != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def identity(subject: Subject) -> dict[str, str]:
    """File name → size and time, of what the pictures depend on."""
    kinds = ("*.json", "*.safetensors")
    files = sorted(f for kind in kinds for f in subject.path.rglob(kind) if f.is_file())
    stats = {f.relative_to(subject.path).as_posix(): f.stat() for f in files}
    return {name: f"{s.st_size} bytes, {s.st_mtime_ns}" for name, s in stats.items()}
