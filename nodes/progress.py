"""Progress of a long node: the bar, a line with the time left on node and console, and the interrupt."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from tqdm.auto import tqdm


class Progress:
    """Counts units of work of several stages.

    Args:
        total: units in all. node_id: of the node whose line shows the time left; None for none.
    """

    def __init__(self, total: int, node_id: str | None = None):
        self._bar = comfy.utils.ProgressBar(total)
        self._console = tqdm(total=total, desc="DiRotQ", leave=False)
        self._node = node_id

    def step(self, what: str, units: int = 1) -> None:
        """One more piece of the stage `what` is done. Raises InterruptProcessingException if asked to stop."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(units)
        self._console.set_description_str(f"DiRotQ: {what}", refresh=False)
        self._console.update(units)
        if self._node is not None:
            self._show(f"{what}, {self.left()} left")

    def left(self) -> str:
        """The time the rest takes at the mean speed so far, as minutes:seconds; ? before the first unit."""
        state: dict[str, Any] = self._console.format_dict
        if not state["n"]:
            return "?"
        return tqdm.format_interval(int(state["elapsed"] / state["n"] * max(0, state["total"] - state["n"])))

    def close(self) -> None:
        """Leave the console's line to others."""
        self._console.close()

    def _show(self, text: str) -> None:
        from server import PromptServer  # ComfyUI's, at its top level

        if getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(text, self._node)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
