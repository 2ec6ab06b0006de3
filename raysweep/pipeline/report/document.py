"""A report as values, and its two forms: one self-contained HTML file, one Markdown file."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

_CSS = """
:root { color-scheme: light; --line: #d9dde3; --soft: #f5f6f8; --ink: #1c2430; --quiet: #5b6675; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); max-width: 1088px;
  margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 36px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--line); } p { margin: 6px 0 10px; max-width: 78ch; } .quiet { color: var(--quiet); }
table { border-collapse: collapse; margin: 8px 0 14px; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; border-bottom: 2px solid var(--line); }
td.text, th.text { text-align: left; white-space: normal; } .wide { overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; } figure { margin: 0; } figure img { width: 352px;
  max-width: 100%; } figure.wide, figure.wide img { width: 100%; }
figcaption { color: var(--quiet); font-size: 13px; max-width: 352px; } figure.wide figcaption { max-width: none; }
.good, .bad, .open { font-weight: 600; } .good { color: #19713a; } .bad { color: #b3261e; } .open { color: #7a5c00; }
.banner { padding: 10px 14px; border-radius: 6px; background: var(--soft); border-left: 4px solid var(--quiet); }
.banner.good { border-color: #19713a; } .banner.bad { border-color: #b3261e; }
"""
_GOOD_WORDS = ("reproduced", "better", "none", "no regression")
_BAD_WORDS = ("not reproduced", "worse", "regression", "failed")
_UNCERTAIN_WORDS = ("cannot tell", "not comparable", "tie", "stands out")


@dataclass(frozen=True)
class Paragraph:
    text: str
    is_muted: bool = False


@dataclass(frozen=True)
class Banner:
    """The one line to read; good: True, False, or None for neither."""

    text: str
    is_good: bool | None = None


@dataclass(frozen=True)
class Table:
    """Cells as text; `text` names the columns of words, which are set flush left."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[str] = ()


@dataclass(frozen=True)
class CaptionedFigure:
    caption: str
    figure: Figure
    is_full_width: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence["Paragraph | Banner | Table | CaptionedFigure"]


@dataclass(frozen=True)
class ReportDocument:
    title: str
    subtitle: str
    sections: Sequence[Section]

    def render_html(self) -> str:
        """One file: no script, no style sheet, no picture from elsewhere."""
        body = "".join(_render_section_html(section) for section in self.sections)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n'
            f'<body><h1>{title}</h1><p class="quiet">{html.escape(self.subtitle)}</p>{body}</body></html>\n'
        )

    def render_markdown(self) -> str:
        """The same without pictures, whose captions say what they would show."""
        lines = [f"# {self.title}", "", self.subtitle, ""]
        for section in self.sections:
            lines += [f"## {section.title}", ""]
            for part in section.parts:
                if not isinstance(part, CaptionedFigure):
                    lines += [*_render_part_markdown(part), ""]
            if captions := [
                part.caption for part in section.parts if isinstance(part, CaptionedFigure)
            ]:
                lines += [f"*Figures, in the HTML: {'; '.join(captions)}.*", ""]
        return "\n".join(lines).rstrip() + "\n"


def _render_section_html(section: Section) -> str:
    out, pictures = [f"<h2>{html.escape(section.title)}</h2>"], []
    for part in section.parts:
        if isinstance(part, CaptionedFigure):
            pictures.append(_render_figure_html(part))
        else:
            out.append(_render_part_html(part))
    if pictures:
        out.append(f'<div class="figures">{"".join(pictures)}</div>')
    return "\n".join(out) + "\n"


def _render_part_html(part: Paragraph | Banner | Table) -> str:
    if isinstance(part, Banner):
        tone = {True: " good", False: " bad", None: ""}[part.is_good]
        return f'<p class="banner{tone}">{html.escape(part.text)}</p>'
    if isinstance(part, Paragraph):
        return f"<p{' class=quiet' if part.is_muted else ''}>{html.escape(part.text)}</p>"
    words = [header in part.text_columns for header in part.headers]
    head = "".join(
        _render_cell_html("th", header, word)
        for header, word in zip(part.headers, words, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(_render_cell_html('td', cell, word) for cell, word in zip(row, words, strict=True))}</tr>\n"
        for row in part.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>'


def _render_cell_html(tag: str, text: str, is_text: bool) -> str:
    tone = (
        "good"
        if text in _GOOD_WORDS
        else "bad"
        if text in _BAD_WORDS
        else "open"
        if text in _UNCERTAIN_WORDS
        else ""
    )
    content = (
        f'<span class="{tone}">{html.escape(text)}</span>'
        if tone and tag == "td"
        else html.escape(text)
    )
    return f"<{tag}{' class=text' if is_text else ''}>{content}</{tag}>"


def _render_figure_html(captioned_figure: CaptionedFigure) -> str:
    buffer = io.BytesIO()
    # The same figure gives the same bytes.
    with rc_context({"svg.hashsalt": "raysweep", "svg.fonttype": "path"}):
        captioned_figure.figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None}
        )
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(captioned_figure.caption)
    return (
        f'<figure{" class=wide" if captioned_figure.is_full_width else ""}><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _render_part_markdown(part: Paragraph | Banner | Table) -> list[str]:
    if isinstance(part, Banner):
        return [f"**{part.text}**"]
    if isinstance(part, Paragraph):
        return [part.text]
    align = [
        "---" if number == 0 or h in part.text_columns else "---:"
        for number, h in enumerate(part.headers)
    ]
    rows = [part.headers, align, *part.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
