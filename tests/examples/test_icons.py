"""Icons corpus: names, captions, filters and the split on hand-written input always; the packages where they are."""

import json
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.icons import clipart, drawings, duplicates, generate, iconify, names, render
from tests.distributed.launch import ROOT
from tests.examples.run import run_example
from tests.examples.test_emoji import ANNOTATIONS, EMOJI_TEST

CIRCLE = '<circle cx="8" cy="8" r="{radius}" fill="{color}"/>'
SVG_METADATA = """\
<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
 <dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>animal</rdf:li><rdf:li>on_a_farm</rdf:li></rdf:Bag></dc:subject>
 <dc:creator><cc:Agent><dc:title>Ada</dc:title></cc:Agent></dc:creator>
 <cc:license rdf:resource="{license}"/></cc:Work></rdf:RDF></metadata></svg>
"""
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    return names.EmojiNames(EMOJI_TEST.splitlines(), [path])


def make_set(title, icons, **others):
    """A set in Iconify's form, of SVG bodies."""
    info = {
        "name": title,
        "palette": True,
        "category": "Emoji",
        "author": {"name": "Someone"},
        "license": {"spdx": "MIT", "url": "https://mit"},
    }
    content = {"icons": {name: {"body": body} for name, body in icons.items()}, "width": 16, "height": 16}
    return content | {"collection": info | others.pop("info", {})} | others


def write_package(folder, sets):
    """The sets as npm's package would have them, a folder."""
    (folder / "json").mkdir(parents=True)
    collections = {name: content["collection"] for name, content in sets.items()}
    (folder / "collections.json").write_text(json.dumps(collections))
    for name, content in sets.items():
        (folder / "json" / f"{name}.json").write_text(
            json.dumps({k: v for k, v in content.items() if k != "collection"})
        )
    return folder


def test_an_icon_is_named_by_its_characters_its_name_or_its_country(emoji):
    assert emoji.find_by_codes("263a-fe0f").name == "smiling face, says CLDR"
    assert emoji.find_by_name("grinning-face").name == "grinning face"
    assert emoji.find_by_name("flag-for-france").name == "flag: France"
    assert emoji.find_by_name("france", "Flags").name == "flag: France" and emoji.find_by_name("france") is None
    assert emoji.find_flag("FR").name == "flag: France" and emoji.find_flag("lang-kl") is None
    assert emoji.find_by_name("waving-hand-1").name == "waving hand"


@pytest.mark.parametrize(
    ("icon", "joined", "name"),
    [
        ("book-1", False, "book"),
        ("monitor-one", False, "monitor"),
        ("whiteheavycheckmark", False, "white heavy check mark"),  # a character's name
        ("wavinghandface", True, "waving hand face"),
        ("wavinghandface", False, "wavinghandface"),
        ("man-running-facing-right-dark", False, "man running facing right dark skin tone"),
        ("clock12face", True, "clock 12 face"),
        ("perservere", True, "perservere"),
    ],
)
def test_names_are_made_readable(emoji, icon, joined, name):
    assert emoji.read_name(icon, joined) == name


def test_code_points_and_letters_are_no_captions():
    assert [names.is_readable(name) for name in ("u1f600", "12", "a b", "x" * 19, "cup of tea")] == [False] * 4 + [True]


def test_captions_and_references_of_a_drawing():
    drawing = drawings.Drawing(
        key="set/red-apple",
        source="set",
        kind="svg",
        content="",
        name="red apple",
        style="OpenMoji style",
        license=drawings.License("MIT"),
        keywords=("apple", "red apple", "fruit"),
        category="food",
    )
    assert sorted(drawing.captions()) == [
        "OpenMoji style: red apple",
        "red apple",
        "red apple (fruit), OpenMoji style",
        "red apple, OpenMoji style",
    ]
    assert drawing.references() == ["red apple", "red apple, OpenMoji style", "red apple: fruit", "red apple, food"]


