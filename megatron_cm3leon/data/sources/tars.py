"""WebDataset tars as img2dataset writes them: members <key>.jpg, <key>.txt and <key>.json, one key after the other.

A tar is a part. Nothing is unpacked to the disk, so a member's name can do no harm.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import (
    PICTURE_ENDINGS,
    BadInput,
    Entry,
    Picture,
    RawPair,
    check_document,
    decode_text,
)  # fmt: skip
from megatron_cm3leon.data.sources.files import check_size, identify_file, open_file

_PICTURES = tuple(ending[1:] for ending in PICTURE_ENDINGS)


@dataclass
class _Group:
    """Members of one key."""

    name: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


class _DamagedTar(Exception):
    """The rest of a tar cannot be read."""


class TarSource(FileSource):
    """Pictures with captions, in tars."""

    expects, external = "members <key>.jpg and <key>.txt (or a .json with a caption)", False

    def _cut(self, file: int) -> str:
        self._parts.append(Part(file, 0, 0, 0, None))
        self.count = None
        return identify_file(self.files[file])

    def _read(self, part: Part) -> Iterator[Entry]:
        name, seen, number = self.name_of(part.file), set(), 0
        try:
            for group in _read_groups(self.files[part.file]):
                if group.name in seen:
                    group.fault = f"duplicate key: {group.name} stands in this tar before, apart from these members"
                seen.add(group.name)
                yield _make_pair(group, f"{part.file:06d}-{number:06d}", f"{name}/{group.name}")
                number += 1
        except _DamagedTar as error:
            yield BadInput(f"{part.file:06d}-{number:06d}", name, str(error))


def _read_groups(path: str) -> Iterator[_Group]:
    """Members with the same key, one group after the other; _DamagedTar where the rest cannot be read.

    A group that the damage cuts is not yielded: its key is named in the exception.
    """
    group = None
    with open_file(path) as content:
        try:
            tar = tarfile.open(fileobj=content, mode="r:", errorlevel=2)  # noqa: SIM115 (reads `content`)
        except tarfile.TarError as error:
            content.seek(0)
            raise _DamagedTar(f"not a tar: {error}; it begins with {content.read(8)!r}") from error
        while True:
            try:
                member = tar.next()
                tar.members.clear()  # tarfile keeps every member otherwise
                if member is None:
                    _check_end(tar, content)
                    break
                if member.isdir():
                    continue
                name, ending = _split_name(member.name)
                if group is None or name != group.name:
                    if group:
                        yield group
                    group = _Group(name)
                _read_member(tar, member, ending, group)
            except (tarfile.TarError, EOFError, OSError, _DamagedTar) as error:
                cut = f" in {group.name}" if group else ""
                raise _DamagedTar(f"truncated or damaged tar:{cut} at byte {tar.offset}: {error}") from error
    if group:
        yield group


def _check_end(tar: tarfile.TarFile, content) -> None:
    """tarfile takes a missing end and a damaged header for the end of the archive."""
    content.seek(tar.offset)
    block = content.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _DamagedTar("the end mark is missing")
    if any(block):
        raise _DamagedTar("a header is damaged")


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: WebDataset cuts at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, group: _Group) -> None:
    if ending not in ("txt", "json", *_PICTURES):
        return
    if ending in group.members:
        group.fault = f"duplicate key: {group.name} has more than one .{ending}"
    elif not member.isfile():
        group.fault = f"{member.name} is no regular file in the tar"
    else:
        try:
            check_size(member.size)
        except ValueError as error:
            group.fault = f"unreadable member {member.name}: {error}"
            return
        content = tar.extractfile(member).read()
        if len(content) < member.size:
            raise _DamagedTar(f"{member.name} has {len(content)} of its {member.size} bytes")
        group.members[ending] = content


def _make_pair(group: _Group, key: str, source: str) -> Entry:
    if group.fault:
        return BadInput(key, source, group.fault)
    pictures = [ending for ending in group.members if ending in _PICTURES]
    if len(pictures) != 1:
        reason = f"duplicate picture members: {', '.join(pictures)}" if pictures else "no picture among the members"
        text = group.members.get("txt", b"").decode(errors="replace") if not pictures else ""
        return BadInput(key, source, f"{reason}: {group.name}", [text] if text else ())
    picture = Picture(f"{source}.{pictures[0]}", content=group.members[pictures[0]])
    try:
        fields = _read_json(group.members["json"]) if "json" in group.members else {"key": group.name}
        caption = fields.pop("caption", None)
        if "txt" in group.members:
            caption = decode_text(group.members["txt"], f"{group.name}.txt")
        if not isinstance(caption, str):
            return BadInput(key, source, f"no caption: {group.name} has no .txt and no .json with a caption", [picture])
    except ValueError as error:
        return BadInput(key, source, str(error), [picture])
    return check_document(RawPair(key, source, [caption, picture], json.dumps(fields, sort_keys=True)))


def _read_json(content: bytes) -> dict:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    return fields
