"""From finished parts to the folder that the user asked for."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base_model import of_folder
from ..card import write_card
from ..checkpoint import checkpoint_tensors
from ..config import DiRotQConfig
from ..files import check_headers, checkpoint_files, read_headers
from ..layout import SitePlan
from ..report import QuantizationReport
from ..shards import SHARD_BYTES, write_shards
from .journal import Journal, sync, sync_folder
from .source import COMPONENT_FILES, Source

logger = logging.getLogger(__name__)

PLOT_NAME = "dirotq_report.png"


def assemble(
    journal: Journal, parts: Sequence[str], target: Path, source: Source, config: DiRotQConfig, plans: list[SitePlan],
    report: QuantizationReport, options: Any,
) -> None:  # fmt: skip
    """Write the result under its name, which it gets when it is complete and on the disk."""
    folder = journal.folder / "result"
    shutil.rmtree(folder, ignore_errors=True)
    whole = source.root is not None and not options.transformer_only
    transformer = folder / source.folder.name if whole else folder
    transformer.mkdir(parents=True)
    model = source.model(options.dtype)
    spec = checkpoint_tensors(model, plans)
    entries = read_headers([journal.part(p) for p in parts])
    check_headers(entries, spec)
    write_shards(transformer, {name: entries[name] for name in spec}, SHARD_BYTES)
    model.register_to_config(quantization_config=config)
    model.save_config(transformer)
    check_headers(read_headers(checkpoint_files(transformer)), spec)
    if whole:
        _copy_pipeline(source, folder)
    report.save(folder)
    write_card(folder, of_folder(source.root or source.folder), name=target.name)
    _plot(report, folder)
    for path in [folder, *folder.rglob("*")]:
        (sync if path.is_file() else sync_folder)(path)
    journal.mark_assembled()
    os.replace(folder, target)
    sync_folder(target.parent)


def _copy_pipeline(source: Source, folder: Path) -> None:
    """Everything else a pipeline consists of, as it is."""
    assert source.root is not None
    shutil.copyfile(source.root / "model_index.json", folder / "model_index.json")
    for component in source.components():
        if source.root / component == source.folder:
            continue
        (folder / component).mkdir()
        for pattern in COMPONENT_FILES:
            for file in sorted((source.root / component).glob(pattern)):
                shutil.copyfile(file, folder / component / file.name)


def _plot(report: QuantizationReport, folder: Path) -> None:
    try:
        from .plot import plot_by_depth
    except ImportError:
        logger.warning("matplotlib is not installed: no %s (pip install dirotq[demo])", PLOT_NAME)
        return
    plot_by_depth(report, folder / PLOT_NAME)
