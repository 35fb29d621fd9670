"""GenEval: images of its prompts in its folder layout, and its score by a checker of the corpus.

    OUTPUT/images/00000/metadata.jsonl        the prompt
    OUTPUT/images/00000/samples/0000.png ...  its images

GenEval's own evaluation/evaluate_images.py reads OUTPUT/images. With `--checker`, a checker (evaluation/judge.py) that
also has `find_objects(image)`, such as examples/shapes/geneval.py, the images are judged here by GenEval's rules.

The images are generated in groups of PROMPTS_AT_ONCE prompts, which the ranks of a launch share. A group that is
complete is not generated again.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_cm3leon.common.atomic_io import atomic_directory
from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.evaluation.judge import load_checker
from megatron_cm3leon.evaluation.metrics.geneval import GROUPS, judge_objects, mean_of_groups, read_prompts
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import Figure, FinishedItems, Result, bootstrap, hash_input
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.ranking import Candidates
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.generation.sampling import SAMPLERS, Sampling
from megatron_cm3leon.tokenizers.images import load_image

PROMPTS_AT_ONCE = 16
"""Prompts whose images are generated in one call."""
SHOWN = 24
"""Images that a report shows."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--prompts", type=user_path, required=True, help="GenEval's evaluation_metadata.jsonl, or a file in its format")
    add("--checker", type=user_path, help="Python file with find_objects(image); executed. Without it: images only")
    add("--images", type=int, default=4, help="images per prompt; GenEval's score is of 4")
    add("--index", type=user_path, help="index to retrieve documents from; without it nothing is retrieved")
    add("--documents", type=int, help="retrieved documents per prompt (default: as in training)")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add("--guidance", type=float, default=1.0, help="weight of classifier-free guidance; 1: none")
    add("--temperature", type=float, default=1.0, help="of the sampled image tokens; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="sample from the tokens that make up this probability")
    add("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="how random numbers select an image token")
    add("--seed", type=int, default=0, help="of the first image of each prompt; the others count up")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def evaluate(
    *,
    model: str | Path,
    prompts: str | Path,
    output: str | Path,
    checker: str | Path | None = None,
    images: int = 4,
    index: str | Path | None = None,
    documents: int | None = None,
    encoder: str | Path | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sampler: str = SAMPLERS[0],
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    ranks: Ranks | None = None,
) -> Result | None:
    """Write OUTPUT/images and, with a checker, judge them; the options are those of `add_options`.

    None on ranks other than the first, which only generate. Figures: `score`, the mean of the groups' shares of correct
    images; the share of each group; `correct_images`, and `correct_prompts`, of which one image at least is correct.
    Intervals are over prompts.
    """
    ranks = ranks or Ranks()
    sampling = Sampling(guidance=guidance, temperature=temperature, top_p=top_p, sampler=sampler, seed=seed)
    if images < 1:
        raise ValueError(f"--images ({images}) must be at least 1.")
    if index is None and (documents is not None or encoder is not None):
        raise ValueError("--documents and --encoder are for --index, to retrieve from; give it, or neither of them.")
    entries = read_prompts(prompts)
    find_objects = None if checker is None else _load_finder(checker)
    settings = {
        "images": images, "guidance": guidance, "temperature": temperature, "top_p": top_p, "sampler": sampler,
        "documents": documents if index is not None else 0, "dtype": dtype,
    }  # fmt: skip
    read = {"model": model, "prompts": prompts} | ({} if index is None else {"index": index})
    inputs = ranks.from_first(lambda: {name: hash_input(path) for name, path in read.items()})
    identity = {"settings": settings, "inputs": inputs, "seed": seed}
    ranks.from_first(lambda: FinishedItems(output, identity).close())
    folder = Path(output) / "images"
    generation = _Generation(
        entries=entries, folder=folder, images=images, sampling=sampling, model=model, dtype=dtype, device=device,
        index=index, documents=documents, encoder=encoder,
    )  # fmt: skip
    generation.run(ranks)
    if not ranks.first:
        return None
    shown = [
        {"path": f"images/{_sample_path(number, 0)}", "caption": entry["prompt"]}
        for number, entry in enumerate(entries[:SHOWN])
    ]
    result = Result(task="geneval", figures={}, settings=settings, seed=seed, inputs=inputs, tables={"images": shown})
    if find_objects is None:
        result.figures["images"] = Figure(len(entries) * images, unit="images")
        result.notes.append(f"No --checker: run GenEval's evaluation/evaluate_images.py on {folder}.")
        return result
    result.inputs["checker"] = hash_input(checker)  # type: ignore[arg-type]  # it is given: there is a finder
    _judge(result, entries, folder, images, find_objects, seed)
    return result


def _load_finder(path: str | Path) -> Any:
    """The function find_objects of a checker; ValueError if there is none."""
    found = getattr(load_checker(path), "find_objects", None)
    if not callable(found):
        raise ValueError(
            f"the checker {path} has no function find_objects(image), which finds several objects; give one that has, "
            f"such as examples/shapes/geneval.py."
        )
    return found


def _sample_path(prompt: int, sample: int) -> str:
    return f"{prompt:05d}/samples/{sample:04d}.png"


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """What is generated: `images` of each prompt in `folder`; the other fields are options of the command."""

    entries: list[dict]
    folder: Path
    images: int
    sampling: Sampling
    model: str | Path
    dtype: str
    device: str
    index: str | Path | None
    documents: int | None
    encoder: str | Path | None

    def run(self, ranks: Ranks) -> None:
        """Write the images of this rank's share of the groups that are not complete."""
        starts = range(0, len(self.entries), PROMPTS_AT_ONCE)
        groups = [range(start, min(start + PROMPTS_AT_ONCE, len(self.entries))) for start in starts]
        left = ranks.from_first(lambda: [n for n, group in enumerate(groups) if not all(map(self._is_complete, group))])
        if not left:
            return
        generator = Generator.load(self.model, self.dtype, ranks.resolve_device(self.device))
        source = None
        if self.index is not None:
            source = DocumentSource.load(self.index, generator.vocabulary, self.encoder)
        tokens = sum(len(groups[number]) for number in left) * self.images * generator.vocabulary.image_tokens
        with ranks.share(left, total=tokens, done=0, label="generating", unit="tokens") as (numbers, advance):
            for number in numbers:
                self._generate(groups[number], generator, source, advance)

    def _is_complete(self, prompt: int) -> bool:
        """Whether a prompt's images were written; ValueError if they are of another prompt."""
        path = self.folder / f"{prompt:05d}" / "metadata.jsonl"
        if not path.is_file():
            return False
        if json.loads(path.read_text()) != self.entries[prompt]:
            raise ValueError(f"{path} is of another prompt than line {prompt + 1} of --prompts; give another --output.")
        return all((self.folder / _sample_path(prompt, sample)).is_file() for sample in range(self.images))

    def _generate(
        self, group: range, generator: Generator, source: DocumentSource | None, advance: Callable[[int], None]
    ) -> None:
        """Write the images of a complete group, so that a prompt's batch is the same in every run."""
        captions = [self.entries[prompt]["prompt"] for prompt in group]
        retrieved = None
        if source is not None:
            count = generator.training_documents if self.documents is None else self.documents
            retrieved = source.read(source.find(count, texts=captions))
        candidates = Candidates(self.images)
        made = list(
            generator.images(captions, self.sampling, retrieved=retrieved, candidates=candidates, advance=advance)
        )
        for place, prompt in enumerate(group):
            samples = [one.image for one in made[place * self.images : (place + 1) * self.images]]
            _write_prompt(self.folder / f"{prompt:05d}", self.entries[prompt], samples)


def _write_prompt(folder: Path, entry: dict, images: Sequence[Image.Image]) -> None:
    """GenEval's folder of one prompt, complete or absent."""
    with atomic_directory(folder) as part:
        (part / "samples").mkdir()
        for number, image in enumerate(images):
            image.save(part / "samples" / f"{number:04d}.png")
        (part / "metadata.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")


def _judge(result: Result, entries: list[dict], folder: Path, images: int, find_objects: Any, seed: int) -> None:
    """Fill the figures and the table of a result."""
    correct = np.zeros((len(entries), images))
    reasons: dict[str, Counter[str]] = {}
    for number, entry in enumerate(track(entries, label="judging", unit="prompts")):
        for sample in range(images):
            reason = judge_objects(find_objects(load_image(folder / _sample_path(number, sample))), entry)
            correct[number, sample] = not reason
            if reason:
                reasons.setdefault(entry["tag"], Counter())[reason] += 1
    tags = [entry["tag"] for entry in entries]
    groups = sorted(set(tags), key=lambda tag: (GROUPS.index(tag) if tag in GROUPS else len(GROUPS), tag))
    shares = correct.mean(axis=1)
    items = np.stack([[groups.index(tag) for tag in tags], shares], axis=1)
    result.figures["score"] = bootstrap(items, mean_of_groups, seed=seed)
    for group in groups:
        result.figures[group] = bootstrap(shares[[tag == group for tag in tags]], seed=seed)
    result.figures["correct_images"] = bootstrap(shares, seed=seed)
    result.figures["correct_prompts"] = bootstrap(correct.max(axis=1), seed=seed)
    result.tables["reasons"] = {tag: dict(counts.most_common(10)) for tag, counts in sorted(reasons.items())}
