"""Filters of images by size, how images are brought to the tokenizer's size, and caption clean-up."""

import html
import re
from dataclasses import dataclass

FITS = ("crop", "pad")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Options of tools/preprocess_data.py for images and captions."""

    fit: str = "crop"
    """crop: the largest centered square; pad: the whole image on a white square."""
    min_side: int = 0
    """Minimum length of an image's shorter side, pixels."""
    max_aspect: float = 0.0
    """Maximum ratio of longer to shorter side; 0: no limit."""
    clean_captions: bool = False
    """Whether captions are cleaned with `clean_caption`."""

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"--fit ({self.fit}) must be one of {', '.join(FITS)}.")
        if self.min_side < 0:
            raise ValueError(f"--min-side ({self.min_side}) must be at least 0 pixels.")
        if self.max_aspect != 0 and not self.max_aspect >= 1:
            raise ValueError(f"--max-aspect ({self.max_aspect}) must be at least 1, or 0 for no limit.")

    def to_dict(self) -> dict:
        """The filters as manifests record them."""
        return {
            "fit": self.fit,
            "min_side": self.min_side,
            "max_aspect": self.max_aspect,
            "clean_captions": self.clean_captions,
        }

    def find_fault(self, size: tuple[int, int]) -> str:
        """Why an image of this width and height is rejected; "" if it is accepted."""
        short, long = sorted(size)
        if short < self.min_side:
            return "picture too small"
        return "picture too long" if self.max_aspect and long > self.max_aspect * short else ""


def clean_caption(text: str) -> str:
    """`text` with HTML entities resolved, tags removed, runs of white space as one space and none at the ends."""
    return _SPACE.sub(" ", _TAG.sub(" ", html.unescape(text))).strip()
