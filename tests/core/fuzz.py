"""Seeded mutations of checkpoints in both layouts, and the verdict on each.

A broken checkpoint must end in one CheckpointError or ValueError of one line; what is read all the same must hold the
original's tensors, bit for bit. Anything else (another exception, other tensors, a case that takes long) is a finding.
Valid values in place of other valid values are no case: no format without a checksum can see those.

Run as a module for many cases: ``python -m tests.core.fuzz --cases 100000 --out benchmarks/results/fuzz.json``, and
with ``--load`` for those that diffusers loads (``fuzz_loading.json``).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import pickle
import random
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq
from dirotq.dirotq_core.single_file import convert, read_native

from .fuzz_verdicts import alarm, load_verdict, read_verdict

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
CONFIG = "config.json"
SECONDS = 10  # what one case may take

#: Values that JSON can hold and that nobody expects.
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 63, 65, 2**31, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a\nb", "\x00", "../../etc/passwd", "/etc/passwd", "dirotq",
    "F32", "F64", "U8", "I64", "F8_E4M3", "F4", "é" * 50, "x" * 5000, [], [0], [-1], [0, 0], [1, 2, 3], [2**62, 1, 0],
    ["*"], ["a"] * 300, [[]], {}, {"a": 1}, [None], "FluxTransformer2DModel", "UNet2DConditionModel", "__class__", "nn",
]  # fmt: skip

Files = dict[str, bytes]


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=64, num_layers=1, cross_attention_dim=64, caption_channels=64,
        sample_size=16, use_additional_conditions=False, in_channels=4, out_channels=8,
    )  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A good checkpoint. files: name → bytes; a single file has one. tensors: what `read_native` finds in it.

    loaded: what `from_pretrained` makes of a folder.
    """

    name: str
    files: Files
    tensors: dict[str, torch.Tensor]
    loaded: dict[str, torch.Tensor]

    @property
    def folder(self) -> bool:
        return CONFIG in self.files


def make_seeds(folder: Path) -> list[Seed]:
    """FLUX.1 and PixArt as one shard, as several, and as a single file."""
    seeds = []
    for make in (flux, pixart):
        name = make.__name__
        torch.manual_seed(0)
        make().to(torch.bfloat16).save_pretrained(folder / f"{name}-dense")
        model = type(make()).from_pretrained(
            folder / f"{name}-dense", quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16
        )
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-sharded", max_shard_size="100KB")
        convert(folder / name, folder / f"{name}.safetensors")
        for path in (folder / name, folder / f"{name}-sharded", folder / f"{name}.safetensors"):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            tensors = {n: t.clone() for n, t in read_native(path).tensors.items()}
            loaded = {n: t.detach().clone() for n, t in model.state_dict().items()}
            seeds.append(Seed(path.name, {f.name: f.read_bytes() for f in files}, tensors, loaded))
    return seeds


# --- mutations: each changes `files` in place ---------------------------------------------------------------------


def some_weights(files: Files, r: random.Random) -> str:
    return r.choice(sorted(n for n in files if n.endswith(".safetensors")))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def truncate(files: Files, r: random.Random) -> None:
    name = r.choice(sorted(files))
    files[name] = files[name][: r.randrange(len(files[name]))]


def extend(files: Files, r: random.Random) -> None:
    name = some_weights(files, r)
    files[name] += r.randbytes(r.choice((1, 7, 8, 4096)))


def length(files: Files, r: random.Random) -> None:
    name = some_weights(files, r)
    real = struct.unpack("<Q", files[name][:8])[0]
    value = r.choice((0, 1, real - 1, real + 1, real + 8, 2**31, 2**40, 2**63, 2**64 - 1, r.getrandbits(64)))
    files[name] = struct.pack("<Q", value) + files[name][8:]


def header_bytes(files: Files, r: random.Random) -> None:
    name = some_weights(files, r)
    data = bytearray(files[name])
    for _ in range(r.choice((1, 1, 1, 2, 8))):
        data[r.randrange(8 + struct.unpack("<Q", files[name][:8])[0])] = r.randrange(256)
    files[name] = bytes(data)


def json_bytes(files: Files, r: random.Random) -> None:
    names = sorted(n for n in files if n.endswith(".json"))
    if not names:
        header_bytes(files, r)
        return
    name = r.choice(names)
    data = bytearray(files[name])
    data[r.randrange(len(data))] = r.randrange(256)
    files[name] = bytes(data)


