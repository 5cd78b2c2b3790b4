"""Registration with diffusers, without importing it.

diffusers' quantizer tables are dictionaries in `diffusers.quantizers.auto`, a module that pulls in transformers. So
importing dirotq only leaves a note for the import system: when that module is loaded, add our row. The same for the
modules that load models.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "dirotq"
TABLES = "diffusers.quantizers.auto"
SINGLE_FILES = "diffusers.loaders.single_file_utils"
LOAD = "load_single_file_checkpoint"
MODELS = "diffusers.models.modeling_utils"


def register() -> None:
    """Make diffusers know ``quant_method="dirotq"``, now or as soon as its modules are loaded. Idempotent."""
    actions = {
        TABLES: ("AUTO_QUANTIZER_MAPPING", _add_rows),
        SINGLE_FILES: (LOAD, _look_at_single_files),
        MODELS: ("ModelMixin", _look_at_folders),
    }
    waiting = {}
    for name, (last, action) in actions.items():
        if hasattr(sys.modules.get(name), last):  # else it is not loaded, or not to its end
            action(sys.modules[name])
        else:
            waiting[name] = action
    if waiting and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder(MetaPathFinder):
    """waiting: module → what to do with it when it is loaded."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]):
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, finder: _Finder):
        self._inner, self._finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        action = self._finder.waiting.pop(module.__name__, None)  # not before: imports can fail
        if not self._finder.waiting and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        if action is not None:
            action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _look_at_single_files(utils: ModuleType) -> None:
    """Let `from_single_file` say what a file of ours is; diffusers would convert it to a model of its own first."""
    original = getattr(utils, LOAD)
    if hasattr(original, "knows_dirotq"):
        return

    @functools.wraps(original)
    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = original(path, *args, **kwargs)
        from .single_file.refuse import refuse_quantized

        refuse_quantized(tensors, str(path))
        return tensors

    load.knows_dirotq = True  # type: ignore[attr-defined]
    setattr(utils, LOAD, load)
    for name in ("diffusers.loaders.single_file", "diffusers.loaders.single_file_model"):  # have their own names for it
        if getattr(sys.modules.get(name), LOAD, None) is original:
            setattr(sys.modules[name], LOAD, load)


def _look_at_folders(modeling: ModuleType) -> None:
    """Let `from_pretrained` check a folder of ours before it builds a model."""
    original = modeling.ModelMixin.from_pretrained.__func__
    if hasattr(original, "knows_dirotq"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> Any:
        from .loading import check_folder

        check_folder(cls, pretrained_model_name_or_path, kwargs)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained.knows_dirotq = True  # type: ignore[attr-defined]
    modeling.ModelMixin.from_pretrained = classmethod(from_pretrained)


def _add_rows(tables: ModuleType) -> None:
    # The first copy of the package wins when pip's and ComfyUI's are in one process.
    if METHOD in tables.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    loading = sys.modules.get(f"{__package__}.config")
    if loading is not None and not hasattr(loading, "DiRotQConfig"):
        return  # it is what made Python load the tables; it calls `register` when it is complete
    from .config import DiRotQConfig

    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DiRotQConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    _teach_pipeline_config(DiRotQConfig)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    # A function in a table of classes: diffusers only calls it, and our modules need diffusers' to be complete.
    from .backend import DiRotQQuantizer

    return DiRotQQuantizer(config, **kwargs)


def _teach_pipeline_config(config: type) -> None:
    """Let ``PipelineQuantizationConfig(quant_backend="dirotq")`` through.

    It wants the backend in transformers' table as well, with the same signature. transformers is loaded when that
    table is asked for, so our row goes in just before; register_quantization_config refuses diffusers' classes.
    """
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    original = PipelineQuantizationConfig._get_quant_config_list

    @functools.wraps(original)
    def with_dirotq(self: Any) -> Any:
        transformers_table, diffusers_table = original(self)
        if transformers_table is not None:
            transformers_table.setdefault(METHOD, config)
        return transformers_table, diffusers_table

    PipelineQuantizationConfig._get_quant_config_list = with_dirotq  # type: ignore[method-assign]
