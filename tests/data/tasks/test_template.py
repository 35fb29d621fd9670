"""Templates that cannot be filled are refused in a sentence; those that can be are parsed as written."""

import re

import pytest

from megatron_cm3leon.data.sources import RawImage
from megatron_cm3leon.data.tasks.options import load_task
from megatron_cm3leon.data.tasks.template import Task, list_tasks
from tests.data.tasks.instructions import show_entry


def fill(task, **values):
    """The document of the first template, as text."""
    return show_entry(task.fill(0, values).build("0", "x:1", "{}"))


def test_spaces_belong_to_the_target_and_not_to_the_ends_of_segments():
    task = Task("x", ("  Say {{ || {a}  and {b}{c} !  |{d} | {e}  {f}",), ("a", "c", "e", "f"))
    text = fill(task, **{name: f" {name} " for name in "abcdef"})
    assert text == "Say { |[ a]  and b[c] !|d|[e  f]"


def test_images_are_segments_of_their_own():
    task = Task("x", ("{i} | {q} {a}. | {j}",), ("a", "j"), images=("i", "j"))
    images = {name: RawImage(name) for name in "ij"}
    assert fill(task, q="why?", a="so", **images) == "<i>|why?[ so].|[<j>]"


def test_every_task_of_the_package_survives_its_description():
    for name in list_tasks():
        task = load_task(name)
        assert task.name == name and type(task).from_dict(task.to_dict(), "manifest") == task


REFUSED = [
    ({"targets": []}, "task x: the template '{q} {a} | {i}' has no target; name one of its fields in targets."),
    ({"templates": []}, "task x: templates is empty; give at least one template."),
    (
        {"templates": ["{q} {a} {i}"]},
        "task x: the template '{q} {a} {i}' has the image {i} inside a text segment; write | between text and image.",
    ),
    ({"templates": ["{a} || {i}"]}, "task x: the template '{a} || {i}' has the image {i} inside a text segment"),
    (
        {"templates": ["{q} | | {a} | {i}"]},
        "task x: the template '{q} | | {a} | {i}' has an empty segment; remove one |.",
    ),
    (
        {"templates": ["{q {a} | {i}"]},
        "task x: the template '{q {a} | {i}' has a single {; write {field}, or double it",
    ),
    ({"templates": ["{a} {a} | {i}"]}, "task x: the template '{a} {a} | {i}' has a target twice"),
    (
        {"targets": ["a", "b"]},
        "task x: targets names 'b', which no template has as {b}; add it to a template, or remove",
    ),
    ({"optional": ["b"]}, "task x: optional names 'b', which no template has as {b}"),
    ({"boxes": {"q": "a"}}, "task x: boxes are in 'a', which is not one of its images; add it."),
    ({"boxes": ["q"]}, "tasks/x.yaml: boxes (['q']) must map a field of objects to the field of their image."),
    ({"targets": "a"}, "tasks/x.yaml: targets ('a') must be a list of texts."),
    ({"target": ["a"]}, "tasks/x.yaml: 'target' is not a key of a task; the keys are name, templates, targets,"),
    ({"name": ""}, "tasks/x.yaml: name ('') must be a text, such as vqa."),
    ({"image_first": "yes"}, "tasks/x.yaml: image_first ('yes') must be true or false."),
    ({"targets": ["a", "i"], "image_first": True}, "task x: image_first puts the images of the prompt in front, but"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_a_task_that_cannot_be_filled_is_refused(changes, message):
    content = {"name": "x", "templates": ["{q} {a} | {i}"], "targets": ["a"], "images": ["i"]}
    Task.from_dict(content, "tasks/x.yaml")
    with pytest.raises(ValueError, match=re.escape(message)):
        Task.from_dict({**content, **changes}, "tasks/x.yaml")


def test_task_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\ntemplates: ["{q} {a}"]\ntargets: [a]\n')
    assert load_task(str(path)).name == "mine"
    for content, message in (
        ("[", "mine.yaml is not valid YAML: "),
        ("- x", "mine.yaml must be a YAML mapping with name, templates and targets."),
        ("name: x\nconversation: {user: x, assistant: '{text}'}", "task x: user ('x') must have {text} once"),
        (
            "name: x\nconversation: {user: '{text}'}",
            "conversation must have user and assistant, and no other keys than",
        ),
        ("name: x\nconversation: {user: 3, assistant: '{text}'}", "user (3) of conversation must be a text"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_task(str(path))
    with pytest.raises(ValueError, match=r"--task \(none\) must be a YAML file, or one of caption, caption_long, chat"):
        load_task("none")