def entry(files: Files, r: random.Random) -> None:
    """One field of one tensor's entry, or the entry itself."""
    name = some_weights(files, r)
    header, data = split(files[name])
    tensor = r.choice(sorted(n for n in header if n != "__metadata__"))
    fields = header[tensor]
    kind = r.randrange(8)
    if kind == 0:
        header[tensor] = r.choice(HOSTILE)
    elif kind == 1:
        fields[r.choice(("dtype", "shape", "data_offsets"))] = r.choice(HOSTILE)
    elif kind == 2:
        del fields[r.choice(sorted(fields))]
    elif kind == 3 and fields["shape"]:
        fields["shape"][r.randrange(len(fields["shape"]))] = r.choice(HOSTILE)
    elif kind == 4:
        i = r.randrange(2)
        fields["data_offsets"][i] = r.choice([*HOSTILE, fields["data_offsets"][i] + r.choice((-8, -1, 1, 8))])
    elif kind == 5:  # an empty tensor of an enormous shape takes no byte
        fields["shape"], fields["data_offsets"] = [0, r.choice((2**40, 2**62, 10**30)), 2**40], [0, 0]
    elif kind == 6:
        other = r.choice(sorted(n for n in header if n != "__metadata__"))
        fields["data_offsets"] = header[other]["data_offsets"]
        if other == tensor:
            del header[tensor]
    else:
        header[r.choice(("", "a", "\n", "__metadata__", "../x", tensor + "x"))] = header.pop(tensor)
    files[name] = joined(header, data)


def metadata(files: Files, r: random.Random) -> None:
    name = some_weights(files, r)
    header, data = split(files[name])
    found = header.get("__metadata__", {})
    if found and r.random() < 0.7:
        found[r.choice([*sorted(found), "a"])] = r.choice(HOSTILE)
    else:
        header["__metadata__"] = r.choice(HOSTILE)
    files[name] = joined(header, data)


def nested(files: Files, r: random.Random) -> None:
    depth = r.choice((100, 5000, 100_000))
    text = b'{"a":' * depth + b"1" + b"}" * depth
    name = r.choice(sorted(files))
    files[name] = text if name.endswith(".json") else joined(text, b"")


def config(files: Files, r: random.Random) -> None:
    """A value of the configuration, of the model's or of the quantization's."""

    def change(body: dict[str, Any]) -> None:
        part = body["quantization_config"] if r.random() < 0.5 else body
        kind, key = r.randrange(5), r.choice(sorted(part))
        if kind == 0:
            del part[key]
        elif kind == 1:
            part[r.choice(("a", "", "_name_or_path", "surprise", "__init__"))] = r.choice(HOSTILE)
        elif kind == 2 and isinstance(part[key], int):
            part[key] = part[key] + r.choice((-1, 1)) if r.random() < 0.5 else part[key] * r.choice((2, 1000, 10**9))
        else:
            part[key] = r.choice(HOSTILE)

    _config(files, change)


