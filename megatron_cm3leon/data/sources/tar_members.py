"""Files in a tar: where their bytes are, links followed. Nothing is unpacked, so a member's name can do no harm."""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_cm3leon.data.sources.files import check_size

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_SPECIAL = "/.."  # no member has this normalized name
_MOST_LINKS = 8
_DAMAGED = "truncated or damaged tar:"


class DamagedTar(tarfile.TarError):
    """The rest of a tar cannot be read."""

    def in_key(self, name: str) -> "DamagedTar":
        """The same with the key whose members the damage cuts."""
        return DamagedTar(str(self).replace(_DAMAGED, f"{_DAMAGED} in {name}", 1))


@dataclass(slots=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int = 0
    """Of its bytes in the tar."""
    size: int = 0
    link: str = ""
    """Name of the member whose bytes are meant, of a link whose target was not met before it."""
    sparse: tarfile.TarInfo | None = None
    """Where its pieces belong, of a sparse file."""


class TarReader:
    """The members of one tar, and their bytes."""

    def __init__(self, content: BinaryIO) -> None:
        """`content`: an uncompressed tar. DamagedTar where it is none."""
        self.content = content
        self._places: dict[str, Member] = {}
        """Files met so far by normalized name."""
        try:
            self._tar = tarfile.open(fileobj=content, mode="r:", errorlevel=2)  # noqa: SIM115 (reads `content`)
        except tarfile.TarError as error:
            content.seek(0)
            start = content.read(8)
            kind = next((kind for magic, kind in _COMPRESSIONS.items() if start.startswith(magic)), "")
            known = f"it is compressed ({kind}); unpack it first" if kind else f"it begins with {start!r}"
            raise DamagedTar(f"not a tar: {error}; {known}") from error

    def __iter__(self) -> Iterator[Member]:
        """Files and links in order, without folders; DamagedTar if the rest cannot be read."""
        while True:
            try:
                info = self._tar.next()
                self._tar.members.clear()  # tarfile keeps every member otherwise
                if info is None:
                    self._check_end()
                    return
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DamagedTar(f"{_DAMAGED} at byte {self._tar.offset}: {error}") from error
            if not info.isdir():
                yield self._locate(info)

    def read(self, member: Member) -> bytes:
        """A member's bytes. ValueError when it has none of its own or too many; DamagedTar when some are missing."""
        place = self.follow(member)
        if not place and member.link == _SPECIAL:
            raise ValueError(f"{member.name} is not a regular file in the tar")
        if not place:
            raise ValueError(
                f"{member.name} is a link to {member.link}, which is not in the tar; write it with tar --dereference "
                f"--hard-dereference, which stores the files themselves"
            )
        try:
            check_size(place.size)
        except ValueError as error:
            raise ValueError(f"unreadable member {member.name}: {error}") from error
        try:
            if place.sparse:
                content = self._tar.extractfile(place.sparse).read()
            else:
                self.content.seek(place.offset)
                content = self.content.read(place.size)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DamagedTar(f"{_DAMAGED} at byte {place.offset}: {error}") from error
        if len(content) < place.size:
            found = f"{member.name} has {len(content)} of its {place.size} bytes"
            raise DamagedTar(f"{_DAMAGED} at byte {place.offset}: {found}")
        return content

    def follow(self, member: Member) -> Member | None:
        """The file that a link means, if the members so far have it; a file itself."""
        for _ in range(_MOST_LINKS):
            if not member or not member.link:
                return member
            member = self._places.get(member.link)
        return None

    def _locate(self, info: tarfile.TarInfo) -> Member:
        name = posixpath.normpath(info.name)
        if info.islnk() or info.issym():
            base = posixpath.dirname(info.name) if info.issym() else ""
            target = posixpath.normpath(posixpath.join(base, info.linkname))
            found = self._places.get(target)
            # A symbolic link may point to a member that follows.
            member = Member(info.name, found.offset, found.size, found.link, found.sparse) if found else None
            member = member or Member(info.name, link=target)
        elif info.isfile():
            member = Member(info.name, info.offset_data, info.size, sparse=info if info.issparse() else None)
        else:
            member = Member(info.name, link=_SPECIAL)
        self._places[name] = member
        return member

    def _check_end(self) -> None:
        """tarfile takes a missing end and a damaged header for the end of the archive."""
        self.content.seek(self._tar.offset)
        block = self.content.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise DamagedTar("the end mark is missing")
        if any(block):
            raise DamagedTar("a header is damaged")
