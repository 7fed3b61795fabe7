"""Makes text safe inside a table of Markdown."""

import html


def escape_cell(text: str) -> str:
    """Return text as it is read, safe inside a cell of a Markdown table: neither markup nor a new cell."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for character in "\\`*_[]|":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped


def join_cells(cells: list[str]) -> str:
    """Return a row of a Markdown table; what UTF-8 cannot hold is spelled out."""
    row = f"| {' | '.join(map(escape_cell, cells))} |"
    return row.encode("utf-8", "backslashreplace").decode()
