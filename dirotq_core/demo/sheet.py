"""The contact sheet: bf16 above 4 bit, one column per prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Panel = tuple[str, Sequence[str], Sequence[np.ndarray], Sequence[np.ndarray]]

COLUMNS = 8
GAP, LABEL, CAPTION = 6, 74, 60


def contact_sheet(panels: Sequence[Panel], columns: int = COLUMNS) -> Image.Image:
    """Draw (model name, captions, bf16 images, 4-bit images) panels, `columns` pairs to a row.

    Images: uint8 [H, W, 3], all of one size.
    """
    size = panels[0][2][0].shape[0]
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    strip = 2 * (size + GAP) + CAPTION
    heights = [28 + strip * -(-len(captions) // columns) for _, captions, _, _ in panels]
    width = LABEL + columns * (size + GAP)
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for (name, captions, reference, quantized), height in zip(panels, heights, strict=True):
        pen.text((GAP, top + 6), name, fill="black", font=font)
        for i, caption in enumerate(captions):
            x = LABEL + (i % columns) * (size + GAP)
            y = top + 28 + (i // columns) * strip
            for k, (label, image) in enumerate((("bf16", reference[i]), ("W4A4", quantized[i]))):
                if i % columns == 0:
                    pen.text((GAP, y + k * (size + GAP) + size // 2 - 8), label, fill="black", font=font)
                sheet.paste(Image.fromarray(image), (x, y + k * (size + GAP)))
            lines = textwrap.wrap(caption, max(12, size // 6))[:4]
            pen.text((x, y + 2 * (size + GAP)), "\n".join(lines), fill="#444", font=small, spacing=2)
        top += height
    return sheet
