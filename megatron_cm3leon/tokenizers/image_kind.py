"""Why a file cannot be decoded as an image: another format, a page, a damaged header, a faulty transfer."""

import io

from PIL import Image

_OTHER_IMAGES = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop (PSD)",
    b"%!PS": "PostScript (EPS)",
    b"\xc5\xd0\xd3\xc6": "PostScript (EPS)",
    b"%PDF": "PDF",
    b"icns": "ICNS",
    b"\0\0\2\0": "CUR",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"II\xbc": "JPEG XR",
    b"BPG\xfb": "BPG",
    b"AT&TFORM": "DjVu",
    b"gimp xcf": "GIMP (XCF)",
    b"/* XPM": "XPM",
    b"\x0a\x05\x01": "PCX",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\x01\xda\x01": "SGI",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_OTHER_FILES = {
    b"\x1f\x8b": "a gzip file; unpack it",
    b"PK\3\4": "a ZIP file; unpack it",
    b"\x1aE\xdf\xa3": "a Matroska video",
    b"\0\5\x16\7": "an AppleDouble file, which holds the attributes that macOS keeps of another file",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
    b"/annex/objects": "a pointer of git-annex; fetch the file with git annex get",
    b"\x89PNG\n": "a PNG whose line ends were converted, as a transfer in text mode does",
    b"\x89PNG\r\r\n": "a PNG whose line ends were converted, as a transfer in text mode does",
    b"\xc2\x89PNG": "a PNG that was saved as text in UTF-8",
    b"\xef\xbf\xbd": "a file that was saved as text in UTF-8, which lost bytes",
}


def explain_no_image(data: bytes, formats: tuple[str, ...]) -> str:
    """Why none of the decoders of `formats` (Pillow's names) accepts these bytes, in a few words."""
    other = _find_other_format(data)
    if other:
        return f"its format is {other}, which is not decoded; convert it to PNG or JPEG"
    damage = _find_damage(data, formats)
    if damage:
        return damage
    kind = _find_kind(data)
    if kind:
        return f"not an image but {kind}"
    return f"not an image in any of the formats {', '.join(formats)}; it begins with {data[:12]!r}"


def _find_damage(data: bytes, formats: tuple[str, ...]) -> str:
    """The message of the decoder that recognizes the first bytes but refuses the header; "" if none does."""
    for name in formats:
        factory, accepts = Image.OPEN[name]
        # Padded: for less than 4 bytes some of these functions raise struct.error.
        if accepts and accepts(data[:16].ljust(16, b"\0")) is True:
            try:
                factory(io.BytesIO(data), "").close()
            except Exception as error:  # SyntaxError, OSError, struct.error ...: decoders meet arbitrary bytes
                return f"damaged {name}: {error or type(error).__name__}"
    return ""


def _find_other_format(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        brands = {data[start : start + 4] for start in range(8, min(int.from_bytes(data[:4], "big"), 256), 4)}
        return "HEIC" if brands & _HEIF_BRANDS and not brands & {b"avif", b"avis"} else ""
    if b"<svg" in data[:4096].lower() and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "SVG"
    return next((name for start, name in _OTHER_IMAGES.items() if data.startswith(start)), "")


def _find_kind(data: bytes) -> str:
    text = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    if data[4:8] == b"ftyp":
        return "a video"
    if text.lower().startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<Error", b"{", b"[")):
        return f"a text that begins with {bytes(text[:40])!r}"
    if not any(data):
        return f"{len(data):,} zero bytes"
    return next((kind for start, kind in _OTHER_FILES.items() if data.startswith(start)), "")
