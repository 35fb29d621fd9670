"""Generate from an exported model: pictures of captions, texts about pictures, what a mask hides, whole documents.

    python tools/generate.py image --model exported/ "a red circle" "a blue square" --output out/
    python tools/generate.py image --model exported/ "a red circle" --candidates 8 --rank-with clip/ --output best/
    python tools/generate.py caption --model exported/ picture.png
    python tools/generate.py ask --model exported/ picture.png "what colour is it?"
    python tools/generate.py infill --model exported/ --text "a <mask> circle on white"
    python tools/generate.py infill --model exported/ --picture picture.png --box 2 2 6 6 --output infilled/
    python tools/generate.py complete --model exported/ "a red circle" @picture.png "a green" --output completed/

Only complete reads @FILE; there a text that begins with @ is written with two: "@@nasa shows".
With --retrieve INDEX, retrieved documents stand in front of each prompt; with --document, given ones.
"""

import argparse
from pathlib import Path

from PIL import Image

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.prompts import CAPTION_FORMS, UNCONDITIONAL_FORMS
from megatron_cm3leon.generation.results import check_output, written_results
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.generation.sampling import SAMPLERS, Sampling, default_guidance
from megatron_cm3leon.generation.types import MadePicture
from megatron_cm3leon.tokenizers.images import load_image

MASK = "<mask>"


def parse_arguments() -> argparse.Namespace:
    style = {"formatter_class": HelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **style)
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image", help="pictures of captions", **style)
    image.add_argument("captions", nargs="*", help="what the pictures should show")
    image.add_argument(
        "--from", type=user_path, dest="file", metavar="FILE", help="more captions, one a line; blank lines are skipped"
    )
    image.add_argument("--candidates", type=int, default=1, help="pictures of each caption; seeds count up")
    image.add_argument(
        "--rank-with", type=user_path, metavar="CLIP", help="CLIP folder: keep the candidates nearest to their caption"
    )
    image.add_argument("--keep", type=int, help="candidates that --rank-with keeps (default: 1)")
    image.add_argument(
        "--unconditional", choices=UNCONDITIONAL_FORMS, default="auto",
        help="guidance's prompt without the caption: caption dropped, or masked by a sentinel",
    )  # fmt: skip
    _add_contrast(image, "classifier-free guidance; 1 is none (default: 2; 1 with --contrast-k)", None)
    _add_shared(image, temperature=0.7, output="out")
    caption = commands.add_parser("caption", help="captions of pictures", **style)
    caption.add_argument("pictures", type=user_path, nargs="+", help="picture files")
    caption.add_argument(
        "--form", choices=CAPTION_FORMS, default="auto", help="continue after the picture, or fill a masked caption"
    )
    caption.add_argument("--longest", type=int, default=64, help="text pieces of a caption at most")
    _add_shared(caption, temperature=0.0)
    ask = commands.add_parser("ask", help="answers to questions about a picture", **style)
    ask.add_argument("picture", type=user_path, help="picture file")
    ask.add_argument("questions", nargs="+", help="questions, each answered by itself")
    ask.add_argument("--longest", type=int, default=16, help="text pieces of an answer at most")
    _add_shared(ask, temperature=0.0)
    infill = commands.add_parser("infill", help="what a mask hides, in a text or in a picture", **style)
    infill.add_argument("--text", help=f"caption with {MASK} where a span is to be filled in")
    infill.add_argument(
        "--picture", type=user_path, help="picture file: the one to change with --box, else what --text describes"
    )
    infill.add_argument(
        "--box", type=int, nargs=4, metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
        help="part of the picture to make anew, in image tokens; bottom and right are exclusive",
    )  # fmt: skip
    infill.add_argument("--caption", help="what the changed picture should show")
    infill.add_argument("--longest", type=int, default=32, help="text pieces of the span at most")
    _add_contrast(infill, "classifier-free guidance, of a picture with --caption; 1 is none", 1.0)
    _add_shared(infill, temperature=1.0, output="out")
    complete = commands.add_parser("complete", help="what follows a document of texts and pictures", **style)
    complete.add_argument(
        "parts", nargs="*", metavar="TEXT|@FILE",
        help="texts, and image files as @FILE; @@ begins a text with one @; a last text goes on",
    )  # fmt: skip
    complete.add_argument("--segments", type=int, default=4, help="new texts and pictures at most")
    complete.add_argument("--longest", type=int, default=64, help="text pieces of a text at most")
    complete.add_argument(
        "--text-temperature", type=float, default=0.0, help="of text; the options below are of images"
    )
    complete.add_argument("--text-top-k", type=int, default=0, help="of text; 0: all")
    complete.add_argument("--text-top-p", type=float, default=1.0, help="of text; 1: all")
    _add_shared(complete, temperature=0.7, output="out")
    return parser.parse_args()


def _add_contrast(parser: argparse.ArgumentParser, help: str, guidance: float | None) -> None:
    parser.add_argument("--guidance", type=float, default=guidance, help=help)
    parser.add_argument("--contrast-k", type=int, default=0, help="contrastive decoding CD-K instead; 0 is none")
    parser.add_argument("--contrast-alpha", type=float, default=0.5, help="share of the k-th probability that is kept")


