"""Images generated from held-out captions: the choice of guidance and retrieval, accuracy and CLIP score."""

from PIL import Image

from megatron_cm3leon.evaluation.heldout import Heldout
from megatron_cm3leon.evaluation.judge import Checker, compute_accuracy, judge_images, parse_captions
from megatron_cm3leon.evaluation.retrieval import Documents, Retrieved
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.generation.sampling import Sampling


def evaluate_images(subject: Subject, display_images: list[Image.Image], retrieved: Retrieved | None) -> Part:
    """Choose guidance and retrieval on the captions of the sweep, then generate images of the reported captions."""
    pairs, checker = subject.pairs, subject.checker
    guidance, retrieval, sweep = _choose_settings(subject, retrieved)
    documents = retrieved.by_caption if retrieved and retrieval else None
    plain = _generate(subject, pairs, documents, 1.0)
    guided = plain if guidance == 1 else _generate(subject, pairs, documents, guidance)
    figures: dict = {"guidance": guidance, "retrieval": retrieval}
    judged = {}
    if checker:
        expected = parse_captions(checker, pairs.captions)
        judged = {"plain": judge_images(checker, plain, expected), "guided": judge_images(checker, guided, expected)}
        figures["heldout_accuracy"] = compute_accuracy(judged["guided"])
        figures["heldout_accuracy_without_guidance"] = compute_accuracy(judged["plain"])
        if retrieved:
            other_documents = None if retrieval else retrieved.by_caption
            others = _generate(subject, pairs, other_documents, guidance)
            accuracies = {
                retrieval: figures["heldout_accuracy"],
                not retrieval: compute_accuracy(judge_images(checker, others, expected)),
            }
            figures["heldout_accuracy_with_retrieval"] = accuracies[True]
            figures["heldout_accuracy_without_retrieval"] = accuracies[False]
    if retrieved:
        figures["clip_score"] = {
            "generated": retrieved.measure_clip_score(pairs.captions, guided),
            "heldout": retrieved.measure_clip_score(pairs.captions, display_images),
        }
    examples = [
        {
            "caption": pairs.captions[number],
            "original": subject.save_image(display_images[number], f"original-{number}"),
            "plain": subject.save_image(plain[number], f"plain-{number}"),
            "guided": subject.save_image(guided[number], f"guided-{number}"),
            **{f"{name}_judged": rows[number] for name, rows in judged.items()},
        }
        for number in subject.examples
    ]
    return Part(figures, {"sweep": sweep, "examples": examples})


def _choose_settings(subject: Subject, retrieved: Retrieved | None) -> tuple[float, bool, list[dict]]:
    """(guidance, with retrieval, rows of the sweep): the best mean accuracy, or CLIP score without a checker.

    Of equal settings the first is chosen. Without checker and index there is no score: the last guidance is chosen.
    """
    guidances, checker, pairs = subject.options.guidance, subject.checker, subject.sweep_pairs
    if not checker and not retrieved:
        return guidances[-1], False, []
    rows, scores = [], []
    for guidance in sorted(set(guidances)):
        for retrieval in (True, False) if retrieved else (False,):
            documents = retrieved.sweep_by_caption if retrieved and retrieval else None
            images = _generate(subject, pairs, documents, guidance)
            row: dict = {"guidance": guidance, "retrieval": retrieval}
            if checker:
                row["accuracy"] = _measure_accuracy(checker, images, pairs)
                scores.append(sum(row["accuracy"].values()))
            elif retrieved:
                row["clip_score"] = retrieved.measure_clip_score(pairs.captions, images)
                scores.append(row["clip_score"])
            rows.append(row)
    best = rows[scores.index(max(scores))]
    return best["guidance"], best["retrieval"], rows


def _measure_accuracy(checker: Checker, images: list[Image.Image], pairs: Heldout) -> dict[str, float]:
    return compute_accuracy(judge_images(checker, images, parse_captions(checker, pairs.captions)))


def _generate(subject: Subject, pairs: Heldout, documents: Documents | None, guidance: float) -> list[Image.Image]:
    """One image for each caption of `pairs`."""
    options = subject.options
    sampling = Sampling(
        guidance=guidance,
        temperature=options.temperature,
        top_p=options.top_p,
        sampler=options.sampler,
        seed=options.seed,
    )
    return [each.image for each in subject.generator.images(pairs.captions, sampling, retrieved=documents)]
