"""A picture of sample images, each with the captions a model finds nearest."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.report.pictures import read_images, thumbnail
from navit_clip.files import write_output

_COLUMNS, _ROWS = 4, 3
_CELL, _THUMB, _MARGIN = 330, 190, 14
_CAPTIONS, _LINE = 3, 17
_RIGHT, _WRONG, _TEXT, _PAPER = "#1a7f37", "#b3261e", "#1f2328", "#ffffff"


def draw_gallery(
    dataset: EvalDataset, data: Embedded, images_ED: Tensor, texts_TD: Tensor, output: Path
) -> None:
    """Draws evenly spaced images of a dataset with their best captions and similarities.

    Captions of the image itself are green, those of others red.

    Raises:
        UserError: If the file cannot be written.
    """
    count = min(_COLUMNS * _ROWS, len(data.names))
    chosen = torch.linspace(0, len(data.names) - 1, count).long().tolist()
    texts, image_T = data.texts, data.image_of_texts
    pixels = read_images(dataset, {data.names[i] for i in chosen})
    rows = -(-count // _COLUMNS)
    cell_height = _THUMB + _MARGIN + _CAPTIONS * (2 * _LINE + 6) + _MARGIN
    canvas = Image.new("RGB", (_COLUMNS * _CELL + _MARGIN, rows * cell_height + _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for place, index in enumerate(chosen):
        left = _MARGIN + place % _COLUMNS * _CELL
        top = _MARGIN + place // _COLUMNS * cell_height
        encoded = pixels.get(data.names[index], b"")
        if thumb := thumbnail(encoded, _CELL - 2 * _MARGIN, _THUMB):
            canvas.paste(thumb, (left, top + (_THUMB - thumb.height)))
        scores = texts_TD @ images_ED[index]
        best = scores.topk(min(_CAPTIONS, len(texts))).indices.tolist()
        y = top + _THUMB + 8
        for caption in best:
            right = int(image_T[caption]) == index
            text = f"{scores[caption]:.2f} {texts[caption]}"
            lines = wrap_text(text, font, _CELL - 2 * _MARGIN, most=2)
            draw.multiline_text(
                (left, y), "\n".join(lines), fill=_RIGHT if right else _WRONG, font=font, spacing=3
            )
            y += _LINE * len(lines) + 6
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    write_output(output, file.getvalue())


def wrap_text(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """The first few lines of a text, no wider than `width` pixels by its letters."""
    lines = [""]
    # A caption without spaces, or of 100 kB, is cut; measuring all of it would take seconds.
    for word in (word[:30] for word in text[:500].split()):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} …"]