def _add_shared(parser: argparse.ArgumentParser, *, temperature: float, output: str | None = None) -> None:
    parser.add_argument(
        "--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote"
    )
    parser.add_argument(
        "--output", type=user_path, default=output, help="new folder for the results and generated.json"
    )
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the tokens that make up this probability")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default=SAMPLERS[0],
        help="how noise becomes a token; each gives another result for the same seed",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result for a prompt")
    parser.add_argument("--retrieve", type=user_path, metavar="INDEX", help="index folder to retrieve documents from")
    parser.add_argument("--documents", type=int, help="documents to retrieve for each prompt (default: as in training)")
    parser.add_argument(
        "--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path"
    )
    parser.add_argument(
        "--document", nargs=2, action="append", metavar=("CAPTION", "PICTURE"),
        help="a document to put in front of each prompt, the most similar last; may be repeated",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is a device")


def sampling_options(arguments: argparse.Namespace) -> dict:
    names = ("guidance", "temperature", "top_k", "top_p", "contrast_k", "contrast_alpha", "sampler", "seed")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def load_generator(arguments: argparse.Namespace) -> Generator:
    Sampling(**{name: value for name, value in sampling_options(arguments).items() if name != "seed"})
    return Generator.load(arguments.model, arguments.dtype, arguments.device)


def find_documents(arguments: argparse.Namespace, generator: Generator, count: int, **queries):
    """Documents in front of `count` prompts: (numbers in the bank or None, ids or None)."""
    if arguments.document and arguments.retrieve:
        raise ValueError("give either --document or --retrieve.")
    if arguments.document:
        given = [
            generator.encode_document([caption, load_image(expand_path(path))]) for caption, path in arguments.document
        ]
        return None, [given] * count
    if not arguments.retrieve and (arguments.documents is not None or arguments.encoder is not None):
        raise ValueError("--documents and --encoder are for --retrieve INDEX; give it too, or leave them out.")
    if not arguments.retrieve:
        return None, None
    source = DocumentSource.load(arguments.retrieve, generator.vocabulary, arguments.encoder)
    wanted = generator.training_documents if arguments.documents is None else arguments.documents
    numbers = source.find(wanted, **queries)
    return numbers, source.read(numbers)


def options_of(arguments: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(arguments).items() if name not in ("captions", "pictures", "parts")}


def describe(made: MadePicture, name: str) -> dict:
    """Entry of generated.json."""
    entry = {"picture": name, "caption": made.caption, "seed": made.seed, "codes": made.codes.tolist()}
    return entry if made.score is None else entry | {"score": made.score}


def find_captions(arguments: argparse.Namespace) -> list[str]:
    """Captions of the command line and of the --from file."""
    captions = list(arguments.captions)
    if arguments.file:
        from megatron_cm3leon.data.sources.documents import decode_text

        text = decode_text(Path(arguments.file).read_bytes(), f"--from {arguments.file}")
        captions += [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not captions:
        raise ValueError("there is no caption to draw; give some, or --from FILE with one a line.")
    return captions


def make_images(arguments: argparse.Namespace) -> None:
    output, captions = check_output(arguments.output), find_captions(arguments)
    if arguments.guidance is None:
        arguments.guidance = default_guidance(arguments.contrast_k)
    generator = load_generator(arguments)
    encoder = None
    if arguments.rank_with:
        from megatron_cm3leon.retrieval.encoder import Encoder

        encoder = Encoder.load(arguments.rank_with)
    numbers, documents = find_documents(arguments, generator, len(captions), texts=captions)
    tokens = len(captions) * max(arguments.candidates, 1) * generator.vocabulary.image_tokens
    with written_results(output, options_of(arguments)) as results, meter(tokens, "generating", "tokens") as progress:
        pictures = generator.images(
            captions,
            documents,
            candidates=arguments.candidates,
            keep=arguments.keep,
            encoder=encoder,
            unconditional=arguments.unconditional,
            advance=progress.advance,
            **sampling_options(arguments),
        )
        each = (arguments.keep or 1) if encoder else arguments.candidates
        for place, made in enumerate(pictures):
            entry = describe(made, results.save(made.picture, made.caption))
            if numbers is not None:
                entry["retrieved"] = numbers[place // each]
            results.made.append(entry)
    print(f"wrote {len(results.made)} pictures, contact_sheet.png and generated.json to {output}")


def write_texts(arguments: argparse.Namespace, entries: list[dict], numbers: list | None) -> None:
    """Write generated.json where there is an --output."""
    if numbers is not None:
        entries = [entry | {"retrieved": row} for entry, row in zip(entries, numbers, strict=True)]
    if arguments.output is not None:
        with written_results(Path(arguments.output), options_of(arguments)) as results:
            results.made += entries
        print(f"wrote {Path(arguments.output) / 'generated.json'}")


def make_captions(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        check_output(arguments.output)
    pictures = [load_image(path) for path in arguments.pictures]
    generator = load_generator(arguments)
    numbers, documents = find_documents(arguments, generator, len(pictures), pictures=pictures)
    options = sampling_options(arguments)
    texts = generator.captions(pictures, documents, form=arguments.form, longest=arguments.longest, **options)
    entries = [{"picture": path, "caption": text} for path, text in zip(arguments.pictures, texts, strict=True)]
    for entry in entries:
        print(f"{entry['picture']}: {entry['caption']}")
    write_texts(arguments, entries, numbers)


def make_answers(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        check_output(arguments.output)
    pictures, questions = [load_image(arguments.picture)] * len(arguments.questions), arguments.questions
    generator = load_generator(arguments)
    numbers, documents = find_documents(arguments, generator, len(pictures), pictures=pictures)
    options = sampling_options(arguments)
    texts = generator.answers(pictures, questions, documents, longest=arguments.longest, **options)
    for question, text in zip(questions, texts, strict=True):
        print(f"{question} {text}")
    entries = [{"question": question, "answer": text} for question, text in zip(questions, texts, strict=True)]
    write_texts(arguments, entries, numbers)


def make_infill(arguments: argparse.Namespace) -> None:
    output = check_output(arguments.output)
    if (arguments.text is None) == (arguments.box is None):
        raise ValueError(f'give either --text "... {MASK} ..." or --picture with --box TOP LEFT BOTTOM RIGHT.')
    if arguments.box is not None and arguments.picture is None:
        raise ValueError("--box needs the --picture it is a part of.")
    if arguments.text is not None and arguments.text.count(MASK) != 1:
        raise ValueError(f"--text ({arguments.text!r}) must hold {MASK} exactly once, where the span is.")
    if arguments.text is not None and arguments.caption is not None:
        raise ValueError("--caption is of a picture with --box; --text is the caption itself: give one of them.")
    if arguments.text is not None and (arguments.guidance != 1 or arguments.contrast_k):
        raise ValueError(
            "--guidance and --contrast-k strengthen a picture's --caption; --text has none: leave them out."
        )
    picture = load_image(arguments.picture) if arguments.picture else None
    generator = load_generator(arguments)
    query = {"pictures": [picture]} if picture is not None else {"texts": [arguments.text.replace(MASK, " ")]}
    numbers, documents = find_documents(arguments, generator, 1, **query)
    options = sampling_options(arguments)
    if arguments.text is not None:
        for name in ("guidance", "contrast_k", "contrast_alpha"):
            del options[name]
        pictures = None if picture is None else [picture]
        parts = tuple(arguments.text.split(MASK))
        text = generator.infill_text([parts], pictures, documents, longest=arguments.longest, **options)[0]
        print(text)
        write_texts(arguments, [{"text": arguments.text, "filled": text}], numbers)
        return
    captions = None if arguments.caption is None else [arguments.caption]
    made = generator.infill_pictures([picture], tuple(arguments.box), captions, documents, **options)[0]
    before = generator.decode_pictures(generator.encode_pictures([picture]))[0]
    with written_results(output, options_of(arguments)) as results:
        first = results.save(before, "as the tokenizer draws it")
        name = results.save(made.picture, "infilled")
        results.made.append(describe(made, name))
    print(f"wrote {name} (before: {first}), contact_sheet.png and generated.json to {output}")


def read_part(part: str) -> str | Image.Image:
    """The image of @FILE, else the text; of a text that begins with @@ the first is dropped."""
    if not part.startswith("@") or part.startswith("@@"):
        return part.removeprefix("@")
    try:
        return load_image(expand_path(part[1:]))
    except ValueError as error:
        raise ValueError(
            f"{part!r} begins with @ and so names an image file. {str(error).rstrip('.')}. "
            f"If it is a text, begin it with @@."
        ) from error


def make_document(arguments: argparse.Namespace) -> None:
    output = check_output(arguments.output)
    parts = [read_part(part) for part in arguments.parts]
    generator = load_generator(arguments)
    texts = [" ".join(part for part in parts if isinstance(part, str))]
    numbers, documents = find_documents(arguments, generator, 1, texts=texts)
    names = ("temperature", "top_k", "top_p")
    made = generator.complete(
        [parts],
        documents,
        text=Sampling(sampler=arguments.sampler, **{name: getattr(arguments, f"text_{name}") for name in names}),
        image=Sampling(sampler=arguments.sampler, **{name: getattr(arguments, name) for name in names}),
        seed=arguments.seed,
        segments=arguments.segments,
        longest=arguments.longest,
    )[0]
    with written_results(output, options_of(arguments) | {"parts": arguments.parts}) as results:
        for part in made:
            if isinstance(part, str):
                entry = {"text": part}
                print(part)
            else:
                entry = describe(part, results.save(part.picture, ""))
                print(f"[{entry['picture']}]")
            results.made.append(entry if numbers is None else entry | {"retrieved": numbers[0]})
    print(f"wrote {len(made)} texts and pictures to {output}")


def main() -> None:
    arguments = parse_arguments()
    {
        "image": make_images,
        "caption": make_captions,
        "ask": make_answers,
        "infill": make_infill,
        "complete": make_document,
    }[arguments.command](arguments)


if __name__ == "__main__":
    run_tool(main)
