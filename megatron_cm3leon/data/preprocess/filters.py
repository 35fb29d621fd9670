"""Which pictures are wanted, how they are brought to size, and caption clean-up."""

import html
import re
from dataclasses import dataclass

FITS = ("crop", "pad")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What tools/preprocess_data.py was told about pictures and captions."""

    fit: str = "crop"
    """crop: the largest centred square; pad: the whole picture on a white square."""
    min_side: int = 0
    """Smallest length of a picture's shorter side, pixels."""
    max_aspect: float = 0.0
    """Largest ratio of longer to shorter side; 0: any."""
    clean_captions: bool = False
    """Whether captions go through `clean_caption`."""

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"--fit ({self.fit}) must be one of {', '.join(FITS)}.")
        if self.min_side < 0:
            raise ValueError(f"--min-side ({self.min_side}) must be at least 0 pixels.")
        if self.max_aspect != 0 and not self.max_aspect >= 1:
            raise ValueError(f"--max-aspect ({self.max_aspect}) must be at least 1, or 0 for any.")

    def to_dict(self) -> dict:
        """The filters as manifests have them."""
        return {
            "fit": self.fit,
            "min_side": self.min_side,
            "max_aspect": self.max_aspect,
            "clean_captions": self.clean_captions,
        }

    def find_fault(self, size: tuple[int, int]) -> str:
        """Why a picture of this width and height is not wanted; "" when it is."""
        short, long = sorted(size)
        if short < self.min_side:
            return "picture too small"
        return "picture too long" if self.max_aspect and long > self.max_aspect * short else ""


def clean_caption(text: str) -> str:
    """Without HTML (entities resolved, tags dropped), runs of white space as one space, none at the ends."""
    return _SPACE.sub(" ", _TAG.sub(" ", html.unescape(text))).strip()
