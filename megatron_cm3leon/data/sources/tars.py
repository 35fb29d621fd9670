"""WebDataset tars as img2dataset writes them: members <key>.jpg, <key>.txt and <key>.json, key by key.

A tar is a part. Keys end at the first dot of a member's base name, as in WebDataset; if that gives no image or no
caption, the key ends at the last dot. If the members of a key are not adjacent (GNU tar without --sort=name), the rest
of the tar is listed first and then read key by key.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from unicodedata import normalize

from megatron_cm3leon.data.sources.base import FileSource, Part
from megatron_cm3leon.data.sources.documents import (
    COMMON_ENDINGS,
    IMAGE_ENDINGS,
    UNREAD_ENDINGS,
    BadInput,
    Entry,
    RawImage,
    RawPair,
    check_document,
    decode_text,
)  # fmt: skip
from megatron_cm3leon.data.sources.files import identify_file, open_file
from megatron_cm3leon.data.sources.tar_members import DamagedTar, Member, TarReader

logger = logging.getLogger(__name__)
_IMAGES = [{ending[1:] for ending in endings} for endings in (COMMON_ENDINGS, IMAGE_ENDINGS, UNREAD_ENDINGS)]
"""File extensions of images: those of the first set are preferred, those of the last set cannot be decoded."""
_READ_AT_ONCE = {"txt", "json"} | _IMAGES[1]


@dataclass
class _Group:
    """Members of one key."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    """By ending: everything after the first dot, in lower case."""
    duplicates: set[str] = field(default_factory=set)
    """Endings that occur more than once."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Bytes of the members that were read in the first pass, by ending."""

    def add(self, ending: str, member: Member) -> None:
        """Add a member; of several with the same ending, the first counts."""
        if ending in self.members:
            self.duplicates.add(ending)
        self.members.setdefault(ending, member)

    def merge(self, other: "_Group") -> None:
        """Add the members of another group with the same key."""
        for ending, member in other.members.items():
            self.add(ending, member)
        self.duplicates |= other.duplicates

    def __str__(self) -> str:
        return ", ".join(f".{ending}" if ending else "no ending" for ending in self.members)


@dataclass
class _Document:
    """The members of a group that form one pair, as their endings; `name`: key of the pair."""

    name: str
    images: list[str]
    texts: list[str]
    jsons: list[str]

    @property
    def complete(self) -> bool:
        """Whether it has one image and a caption."""
        return len(self.images) == 1 and bool(self.texts or self.jsons)


class TarSource(FileSource):
    """Images with captions, in tars."""

    expects, external = "members <key>.jpg and <key>.txt (or a .json with a caption)", False

    def _cut(self, file: int) -> str:
        self._parts.append(Part(file, 0, 0, 0, None))
        self.count = None
        return identify_file(self.files[file])

    def _read(self, part: Part) -> Iterator[Entry]:
        name, number = self.name_of(part.file), 0
        seen: set[str] = set()
        others: list[str] = []
        prefix = f"{part.file:06d}"
        try:
            with open_file(self.files[part.file]) as content:
                reader = TarReader(content)
                for group in _read_groups(reader, name, others):
                    documents = _find_documents(group)
                    if not documents or (group.name not in seen and _describes_dataset(reader, group)):
                        others.append(f"{group.name} ({group})")
                        continue
                    for document in documents:
                        fault = _describe_repeated(group, document) if document.name in seen else ""
                        seen.add(document.name)
                        yield _make_pair(reader, group, document, f"{prefix}-{number:06d}", name, fault)
                        number += 1
        except DamagedTar as error:
            yield BadInput(f"{prefix}-{number:06d}", name, str(error))
        else:
            if others and not number:
                reason = f"no image and no caption among its {len(others)} members, such as {others[0]}"
                yield BadInput(f"{prefix}-{number:06d}", name, reason)


