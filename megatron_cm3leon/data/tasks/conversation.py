"""Conversations: turns of user and assistant -> an instruction document with one target per answer.

    name: chat
    conversation: {system: "{text}", user: "User: {text}", assistant: "Assistant: {text}", separator: "\\n"}

`{text}` is what a turn says; that of the assistant is a target, with its images. The separator stands between turns. An
image is a segment of its own where its mark is. The images at the beginning of a user's turn come before the words
that name the role, so a question about an image is `image <break> User: question`.

    format     turns                                                    mark of an image
    llava      conversations: [{"from": "human", "value": ".."}]        <image>
    sharegpt   the same, or role and content; system: ".."              <image>
    messages   messages: [{"role": "user", "content": ..}]              <image>, or an item of the content's list
    lumina     as llava                                                 <|image|>, in the turns of either role

Images are in the field `image` or `images`: one or a list, each a path, URL, base64 or data: URI. There must be as many
as marks. A content that is a list has items such as {"type": "text", "text": ..}, {"type": "image", "image": ..} and
{"type": "image_url", "image_url": {"url": ..}}; an image without a value of its own is the next one of the field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cm3leon.data.sources.documents import PROMPT, TARGET, BadInput, Entry, RawImage
from megatron_cm3leon.data.sources.embedded import shorten
from megatron_cm3leon.data.sources.rows import Locate, Unusable, read_image_field, write_extra
from megatron_cm3leon.data.tasks.pieces import PieceBuilder
from megatron_cm3leon.data.tasks.template import check_keys, read_image_first, read_name

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
ALIASES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
"""Names of roles in data sets."""
TURNS = {"llava": "conversations", "sharegpt": "conversations", "messages": "messages", "lumina": "conversations"}
"""Format -> field of the turns."""
MARKS = {"llava": "<image>", "sharegpt": "<image>", "messages": "<image>", "lumina": "<|image|>"}
"""Format -> mark of an image."""
_IMAGE_FIELDS = ("image", "images")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_TEXT_TYPES = ("text", "input_text", "output_text")
_TEXT = "{text}"


@dataclass(frozen=True)
class Conversation:
    """How the turns of a conversation are written."""

    name: str
    user: str
    assistant: str
    system: str = _TEXT
    separator: str = "\n"
    image_first: bool = False
    """Whether all images of the prompts precede the first text."""

    def __post_init__(self) -> None:
        for role in ROLES:
            if getattr(self, role).count(_TEXT) != 1:
                raise ValueError(
                    f"task {self.name}: {role} ({getattr(self, role)!r}) must have {_TEXT} once, where the turn's text "
                    f"stands."
                )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> "Conversation":
        """A conversation from the content of a YAML file or of a manifest; `where`: its name in messages."""
        check_keys(content, ("name", "conversation", "image_first"), where)
        given = content["conversation"]
        known = (*ROLES, "separator")
        if not isinstance(given, Mapping) or not {USER, ASSISTANT} <= given.keys() <= set(known):
            raise ValueError(f"{where}: conversation must have user and assistant, and no other keys than {known}.")
        if wrong := [key for key, value in given.items() if not isinstance(value, str)]:
            raise ValueError(f"{where}: {wrong[0]} ({given[wrong[0]]!r}) of conversation must be a text.")
        return cls(read_name(content, where), **given, image_first=read_image_first(content, where))

    def to_dict(self) -> dict:
        """What `from_dict` reads."""
        forms = {key: getattr(self, key) for key in (*ROLES, "separator")}
        return {"name": self.name, "conversation": forms, **({"image_first": True} if self.image_first else {})}


Item = str | RawImage | None
"""A text or image of a turn; None: the next image of the row's field."""
Turn = tuple[str, str, list[str | RawImage]]
"""Role, name in messages, texts and images."""


