"""Generate from an exported model: pictures of captions, captions of pictures, or what a mask hides.

    python tools/generate.py image --model exported/ "a red circle" "a blue square" --output out/
    python tools/generate.py caption --model exported/ picture.png
    python tools/generate.py infill --model exported/ --text "a <mask> circle on white"
    python tools/generate.py infill --model exported/ --picture picture.png --box 2 2 6 6 --output out/

With --retrieve INDEX, retrieved documents stand in front of each prompt.
"""

import argparse
import json
from pathlib import Path

from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.generation.decoder import DTYPES
from megatron_cm3leon.generation.generate import Generator
from megatron_cm3leon.generation.prompts import CAPTION_FORMS, UNCONDITIONAL_FORMS
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.generation.sheet import save_pictures
from megatron_cm3leon.progress import meter
from megatron_cm3leon.tokenizers.pixels import load_picture

MASK = "<mask>"
ACCOUNT = "generated.json"


def parse_arguments() -> argparse.Namespace:
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **style)
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image", help="pictures of captions", **style)
    image.add_argument("captions", nargs="+", help="what the pictures should show")
    image.add_argument("--candidates", type=int, default=1, help="pictures of each caption; seeds count up")
    image.add_argument(
        "--unconditional", choices=UNCONDITIONAL_FORMS, default="auto",
        help="guidance's prompt without the caption: caption dropped, or masked by a sentinel",
    )  # fmt: skip
    _add_shared(image, temperature=0.7, guidance=2.0, output="out")
    caption = commands.add_parser("caption", help="captions of pictures", **style)
    caption.add_argument("pictures", nargs="+", help="picture files")
    caption.add_argument(
        "--form", choices=CAPTION_FORMS, default="auto", help="continue after the picture, or fill a masked caption"
    )
    caption.add_argument("--longest", type=int, default=64, help="text pieces of a caption at most")
    _add_shared(caption, temperature=0.0)
    infill = commands.add_parser("infill", help="what a mask hides, in a text or in a picture", **style)
    infill.add_argument("--text", help=f"caption with {MASK} where a span is to be filled in")
    infill.add_argument("--picture", help="picture file: the one to change with --box, else what --text describes")
    infill.add_argument(
        "--box", type=int, nargs=4, metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
        help="part of the picture to make anew, in image tokens; bottom and right are exclusive",
    )  # fmt: skip
    infill.add_argument("--caption", help="what the changed picture should show")
    infill.add_argument("--longest", type=int, default=32, help="text pieces of the span at most")
    _add_shared(infill, temperature=1.0, guidance=1.0, output="out")
    return parser.parse_args()


def _add_shared(
    parser: argparse.ArgumentParser, *, temperature: float, guidance: float | None = None, output: str | None = None
) -> None:
    parser.add_argument("--model", required=True, help="folder that tools/convert_checkpoint.py export wrote")
    parser.add_argument("--output", default=output, help=f"folder for the results and {ACCOUNT}")
    if guidance is not None:
        parser.add_argument("--guidance", type=float, default=guidance, help="classifier-free guidance; 1 is none")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result for a prompt")
    parser.add_argument("--retrieve", metavar="INDEX", help="index folder to retrieve documents from")
    parser.add_argument("--documents", type=int, help="documents to retrieve for each prompt (default: as in training)")
    parser.add_argument("--encoder", help="CLIP folder, where it is no longer where the index recorded it")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type the model computes in")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is a device")


