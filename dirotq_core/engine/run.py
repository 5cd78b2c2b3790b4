"""`quantize_checkpoint`: from a folder or a Hub id to a folder, with one block of the model in memory at a time."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config import DiRotQConfig
from ..files import read_headers
from ..layout import plan_sites, sparing_float32
from ..report import QuantizationReport
from ..solve import LinearReport
from .blocks import Block, cut_into_blocks, pinned, place_buffers, read_ahead
from .dist import World
from .draw import draw_inputs
from .estimate import Estimate, NoRoomError, check_space, estimate, host_limit, measured_speed
from .journal import Journal, work_folder
from .options import EngineOptions
from .output import assemble
from .process import Workshop
from .request import check_call, fingerprint, images_of
from .samples import Activations, read_samples, share_on
from .source import Source, open_source, read_tensors
from .timing import Stopwatch

logger = logging.getLogger(__name__)

_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: DiRotQConfig | None = None,
    prompts: Sequence[str] | None = None,
    *,
    calibration: str | None = None,
    call: dict[str, Any] | None = None,
    options: EngineOptions | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a pipeline on disk or on the Hub, block by block; write the result to the new folder `out`.

    The dense model is never whole in memory. Finished blocks are kept in ``.NAME.partial`` beside `out`: after a kill,
    an interrupt or a full disk the same call goes on where it stopped and ends with the same bytes.

    Args:
        model: folder of a pipeline (or, without prompts, of a transformer) or Hub id.
        config: what to make; None for the default method.
        prompts: calibration prompts; None or empty: data-free.
        calibration: "none" for an instant data-free checkpoint, "prompts" to insist on `prompts`; None: as they say.
        call: keyword arguments of the pipeline's call, numbers and strings.
        options: how to calibrate and compute.

    Returns:
        The report, one row per linear; it is also in `out`.

    Raises:
        FileExistsError: `out` exists. ResumeError: unfinished work of another run is in the way.
        CheckpointError: the model is damaged. ValueError: a bad value, or no recipe for the model.
        OSError: a full disk, among others; finished blocks are kept.
    """
    _check_calibration(calibration, prompts)
    target, options, call = Path(out), options or EngineOptions(), dict(call or {})
    config = (config or DiRotQConfig()).resolved(calibrated=bool(prompts))
    images = images_of(prompts or [], options)
    if len(images) == 1:
        logger.warning("one image: none is left to hold out, so the report has no output SQNR")
    check_call(call)
    if target.exists() and not work_folder(target).exists():
        raise FileExistsError(f"{target} exists already; give a new folder, nothing is overwritten")
    source = open_source(model)
    if images and source.root is None:
        raise ValueError(f"{model} is a transformer without its pipeline, which calibration runs; only data-free works")
    skeleton = source.model(options.dtype)
    config = sparing_float32(config, skeleton)
    plans = plan_sites(skeleton, config)
    source.check(skeleton)
    wanted = fingerprint(source, config, images, call, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    world = World.join()
    options = replace(options, device=world.device(options.device))
    try:
        blocks, outer = cut_into_blocks(skeleton, plans)
        needs = estimate(source, skeleton, blocks, outer, config, len(images), call, options)
        needs.check_gpu(options)
        if not options.transformer_only:
            source.other_parts()  # which are copied
        with _journal(target, wanted, world) as journal:
            if world.share(target.exists()):
                return _already_complete(journal, target, world)
            world.by_first(partial(check_space, target, needs, journal.folder))
            place_buffers(skeleton, options.device)
            run = _Run(source, skeleton, blocks, outer, config, options, journal, world, progress and world.first)
            report = run.quantize(images, call)
            if world.first:
                parts = ["outer", *(b.name for b in blocks)]
                with run.watch("assembling"):
                    assemble(journal, parts, target, source, config, plans, report, options)
                journal.remove()
                logger.info("seconds by stage: %s", run.watch)
    except OSError as error:
        if error.errno not in _FULL or isinstance(error, NoRoomError):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror} while writing to {work_folder(target)}; what is finished is kept there: make room and "
            "run the same command again",
        ) from error
    finally:
        world.leave()
    for note in report.notes() if world.first else ():
        logger.warning("%s", note)
    return report


def _check_calibration(calibration: str | None, prompts: Sequence[str] | None) -> None:
    if calibration not in (None, "none", "prompts"):
        raise ValueError(f"calibration must be 'prompts' or 'none', got {calibration!r}")
    if calibration == "none" and prompts:
        raise ValueError("calibration='none' and prompts exclude each other")
    if calibration == "prompts" and not prompts:
        raise ValueError("calibration='prompts' needs prompts")


