"""Generate from an exported model: images of captions, texts about images, what a mask hides, whole documents.

    python tools/generate.py image --model exported/ "a red circle" "a blue square" --output out/
    python tools/generate.py image --model exported/ "a red circle" --candidates 8 --rank-with clip/ --output best/
    python tools/generate.py caption --model exported/ image.png
    python tools/generate.py ask --model exported/ image.png "what color is it?"
    python tools/generate.py infill --model exported/ --text "a <mask> circle on white"
    python tools/generate.py infill --model exported/ --image image.png --box 2 2 6 6 --output infilled/
    python tools/generate.py complete --model exported/ "a red circle" @image.png "a green" --output completed/
    python tools/generate.py sheets --run runs/x --tokenizer tok/ --output sheets/

sheets exports the newest checkpoint of a run to a temporary folder and draws held-out pairs of each validation source.
Only complete reads @FILE; there, a text that begins with @ is written with two: "@@nasa shows".
With --retrieve INDEX, retrieved documents precede each prompt; with --document, given ones.
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.evaluation.sheets import draw_sheets
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.prompts import BOX_FORMS, CAPTION_FORMS, UNCONDITIONAL_FORMS
from megatron_cm3leon.generation.results import Results
from megatron_cm3leon.generation.retrieved import RetrievalOptions
from megatron_cm3leon.generation.run import Request, generate
from megatron_cm3leon.generation.sampling import SAMPLERS, Sampling, default_guidance
from megatron_cm3leon.generation.tasks import (
    MASK,
    AnswerTask,
    CaptionTask,
    CompletionTask,
    ImageTask,
    InfillTask,
    Task,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help, add_arguments in (
        ("image", "images of captions", _add_image),
        ("caption", "captions of images", _add_caption),
        ("ask", "answers to questions about an image", _add_ask),
        ("infill", "what a mask hides, in a text or in an image", _add_infill),
        ("complete", "what follows a document of texts and images", _add_complete),
        ("sheets", "contact sheets of a run's newest checkpoint, one per validation source", _add_sheets),
    ):
        add_arguments(commands.add_parser(name, help=help, formatter_class=HelpFormatter))
    return parser.parse_args()


def _add_image(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("captions", nargs="*", help="what the images should show")
    add(
        "--from", type=user_path, dest="file", metavar="FILE",
        help="file with more captions, one per line; blank lines are skipped",
    )  # fmt: skip
    add("--candidates", type=int, default=1, help="images per caption; seeds count up")
    add("--rank-with", type=user_path, metavar="CLIP", help="CLIP folder: keep the candidates nearest to their caption")
    add("--keep", type=int, help="candidates per caption that --rank-with keeps (default: 1)")
    add(
        "--unconditional", choices=UNCONDITIONAL_FORMS, default="auto",
        help="guidance's prompt without the caption: caption dropped, or masked by a sentinel",
    )  # fmt: skip
    _add_contrast(parser, "classifier-free guidance; 1 is none (default: 2; 1 with --contrast-k)", None)
    _add_shared(parser, temperature=0.7, output="out")


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=user_path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--form", choices=CAPTION_FORMS, default="auto", help="continue after the image, or fill a masked caption"
    )
    parser.add_argument("--longest", type=int, default=64, help="text pieces of a caption, at most")
    _add_shared(parser, temperature=0.0)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    # Options keep the names that generated.json has for them: "picture".
    parser.add_argument("picture", type=user_path, metavar="IMAGE", help="image file")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="questions, each answered on its own")
    parser.add_argument("--longest", type=int, default=16, help="text pieces of an answer, at most")
    _add_shared(parser, temperature=0.0)


def _add_infill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", help=f"caption with {MASK} where a span is to be filled in")
    add(
        "--image", type=user_path, dest="picture", metavar="IMAGE",
        help="image file: the one to change with --box, else the one that --text describes",
    )  # fmt: skip
    add("--picture", type=user_path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # the old name of --image
    add(
        "--box", type=int, nargs=4, metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
        help="part of the image to generate again, in image tokens; bottom and right are exclusive",
    )  # fmt: skip
    add("--caption", help="what the changed image should show")
    add(
        "--form", choices=BOX_FORMS, default="auto",
        help="of --box: masked, between the codes on all sides; raster, after the codes in front of it, as an image is "
        "generated; auto: raster unless training infilled parts often",
    )  # fmt: skip
    add("--longest", type=int, default=32, help="text pieces of the span, at most")
    _add_contrast(parser, "classifier-free guidance, for an image with --caption; 1 is none", 1.0)
    _add_shared(parser, temperature=1.0, output="out")


def _add_complete(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "parts", nargs="*", metavar="TEXT|@FILE",
        help="texts, and image files as @FILE; @@ begins a text with one @; a text at the end is continued",
    )  # fmt: skip
    add("--segments", type=int, default=4, help="new texts and images, at most")
    add("--longest", type=int, default=64, help="text pieces of a text, at most")
    add("--text-temperature", type=float, default=0.0, help="for text; the options below are for images")
    add("--text-top-k", type=int, default=0, help="for text; 0: all")
    add("--text-top-p", type=float, default=1.0, help="for text; 1: all")
    _add_shared(parser, temperature=0.7, output="out")


def _add_sheets(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=user_path, required=True, help="run folder with validation.sources or validation.shards")
    add("--tokenizer", type=user_path, required=True, help="tokenizer folder the run was trained with")
    add("--output", type=user_path, required=True, help="folder to write NAME.png of each source to")
    add("--pairs", type=int, default=12, help="held-out pairs of each source; the same ones for a seed")
    add("--longest", type=int, default=64, help="text pieces of a generated text, at most")
    add("--temperature", type=float, default=0.7, help="of images; texts are greedy")
    add("--guidance", type=float, default=default_guidance(0), help="classifier-free guidance of images; 1 is none")
    add("--seed", type=int, default=0, help="of the choice of pairs and of the images")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def _add_contrast(parser: argparse.ArgumentParser, help: str, guidance: float | None) -> None:
    parser.add_argument("--guidance", type=float, default=guidance, help=help)
    parser.add_argument("--contrast-k", type=int, default=0, help="contrastive decoding CD-K instead; 0 is none")
    parser.add_argument("--contrast-alpha", type=float, default=0.5, help="share of the k-th probability that is kept")


def _add_shared(parser: argparse.ArgumentParser, *, temperature: float, output: str | None = None) -> None:
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--output", type=user_path, default=output, help="new folder for the results and generated.json")
    add("--temperature", type=float, default=temperature, help="0 is greedy")
    add("--top-k", type=int, default=0, help="draw among the k most likely tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the most likely tokens with this total probability")
    add(
        "--sampler", choices=SAMPLERS, default=SAMPLERS[0],
        help="how random numbers become a token; they give different results for the same seed",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed gives the same result for a prompt")
    add("--retrieve", type=user_path, metavar="INDEX", help="index folder to retrieve documents from")
    add("--documents", type=int, help="documents to retrieve for each prompt (default: as in training)")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add(
        "--document", nargs=2, action="append", metavar=("CAPTION", "IMAGE"),
        help="a document in front of each prompt, the most similar last; may be repeated",
    )  # fmt: skip
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def build_sampling(arguments: argparse.Namespace) -> Sampling:
    names = [one.name for one in fields(Sampling) if hasattr(arguments, one.name)]
    return Sampling(**{name: getattr(arguments, name) for name in names})


def build_task(arguments: argparse.Namespace) -> Task:
    if arguments.command == "complete":
        names = ("temperature", "top_k", "top_p")
        shared = {"sampler": arguments.sampler, "seed": arguments.seed}
        text = Sampling(**shared, **{name: getattr(arguments, f"text_{name}") for name in names})
        sizes = {"segments": arguments.segments, "longest": arguments.longest}
        return CompletionTask(
            parts=arguments.parts, options=CompletionOptions(text=text, image=build_sampling(arguments), **sizes)
        )
    sampling = build_sampling(arguments)
    if arguments.command == "image":
        return ImageTask(
            captions=arguments.captions, file=arguments.file, sampling=sampling, candidates=arguments.candidates,
            keep=arguments.keep, rank_with=arguments.rank_with, unconditional=arguments.unconditional,
        )  # fmt: skip
    longest = arguments.longest
    if arguments.command == "caption":
        return CaptionTask(images=arguments.images, sampling=sampling, form=arguments.form, longest=longest)
    if arguments.command == "ask":
        return AnswerTask(image=arguments.picture, questions=arguments.questions, sampling=sampling, longest=longest)
    box = None if arguments.box is None else tuple(arguments.box)
    return InfillTask(
        text=arguments.text, image=arguments.picture, box=box, caption=arguments.caption, form=arguments.form,
        sampling=sampling, longest=longest,
    )  # fmt: skip


def build_request(arguments: argparse.Namespace) -> Request:
    if arguments.command == "image" and arguments.guidance is None:
        arguments.guidance = default_guidance(arguments.contrast_k)
    retrieval = RetrievalOptions(
        index=arguments.retrieve, documents=arguments.documents, encoder=arguments.encoder,
        given=[(caption, expand_path(path)) for caption, path in arguments.document or ()],
    )  # fmt: skip
    options = recorded_options(arguments)
    if arguments.command == "complete":
        options["parts"] = arguments.parts
    return Request(
        task=build_task(arguments), model=arguments.model, output=arguments.output, retrieval=retrieval,
        options=options, dtype=arguments.dtype, device=arguments.device,
    )  # fmt: skip


def recorded_options(arguments: argparse.Namespace) -> dict:
    """The options as generated.json has them."""
    return {name: value for name, value in vars(arguments).items() if name not in ("captions", "images", "parts")}


def print_results(command: str, results: Results, output: str | None) -> None:
    lines = {
        "caption": "{picture}: {caption}".format_map,
        "ask": "{question} {answer}".format_map,
        "infill": lambda entry: entry.get("filled"),  # None for an image
        "complete": lambda entry: entry["text"] if "text" in entry else f"[{entry['picture']}]",
    }
    for entry in results.entries if command in lines else ():
        line = lines[command](entry)
        if line is not None:
            print(line)
    if output is not None:
        images = f"{len(results.shown)} images, contact_sheet.png and " if results.shown else ""
        print(f"wrote {images}generated.json to {output}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "sheets":
        options = {name: getattr(arguments, name) for name in ("pairs", "longest", "dtype", "device")}
        sampling = build_sampling(arguments)
        for path in draw_sheets(arguments.run, arguments.tokenizer, arguments.output, sampling, **options):
            print(f"wrote {path}")
        return
    request = build_request(arguments)
    results = generate(request)
    print_results(arguments.command, results, request.output)


if __name__ == "__main__":
    run_tool(main)