def _config(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    if CONFIG in files:
        body = json.loads(files[CONFIG])
        change(body)
        files[CONFIG] = json.dumps(body).encode()
        return
    (name,) = files
    header, data = split(files[name])
    body = json.loads(header["__metadata__"]["dirotq"])
    change(body)
    header["__metadata__"]["dirotq"] = json.dumps(body)
    files[name] = joined(header, data)


def index(files: Files, r: random.Random) -> None:
    """Entries of the index; a folder without one gets one."""
    if CONFIG not in files:
        metadata(files, r)
        return
    if INDEX in files:
        body = json.loads(files[INDEX])
    else:
        names = [n for n in split(files[WEIGHTS])[0] if n != "__metadata__"]
        body = {"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    weight_map = body["weight_map"]
    name = r.choice(sorted(weight_map))
    kind = r.randrange(6)
    if kind == 0:
        body[r.choice(("weight_map", "metadata"))] = r.choice(HOSTILE)
    elif kind == 1:
        weight_map[name] = r.choice(HOSTILE)
    elif kind == 2:
        own = weight_map[name]
        ways_out = "../outside.safetensors", "/dev/zero", "/dev/stdin", ".", "..", "C:\\x.safetensors"
        weight_map[name] = r.choice((*ways_out, f"./{own}", f"a/../{own}", CONFIG, "x.bin"))
    elif kind == 3:
        removed = weight_map[name]
        body["weight_map"] = {n: f for n, f in weight_map.items() if f != removed} or {"a": "b.safetensors"}
    elif kind == 4:
        weight_map[r.choice(("a", "", name + ".x"))] = weight_map[name]
    else:
        body["weight_map"] = {n: f"../{f}" for n, f in weight_map.items()}
    files[INDEX] = json.dumps(body).encode()


def values(files: Files, r: random.Random) -> None:
    """Not a number, infinity, negative scales, signs that are none."""
    name = some_weights(files, r)
    header, data = split(files[name])
    patterns = {"BF16": (b"\xc0\x7f", b"\x80\xff"), "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\x7f"), "I8": (b"\0", b"\2")}
    fit = sorted(n for n, f in header.items() if n != "__metadata__" and f["dtype"] in patterns)
    if not fit:
        extend(files, r)
        return
    tensor = r.choice(fit)
    value = r.choice(patterns[header[tensor]["dtype"]])
    if tensor.endswith("weight_scale") and r.random() < 0.3:
        value = {"BF16": b"\x80\xbf", "F32": b"\0\0\x80\xbf"}[header[tensor]["dtype"]]
    begin, end = header[tensor]["data_offsets"]
    at = begin + len(value) * r.randrange((end - begin) // len(value))
    files[name] = joined(header, data[:at] + value + data[at + len(value) :])


def replace(files: Files, r: random.Random) -> None:
    """A file that is something else."""
    name = r.choice(sorted(files))
    files[name] = r.choice((
        b"", b"\0" * 100, pickle.dumps({"a": 1}), b"PK\x03\x04" + r.randbytes(60), b"GGUF" + r.randbytes(60), b"null",
        r.randbytes(200), b"\x80\x02}q\x00.", b"{" * 64, b"[" * 200_000, joined({}, b""), b"1e999", b"\xef\xbb\xbf{}",
        b"9" * 5000,
    ))  # fmt: skip


def missing(files: Files, r: random.Random) -> None:
    if len(files) > 1:
        del files[r.choice(sorted(files))]
    else:
        replace(files, r)


def rename(files: Files, r: random.Random) -> None:
    """Pickles by their usual names, beside or in place of the weights."""
    if CONFIG in files:
        name = some_weights(files, r)
        data = files.pop(name) if r.random() < 0.7 else files[name]
        files[r.choice(("diffusion_pytorch_model.bin", "x.pt", "x.ckpt"))] = r.choice((data, pickle.dumps([1])))
    else:
        replace(files, r)


def special(files: Files, r: random.Random) -> None:
    """A name that is no regular file; `Fuzzer` makes it."""
    files[r.choice(sorted(files))] = SPECIAL + r.choice(sorted(MAKE)).encode()


SPECIAL = b"special:"
MAKE: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("absent"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.symlink_to(".."),
}

MUTATIONS = (
    truncate, extend, length, header_bytes, json_bytes, entry, entry, entry, metadata, nested, config, config, config,
    index, index, values, replace, missing, rename, special,
)  # fmt: skip


# --- cases ------------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Cases by number: the same number is the same case on every machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seeds = make_seeds(folder / "seeds")
        (folder / "outside.safetensors").write_bytes(self.seeds[0].files[WEIGHTS])

    def files(self, number: int) -> tuple[Seed, str, Files]:
        r = random.Random(number)
        seed, mutation = r.choice(self.seeds), r.choice(MUTATIONS)
        files = copy.copy(seed.files)
        mutation(files, r)
        if r.random() < 0.15 and files:
            try:
                r.choice(MUTATIONS)(files, r)  # a second one, where the first left something to mutate
            except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, struct.error, AttributeError):
                pass
        return seed, mutation.__name__, files

    def run(self, number: int, load: bool = False) -> tuple[str, str]:
        """(mutation, verdict) of one case; load: of `from_pretrained`, "other" for single files."""
        seed, mutation, files = self.files(number)
        if load and not seed.folder:
            return mutation, "other"
        case = self.folder / "case"
        case.mkdir()
        try:
            for name, data in files.items():
                kind = data.removeprefix(SPECIAL).decode(errors="replace")
                if data.startswith(SPECIAL) and kind in MAKE:
                    MAKE[kind](case / name)
                else:
                    (case / name).write_bytes(data)
            signal.signal(signal.SIGALRM, alarm)
            signal.alarm(SECONDS)
            try:
                if load:
                    cls = PixArtTransformer2DModel if seed.name.startswith("pixart") else FluxTransformer2DModel
                    return mutation, load_verdict(cls, seed.loaded, case)
                return mutation, read_verdict(seed.tensors, case if seed.folder else case / next(iter(files)))
            finally:
                signal.alarm(0)
        finally:
            shutil.rmtree(case)


def main() -> None:
    logging.disable(logging.CRITICAL)  # what diffusers says about unknown attributes
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--load", action="store_true", help="through from_pretrained instead of our own readers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    counts: dict[str, Counter[str]] = {}
    findings: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=base) as folder:
        fuzzer = Fuzzer(Path(folder))
        began = time.monotonic()
        for number in range(options.start, options.start + options.cases):
            mutation, outcome = fuzzer.run(number, options.load)
            found = outcome not in ("refused", "same", "other")
            counts.setdefault(mutation, Counter())["finding" if found else outcome] += 1
            if found:
                findings.append({"case": number, "mutation": mutation, "outcome": outcome})
                print(findings[-1], flush=True)
        seconds = time.monotonic() - began
    total = sum(counts.values(), Counter())
    result = {
        "cases": options.cases,
        "first": options.start,
        "seconds": round(seconds),
        "outcomes": dict(sorted(total.items())),
        "by_mutation": {m: dict(sorted(c.items())) for m, c in sorted(counts.items())},
        "findings": findings,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "findings"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
