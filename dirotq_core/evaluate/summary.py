"""The result as data: one row per model, means with intervals, differences; written as JSON, CSV and text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from typing import Any

import numpy as np

from ..inspect import bits_text
from .bootstrap import intervals
from .frechet import ENOUGH
from .judge.protocol import QUESTIONS
from .judge.tally import Pair, against_control, tally
from .metrics import METRICS
from .prompt_sets import Prompt
from .subjects import Size, Subject

#: Metrics of whole sets, which have no interval: (key, label).
OF_SETS = (("fid", "FID to reference"), ("fid_real", "FID to real images"))
#: Of report.json.
VERSION = 1
#: In "meaningless", beside metrics.
JUDGE = "judge"
#: Behind the name of what means nothing.
MARK = "(means nothing)"
#: Prompts below which percentile intervals are too narrow to be trusted.
TRUSTED = 30


def summarize(
    subjects: Sequence[Subject], scores: Mapping[str, Mapping[str, np.ndarray]],
    fid: Mapping[str, Mapping[str, float]], verdicts: Mapping[str, Mapping[str, Sequence[Pair]]], resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """The rows of `subjects`, and the differences between every two of them that are not the reference.

    Args:
        subjects: the reference first. scores: metric → name → values [P]. fid: name → distances.
        verdicts: name → question → pairs, in the order of the prompts.
    """
    rows = [
        {
            "name": s.name, "source": str(s.path), "kind": s.kind, "control": s.control, "reference": s is subjects[0],
            **(asdict(s.size) if s.size else dict.fromkeys(f.name for f in fields(Size))),
            "metrics": {}, **dict(fid.get(s.name, {})), "judge": {},
        }
        for s in subjects
    ]  # fmt: skip
    by_name = {row["name"]: row for row in rows}
    differences = []
    compared = [s.name for s in subjects[1:] if not s.control]
    for metric, by_subject in scores.items():
        names = list(by_subject)
        pairs = list(combinations([n for n in names if n in compared], 2))
        columns = [by_subject[n] for n in names] + [by_subject[a] - by_subject[b] for a, b in pairs]
        # One call, so that all columns see the same resampled prompts.
        found = intervals(np.stack(columns, axis=1), resamples) if columns else []
        for name, interval in zip(names, found, strict=False):
            by_name[name]["metrics"][metric] = interval.to_dict()
        for (a, b), interval in zip(pairs, found[len(names) :], strict=True):
            differences.append({"metric": metric, "model": a, "minus": b, **interval.to_dict()})
    controls = [s.name for s in subjects if s.control and s.name in verdicts]
    for name, by_question in verdicts.items():
        for question, answers in by_question.items():
            entry = asdict(tally(answers, resamples))
            if controls and name != controls[0]:
                net = against_control(answers, verdicts[controls[0]][question], resamples)
                entry["against_control"] = net.to_dict() if net else None
            by_name[name]["judge"][question] = entry
    return {"rows": rows, "differences": differences}


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the numbers, one sentence each."""
    found = []
    if result.get("meaningless"):
        labels = ["the judge" if name == JUDGE else METRICS[name].label for name in result["meaningless"]]
        found.append(
            f"The numbers of {', '.join(labels)} mean nothing: networks of random weights or other stand-ins made them."
        )
    count = result["prompts"]["count"]
    if any(key in row for row in result["rows"] for key, _ in OF_SETS) and count < ENOUGH:
        found.append(
            f"FID is of {count} images; below {ENOUGH} it depends on their number more than on the model, and says "
            "little beyond the order of models measured alike."
        )
    if any("psnr" in row["metrics"] for row in result["rows"]):
        found.append("PSNR of identical images counts as 100 dB; SSIM is over uniform windows of 7 × 7.")
    if count < TRUSTED:
        found.append(
            f"Bootstrap intervals of {count} prompts are too narrow; {TRUSTED} or more are needed to trust them."
        )
    for row in result["rows"]:
        for question, entry in row["judge"].items():
            found += _judge_notes(f"about {question} of {row['name']!r}", entry, count)
    reference = result["rows"][0]
    if reference["kind"] != "images" and reference["bits"] != 16:
        found.append(f"The reference {reference['name']!r} is itself quantized: nothing is compared with 16 bit.")
    if result.get("judge_failed"):
        found.append(f"There are no verdicts, as the judge failed: {result['judge_failed']}")
    if result.get("judge") and not any(r["control"] for r in result["rows"]):
        found.append("The judge was not checked against a control: the reference is a folder of images.")
    return found


def _judge_notes(what: str, entry: Mapping[str, Any], count: int) -> list[str]:
    found = []
    if entry["unread"]:
        found.append(
            f"{entry['unread']} of {2 * count} questions {what} have no verdict: no reply could be read, or the "
            "question was refused."
        )
    if 0 < entry["judged"] < TRUSTED <= count:
        found.append(f"The judge's intervals {what} are of {entry['judged']} prompts and too narrow.")
    return found


