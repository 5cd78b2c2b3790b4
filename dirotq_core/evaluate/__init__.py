"""Comparing models by their pictures: ``dirotq evaluate``, described in docs/evaluate.md."""

from .options import EvaluationOptions
from .prompt_sets import Prompt, read_prompt_set, seed_of
from .run import evaluate

__all__ = ["EvaluationOptions", "Prompt", "evaluate", "read_prompt_set", "seed_of"]