def plan_checkpoint(
    model: str | Path,
    config: DiRotQConfig | None = None,
    prompts: Sequence[str] | None = None,
    *,
    call: dict[str, Any] | None = None,
    options: EngineOptions | None = None,
) -> Estimate:
    """What `quantize_checkpoint` would do and take with these arguments. No weights are fetched from the Hub.

    The time follows from the speed of a product on the device, which is measured.
    """
    options, call = options or EngineOptions(), dict(call or {})
    config = (config or DiRotQConfig()).resolved(calibrated=bool(prompts))
    images = images_of(prompts or [], options)
    check_call(call)
    source = open_source(model, weights=Path(model).is_dir())
    skeleton = source.model(options.dtype)
    config = sparing_float32(config, skeleton)
    plans = plan_sites(skeleton, config)
    if source.entries:
        source.check(skeleton)
    blocks, outer = cut_into_blocks(skeleton, plans)
    needs = estimate(source, skeleton, blocks, outer, config, len(images), call, options)
    return replace(needs, speed=measured_speed(options))


def _journal(target: Path, wanted: dict[str, Any], world: World) -> Journal:
    """The first process makes the work folder, or refuses it; the others follow."""
    return world.by_first(partial(Journal, target, wanted)) or Journal(target, wanted, owner=False)


def _already_complete(journal: Journal, target: Path, world: World) -> QuantizationReport:
    """Killed between the last rename and the end: nothing is left to do but to clean up."""
    ours = world.share(journal.resumed and journal.assembled)
    report = QuantizationReport.load(target) if ours else None
    if report is None:
        raise FileExistsError(f"{target} exists already and is not from this run; nothing is overwritten")
    world.wait()
    if world.first:
        journal.remove()
    return report


class _Run:
    """One run, from the first block to the last."""

    def __init__(
        self, source: Source, model: Any, blocks: list[Block], outer: list[str], config: DiRotQConfig,
        options: EngineOptions, journal: Journal, world: World, progress: bool,
    ):  # fmt: skip
        self.source, self.model, self.blocks, self.outer, self.config = source, model, blocks, outer, config
        self.options, self.journal, self.world, self.progress = options, journal, world, progress
        self.watch = Stopwatch(options.device)

    def quantize(self, images: list[str], call: dict[str, Any]) -> QuantizationReport:
        notes = self.world.share({b.name: self.journal.record(b.name) for b in self.blocks if self.world.first})
        missing = [b for b in self.blocks if notes[b.name] is None]
        if missing:
            activations, held_out = self._activations(images, call) if images else (None, 0)
            workshop = Workshop(self.model, self.config, self.options, activations, held_out, self.world, self.watch)
            self._quantize_blocks(workshop, missing, notes)
        if self.world.first and self.journal.record("outer") is None:
            self.journal.commit("outer", self.source.read(self.outer, self.options.dtype), [])
        report = QuantizationReport(self.config.method, self.config.activation_bits or 4)
        for block in self.blocks:
            report.linears += [LinearReport(**row) for row in notes[block.name]]
        return report

    def _activations(self, images: list[str], call: dict[str, Any]) -> tuple[Activations, int]:
        """Those of this process's samples, and how many samples of all are held out."""
        with self.watch("drawing"):
            parts = draw_inputs(
                self.source, self.blocks, self.outer, images, call, self.config.seed, self.options, self.journal,
                self.world, self.progress,
            )  # fmt: skip
        samples = [s for part in parts for s in read_samples(self.journal.part(part))]
        activations = Activations(
            share_on(self.options.device, self.world.mine(samples)), self.blocks[0].recipe.returns,
            host_limit(self.options) / self.world.size, self.journal.folder / f"activations-{self.world.rank}",
            pinned=self.options.device.startswith("cuda"),
        )  # fmt: skip
        if activations.on_disk:
            logger.warning("the blocks' inputs take %.1f GB and wait in files", activations.bytes / 1e9)
        return activations, sum(s.held_out for s in samples)

    def _quantize_blocks(self, workshop: Workshop, missing: list[Block], notes: dict[str, Any]) -> None:
        # What comes after the last missing block needs no inputs.
        last = self.blocks.index(missing[-1])
        upto = self.blocks[: last + 1] if workshop.activations is not None else missing
        total = sum(b.weights for b in upto)
        with tqdm(total=total, desc="quantizing", unit="w", unit_scale=True, disable=not self.progress) as bar:
            for block, tensors in zip(upto, read_ahead(self._reads(upto, notes)), strict=True):
                bar.set_postfix_str(block.name)
                hand_on = workshop.activations is not None and block is not upto[-1]
                if notes[block.name] is None:
                    made, reports = workshop.quantize(block, tensors, hand_on)
                    notes[block.name] = [r.to_dict() for r in reports]
                    if self.world.first:
                        with self.watch("writing"):
                            self.journal.commit(block.name, made, notes[block.name])
                else:
                    workshop.replay(block, tensors)
                bar.update(block.weights)

    def _reads(self, blocks: Sequence[Block], notes: dict[str, Any]) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        finished = {b.name for b in blocks if notes[b.name] is not None}
        for block in blocks:
            quantized = block.name in finished and self.options.sequential
            yield partial(self._read, block, quantized)

    def _read(self, block: Block, quantized: bool) -> dict[str, torch.Tensor]:
        if quantized:
            return pinned(read_tensors(read_headers([self.journal.part(block.name)])), self.options.device)
        return pinned(self.source.read(block.tensors, self.options.dtype), self.options.device)