def _read_groups(reader: TarReader, name: str, others: list[str]) -> Iterator[_Group]:
    """Groups in the order of their first members; DamagedTar if the rest cannot be read.

    Groups are yielded at once as long as each key is complete. From the first incomplete key on, the rest of the tar
    is listed before it is read, so that members of a key that are not adjacent are joined. Names of members that
    belong to no document are appended to `others`.
    """
    rest: dict[str, _Group] = {}
    damage, scattered = None, False
    try:
        for group in _gather(reader, rest, others):
            if not rest and all(document.complete for document in _find_documents(group)) and not _has_open_link(group):
                yield group
            elif group.name in rest:
                rest[group.name].merge(group)
                scattered = True
            else:
                rest[group.name] = group
    except DamagedTar as error:
        damage = error
    if scattered:
        logger.info(
            "%s: members of a key are not adjacent, which takes longer to read; tar --sort=name keeps them together.",
            name,
        )
    _join_forms(rest)
    yield from rest.values()
    if damage:
        raise damage


def _gather(reader: TarReader, rest: dict[str, _Group], others: list[str]) -> Iterator[_Group]:
    """Adjacent members with the same key; their bytes are read as long as `rest` is empty.

    If the tar is damaged, DamagedTar names the incomplete group; the group is yielded only if `rest` may hold other
    members of it.
    """
    group = None
    try:
        for member in reader:
            name, ending = _split_name(member.name)
            if _is_no_document(name, ending):
                others.append(member.name)
                continue
            if group is None or name != group.name:
                if group:
                    yield group
                group = _Group(name)
            group.add(ending, member)
            if not rest and not member.link and ending in _READ_AT_ONCE and ending not in group.contents:
                with suppress(ValueError):  # too large: _make_pair reports it
                    group.contents[ending] = reader.read(member)
    except DamagedTar as error:
        if group and rest:
            yield group  # other members of it may precede
        raise (error.in_key(group.name) if group else error) from error
    if group:
        yield group


def _join_forms(rest: dict[str, _Group]) -> None:
    """Join two incomplete groups whose names differ only in their Unicode form (NFC, NFD)."""
    forms: defaultdict[str, list[str]] = defaultdict(list)
    for name, group in rest.items():
        if not name.isascii() and not any(document.complete for document in _find_documents(group)):
            forms[normalize("NFC", name)].append(name)
    for first, *more in forms.values():
        if len(more) == 1 and rest[first].members.keys().isdisjoint(rest[more[0]].members):
            rest[first].merge(rest.pop(more[0]))


def _has_open_link(group: _Group) -> bool:
    """Whether a link's target may be a later member."""
    return any(member.link for member in group.members.values())


def _is_no_document(name: str, ending: str) -> bool:
    """Whether a member belongs to the file system (`._x.jpg`, .DS_Store) or to the dataset (`__x__.json`)."""
    base = name.rpartition("/")[2]
    describes_dataset = base.startswith("__") and base.endswith("__") and ending not in _IMAGES[1]
    return not base or describes_dataset or "__MACOSX/" in name  # a name that begins with a dot has an empty key


