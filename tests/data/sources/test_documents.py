"""Instruction documents: what makes one unusable."""

import pytest

from megatron_cm3leon.data.sources import BadInput, RawImage, RawInstruction
from megatron_cm3leon.data.sources.documents import Fields, check_document
from megatron_cm3leon.data.sources.rows import make_document

IMAGE = RawImage("a.png", "/a.png")


def make(pieces, roles, joined):
    return RawInstruction("0", "x:1", pieces, "{}", tuple(roles), tuple(joined))


def test_pieces_that_are_joined_form_one_segment():
    document = make(["Q?", " yes", ".", IMAGE], ["prompt", "target", "prompt", "prompt"], [False, True, True, False])
    assert check_document(document) is document and document.kind == "instruction"
    assert document.join_pieces() == ["Q? yes.", IMAGE] and document.texts == ["Q?", " yes", "."]


@pytest.mark.parametrize(
    "pieces, roles, reason",
    [
        (["Q?", " "], ["prompt", "target"], "empty answer: piece 2 of 2"),
        (["", " yes"], ["prompt", "target"], "empty text"),
        (["Q?", " yes"], ["prompt", "answer"], "unknown role: 'answer' of piece 2; the roles are prompt, target"),
        (["Q?", " yes"], ["prompt", "prompt"], "no answer: none of the 2 pieces is a target"),
        (["Q?", RawImage("")], ["prompt", "target"], "empty picture path"),
        (["Q?", "\ud800"], ["prompt", "target"], "not Unicode: an unpaired surrogate in text or picture path"),
    ],
)
def test_an_unusable_document_has_a_reason(pieces, roles, reason):
    found = check_document(make(pieces, roles, [False, False]))
    assert isinstance(found, BadInput) and (found.source, found.reason) == ("x:1", reason)


def read_segments(*segments, **others):
    return make_document({"segments": list(segments), **others}, "0", "x:1", Fields(), lambda name: (name, f"/{name}"))


def test_segments_with_roles_are_an_instruction_document():
    question = {"role": "prompt", "text": "Is it red?"}
    answer, image = (
        {"role": "target", "text": " yes", "joined": True},
        {"role": "prompt", "image": "a.png", "joined": None},
    )
    document = read_segments(question, answer, image, license="CC0")
    assert document == RawInstruction(
        "0",
        "x:1",
        ["Is it red?", " yes", IMAGE],
        '{"license": "CC0"}',
        ("prompt", "target", "prompt"),
        (False, True, False),
    )
    for segments, reason in (
        ([question, {**answer, "role": "user"}], "unknown role: 'user' of piece 2; the roles are prompt, target"),
        ([question, {"text": "yes"}], "unknown role: 'None' of piece 2; the roles are prompt, target"),
        ([question, image, answer], "segment 2 is joined, which only a text after a text can be"),
        ([question, "yes"], 'segment 1 is no {"text": ...} and no {"image": ...}'),
        ([question, {"role": "target", "text": " "}], "empty answer: piece 2 of 2"),
    ):
        assert read_segments(*segments).reason == reason
