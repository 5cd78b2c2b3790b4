"""The report as one page that needs no other file: tables, plots, and the pictures side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .images import ImageSet
from .prompt_sets import Prompt
from .summary import JUDGE, JUDGE_COLUMNS, cell, columns_of, judge_rows, marked

#: Longer side of a picture on the page.
THUMBNAIL = 320
#: Prompts shown because they lost most, beside those at equal distances.
WORST = 4

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tr.soft td { opacity: .7; }
.ends { opacity: .65; font-size: .85em; display: block; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption, .small { font-size: .85rem; opacity: .75; }
.grid { display: grid; gap: .6rem; align-items: start; overflow-x: auto; }
.grid img { width: 100%; border-radius: 4px; display: block; }
.grid .head { font-weight: 600; font-size: .85rem; overflow-wrap: anywhere; }
.grid .prompt { font-size: .8rem; opacity: .8; overflow-wrap: anywhere; max-height: 16rem; overflow: auto; }
"""


def write_page(
    result: Mapping[str, Any], sets: Sequence[ImageSet], prompts: Sequence[Prompt],
    scores: Mapping[str, Mapping[str, np.ndarray]], shown: int,
) -> str:  # fmt: skip
    """The page's text. sets: the reference first. shown: prompts in the grid, beside the worst ones."""
    from .plots import plots

    drawn = [f"{name} = {value}" for name, value in result["call"].items()]
    about = [
        f"{result['prompts']['count']} prompts ({result['prompts']['digest'].split(', ')[-1]})",
        f"{result['dtype']} on {result['device']}",
        *drawn,
        *(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    body = [
        "<h1>Evaluation</h1>",
        f'<p class="small">{escape(" · ".join(about))}</p>',
        f"<p>{escape(_seeds(result['rows']))} In brackets: 95 % intervals of a bootstrap over prompts, the same "
        "resampled prompts for all models.</p>",
        _table(result),
        *(f'<p class="small">{escape(note)}</p>' for note in result["notes"]),
        _differences(result),
        _judge(result),
        *(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in plots(result)),
        _grid(sets, prompts, _psnr(result, scores), shown),
    ]
    inner = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{STYLE}</style></head>\n<body>\n{inner}\n</body></html>\n"
    )


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is known of the noise that the pictures began with."""
    others = [row["name"] for row in rows if row["kind"] == "images"]
    if not others:
        return "Every model draws the same prompts with the same seeds."
    return (
        "The models drawn here have the same prompts and the same seeds. The pictures of "
        f"{', '.join(others)} were drawn elsewhere: their seeds are not known."
    )


def _rows(head: Sequence[str], lines: Sequence[tuple[Sequence[str], bool]]) -> str:
    """A table; lines with True are set back."""
    parts = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for cells, soft in lines:
        inside = "".join(f"<td>{_value(c)}</td>" for c in cells)
        parts.append(f"<tr class={'soft' if soft else 'plain'}>{inside}</tr>")
    return f'<div class="scroll"><table>{"".join(parts)}</table></div>'


def _value(text: str) -> str:
    mean, bracket, ends = escape(text).partition(" [")
    return f'{mean} <span class="ends">[{ends}</span>' if bracket and ends.endswith("]") else escape(text)


def _table(result: Mapping[str, Any]) -> str:
    columns = columns_of(result)
    lines = [
        ([row["name"], *(cell(row, key) for key, _ in columns)], row["reference"] or row["control"])
        for row in result["rows"]
    ]
    return _rows(["model", *(heading for _, heading in columns)], lines)


def _differences(result: Mapping[str, Any]) -> str:
    if not result["differences"]:
        return ""
    from .metrics import METRICS

    lines = []
    for entry in result["differences"]:
        metric = METRICS[entry["metric"]]
        ends = [f"{entry[key]:+.{metric.digits}f}" for key in ("mean", "low", "high")]
        clear = entry["low"] > 0 or entry["high"] < 0
        verdict = ""
        if clear:
            verdict = entry["model"] if (entry["mean"] > 0) == (metric.better == "higher") else entry["minus"]
        cells = [
            f"{entry['model']} − {entry['minus']}",
            marked(result, entry["metric"], metric.label),
            f"{ends[0]} [{ends[1]}, {ends[2]}]",
            verdict,
        ]
        lines.append((cells, not clear))
    return "<h2>Differences</h2>" + _rows(["models", "metric", "difference", "better"], lines)


def _judge(result: Mapping[str, Any]) -> str:
    lines = judge_rows(result)
    if not lines:
        return ""
    controls = {row["name"] for row in result["rows"] if row["control"]}
    return (
        f"<h2>{marked(result, JUDGE, 'A model as judge')}</h2>"
        f"<p>{escape(str(result['judge']['model']))} was asked about every pair, the reference's picture and the "
        "model's, in both orders. Preference: +1 if it always prefers the model, −1 the reference. Won, lost: in both "
        "orders. Agreement: prompts judged alike in both orders. First: how often the picture shown first was "
        "preferred; far from 50 % is a habit, not a judgement. The control is the reference drawn with other seeds.</p>"
        + _rows(["question", "model", *JUDGE_COLUMNS], [(line, line[1] in controls) for line in lines])
    )


def _psnr(result: Mapping[str, Any], scores: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray | None:
    """Mean over the models [P], the control left out."""
    controls = {row["name"] for row in result["rows"] if row["control"]}
    values = [v for name, v in scores.get("psnr", {}).items() if name not in controls]
    return np.mean(values, axis=0) if values else None


def _grid(sets: Sequence[ImageSet], prompts: Sequence[Prompt], psnr: np.ndarray | None, shown: int) -> str:
    if shown < 1:
        return ""
    heads = "".join(f'<div class="head">{escape(s.name)}</div>' for s in sets)
    columns = f"grid-template-columns: minmax(9rem, 1fr) repeat({len(sets)}, minmax(8rem, 1.4fr))"
    parts = []
    for title, chosen in _chosen(len(prompts), psnr, shown):
        cells = [f'<div class="head">prompt</div>{heads}']
        for i in chosen:
            cells.append(f'<div class="prompt"><b>{escape(prompts[i].id)}</b><br>{escape(prompts[i].text)}</div>')
            cells += [_picture(s, prompts[i]) for s in sets]
        parts.append(f'<h2>{escape(title)}</h2><div class="grid" style="{columns}">{"".join(cells)}</div>')
    return "\n".join(parts)


def _chosen(count: int, psnr: np.ndarray | None, shown: int) -> list[tuple[str, list[int]]]:
    """Prompts at equal distances and, where there are others and PSNR is known, those of the lowest."""
    even = sorted({int(i) for i in np.linspace(0, count - 1, min(shown, count)).round()})
    found = [("Pictures", even)]
    if count > shown and psnr is not None:
        rest = [int(i) for i in np.argsort(psnr, kind="stable") if int(i) not in even]
        found.append(("Pictures with the lowest PSNR", rest[:WORST]))
    return found


def _picture(images: ImageSet, prompt: Prompt) -> str:
    from PIL import Image

    image = Image.fromarray(images.load(prompt.id))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(images.name)}: {escape(prompt.text)}" src="data:image/jpeg;base64,{data}">'
