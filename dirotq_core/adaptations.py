"""What diffusers and PEFT have to know of quantized models, taught to their classes."""

from __future__ import annotations

from diffusers.utils import is_peft_available

from .diffusers_habits import count_as_dense, move_in_own_dtype, teach_flux_loras
from .hub import teach_pushing
from .pipeline_habits import cast_all_or_nothing
from .saving import check_pipelines, save_beside


def teach_libraries() -> None:
    """Run when a quantized model comes into being: made, loaded or, of which nothing else tells, unpickled.

    Idempotent.
    """
    count_as_dense()
    move_in_own_dtype()
    cast_all_or_nothing()
    save_beside()
    check_pipelines()
    teach_flux_loras()
    teach_pushing()
    if is_peft_available():
        from .peft_habits import teach_peft

        teach_peft()
