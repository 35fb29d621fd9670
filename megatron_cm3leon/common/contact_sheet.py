"""Contact sheet: pictures in a grid, each with its caption beneath."""

from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, LINE, FONT_SIZE = 160, 12, 16, 12
LONGEST = 4
"""Lines of a caption that are shown."""


def enlarge_picture(picture: Image.Image, size: int) -> Image.Image:
    """A small picture enlarged by a whole factor, pixels kept sharp, to at most `size`; a larger one reduced."""
    width, height = picture.size
    factor = size // max(width, height)
    if factor >= 1:
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    picture = picture.copy()
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def draw_contact_sheet(pictures: list[Image.Image], captions: list[str], columns: int = 6) -> Image.Image:
    """One RGB picture of all, row by row."""
    columns = max(1, min(columns, len(pictures)))
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, 26)[:LONGEST] or [""] for caption in captions]
    lines = max(len(text) for text in texts)
    row_height = CELL + lines * LINE + 2 * MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = MARGIN + number % columns * (CELL + MARGIN)
        top = MARGIN + number // columns * row_height
        shown = enlarge_picture(picture, CELL)
        corner = (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2)
        sheet.paste(shown, corner)
        frame = (corner[0] - 1, corner[1] - 1, corner[0] + shown.width, corner[1] + shown.height)
        draw.rectangle(frame, outline=(170, 170, 170))
        for place, line in enumerate(text):
            draw.text((left, top + CELL + 6 + place * LINE), line, fill="black", font=font)
    return sheet
