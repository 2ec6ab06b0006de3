"""A report as a value, rendered as one self-contained HTML file or as Markdown."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from raysweep.visible_text import escape_markdown, show_characters

_CSS = """
:root { color-scheme: light; --line: #d9dde3; --soft: #f5f6f8; --ink: #1c2430; --quiet: #5b6675; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); \
max-width: 1088px;
  margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 36px 0 8px; padding-top: \
12px;
  border-top: 1px solid var(--line); } p { margin: 6px 0 10px; max-width: 78ch; } .quiet { color: \
var(--quiet); }
table { border-collapse: collapse; margin: 8px 0 14px; font-variant-numeric: tabular-nums; \
font-size: 14px; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); \
white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; border-bottom: 2px \
solid var(--line); }
td.text, th.text { text-align: left; white-space: normal; } .wide { overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; } figure { margin: 0; } figure img { width: \
352px;
  max-width: 100%; } figure.wide, figure.wide img { width: 100%; }
figcaption { color: var(--quiet); font-size: 13px; max-width: 352px; } figure.wide figcaption { \
max-width: none; }
.good, .bad, .open { font-weight: 600; } .good { color: #19713a; } .bad { color: #b3261e; } .open \
{ color: #7a5c00; }
.banner { padding: 10px 14px; border-radius: 6px; background: var(--soft); border-left: 4px solid \
var(--quiet); }
.banner.good { border-color: #19713a; } .banner.bad { border-color: #b3261e; }
"""
_GOOD_WORDS = ("reproduced", "better", "none", "no regression")
_BAD_WORDS = ("not reproduced", "worse", "regression", "failed")
_UNCERTAIN_WORDS = ("cannot tell", "not comparable", "tie", "stands out")


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text.

    Attributes:
        text: The text, without markup.
        is_muted: Whether to print it in grey.
    """

    text: str
    is_muted: bool = False


@dataclass(frozen=True)
class Banner:
    """The most important line of a report.

    Attributes:
        text: The text, without markup.
        is_good: Whether it is good news; None for neither good nor bad.
    """

    text: str
    is_good: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        headers: Titles of the columns.
        rows: Cells of each row.
        text_columns: Titles of the columns of words, which are aligned to the left.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[str] = ()


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with a caption.

    Attributes:
        caption: Text below the figure.
        figure: The figure, drawn as SVG.
        is_full_width: Whether it takes the whole width of the page.
    """

    caption: str
    figure: Figure
    is_full_width: bool = False


TextPart = Paragraph | Banner | Table
SectionPart = TextPart | CaptionedFigure


@dataclass(frozen=True)
class Section:
    """A section: a title and its content in order; HTML shows the figures last."""

    title: str
    parts: Sequence[SectionPart]


@dataclass(frozen=True)
class ReportDocument:
    """A whole report: title, a line below it, and sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]

    def render_html(self) -> str:
        """Return one HTML file without scripts and without references to other files."""
        body = "".join(_render_section_html(section) for section in self.sections)
        title = _escape_html(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{title}</title>"
            f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n'
            f'<body><h1>{title}</h1><p class="quiet">{_escape_html(self.subtitle)}</p>{body}'
            "</body></html>\n"
        )

    def render_markdown(self) -> str:
        """Return Markdown; the captions of figures replace the figures."""
        lines = [f"# {escape_markdown(self.title)}", "", escape_markdown(self.subtitle), ""]
        for section in self.sections:
            lines += [f"## {escape_markdown(section.title)}", ""]
            captions = []
            for part in section.parts:
                if isinstance(part, CaptionedFigure):
                    captions.append(escape_markdown(part.caption))
                else:
                    lines += [*_render_part_markdown(part), ""]
            if captions:
                lines += [f"*Figures, in the HTML: {'; '.join(captions)}.*", ""]
        return "\n".join(lines).rstrip() + "\n"


def _escape_html(text: str) -> str:
    """Write a text in HTML so that the page shows it, and no sign reorders or hides others."""
    return html.escape(show_characters(text, line_breaks=True))


def _render_section_html(section: Section) -> str:
    """Render the title, the text and then the figures of a section."""
    blocks, pictures = [f"<h2>{_escape_html(section.title)}</h2>"], []
    for part in section.parts:
        if isinstance(part, CaptionedFigure):
            pictures.append(_render_figure_html(part))
        else:
            blocks.append(_render_part_html(part))
    if pictures:
        blocks.append(f'<div class="figures">{"".join(pictures)}</div>')
    return "\n".join(blocks) + "\n"


def _render_part_html(part: TextPart) -> str:
    """Render text or a table."""
    if isinstance(part, Banner):
        tone = {True: " good", False: " bad", None: ""}[part.is_good]
        return f'<p class="banner{tone}">{_escape_html(part.text)}</p>'
    if isinstance(part, Paragraph):
        return f"<p{' class=quiet' if part.is_muted else ''}>{_escape_html(part.text)}</p>"
    return _render_table_html(part)


def _render_table_html(table: Table) -> str:
    """Render a table."""
    is_text = [header in table.text_columns for header in table.headers]
    head = _render_row_html("th", table.headers, is_text)
    rows = "".join(f"<tr>{_render_row_html('td', row, is_text)}</tr>\n" for row in table.rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>'


def _render_row_html(tag: str, cells: Sequence[str], is_text: Sequence[bool]) -> str:
    """Render the cells of a row; `is_text` marks the columns of words."""
    pairs = zip(cells, is_text, strict=True)
    return "".join(_render_cell_html(tag, cell, words) for cell, words in pairs)


def _render_cell_html(tag: str, text: str, is_text: bool) -> str:
    """Render a cell; verdicts in the body of the table are coloured."""
    content = _escape_html(text)
    tone = _find_tone(text)
    if tone and tag == "td":
        content = f'<span class="{tone}">{content}</span>'
    return f"<{tag}{' class=text' if is_text else ''}>{content}</{tag}>"


def _find_tone(text: str) -> str:
    """Return the CSS class of a verdict, or "" for other text."""
    if text in _GOOD_WORDS:
        return "good"
    if text in _BAD_WORDS:
        return "bad"
    return "open" if text in _UNCERTAIN_WORDS else ""


def _render_figure_html(captioned_figure: CaptionedFigure) -> str:
    """Render a figure as inline SVG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "raysweep", "svg.fonttype": "path"}):
        captioned_figure.figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None}
        )
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = _escape_html(captioned_figure.caption)
    css_class = " class=wide" if captioned_figure.is_full_width else ""
    return (
        f'<figure{css_class}><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _render_part_markdown(part: TextPart) -> list[str]:
    """Render text or a table as lines."""
    if isinstance(part, Banner):
        return [f"**{escape_markdown(part.text)}**"]
    if isinstance(part, Paragraph):
        return [escape_markdown(part.text)]
    left_aligned = {part.headers[0], *part.text_columns}
    align = ["---" if header in left_aligned else "---:" for header in part.headers]
    head, *rows = ([escape_markdown(cell) for cell in row] for row in (part.headers, *part.rows))
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *rows)]
