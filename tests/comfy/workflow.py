"""UI-format workflows: checks against /object_info, and conversion to the API format that /prompt takes.

The browser does this conversion in ComfyUI. The server knows only the result, so the tests need their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Graph = dict[str, Any]
Prompt = dict[str, dict[str, Any]]

#: Nodes that exist in the browser only.
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
#: Integer inputs to which the browser adds a widget "control after generate" of its own accord.
SEEDS = ("seed", "noise_seed")


def load(path: Path) -> Graph:
    return json.loads(path.read_text(encoding="utf-8"))


def widgets(definition: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, type or options, settings) of a node's widgets as the browser orders them, its own among them.

    The browser's own have the name "" and no value in a prompt.
    """
    for group in ("required", "optional"):
        for name, spec in definition["input"].get(group, {}).items():
            kind, settings = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or settings.get("forceInput"):
                continue
            yield name, kind, settings
            if settings.get("control_after_generate") or (kind == "INT" and name in SEEDS):
                yield "", "control_after_generate", {}
            if settings.get("image_upload"):
                yield "", "image_upload", {}


def input_names(definition: Mapping[str, Any]) -> list[str]:
    """Every input of a node type, in the order of its definition."""
    return [name for group in ("required", "optional") for name in definition["input"].get(group, {})]


def widget_values(node: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Widget name → value of a node. ValueError if the number of values is not that of the widgets."""
    values = node.get("widgets_values", [])
    if isinstance(values, dict):
        return values
    known = list(widgets(definition))
    if len(values) != len(known):
        names = [name or kind for name, kind, _ in known]
        raise ValueError(f"{node['type']} (node {node['id']}) has {len(values)} values for the widgets {names}")
    return {name: value for (name, _, _), value in zip(known, values, strict=True) if name}


def to_prompt(graph: Graph, object_info: Mapping[str, Any]) -> Prompt:
    """The API format of a UI-format workflow. KeyError for a node type that `object_info` lacks."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    sources = {link[0]: (link[1], link[2]) for link in graph["links"]}
    prompt: Prompt = {}
    for node in graph["nodes"]:
        if node["type"] in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        inputs = widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs", []):
            found = _source(slot.get("link"), slot["type"], nodes, sources)
            if found is not None:
                inputs[slot["name"]] = found[1]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _source(
    link: int | None, kind: str, nodes: Mapping[int, Any], sources: Mapping[int, tuple[int, int]]
) -> tuple[str, Any] | None:
    """What an input's link leads to through reroutes and bypassed nodes: a node's output, a primitive's value."""
    while link is not None:
        origin, slot = sources[link]
        node = nodes[origin]
        if node["type"] == PRIMITIVE:
            return "value", node["widgets_values"][0]
        if node.get("mode", 0) == MUTED:
            return None
        if node["type"] == REROUTE:
            link = node["inputs"][0].get("link")
        elif node.get("mode", 0) == BYPASSED:
            link = next((i.get("link") for i in node.get("inputs", []) if i["type"] == kind), None)
        else:
            return "link", [str(origin), slot]
    return None


def check_links(graph: Graph) -> None:
    """ValueError unless links and the slots that name them agree, as the browser needs them to."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    if len(nodes) < len(graph["nodes"]) or len(links) < len(graph["links"]):
        raise ValueError("two nodes or two links have one id")
    if graph["last_node_id"] < max(nodes) or graph["last_link_id"] < max(links, default=0):
        raise ValueError("last_node_id or last_link_id is below an id in use")
    for number, origin, out, target, slot, kind in graph["links"]:
        output, entry = nodes[origin]["outputs"][out], nodes[target]["inputs"][slot]
        if number not in (output.get("links") or []) or entry.get("link") != number:
            raise ValueError(f"link {number} is not named by both its ends")
        if kind != output["type"] or entry["type"] not in (kind, "*"):
            raise ValueError(f"link {number} of type {kind} joins {output['type']} with {entry['type']}")
    named = {n for node in graph["nodes"] for o in node.get("outputs", []) for n in o.get("links") or []}
    named |= {i["link"] for node in graph["nodes"] for i in node.get("inputs", []) if i.get("link") is not None}
    if named != set(links):
        raise ValueError(f"slots name links that do not exist: {sorted(named ^ set(links))}")
