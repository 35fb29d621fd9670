"""Everything that the units of evidence.py share: lists of documents, tokenizers, shards, two CLIPs and indexes.

    lists/train.jsonl      training documents: names and styles that are not held out
    lists/heldout.jsonl    queries (held-out names) and drawings of the held-out styles
    lists/memory.jsonl     training documents and queries: the memory bank of the study `memory`
    lists/pairs.jsonl      training documents, each with two captions, for the CLIP of retrieval
    lists/all.jsonl        every drawing with two captions, for the second CLIP
    tokenizer              trained on train.jsonl
    clip                   trained on pairs.jsonl; it retrieves and ranks
    judge                  the second CLIP: it has seen all names and styles, and is never used to retrieve or to rank
    shards, index          train and memory, and the shards heldout

The lists are split by name and by style. A name that examples/icons/generate.py held out has no drawing in train.jsonl.
The held-out styles are the one that it held out and OpenMoji, whose thick outlines tell it apart: the first alone has
fewer than the 1,000 drawings that a claim requires.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retrieval_gain import run_once

HELDOUT_STYLES = ("fxemoji", "openmoji")
"""Sources whose drawings no model sees."""
SPECIALS = ("--specials", 64, "--sentinels", 32)
IMAGE = ("--image-size", 32, "--downsample", 4, "--codebook-size", 512, "--num-res-blocks", 1)
FULL = {
    "text": ("--vocab-size", 1472),
    "image": ("--steps", 2000),
    "clip": ("--steps", 3000),
    "judge": ("--steps", 4000, "--width", 96, "--layers", 3, "--patch-size", 4, "--seed", 1),
}
"""Options of the stages that train."""
SMALL = {
    "text": ("--vocab-size", 320),
    "image": ("--steps", 4),
    "clip": ("--steps", 4, "--batch-size", 16),
    "judge": ("--steps", 4, "--batch-size", 16, "--seed", 1),
}
"""To check that every stage runs; the results are meaningless."""


def simplify_name(name: str) -> str:
    """A name by which drawings are compared, as examples/icons compares them."""
    return " ".join(name.lower().split())


def read_lines(path: Path) -> list[dict]:
    """The drawings of a list; ValueError if it does not exist or has no names and styles."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the output folder of examples/icons/generate.py as --pairs.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines or not {"image", "caption", "name", "style", "source", "heldout"} <= set(lines[0]):
        raise ValueError(
            f"{path} has no lines with image, caption, name, style, source and heldout, which "
            f"examples/icons/generate.py writes; give its output folder as --pairs."
        )
    return lines


def write_lists(pairs: Path, folder: Path, heldout_styles: Iterable[str] = HELDOUT_STYLES) -> None:
    """Write the lists to `folder`; ValueError for pairs without a held-out name in two styles."""
    styles = set(heldout_styles)
    drawings = []
    for split in ("train", "heldout"):
        for line in read_lines(pairs / f"{split}.jsonl"):
            drawings.append(line | {"image": str((pairs / line["image"]).resolve())})
    train = [line for line in drawings if not line["heldout"] and line["source"] not in styles]
    seen = {simplify_name(line["name"]) for line in train}
    queries = [line for line in drawings if "name" in line["heldout"] and line["source"] not in styles]
    drawn = [line for line in drawings if line["source"] in styles and simplify_name(line["name"]) in seen]
    if not any(len(found) > 1 for found in list_styles(queries).values()):
        raise ValueError(f"{pairs} has no held-out name in two styles, which the study memory requires; give more.")
    # The caption names the style: it is all that the prompt says about it.
    styled = [line | {"caption": f"{line['name']}, {line['style']}", "heldout": "style"} for line in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train": train, "heldout": queries + styled, "memory": train + queries}
    lists |= {"pairs": add_captions(train), "all": add_captions(drawings)}
    for name, lines in lists.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(folder / f"{name}.jsonl")


def add_captions(lines: Iterable[dict]) -> list[dict]:
    """Each drawing twice: with its caption, and with its name alone or, if the caption is the name, also its style.

    An encoder learns from them what of a caption is the name, also of a name that it has not seen.
    """
    found = []
    for line in lines:
        name, style = line["name"], line["style"]
        found += [line, line | {"caption": f"{name}, {style}" if line["caption"] == name else name}]
    return found


def list_styles(lines: Iterable[dict]) -> dict[str, set[str]]:
    """Name -> the styles it is drawn in."""
    styles: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        styles[simplify_name(line["name"])].add(line["style"])
    return styles


def prepare(work: Path, pairs: Path | None, options: dict[str, tuple]) -> None:
    """Run the stages whose results do not exist; `options` is FULL or SMALL.

    Two stages run at the same time: each of them uses one core for most of its time.
    """
    work.mkdir(parents=True, exist_ok=True)
    if pairs is None:
        pairs = work / "pairs"
        run_once(pairs / "manifest.json", "examples/icons/generate.py", "--output", pairs)
    lists, tokenizer, shards, index = (work / name for name in ("lists", "tokenizer", "shards", "index"))
    if not (lists / "all.jsonl").is_file():
        write_lists(pairs, lists)
    tool, given = "tools/train_tokenizer.py", ("--input", lists / "train.jsonl", "--output", tokenizer, *SPECIALS)
    run_once(tokenizer / "text.model", tool, "text", *given, *options["text"])

    def train_encoder(name: str, documents: str) -> None:
        inputs = ("--input", lists / f"{documents}.jsonl", "--text-model", tokenizer / "text.model")
        output = ("--output", work / name, *options[name])
        run_once(work / name / "model.safetensors", "tools/train_clip.py", *inputs, *output)

    def write_shards(name: str) -> None:
        inputs = ("--input", lists / f"{name}.jsonl", "--tokenizer", tokenizer, "--output", shards / name)
        run_once(shards / name / "manifest.json", "tools/preprocess_data.py", *inputs)

    def build_index(name: str, *more) -> None:
        inputs = ("--shards", shards / name, "--encoder", work / "clip", "--output", index / name)
        run_once(index / name / "index.json", "tools/build_index.py", *inputs, *more)

    def encode_documents() -> None:
        run_once(tokenizer / "vocab.json", tool, "image", *given, *IMAGE, *options["image"])
        for name in ("train", "heldout", "memory"):
            write_shards(name)

    def build_indexes() -> None:
        build_index("train")
        # In the bank of the study `memory`, a drawing that is nearly the query's is what is looked for.
        build_index("memory", "--threshold", 1)

    run_together(encode_documents, lambda: train_encoder("clip", "pairs"))
    run_together(build_indexes, lambda: train_encoder("judge", "all"))


def run_together(*stages) -> None:
    """Call functions that wait for processes, all at once; the first error is raised after all have ended."""
    with ThreadPoolExecutor(len(stages)) as pool:
        futures = [pool.submit(stage) for stage in stages]
    for future in futures:
        future.result()
