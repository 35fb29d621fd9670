"""Contact sheet: images in a grid, each with its caption below."""

from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, LINE, FONT_SIZE = 160, 12, 16, 12
MAX_LINES = 4
"""Lines shown of each caption."""


def resize_image(image: Image.Image, size: int) -> Image.Image:
    """A small image enlarged by an integer factor, with sharp pixels, to at most `size` pixels, or reduced."""
    width, height = image.size
    factor = size // max(width, height)
    if factor >= 1:
        return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    reduced = image.copy()
    reduced.thumbnail((size, size), Image.Resampling.LANCZOS)
    return reduced


def draw_contact_sheet(images: list[Image.Image], captions: list[str], columns: int = 6) -> Image.Image:
    """One RGB image with all `images`, row by row; `captions` has one text per image."""
    columns = max(1, min(columns, len(images)))
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, 26)[:MAX_LINES] or [""] for caption in captions]
    lines = max(len(text) for text in texts)
    row_height = CELL + lines * LINE + 2 * MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, rows * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = MARGIN + number % columns * (CELL + MARGIN)
        top = MARGIN + number // columns * row_height
        shown = resize_image(image, CELL)
        corner = (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2)
        sheet.paste(shown, corner)
        frame = (corner[0] - 1, corner[1] - 1, corner[0] + shown.width, corner[1] + shown.height)
        draw.rectangle(frame, outline=(170, 170, 170))
        for number_of_line, line in enumerate(text):
            draw.text((left, top + CELL + 6 + number_of_line * LINE), line, fill="black", font=font)
    return sheet
