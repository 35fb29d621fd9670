"""Evaluation of an exported model on held-out shards; tools/report.py shows the results.

Held-out documents are drawn once: some to choose guidance and retrieval on, others, which are reported, for all else.
Measured are

    the checker's accuracy on generated images (and on the image tokenizer's reconstructions: the upper bound),
    the accuracy of generated captions, the PSNR of the reconstructions, the loss with and without retrieved documents.

Examples of each are written as images beside evaluation.json, which holds

    figures           the numbers
    sweep             accuracy (or CLIP score) by guidance, with and without retrieved documents
    examples          captions with their images: held-out, generated with guidance 1 and with the best guidance
    reconstructions   original images and their reconstructions by the image tokenizer
    retrieval         queries and their retrieved documents
    infilling         images with a part generated anew
    captions          images and the captions generated for them
    seconds           time of each part
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.evaluation.image_to_text import evaluate_captions
from megatron_cm3leon.evaluation.infilling import evaluate_infilling
from megatron_cm3leon.evaluation.loss import evaluate_loss
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.evaluation.reconstruction import evaluate_reconstruction
from megatron_cm3leon.evaluation.retrieval import retrieve_documents
from megatron_cm3leon.evaluation.subject import load_subject
from megatron_cm3leon.evaluation.text_to_image import evaluate_images


def evaluate_model(
    model: str | Path,
    shards: str | Path,
    output: str | Path,
    options: EvaluationOptions,
    *,
    checker: str | Path | None = None,
    index: str | Path | None = None,
    encoder: str | Path | None = None,
    dtype: str = "fp32",
    device: str = "auto",
) -> dict:
    """Evaluate; write evaluation.json and pictures/ to `output` and return the content of evaluation.json.

    `checker` is a Python file (judge.py), `index` an index folder to retrieve from, `encoder` its CLIP folder if it was
    moved. Raises ValueError if the inputs do not fit each other or if the shards hold too few pairs.
    """
    output = Path(output)
    seconds: dict[str, float] = {}
    with _measure_time("load", seconds):
        subject = load_subject(
            model,
            shards,
            output,
            options,
            checker=checker,
            index=index,
            encoder=encoder,
            dtype=dtype,
            device=device,
        )
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    with meter(6, "evaluating", "parts") as progress:
        with _measure_time("reconstruct", seconds, progress):
            reconstruction, reconstructed = evaluate_reconstruction(subject)
        with _measure_time("retrieve", seconds, progress):
            retrieval, retrieved = retrieve_documents(subject, reconstructed.display_images)
        with _measure_time("generate", seconds, progress):
            generated = evaluate_images(subject, reconstructed.display_images, retrieved)
        with _measure_time("caption", seconds, progress):
            captions = evaluate_captions(subject, reconstructed.display_images, retrieved)
        with _measure_time("infill", seconds, progress):
            infilling = evaluate_infilling(subject, reconstructed.reconstructions, retrieved)
        with _measure_time("lose", seconds, progress):  # a key of evaluation.json
            loss = evaluate_loss(subject, retrieved)
    parts = [reconstruction, retrieval, generated, captions, infilling, loss]
    result = {
        "format": 1,
        "figures": {name: value for part in parts for name, value in part.figures.items()},
        "options": options.to_dict() | {"documents": subject.documents},
        **{name: value for part in parts for name, value in part.content.items()},
        "seconds": seconds,
    }
    (output / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


@contextmanager
def _measure_time(name: str, seconds: dict[str, float], progress: Meter | None = None) -> Iterator[None]:
    """Put the time inside the `with` into `seconds`, and advance `progress` by one part."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
    if progress:
        progress.advance()
