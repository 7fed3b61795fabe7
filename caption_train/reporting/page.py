"""Makes one HTML page of a report. Nothing in a report can become markup or code.

Text goes through Jinja2's escaping or, for the gallery, into a block of JSON that the page's script puts
into text nodes. A Content-Security-Policy allows that one script and style sheet, by their hashes, and no
address but `data:` pictures.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from caption_train.metrics.output_health import REMARKS
from caption_train.reporting.curves import draw_chart
from caption_train.reporting.report import Cell, Report, Row
from caption_train.system.files import parse_json, read_regular_file, write_atomically

_DATA = re.compile(rb'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def write_report(path: Path, report: Report) -> None:
    """Write a report's page, whole or not at all."""
    write_atomically(path, render_report(report))


def render_report(report: Report) -> str:
    """Return a report as an HTML page."""
    filters = {"number": format_number, "change": describe_change, "verdict": judge, "draw": draw_chart}
    return render_page(
        "report.html", report, _gallery(report), scripts=("page.js", "report.js"), filters=filters
    )


def render_page(
    template: str,
    report: Any,
    data: Any,
    *,
    scripts: Sequence[str],
    styles: Sequence[str] = ("report.css",),
    filters: Mapping[str, Callable],
) -> str:
    """Return a page: a template that extends base.html, with its scripts, styles and data inside it.

    Args:
        template: its file in this folder.
        report: what the template shows, as `report`.
        data: what the scripts read, from a block of JSON.
        scripts, styles: files in this folder; each kind becomes one block, which the policy allows.
        filters: what the template calls, by name.
    """
    from jinja2 import Environment, FunctionLoader

    script, style = ("\n".join(map(_read, names)) for names in (scripts, styles))
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.get_template(template).render(
        report=report,
        policy=(
            f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        script=script,
        style=style,
        data=dump_json(data),
    )


def dump_json(value: Any) -> str:
    """Return JSON that no HTML parser takes for markup, wherever it stands in a page."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Lone surrogates cannot be written as UTF-8.
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    unsafe = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return text.translate(str.maketrans(unsafe))


def read_gallery(path: Path) -> dict[str, Any]:
    """Return the data of the gallery in a page that was written before; {} if there is none."""
    try:
        found = _DATA.search(read_regular_file(path))
        value = parse_json(found[1]) if found else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _gallery(report: Report) -> dict[str, Any]:
    return {
        "columns": list(report.columns),
        "metrics": [
            [row.key, row.label, row.better, row.is_share]
            for row in report.rows
            if any(a and row.key in a.scores for item in report.items for a in item.answers)
        ],
        "remarks": list(REMARKS),
        "items": [
            {
                "name": item.name,
                "references": list(item.references),
                "prompt": item.prompt,
                "answers": [
                    answer and [answer.text, list(answer.remarks), _round(answer.scores)]
                    for answer in item.answers
                ],
                "picture": item.thumbnail
                and [item.thumbnail.address, item.thumbnail.width, item.thumbnail.height],
            }
            for item in report.items
        ],
    }


def _round(scores: Any) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in scores.items()}


def format_number(value: float | None, row: Row) -> str:
    """Return a score as people read it: shares in per cent, others with three digits."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if row.is_share else f"{value:.3f}"


def describe_change(cell: Cell, row: Row) -> str:
    """Return how far a score is from the first column's, with interval and p."""
    if cell.change is None:
        return ""
    value, low, high, p = cell.change
    scale, unit = (100, " points") if row.is_share else (1, "")
    digits = 1 if row.is_share else 3
    # Adding 0.0 turns -0.0 into 0.0.
    shown = [f"{round(scale * number, digits) + 0.0:+.{digits}f}" for number in (value, low, high)]
    return f"{shown[0]}{unit} [{shown[1]}, {shown[2]}], p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def judge(cell: Cell, row: Row) -> str:
    """Return "better" or "worse" where p says so at 0.05; else "" ."""
    if cell.change is None or not row.better or cell.change[3] >= 0.05:
        return ""
    return "better" if cell.change[0] * row.better > 0 else "worse"


def _read(name: str) -> str:
    return (files("caption_train.reporting") / name).read_text("utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"