def test_sets_of_icons_and_what_is_not_used(emoji, tmp_path):
    circle = CIRCLE.format(radius=4, color="red")
    plain = make_set(
        "Plain Icons (v1)",
        {"grin": circle, "cup-fill": circle, "github": circle, "u1f600": circle, "old": circle, "sign": circle},
        chars={"1f600": "grin"},
        categories={"FoodDrink": ["cup-fill"], "Brand": ["sign"]},
        suffixes={"": "Line", "fill": "Fill"},
    )
    plain["icons"]["old"]["hidden"] = True
    logos = make_set("Marks", {"x": circle}, info={"category": "Logos"})
    package = write_package(tmp_path / "package", {"plain": plain, "marks": logos})
    assert list(iconify.load_sets(package, None, logos=False)) == ["plain"]
    assert list(iconify.load_sets(package, None, logos=True)) == ["marks", "plain"]
    filtered = Counter()
    content = iconify.load_sets(package, ["plain"], logos=False)["plain"]
    grin, cup = iconify.list_icons("plain", content, emoji, False, filtered)
    assert (grin.name, grin.keywords, grin.style) == (
        "grinning face",
        ("face", "grin", "Grinning face"),
        "Plain v1 style",
    )
    assert (cup.name, cup.category, cup.style) == ("cup", "food drink", "Plain v1 fill style")
    assert grin.license == drawings.License("MIT", "https://mit", "Someone") and cup.key == "plain/cup-fill"
    assert filtered == {"logo": 2, "unreadable name": 1, "hidden": 1}
    with pytest.raises(
        ValueError, match=r"--sets \(marks\) must be multi-colored sets .* not logos \(--logos\): plain"
    ):
        iconify.load_sets(package, ["marks"], logos=False)
    (tmp_path / "odd.tgz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"odd.tgz\) is not the package @iconify/json .*install_icons.sh"):
        iconify.load_sets(tmp_path / "odd.tgz", None, logos=False)


def test_clip_art_with_titles_of_its_own(tmp_path):
    def add(folder, name, title="Cow 1", license=PUBLIC_DOMAIN):
        for kind in ("png", "svg"):
            (tmp_path / kind / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "png" / folder / f"{name}.png")
        if title is not None:
            content = SVG_METADATA.format(title=title, license=license)
            (tmp_path / "svg" / folder / f"{name}.svg").write_text(content)

    add("animals", "cow", "Clipart by N. Buculei - a_brown_cow_01")
    for number in range(clipart.GENERIC_FILES + 1):
        add("shapes", f"star{number}", "gramastar")
    add("unsorted", "untitled", "Cool Icon Collection")
    add("unsorted", "none", None)
    add("unsorted", "empty", "")
    add("unsorted", "gpl", "horse", "http://creativecommons.org/licenses/GPL/2.0/")
    add("logos", "wheel")
    add("unsorted", "tux", "Linux penguin")
    (tmp_path / "png/animals/link.png").symlink_to("cow.png")
    filtered = Counter()
    (cow,) = clipart.list_clipart(tmp_path, False, 0, filtered)
    assert (cow.name, cow.category, cow.keywords) == ("brown cow", "animals", ("animal", "on a farm"))
    assert cow.license.author == "Ada" and cow.license.spdx == "LicenseRef-public-domain"
    generic = clipart.GENERIC_FILES + 2
    assert filtered == {"generic title": generic, "no title": 2, "license not stated": 1, "logo": 2}


def test_stamps_have_a_sentence_each(tmp_path):
    for name, text in (
        ("animals/cat", "A grey cat. It sleeps.\nde.utf8=Eine Katze."),
        ("symbols/alphabets/a", "The letter A."),
    ):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
        path.with_suffix(".txt").write_text(text)
    Image.new("RGB", (4, 4)).save(tmp_path / "animals/dog.png")
    filtered = Counter()
    (cat,) = clipart.list_stamps(tmp_path, filtered)
    assert (cat.name, cat.category, cat.license.spdx) == ("grey cat", "animals", "GPL-2.0-only")
    assert filtered == {"letter or digit": 1, "no title": 1}