def table_csv(result: Mapping[str, Any]) -> str:
    """One line per model."""
    metrics = [m for m in METRICS if any(m in row["metrics"] for row in result["rows"])]
    sets = [key for key, _ in OF_SETS if any(key in row for row in result["rows"])]
    questions = [q for q in QUESTIONS if any(q in row["judge"] for row in result["rows"])]
    head = ["model", "bytes", "bits", "linear_bits", "activation_bits"]
    head += [f"{m}{end}" for m in metrics for end in ("", "_low", "_high")] + sets
    parts = ("won", "tied", "lost", "agreement", "first", "judged", "unread")
    intervals_of = ("preference", "against_control")
    ends = [f"{name}{end}" for name in intervals_of for end in ("", "_low", "_high")]
    head += [f"judge_{q}_{part}" for q in questions for part in (*ends, *parts)]
    meaningless = result.get("meaningless") or []
    if meaningless:
        head.append("meaningless")
    lines: list[list[Any]] = [head]
    for row in result["rows"]:
        line = [row["name"], row["bytes"], row["bits"], row["linear_bits"], row["activation_bits"]]
        for metric in metrics:
            line += _ends(row["metrics"].get(metric))
        line += [row.get(key) for key in sets]
        for question in questions:
            entry = row["judge"].get(question)
            if entry is None:
                line += [None] * len((*ends, *parts))
                continue
            line += [value for name in intervals_of for value in _ends(entry.get(name))]
            line += [entry[part] for part in parts]
        if meaningless:
            line.append(" ".join(meaningless))
        lines.append(line)
    return _csv(lines)


def _ends(interval: Mapping[str, float] | None) -> list[float | None]:
    return [interval["mean"], interval["low"], interval["high"]] if interval else [None, None, None]


def prompts_csv(
    prompts: Sequence[Prompt], scores: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """One line per prompt and model, with the metrics of its picture; without a seed if others have drawn it."""
    kinds = {row["name"]: (row["kind"], row["control"]) for row in rows}
    names = list(dict.fromkeys(name for by_subject in scores.values() for name in by_subject))
    lines: list[list[Any]] = [["id", "seed", "model", *scores, "prompt"]]
    for i, prompt in enumerate(prompts):
        for name in names:
            values = [float(by[name][i]) if name in by else None for by in scores.values()]
            kind, control = kinds[name]
            seed = None if kind == "images" else prompt.seed(control)
            lines.append([prompt.id, seed, name, *values, prompt.text])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def columns_of(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, heading) of the columns of the table for people."""
    rows = result["rows"]
    found = [("size", "size MB"), ("bits", "bits")]
    if any(row["activation_bits"] is not None for row in rows):
        found.append(("activation_bits", "act. bits"))
    if any(row["linear_bits"] is not None for row in rows):
        found.append(("linear_bits", "in linears"))
    for name, metric in METRICS.items():
        if any(name in row["metrics"] for row in rows):
            arrow = "↑" if metric.better == "higher" else "↓"
            found.append((name, f"{metric.label}{f' {metric.unit}' if metric.unit else ''} {arrow}"))
    found += [(key, f"{label} ↓") for key, label in OF_SETS if any(key in row for row in rows)]
    return [(key, marked(result, key, heading)) for key, heading in found]


def marked(result: Mapping[str, Any], key: str, heading: str) -> str:
    """`heading`, with `MARK` if a stand-in made the numbers of this metric, column of a metric, or of the judge."""
    name = "fid" if key in dict(OF_SETS) else key
    return f"{heading} {MARK}" if name in (result.get("meaningless") or []) else heading


def cell(row: Mapping[str, Any], key: str) -> str:
    """What stands in a column; empty for what was not measured."""
    if key == "size":
        return "" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f}"
    if key == "activation_bits":
        return bits_text(row[key])
    if key in ("bits", "linear_bits"):
        return "" if row[key] is None else f"{row[key]:.2f}"
    if key in METRICS and key in row["metrics"]:
        value, digits = row["metrics"][key], METRICS[key].digits
        return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{row[key]:.2f}" if key in dict(OF_SETS) and key in row else ""


JUDGE_COLUMNS = ("preference", "won", "tied", "lost", "agreement", "first", "minus control", "judged")


def judge_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(question, model, and `JUDGE_COLUMNS`) as text."""
    lines = []
    for question in QUESTIONS:
        for row in result["rows"]:
            entry = row["judge"].get(question)
            if entry is None:
                continue
            keys = ("won", "tied", "lost", "agreement", "first")
            shares = ["" if entry[key] is None else f"{entry[key]:.0%}" for key in keys]
            net = _signed(entry.get("against_control"))
            lines.append((question, row["name"], _signed(entry["preference"]), *shares, net, str(entry["judged"])))
    return lines


def _signed(interval: Mapping[str, float] | None) -> str:
    return f"{interval['mean']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]" if interval else ""


def table_text(result: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    columns = columns_of(result)
    lines = [["model", *(heading for _, heading in columns)]]
    lines += [[row["name"], *(cell(row, key) for key, _ in columns)] for row in result["rows"]]
    text = _aligned(lines)
    judged = judge_rows(result)
    if judged:
        text += "\n\n" + _aligned([[marked(result, JUDGE, "question"), "model", *JUDGE_COLUMNS], *map(list, judged)])
    return "\n".join([text, *(f"\n{note}" for note in result["notes"])])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
