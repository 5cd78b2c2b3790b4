"""Drawing every prompt with a pipeline, each picture a file as soon as it is there."""

from __future__ import annotations

import gc
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..engine.dist import World
from ..engine.journal import ResumeError, differences, sync, write_atomically
from .images import ImageSet, find_images, opening
from .options import EvaluationOptions
from .prompt_sets import Prompt, digest
from .subjects import Subject, identity, load_pipeline

DRAWING = "drawing.json"
#: Arguments of a pipeline that the drawing sets itself.
OWN_ARGUMENTS = ("prompt", "generator", "output_type", "num_images_per_prompt")


def draw_subject(
    subject: Subject, reference: Subject, prompts: Sequence[Prompt], folder: Path, options: EvaluationOptions,
    world: World,
) -> ImageSet:  # fmt: skip
    """The pictures of `subject` in `folder`, those that are missing drawn now; every process draws its share.

    Batches are the same whatever is missing, so that a run that was killed and goes on draws what it would have drawn.

    Raises:
        ResumeError: the folder holds pictures of another model, or drawn in another way.
    """
    wanted = world.by_first(lambda: _open(subject, reference, prompts, folder, options))
    missing = world.share(wanted)
    mine = world.mine(missing or [])
    if mine:
        pipeline = load_pipeline(subject, reference, options.dtype, world.device(options.device), options.offload)
        _check_call(pipeline, options.call)
        label = subject.name if world.size == 1 else f"{subject.name} ({world.rank})"
        with tqdm(total=sum(map(len, mine)), desc=label, unit="image", disable=not options.progress) as bar:
            for batch in mine:
                _draw(pipeline, batch, folder, options, subject.control)
                bar.update(len(batch))
        del pipeline
        free_memory()
    world.wait()
    return find_images(subject.name, folder, (p.id for p in prompts))


def free_memory() -> None:
    """Give back what a pipeline or a judge, to which nothing refers any more, had on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _open(
    subject: Subject, reference: Subject, prompts: Sequence[Prompt], folder: Path, options: EvaluationOptions
) -> list[list[Prompt]]:
    """The batches in which a picture is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / DRAWING
    now = _fingerprint(subject, reference, prompts, options)
    if file.exists():
        try:
            before = json.loads(file.read_bytes())
        except ValueError as error:
            raise ResumeError(f"{file} is damaged ({error}); remove {folder} to draw again") from error
        changes = differences(before, now)
        if changes and not any(folder.glob("*.png")):  # stopped before the first picture, by a wrong argument perhaps
            write_atomically(file, json.dumps(now, indent=1).encode())
        elif changes:
            raise ResumeError(
                f"{folder} holds pictures that were drawn differently: {'; '.join(changes[:3])}"
                + (f"; and {len(changes) - 3} more differences" if len(changes) > 3 else "")
                + ". Give another folder to write, or remove that one to draw again"
            )
    elif any(f.suffix != ".tmp" for f in folder.iterdir()):
        raise ResumeError(f"{folder} holds files that were not drawn here; give another folder to write")
    else:
        write_atomically(file, json.dumps(now, indent=1).encode())
    for prompt in prompts:
        _check_drawn(_file(folder, prompt), prompt)
    size = options.batch
    batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    return [batch for batch in batches if not all(_file(folder, p).exists() for p in batch)]


def _check_call(pipeline: Any, call: dict[str, Any]) -> None:
    """ValueError for an argument that the pipeline does not name; some would swallow it without a word."""
    known = inspect.signature(pipeline.__call__).parameters
    unknown = next((name for name in call if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{type(pipeline).__name__} has no argument {unknown!r}; it has {', '.join(known)}")


def _fingerprint(
    subject: Subject, reference: Subject, prompts: Sequence[Prompt], options: EvaluationOptions
) -> dict[str, Any]:
    """What the pictures depend on, machine and versions of other packages aside."""
    around = identity(reference) if subject.kind == "transformer" else {}
    body = {
        "files": identity(subject) | {f"reference/{name}": value for name, value in around.items()},
        "activation_bits": subject.activation_bits,
        "call": options.call,
        "dtype": str(options.dtype).removeprefix("torch."),
        "batch": options.batch,
        "control": subject.control,
        # The last bit of a picture depends on the others of its batch.
        "prompts": digest(prompts) if options.batch > 1 else None,
    }
    return json.loads(json.dumps(body))


def _file(folder: Path, prompt: Prompt) -> Path:
    return folder / f"{prompt.id}.png"


def _check_drawn(file: Path, prompt: Prompt) -> None:
    """ResumeError if the picture is of another prompt."""
    from PIL import Image

    if not file.exists():
        return
    with opening(file), Image.open(file) as image:
        drawn = image.info.get("prompt")  # from before the pixels, which stay unread
    if drawn != prompt.text:
        raise ResumeError(
            f"{file} was drawn for {drawn!r:.80}, but {prompt.id!r} now is {prompt.text!r:.80}; give another folder "
            "to write"
        )


@torch.no_grad()
def _draw(
    pipeline: Any, batch: Sequence[Prompt], folder: Path, options: EvaluationOptions, control: bool
) -> None:  # fmt: skip
    seeds = [p.seed(control) for p in batch]
    torch.manual_seed(seeds[0])  # for schedulers that draw noise without the generator
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    one = len(batch) == 1
    images = pipeline(
        prompt=batch[0].text if one else [p.text for p in batch],
        generator=generators[0] if one else generators,
        **options.call,
    ).images
    if len(images) != len(batch):
        raise ValueError(f"{type(pipeline).__name__} returned {len(images)} images for {len(batch)} prompts")
    for prompt, seed, image in zip(batch, seeds, images, strict=True):
        _save(image, _file(folder, prompt), prompt, seed)


def _save(image: Any, file: Path, prompt: Prompt, seed: int) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", prompt.text)
    info.add_itxt("seed", str(seed))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        image.convert("RGB").save(temporary, format="png", pnginfo=info)
        sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