def make_thumbnails(count):
    """Discs of many sizes, places and colors."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        image = Image.new("RGB", (16, 16), "white")
        left, top, size = (int(random.integers(1, high)) for high in (8, 8, 8))
        color = tuple(int(value) for value in random.integers(0, 200, 3))
        ImageDraw.Draw(image).ellipse((left, top, left + size, top + size), fill=color)
        images.append(np.asarray(image))
    return np.stack(images)


def test_near_duplicates_are_those_of_a_plain_loop(monkeypatch):
    thumbnails = make_thumbnails(150)
    thumbnails = np.concatenate([thumbnails, thumbnails[::-1] // 1, thumbnails[:40] - (thumbnails[:40] > 3)])
    expected = []
    ink = 255.0 - thumbnails.reshape(len(thumbnails), -1)
    for number, row in enumerate(ink):
        close = [
            other
            for other in range(number)
            if expected[other] < 0
            and np.linalg.norm(row - ink[other]) <= 0.3 * max(np.linalg.norm(row), np.linalg.norm(ink[other]))
        ]
        expected.append(close[0] if close else -1)
    for block in (16, 1024):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        assert duplicates.find_near_duplicates(thumbnails, 0.3).tolist() == expected
    assert min(expected[150:]) >= 0


def test_a_name_is_held_out_in_every_style():
    def make(source, name):
        return drawings.Drawing(f"{source}/{name}", source, "svg", "", name, "style", drawings.License("MIT"))

    reasons = {name: generate.hold_out(make("openmoji", name), 0, "fxemoji") for name in map(str, range(2000))}
    assert set(reasons.values()) == {"", "name"} and 160 < sum(map(bool, reasons.values())) < 240
    for name, reason in reasons.items():
        assert generate.hold_out(make("noto", name.upper()), 0, "fxemoji") == reason
        assert generate.hold_out(make("fxemoji", name), 0, "fxemoji") == (f"{reason} and style" if reason else "style")
    assert reasons != {name: generate.hold_out(make("noto", name), 1, "fxemoji") for name in reasons}


def test_messages(tmp_path):
    pytest.importorskip("resvg_py")
    for arguments, message in (
        (["--size", "500"], r"--size \(500\) must be from 16 to 136"),
        (["--limit", "-1"], r"--limit \(-1\) must be 0 or more"),
        (["--workers", "0"], r"--workers \(0\) must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.parse_options(["--output", str(tmp_path), *arguments])
    with pytest.raises(ValueError, match=r"--stamps \(.*nowhere\) does not exist; .*\(tuxpaint-stamps-default\)"):
        generate.find_input("stamps", tmp_path / "nowhere", "tuxpaint-stamps-default")


@pytest.fixture(scope="module")
def unicode_data():
    """Unicode's list and CLDR's names, and the renderer; what needs them is skipped without."""
    pytest.importorskip("resvg_py")
    try:
        generate.load_emoji_names()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("pillow_limit", [10**8, 60, 30])  # accepted by Pillow, warned of, refused
def test_files_with_too_many_pixels(unicode_data, tmp_path, monkeypatch, pillow_limit):
    Image.new("RGB", (9, 9)).save(tmp_path / "large.png")
    drawing = drawings.Drawing("set/x", "set", "file", str(tmp_path / "large.png"), "x", "y", drawings.License("MIT"))
    assert render.draw(drawing, 16, "").size == (16, 16)
    monkeypatch.setattr(render, "LARGEST_PIXELS", 80)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with pytest.raises(render.TooLargeError):
        render.draw(drawing, 16, "")


def test_a_page_is_trimmed_to_its_drawing(unicode_data, tmp_path):
    page = Image.new("RGBA", (300, 300), (255, 255, 255, 0))
    page.paste((200, 0, 0, 255), (10, 20, 50, 40))  # wide, in the corner
    page.save(tmp_path / "page.png")
    drawing = drawings.Drawing("set/x", "set", "file", str(tmp_path / "page.png"), "x", "y", drawings.License("MIT"))
    image = render.on_white(render.draw(drawing, 32, ""), 32)
    red = np.asarray(image)[..., 1] < 128
    assert red.any(axis=0).all() and red.any(axis=1).sum() == 16 and red[8:24].all()


def make_icons(colors):
    """Circles with names, one blank, one that is no SVG, one long and one that repeats another."""
    icons = {
        f"thing {color} {radius}x": CIRCLE.format(radius=radius, color=color)
        for color in colors
        for radius in range(2, 9)
    }
    icons["repeated circle"] = CIRCLE.format(radius=8, color=colors[0]).replace('r="8"', 'r="8.01"')
    icons["nothing here"] = CIRCLE.format(radius=8, color="white")
    icons["broken drawing"] = "<circle"
    return icons


def build(tmp_path, output, *arguments):
    package = tmp_path / "package"
    if not package.exists():
        colors = ("red", "blue", "green", "black", "orange", "purple")
        sets = {name: make_set(name.title(), make_icons(colors)) for name in ("first", "fxemoji")}
        sets["fxemoji"]["icons"] |= {"held one": {"body": '<rect width="9" height="9"/>'}}
        sets["first"]["icons"]["long line"] = {"body": '<rect width="90" height="9"/>', "width": 90, "height": 9}
        write_package(package, sets)
    options = ["--output", str(output), "--sources", "iconify", "--iconify", str(package), "--size", "32"]
    return generate.generate(generate.parse_options([*options, "--workers", "1", *arguments]))


def test_the_corpus_its_counts_and_its_continuation(unicode_data, tmp_path, monkeypatch):
    manifest = build(tmp_path, tmp_path / "one")
    first, held = manifest["sources"]["first"], manifest["sources"]["fxemoji"]
    # A near-duplicate of another style is a duplicate too: one drawing of the held-out style differs.
    assert first["filtered"] == {"near-duplicate": 1, "blank": 1, "not renderable": 1, "too long": 1}
    assert held["filtered"] == {"near-duplicate": 43, "blank": 1, "not renderable": 1} and held["images"] == 1
    assert first["found"] == first["images"] + 4 == 46 and first["licenses"] == {"MIT": 42}
    lines = {
        split: [json.loads(line) for line in (tmp_path / f"one/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "heldout")
    }
    assert len(lines["train"]) == manifest["counts"]["train"] and len(lines["heldout"]) + len(lines["train"]) == 43
    assert {line["heldout"] for line in lines["train"]} == {""} and "" not in {x["heldout"] for x in lines["heldout"]}
    assert not {x["name"] for x in lines["train"]} & {x["name"] for x in lines["heldout"] if "name" in x["heldout"]}
    files = {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.png")}
    assert files == {line["image"] for split in lines.values() for line in split}
    assert all(line["license"] == "MIT" and line["references"][0] == line["name"] for line in lines["train"])
    with Image.open(tmp_path / "one" / lines["train"][0]["image"]) as image:
        assert image.size == (32, 32) and image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)

    # Interrupted after the first part: the next call renders the second one alone, with the same result.
    original, rendered = generate.render_all.__globals__["render_part"], []

    def interrupt(part, images):
        rendered.append(part.drawings[0].source)
        if len(rendered) == 2:
            raise KeyboardInterrupt
        original(part, images)

    monkeypatch.setitem(generate.render_all.__globals__, "render_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, tmp_path / "two")
    assert not (tmp_path / "two/train.jsonl").exists()
    build(tmp_path, tmp_path / "two")
    assert rendered == ["first", "fxemoji", "fxemoji"]
    for split in ("train", "heldout"):
        assert (tmp_path / f"one/{split}.jsonl").read_bytes() == (tmp_path / f"two/{split}.jsonl").read_bytes()
    assert build(tmp_path, tmp_path / "two") == json.loads((tmp_path / "two/manifest.json").read_text())
    assert len(rendered) == 3
    with pytest.raises(ValueError, match=r"holds a corpus of another --seed \(0\); give another folder"):
        build(tmp_path, tmp_path / "two", "--seed", "3")
    with pytest.raises(ValueError, match=r"--limit \(3\) gives .* images, .* but at least 20 are required"):
        build(tmp_path, tmp_path / "three", "--limit", "3")


@pytest.mark.slow  # 90 s
def test_the_whole_path_continues(unicode_data, tmp_path):
    for what in (generate.ICONIFY, generate.STAMPS):
        if not generate.Path(what).exists():
            pytest.skip(f"{what} is not installed; see examples/icons/install_icons.sh")
    done = run_example("icons.sh", "--small", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["heldout_accuracy"] is None and 0 < report["loss_with_retrieval"] < 20
    assert "Held-out captions" in (tmp_path / "out/report.html").read_text()
    stages = (tmp_path / "out/stages.tsv").read_text().splitlines()
    (tmp_path / "out/stages.tsv").write_text("".join(f"{line}\n" for line in stages[:-1]))
    done = run_example("icons.sh", "--small", "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count("finished before") == len(stages) - 1
    done = run_example("icons.sh", "--out", tmp_path / "out")
    assert done.returncode == 2 and "holds a run of size small, not default" in done.stderr


def test_where_nothing_can_be_installed_the_reason_is_printed(tmp_path):
    for program in ("bash", "dirname", "id"):  # no apt-get and no npm
        (tmp_path / program).symlink_to(shutil.which(program))
    command = ["bash", ROOT / "examples/icons/install_icons.sh", tmp_path / "cache"]
    done = subprocess.run(command, env={"PATH": str(tmp_path), "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0
    assert "icons: only root on Debian or Ubuntu can install openclipart-png" in done.stdout
    assert f"npm is not installed, so @iconify/json@{iconify.VERSION} cannot be fetched" in done.stdout


def test_a_folder_of_others_is_not_continued(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run_example("icons.sh", "--out", tmp_path)
    assert done.returncode == 2 and "was not written by this script" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