def _describes_dataset(reader: TarReader, group: _Group) -> bool:
    """Whether a group is one .json without a caption, such as the statistics that img2dataset writes."""
    if group.members.keys() != {"json"} or group.duplicates:
        return False
    try:
        content = group.contents.get("json") or reader.read(group.members["json"])
        return "caption" not in _read_json(content)
    except ValueError:  # not valid JSON: an unusable input
        return False


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: WebDataset splits at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _find_documents(group: _Group) -> list[_Document]:
    """The pairs of a group: the members whose endings hold no dot, if these are an image and a caption.

    Otherwise the members with more dots count, too: as separate pairs if image and caption have the same name up to
    the last dot (photo.v1.jpg, photo.v1.txt), otherwise as members of one pair (0.image.jpg, 0.caption.txt).
    """
    plain = _sort_members(group.name, [ending for ending in group.members if "." not in ending])
    dotted = [ending for ending in group.members if "." in ending]
    if plain.complete or not dotted:
        return [plain] if plain.images or plain.texts or plain.jsons else []
    stems: defaultdict[str, list[str]] = defaultdict(list)
    for ending in dotted:
        stems[ending.rpartition(".")[0]].append(ending)
    names = {stem: group.members[endings[0]].name.rpartition(".")[0] for stem, endings in stems.items()}
    separate = [_sort_members(names[stem], endings) for stem, endings in stems.items()]
    if any(document.complete for document in separate) and not (plain.images or plain.texts or plain.jsons):
        return [document for document in separate if document.images or document.texts or document.jsons]
    more = _sort_members(group.name, dotted)
    joined = _Document(
        group.name, plain.images or more.images, plain.texts or more.texts, plain.jsons or more.jsons[:1]
    )
    return [joined] if joined.images or joined.texts or joined.jsons else []


def _sort_members(name: str, endings: Iterable[str]) -> _Document:
    kinds = {ending: ending.rpartition(".")[2] for ending in endings}
    images = ([ending for ending, kind in kinds.items() if kind in allowed] for allowed in _IMAGES)
    texts, jsons = ([ending for ending, kind in kinds.items() if kind == wanted] for wanted in ("txt", "json"))
    return _Document(name, next(filter(None, images), []), texts, jsons)


def _describe_repeated(group: _Group, document: _Document) -> str:
    return (
        f"duplicate key: {document.name} occurs earlier in this tar, not next to these members ({group}); tar "
        f"--sort=name keeps the members of a key together"
    )


def _describe_dots(group: _Group) -> str:
    """Addition to a reason if names hold more than one dot."""
    if not any("." in ending for ending in group.members):
        return ""
    return f"; a key ends at the first dot of a name, and the endings of {group.name} are {group}"


def _find_fault(group: _Group, document: _Document) -> str:
    """Why these members are not a valid pair; "" if they are."""
    repeated = group.duplicates.intersection([*document.images, *document.texts, *document.jsons])
    dots = _describe_dots(group)
    if repeated:
        return f"duplicate key: {group.name} has more than one .{min(repeated)}{dots}"
    if len(document.images) > 1:
        return f"duplicate image members: {', '.join(document.images)}: {document.name}{dots}"
    if not document.images:
        return f"no image among the members: {document.name}{dots or f' ({group})'}"
    if len(document.texts) > 1:
        return f"duplicate captions: {', '.join(document.texts)}: {document.name}{dots}"
    return ""


def _make_pair(reader: TarReader, group: _Group, document: _Document, key: str, tar: str, fault: str) -> Entry:
    source = f"{tar}/{document.name}"
    usable: list[str | RawImage] = []

    def read(ending: str) -> bytes:
        return group.contents[ending] if ending in group.contents else reader.read(group.members[ending])

    try:
        if fault := fault or _find_fault(group, document):
            if len(document.texts) == 1 and not document.images:
                usable.append(decode_text(read(document.texts[0]), document.texts[0]))
            raise ValueError(fault)
        name, ending = _split_name(group.members[document.images[0]].name)
        image = RawImage(f"{tar}/{name}.{ending}", content=read(document.images[0]))
        usable.append(image)
        fields = _read_json(read(document.jsons[0])) if document.jsons else {"key": document.name}
        caption = fields.pop("caption", None)
        if document.texts:
            caption = decode_text(read(document.texts[0]), f"{group.name}.{document.texts[0]}")
        if not isinstance(caption, str):
            dots = _describe_dots(group)
            raise ValueError(f"no caption: {document.name} has no .txt and no .json with a caption{dots}")
    except ValueError as error:
        return BadInput(key, source, str(error), usable)
    return check_document(RawPair(key, source, [caption, image], json.dumps(fields, sort_keys=True)))


def _read_json(content: bytes) -> dict:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    return fields