@dataclass(frozen=True)
class ConversationFiller:
    """Turns rows of one of the formats into documents."""

    conversation: Conversation
    format: str
    passes = 1

    def describe(self) -> dict:
        """The conversation as manifests record it."""
        return {**self.conversation.to_dict(), "format": self.format}

    def fill(self, record: object, key: str, source: str, number: int, form: int, locate: Locate) -> Entry:
        """The document of a row, or a BadInput with the reason; `number` and `form` are not used."""
        if not isinstance(record, dict):
            return BadInput(key, source, f"not a JSON object but {type(record).__name__}")
        turns_field = TURNS[self.format]
        try:
            images = _read_images(record, key, locate)
            turns = [
                (role, place, list(self._split_content(content, place, key, locate)))
                for role, content, place in _read_turns(record, turns_field)
            ]
            builder = self._write(self._place_images(turns, images))
        except Unusable as error:
            return BadInput(key, source, str(error))
        used = (turns_field, *_IMAGE_FIELDS, SYSTEM)
        extra = {name: value for name, value in record.items() if name not in used}
        return builder.build(key, source, write_extra(extra) if extra else "{}")

    def _split_content(self, content: object, place: str, key: str, locate: Locate) -> Iterator[Item]:
        """Texts and images of a turn in their order."""
        if isinstance(content, str):
            yield from self._split_text(content)
            return
        if not isinstance(content, list):
            raise Unusable(f"no text: the content of {place} is {type(content).__name__}, not text or a list")
        for number, item in enumerate(content, 1):
            kind = item.get("type") if isinstance(item, dict) else None
            if isinstance(item, str):
                yield from self._split_text(item)
            elif isinstance(item, dict) and kind in _TEXT_TYPES and isinstance(item.get("text"), str):
                yield from self._split_text(item["text"])
            elif isinstance(item, dict) and kind in _IMAGE_TYPES:
                yield _read_item_image(item, f"{key}.{place.replace(' ', '')}.{number}", locate)
            else:
                shown = shorten(repr(kind if isinstance(item, dict) else item), 60)
                raise Unusable(f"unknown content: item {number} of {place} has the type {shown}, not text or image")

    def _split_text(self, text: str) -> Iterator[Item]:
        for number, part in enumerate(text.split(MARKS[self.format])):
            if number:
                yield None
            if part.strip():
                yield part.strip()

    def _place_images(self, turns: list[tuple[str, str, list[Item]]], images: list[RawImage]) -> list[Turn]:
        """The turns with the images of the row's field at their marks."""
        marks = sum(item is None for _, _, items in turns for item in items)
        if marks != len(images):
            raise Unusable(
                f"images and marks differ: {marks} marks {MARKS[self.format]} in the turns, {len(images)} images"
            )
        rest = iter(images)
        return [(role, place, [next(rest) if item is None else item for item in items]) for role, place, items in turns]

    def _write(self, turns: list[Turn]) -> PieceBuilder:
        builder, style = PieceBuilder(), self.conversation
        if style.image_first:
            for role, _, items in turns:
                for item in items:
                    if role != ASSISTANT and isinstance(item, RawImage):
                        builder.add_image(PROMPT, item)
        for role, place, items in turns:
            what = TARGET if role == ASSISTANT else PROMPT
            if not items:
                raise Unusable(f"{'empty answer' if role == ASSISTANT else 'empty text'}: {place} ({role})")
            if what == PROMPT:
                if style.image_first:
                    items = [item for item in items if isinstance(item, str)]
                while items and isinstance(items[0], RawImage):
                    builder.add_image(PROMPT, items[0])
                    items = items[1:]
                if not items:
                    continue
            before, after = getattr(style, role).split(_TEXT)
            builder.add_text(PROMPT, style.separator + before)
            for position, item in enumerate(items):
                if isinstance(item, RawImage):
                    builder.add_image(what, item)
                    continue
                if position and isinstance(items[position - 1], str):
                    builder.add_text(what, " ")
                builder.add_text(what, item)
            if after:
                builder.add_text(PROMPT, after)
        return builder


def _read_turns(record: dict, turns_field: str) -> Iterator[tuple[str, object, str]]:
    """(role, content, name in messages) of each turn."""
    turns = record.get(turns_field)
    if not isinstance(turns, list) or not turns:
        raise Unusable(f'no turns: field "{turns_field}" is {_describe(record, turns_field)}, not a list of turns')
    if record.get(SYSTEM):
        yield SYSTEM, record[SYSTEM], "the system text"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Unusable(f"no turns: turn {number} is {type(turn).__name__}, not an object")
        given = turn.get("from", turn.get("role"))
        role = ALIASES.get(given) if isinstance(given, str) else None
        if role is None:
            raise Unusable(
                f"unknown role: {shorten(repr(given), 60)} of turn {number}; the roles are {', '.join(ALIASES)}"
            )
        yield role, turn.get("value", turn.get("content")), f"turn {number}"


def _describe(record: dict, name: str) -> str:
    if name not in record:
        return "missing"
    return "empty" if record[name] == [] else type(record[name]).__name__


def _read_images(record: dict, key: str, locate: Locate) -> list[RawImage]:
    """The images of the row's field; one may be given without a list."""
    given = [name for name in _IMAGE_FIELDS if record.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise Unusable('two lists of images: fields "image" and "images"')
    if not given:
        return []
    values = record[given[0]]
    return [
        read_image_field({f"{given[0]} {number}": _unwrap(value)}, f"{given[0]} {number}", f"{key}.{number}", locate)
        for number, value in enumerate(values if isinstance(values, list) else [values], 1)
    ]


def _read_item_image(item: dict, shown: str, locate: Locate) -> RawImage | None:
    """The image of an item of a content; None if it has no value of its own."""
    names = ("image", "image_url", "url", "path", "base64", "bytes", "data")
    value = next((item[name] for name in names if item.get(name) is not None), None)
    return None if value is None else read_image_field({"image": _unwrap(value)}, "image", shown, locate)


def _unwrap(value: object) -> object:
    """{"url": ..} as its value."""
    return value["url"] if isinstance(value, dict) and isinstance(value.get("url"), str) else value
