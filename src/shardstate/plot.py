"""Bars as SVG: what `bench --plot` and the benchmarks of the documentation draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _ROW, _TITLE = 760, 250, 26, 34
_COLOURS = {True: "#2563eb", False: "#94a3b8"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A median, and the lowest and highest value of all rounds."""

    label: str
    value: float
    low: float
    high: float
    own: bool = False  # ours: in another colour


def bars_svg(groups: Sequence[tuple[str, Sequence[Bar]]], *, unit: str) -> str:
    """Return an SVG picture of groups of horizontal bars, with a title for each group.

    All have one scale, from 0; a thin line goes from the lowest to the highest value.
    """
    bars = [bar for _, group in groups for bar in group]
    most = max((bar.high for bar in bars), default=0.0) or 1.0
    scale = (_WIDTH - _LABEL - 110) / most
    rows: list[str] = []
    y = 8
    for title, group in groups:
        rows.append(_text(8, y + 20, f"{title} ({unit})", weight="600"))
        y += _TITLE
        for bar in group:
            middle = y + _ROW / 2
            rows.append(_text(_LABEL - 8, middle + 4, bar.label, anchor="end"))
            width = max(1.0, bar.value * scale)
            rows.append(
                f'<rect x="{_LABEL}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" '
                f'fill="{_COLOURS[bar.own]}"/>'
            )
            low, high = (_LABEL + value * scale for value in (bar.low, bar.high))
            rows.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" '
                f'stroke="#0f172a"/>'
            )
            rows.append(_text(max(_LABEL + width, high) + 8, middle + 4, f"{bar.value:.3g}"))
            y += _ROW
        y += 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#0f172a">{escape(text)}</text>'
    )
