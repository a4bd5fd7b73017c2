"""Parts of a report's page: tables whose headings and cells are aligned by their column, and embedded images."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

PANEL_DPI = 160  # sharp on a phone, whose pixels are fine
QUALITY = 70  # of thumbnails, WebP

Column = tuple[str, str]  # heading and classes: "text" is aligned to the left, "wide" and "narrow" show on such screens


def td(text: str, value: object = "", kind: str = "") -> tuple[str, str, str]:
    """A cell: text, value to sort by, classes of its own. Text is escaped later."""
    return text, str(value), kind


def table(columns: Sequence[Column], body: Sequence[Sequence[tuple[str, str, str]]]) -> str:
    """A table that can be sorted by every column and scrolls inside of itself.

    Args:
        columns: headings and classes.
        body: lines of cells.
    """
    head = "".join(
        f'<th scope="col" class="{kind}"><button>{html.escape(name)}</button></th>' for name, kind in columns
    )
    lines = []
    for cells in body:
        parts = []
        for (text, value, own), (_, kind) in zip(cells, columns, strict=True):
            classes = " ".join(filter(None, (kind, own)))
            parts.append(f'<td class="{classes}" data-value="{html.escape(value)}">{html.escape(text)}</td>')
        lines.append(f"<tr>{''.join(parts)}</tr>")
    return _scrolling(f'<table class="sorted"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>')


def gallery(columns: Sequence[str], body: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of images.

    Args:
        columns: headings.
        body: name and cells, as HTML, of every line.
    """
    head = "".join(f'<th scope="col" class="text">{html.escape(name)}</th>' for name in ("method", *columns))
    lines = [
        f'<tr><td class="text">{html.escape(name)}</td>{"".join(f"<td class=text>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in body
    ]
    return _scrolling(f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>')


def notes(sentences: Sequence[str]) -> str:
    """A list of sentences."""
    return f'<ul class="notes">{"".join(f"<li>{html.escape(text)}</li>" for text in sentences)}</ul>'


def panels(figures: dict[str, Figure]) -> str:
    """Plots beside each other, as many as the screen has room for."""
    images = []
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="webp", dpi=PANEL_DPI, pil_kwargs={"lossless": True})
        images.append(_image(file.getvalue(), name))
    return f'<div class="panels">{"".join(images)}</div>'


def thumbnail(image: Image.Image, name: str, link: str) -> str:
    """A small image that links to the file that it was made from."""
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=QUALITY)
    return f'<a href="{html.escape(link)}">{_image(file.getvalue(), name, image.size)}</a>'


def _image(data: bytes, name: str, size: tuple[int, int] | None = None) -> str:
    shape = "" if size is None else f' width="{size[0]}" height="{size[1]}"'
    content = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(name)}"{shape} src="data:image/webp;base64,{content}">'


def _scrolling(content: str) -> str:
    return f'<div class="scroll" tabindex="0">{content}</div>'
