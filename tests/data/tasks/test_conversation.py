"""Conversations of all four formats, with what is wrong in them."""

import base64
import json

import pytest

from megatron_cm3leon.data.sources import BadInput, RawImage
from tests.data.runs import read_all, read_quarantine
from tests.data.tasks.instructions import (
    open_rows,
    read_one,
    run_rows,
    show_document,
    write_gray_images,
    write_rows,
)


def talk(*values, **others):
    """A row with turns of human and gpt in turn."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns, **others}


def say(*contents, **others):
    """A row of messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": value} for number, value in enumerate(contents)]
    return {"messages": turns, **others}


TURN = "<white.png>|User: What is it?\nAssistant:[ A square.]"
GOOD = [
    ("llava", talk("<image>\nWhat is it?", "A square.", image="white.png", id=3), TURN),
    (
        "llava",
        talk("What is it?\n<image>", "A square.", image=["white.png"]),
        "User: What is it?|<white.png>|Assistant:[ A square.]",
    ),
    ("llava", talk("Hi", "Hello.", image=""), "User: Hi\nAssistant:[ Hello.]"),
    (
        "llava",
        talk("<image>\nWhat is it?", "A square.", "Its color?", "White.", image="white.png"),
        f"{TURN}\nUser: Its color?\nAssistant:[ White.]",
    ),
    (
        "sharegpt",
        {"system": "Be brief.", **talk("<image><image>Same?", "No.", images=["white.png", "black.png"])},
        "Be brief.|<white.png>|<black.png>|User: Same?\nAssistant:[ No.]",
    ),
    (
        "sharegpt",
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        "User: Hi\nAssistant:[ Hello.]",
    ),
    ("messages", say("<image>What is it?", "A square.", images="white.png"), TURN),
    (
        "messages",
        say(
            [{"type": "image_url", "image_url": {"url": "white.png"}}, {"type": "text", "text": "What is it?"}],
            [{"type": "text", "text": "A square."}],
        ),
        TURN,
    ),
    ("messages", say([{"type": "image"}, "What is it?"], "A square.", images=["white.png"]), TURN),
    (
        "messages",
        say([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "c"),
        "User: a b\nAssistant:[ c]",
    ),
    (
        "lumina",
        talk("Draw a square.", "<|image|>", "Darker.", "Here: <|image|> Done.", image=["white.png", "black.png"]),
        "User: Draw a square.\nAssistant:|[<white.png>]|User: Darker.\nAssistant:[ Here:]|[<black.png>]|[Done.]",
    ),
    (
        "lumina",
        talk("<|image|>Darker.", "<|image|>", image=["white.png", "black.png"]),
        "<white.png>|User: Darker.\nAssistant:|[<black.png>]",
    ),
]


@pytest.mark.parametrize("form, row, expected", GOOD)
def test_turns_become_pieces(tmp_path, form, row, expected):
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    assert read_one(rows, form) == expected
    (tmp_path / "rows.json").write_text(json.dumps([row], indent=2))
    assert read_one(tmp_path / "rows.json", form) == expected


def test_the_tokens_and_targets_of_a_conversation(tmp_path):
    write_gray_images(tmp_path)
    row = talk("<|image|>Darker.", "Yes: <|image|>", "Why?", "So.", image=["white.png", "gray.png"], license="CC0")
    corpus = run_rows(write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "out", "lumina")
    assert show_document(corpus, 0) == "<15>|User: Darker.\nAssistant:[ Yes:]|[<8>]|User: Why?\nAssistant:[ So.]"
    (metadata,) = corpus.metadata().to_pylist()
    assert metadata["image"] == "white.png\ngray.png" and json.loads(metadata["extra"]) == {"license": "CC0"}
    assert corpus.manifest["options"]["tasks"] == [
        {
            "name": "chat",
            "conversation": {
                "system": "{text}",
                "user": "User: {text}",
                "assistant": "Assistant: {text}",
                "separator": "\n",
            },
            "format": "lumina",
        }
    ]


def test_image_first_moves_the_images_of_prompts(tmp_path):
    row = talk("What is it?\n<image>", "A square.", "And <image>?", "Black.", image=["white.png", "black.png"])
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    assert read_one(rows, "llava", image_first=True) == (
        "<white.png>|<black.png>|User: What is it?\nAssistant:[ A square.]\nUser: And ?\nAssistant:[ Black.]"
    )


def test_images_may_be_urls_base64_or_in_another_folder(tmp_path):
    write_gray_images(tmp_path / "images")
    content = (tmp_path / "images/white.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    row = say(
        [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
            {"type": "image", "base64": encoded},
            {"type": "image", "image": "white.png"},
            {"type": "image", "url": "memory://bucket/x.png"},
        ],
        "Four.",
    )
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    (entry,) = read_all(open_rows(rows, "messages", images=str(tmp_path / "images")))
    images = [piece for piece in entry.segments if isinstance(piece, RawImage)]
    assert [image.content for image in images] == [content, content, None, None]
    assert images[2].path == str(tmp_path / "images/white.png") and images[2].name == "images/white.png"
    assert images[3].path == "memory://bucket/x.png"


DIFFER = "images and marks differ: "
ROLES = "the roles are human, user, gpt, assistant, system"
BAD = [
    ("llava", talk("What?", "A square.", image="white.png"), DIFFER + "0 marks <image> in the turns, 1 images"),
    ("llava", talk("<image><image>", "x", image="white.png"), DIFFER + "2 marks <image> in the turns, 1 images"),
    ("llava", talk("<image>?", "x"), DIFFER + "1 marks <image> in the turns, 0 images"),
    ("lumina", talk("x", "<|image|>", image=["a.png", "b.png"]), DIFFER + "1 marks <|image|> in the turns, 2 images"),
    ("messages", say([{"type": "image"}, "x"], "y"), DIFFER + "1 marks <image> in the turns, 0 images"),
    ("llava", talk("What?", " "), "empty answer: turn 2 (assistant)"),
    ("llava", talk("", "x"), "empty text: turn 1 (user)"),
    ("llava", talk("x"), "no answer: none of the 1 pieces is a target"),
    (
        "sharegpt",
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "unknown role: 'narrator' of turn 1; " + ROLES,
    ),
    ("sharegpt", {"conversations": [{"value": "x"}]}, "unknown role: None of turn 1; " + ROLES),
    ("llava", say("x", "y"), 'no turns: field "conversations" is missing, not a list of turns'),
    ("llava", {"conversations": []}, 'no turns: field "conversations" is empty, not a list of turns'),
    ("llava", {"conversations": ["x"]}, "no turns: turn 1 is str, not an object"),
    ("llava", talk("x", None), "no text: the content of turn 2 is NoneType, not text or a list"),
    (
        "messages",
        say([{"type": "video"}], "y"),
        "unknown content: item 1 of turn 1 has the type 'video', not text or image",
    ),
    ("messages", say("<image>", "y", images=[3]), 'field "images 1" is int, not text'),
    (
        "llava",
        talk("<image>", "y", image="a.png", images=["b.png"]),
        'two lists of images: fields "image" and "images"',
    ),
    ("llava", 3, "not a JSON object but int"),
]


@pytest.mark.parametrize("form, row, reason", BAD, ids=[reason[:40] for _, _, reason in BAD])
def test_a_row_that_cannot_be_used_has_a_reason(tmp_path, form, row, reason):
    good = say("x", "y") if form == "messages" else talk("x", "y")
    rows = write_rows(tmp_path / "rows.jsonl", [good, row])
    first, second = read_all(open_rows(rows, form))
    assert not isinstance(first, BadInput) and isinstance(second, BadInput)
    assert (second.source, second.reason) == ("rows.jsonl:2", reason)


def test_the_quarantine_names_file_item_and_both_numbers(tmp_path):
    write_gray_images(tmp_path)
    rows = [talk("<image>x", "y", image="white.png"), talk("<image>x", "y", image=["white.png", "gray.png"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run_rows(tmp_path / "rows.json", tmp_path / "out", "llava", max_bad_fraction=0.5)
    assert read_quarantine(tmp_path / "out") == [
        {
            "key": "00000001",
            "source": "rows.json:item 2",
            "reason": "images and marks differ: 1 marks <image> in the turns, 2 images",
        }
    ]


def test_a_conversation_of_ones_own(tmp_path):
    (tmp_path / "inst.yaml").write_text(
        'name: inst\nconversation: {user: "[INST] {text} [/INST]", assistant: "{text} </a>", separator: " "}\n'
    )
    rows = write_rows(tmp_path / "rows.jsonl", [talk("a", "b", "c", "d")])
    assert read_one(rows, "llava", task=str(tmp_path / "inst.yaml")) == (
        "[INST] a [/INST][ b] </a> [INST] c [/INST][ d] </a>"
    )
    for options, message in (
        ({"task": "vqa"}, "--task vqa does not suit --format llava, which needs a conversation."),
        ({"all_templates": True}, "--all-templates and --fields are for templates; --format llava has turns."),
    ):
        with pytest.raises(ValueError, match=message):
            open_rows(rows, "llava", **options)
    with pytest.raises(ValueError, match="--task chat does not suit --format auto, which needs templates"):
        open_rows(rows, task="chat")
