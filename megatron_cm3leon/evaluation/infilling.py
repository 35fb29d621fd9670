"""The lower half of held-out images, generated anew from the caption and the upper half."""

from PIL import Image

from megatron_cm3leon.evaluation.heldout import cover_box
from megatron_cm3leon.evaluation.retrieval import Retrieved
from megatron_cm3leon.evaluation.subject import Part, Subject
from megatron_cm3leon.generation.sampling import Sampling

_MAX_EXAMPLES = 4


def evaluate_infilling(subject: Subject, reconstructions: list[Image.Image], retrieved: Retrieved | None) -> Part:
    """Infill a few images; no number but how many of the other image tokens are unchanged."""
    height, width = subject.vocabulary.image_height, subject.vocabulary.image_width
    box = (height // 2, 0, height, width)
    shown = subject.examples[:_MAX_EXAMPLES]
    codes, captions = subject.pairs.codes[: len(shown)], subject.pairs.captions[: len(shown)]
    options, documents = subject.options, retrieved.by_caption[: len(shown)] if retrieved else None
    sampling = Sampling(temperature=options.temperature, sampler=options.sampler, seed=options.seed)
    infilled = subject.generator.infill_images(list(codes), box, sampling, captions=captions, retrieved=documents)
    examples = []
    for number in shown:
        covered = cover_box(reconstructions[number], box, (height, width))
        example = {
            "caption": captions[number],
            "before": subject.save_image(reconstructions[number], f"reconstruction-{number}"),
            "masked": subject.save_image(covered, f"masked-{number}"),
            "after": subject.save_image(infilled[number].image, f"infilled-{number}"),
            "kept_codes": int((infilled[number].codes == codes[number])[: box[0] * width].sum()),
            "other_codes": box[0] * width,
        }
        examples.append(example)
    return Part({}, {"infilling": examples})
