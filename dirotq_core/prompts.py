"""Calibration prompts: the built-in set and a user's file."""

from __future__ import annotations

from pathlib import Path

#: 128 prompts written for this project, one a line.
BUILT_IN_PROMPTS = Path(__file__).parent / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """Non-empty lines of a UTF-8 file, with a byte order mark or without; ValueError if it is not UTF-8 or has none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
