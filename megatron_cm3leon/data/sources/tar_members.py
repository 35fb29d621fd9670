"""Files in a tar and the offsets of their bytes, with links resolved. Nothing is unpacked, so names are harmless."""

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
    """The tar is damaged: the rest of it cannot be read."""

    def in_key(self, name: str) -> "DamagedTar":
        """The same error with the name of the key whose members are incomplete."""
        return DamagedTar(str(self).replace(_DAMAGED, f"{_DAMAGED} in {name}", 1))


@dataclass(slots=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int = 0
    """Offset of its bytes in the tar."""
    size: int = 0
    link: str = ""
    """Normalized name of the target, for a link whose target does not precede it."""
    sparse: tarfile.TarInfo | None = None
    """Header with the map of a sparse file."""


class TarReader:
    """The members of one tar, and their bytes."""

    def __init__(self, content: BinaryIO) -> None:
        """`content`: an uncompressed tar. DamagedTar if it is not one."""
        self.content = content
        self._files: dict[str, Member] = {}
        """Members so far, by normalized name."""
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
                self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members otherwise
                if info is None:
                    self._check_end()
                    return
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DamagedTar(f"{_DAMAGED} at byte {self._tar.offset}: {error}") from error
            if not info.isdir():
                yield self._locate(info)

    def read(self, member: Member) -> bytes:
        """Bytes of a member. ValueError if it is not a file or too large; DamagedTar if bytes are missing."""
        file = self.follow(member)
        if not file and member.link == _SPECIAL:
            raise ValueError(f"{member.name} is not a regular file in the tar")
        if not file:
            raise ValueError(
                f"{member.name} is a link to {member.link}, which is not in the tar; write it with tar --dereference "
                f"--hard-dereference, which stores the files themselves"
            )
        try:
            check_size(file.size)
        except ValueError as error:
            raise ValueError(f"unreadable member {member.name}: {error}") from error
        try:
            sparse = self._tar.extractfile(file.sparse) if file.sparse else None
            if sparse:
                content = sparse.read()
            else:
                self.content.seek(file.offset)
                content = self.content.read(file.size)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DamagedTar(f"{_DAMAGED} at byte {file.offset}: {error}") from error
        if len(content) < file.size:
            found = f"{member.name} has {len(content)} of its {file.size} bytes"
            raise DamagedTar(f"{_DAMAGED} at byte {file.offset}: {found}")
        return content

    def follow(self, member: Member) -> Member | None:
        """The target file of a link, if it is among the members so far; for a file, the file itself."""
        found: Member | None = member
        for _ in range(_MOST_LINKS):
            if not found or not found.link:
                return found
            found = self._files.get(found.link)
        return None

    def _locate(self, info: tarfile.TarInfo) -> Member:
        name = posixpath.normpath(info.name)
        if info.islnk() or info.issym():
            base = posixpath.dirname(info.name) if info.issym() else ""
            target = posixpath.normpath(posixpath.join(base, info.linkname))
            found = self._files.get(target)
            # A symbolic link may point to a member that follows.
            member = Member(info.name, found.offset, found.size, found.link, found.sparse) if found else None
            member = member or Member(info.name, link=target)
        elif info.isfile():
            member = Member(info.name, info.offset_data, info.size, sparse=info if info.issparse() else None)
        else:
            member = Member(info.name, link=_SPECIAL)
        self._files[name] = member
        return member

    def _check_end(self) -> None:
        """DamagedTar for a missing end or a damaged header, which tarfile treats as the end of the archive."""
        self.content.seek(self._tar.offset)
        block = self.content.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise DamagedTar("the end mark is missing")
        if any(block):
            raise DamagedTar("a header is damaged")