def sampling_options(arguments: argparse.Namespace) -> dict:
    names = ("guidance", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def retrieve(arguments: argparse.Namespace, generator: Generator, **queries):
    """Retrieved documents (numbers, ids) of each query; (None, None) without --retrieve."""
    if not arguments.retrieve:
        return None, None
    source = DocumentSource.load(arguments.retrieve, generator.vocabulary, arguments.encoder)
    count = arguments.documents
    numbers = source.find(generator.training_documents if count is None else count, **queries)
    return numbers, source.read(numbers)


def check_output(output: str | None) -> Path | None:
    if output is None:
        return None
    folder = Path(output)
    if (folder / ACCOUNT).exists():
        raise ValueError(f"{folder} holds the results of an earlier call ({ACCOUNT}); give another --output.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output ({folder}) is a file; give a folder.")
    return folder


def write_account(folder: Path, arguments: argparse.Namespace, made: list[dict]) -> None:
    options = {name: value for name, value in vars(arguments).items() if name not in ("captions", "pictures")}
    text = json.dumps({"format": 1, "options": options, "made": made}, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ACCOUNT).write_text(text + "\n")


def describe_pictures(made, names: list[str], numbers: list | None) -> list[dict]:
    """Entries of generated.json; `numbers` are the retrieved documents of each picture."""
    entries = []
    for place, (picture, name) in enumerate(zip(made, names, strict=True)):
        entry = {"picture": name, "caption": picture.caption, "seed": picture.seed}
        if numbers is not None:
            entry["retrieved"] = numbers[place]
        entries.append({**entry, "codes": picture.codes.tolist()})
    return entries


def make_images(arguments: argparse.Namespace) -> None:
    output = check_output(arguments.output)
    generator = Generator.load(arguments.model, arguments.dtype, arguments.device)
    numbers, documents = retrieve(arguments, generator, texts=arguments.captions)
    tokens = len(arguments.captions) * max(arguments.candidates, 1) * generator.vocabulary.image_tokens
    with meter(tokens, "generating", "tokens") as progress:
        made = generator.images(
            arguments.captions,
            documents,
            candidates=arguments.candidates,
            unconditional=arguments.unconditional,
            advance=progress.advance,
            **sampling_options(arguments),
        )
    names = save_pictures(output, [one.picture for one in made], [one.caption for one in made])
    if numbers is not None:
        numbers = [row for row in numbers for _ in range(arguments.candidates)]
    write_account(output, arguments, describe_pictures(made, names, numbers))
    print(f"wrote {len(made)} pictures, contact_sheet.png and {ACCOUNT} to {output}")


def make_captions(arguments: argparse.Namespace) -> None:
    output = check_output(arguments.output)
    pictures = [load_picture(path) for path in arguments.pictures]
    generator = Generator.load(arguments.model, arguments.dtype, arguments.device)
    numbers, documents = retrieve(arguments, generator, pictures=pictures)
    texts = generator.captions(
        pictures, documents, form=arguments.form, longest=arguments.longest, **sampling_options(arguments)
    )
    made = [{"picture": path, "caption": text} for path, text in zip(arguments.pictures, texts, strict=True)]
    for place, entry in enumerate(made):
        print(f"{entry['picture']}: {entry['caption']}")
        if numbers is not None:
            entry["retrieved"] = numbers[place]
    if output is not None:
        write_account(output, arguments, made)
        print(f"wrote {output / ACCOUNT}")


def make_infill(arguments: argparse.Namespace) -> None:
    output = check_output(arguments.output)
    picture = load_picture(arguments.picture) if arguments.picture else None
    if (arguments.text is None) == (arguments.box is None):
        raise ValueError(f'give either --text "... {MASK} ..." or --picture with --box TOP LEFT BOTTOM RIGHT.')
    if arguments.box is not None and picture is None:
        raise ValueError("--box needs the --picture it is a part of.")
    if arguments.text is not None and arguments.text.count(MASK) != 1:
        raise ValueError(f"--text ({arguments.text!r}) must hold {MASK} exactly once, where the span is.")
    generator = Generator.load(arguments.model, arguments.dtype, arguments.device)
    query = {"pictures": [picture]} if picture is not None else {"texts": [arguments.text.replace(MASK, " ")]}
    _, documents = retrieve(arguments, generator, **query)
    options = sampling_options(arguments)
    if arguments.text is not None:
        del options["guidance"]  # there is no text to leave out
        pictures = None if picture is None else [picture]
        parts = tuple(arguments.text.split(MASK))
        text = generator.infill_text([parts], pictures, documents, longest=arguments.longest, **options)[0]
        print(text)
        write_account(output, arguments, [{"text": arguments.text, "filled": text}])
        print(f"wrote {output / ACCOUNT}")
        return
    captions = None if arguments.caption is None else [arguments.caption]
    made = generator.infill_pictures([picture], tuple(arguments.box), captions, documents, **options)
    before = generator.decode_pictures(generator.encode_pictures([picture]))[0]
    names = save_pictures(output, [before, made[0].picture], ["as the tokenizer draws it", "infilled"])
    write_account(output, arguments, describe_pictures(made, names[1:], None))
    print(f"wrote {names[1]} (before: {names[0]}), contact_sheet.png and {ACCOUNT} to {output}")


def main() -> None:
    arguments = parse_arguments()
    {"image": make_images, "caption": make_captions, "infill": make_infill}[arguments.command](arguments)


if __name__ == "__main__":
    run_tool(main)
