"""Instruction documents: what makes one unusable."""

import pytest

from megatron_cm3leon.data.sources import BadInput, RawImage, RawInstruction
from megatron_cm3leon.data.sources.documents import check_document

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
