"""Prompts: the forms in which a CM3-trained model has seen a pair, up to the point where it continues.

    image of a caption      </s> documents caption <break>                            -> image codes
    without the caption     </s> documents                  ("dropped")               -> image codes
                            </s> documents <sentinel:0> <break>  ("sentinel")         -> image codes
    caption of an image     </s> documents image <break>    ("image_first")           -> text, </s> or <break>
                            </s> documents <sentinel:0> <break> image </s> <sentinel:0>   ("masked")
                                                                                      -> text, <eoss>
    infilling               </s> documents left <sentinel:0> right </s> <sentinel:0>  -> the span, <eoss>  ("masked")
    a box of an image       </s> documents caption <break> codes before the box       -> codes  ("raster")

`documents` are the retrieved ones, each followed by <break>. All functions take and return lists of ids.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_cm3leon.tokenizers.vocab import Vocabulary

Documents = Sequence[Iterable[int] | np.ndarray]
"""Ids of the retrieved documents of one prompt."""
UNCONDITIONAL_FORMS = ("auto", "dropped", "sentinel")
CAPTION_FORMS = ("auto", "image_first", "masked")
BOX_FORMS = ("auto", "masked", "raster")
LITTLE_INFILLING = 0.15
"""Share of training sequences that infill a part, up to which a box is filled far better in raster order (measured)."""


def choose_caption_form(form: str, training: dict) -> str:
    """Resolve "auto": "image_first" if the model was trained on images before texts, else "masked".

    <sentinel:0> for a *complete* caption is rarer in training: a span must cover it, or rotation must be on.
    """
    _check_form(form, CAPTION_FORMS, "form")
    if form != "auto":
        return form
    return "image_first" if training.get("image_first_probability", 0.5) > 0 else "masked"


def choose_unconditional_form(form: str, documents: Documents, training: dict) -> str:
    """Resolve "auto" as CM3Leon does: a sentinel for the caption, or nothing ("dropped") after retrieved documents.

    The other form is chosen if the model has not seen it in training: a sentinel requires CM3 masking, an image right
    after the documents requires documents that begin with their image.
    """
    _check_form(form, UNCONDITIONAL_FORMS, "unconditional")
    if form != "auto":
        return form
    if training.get("cm3_probability", 1.0) == 0:
        return "dropped"
    begins_with_image = training.get("image_first_probability", 0.5) > 0
    return "dropped" if len(documents) and begins_with_image else "sentinel"


def choose_box_form(form: str, training: dict) -> str:
    """Resolve "auto": "raster" if at most LITTLE_INFILLING of the training sequences had a part to infill.

    "masked" sees the image on all sides of a box, but a model must have learned to use it; "raster" sees what is before
    the box alone, in the order that every image of the training has. The measurement (docs/quickstart_recipe.md) ends
    at LITTLE_INFILLING; for more, "auto" relies on what the training was configured for.
    """
    _check_form(form, BOX_FORMS, "form")
    if form != "auto":
        return form
    share = training.get("cm3_probability", 1.0) * training.get("cm3_infill_probability", 0.0)
    return "masked" if share > LITTLE_INFILLING else "raster"


def _check_form(form: str, forms: tuple[str, ...], name: str) -> None:
    if form not in forms:
        raise ValueError(f"{name} ({form!r}) must be one of: {', '.join(forms)}.")


def begin_sample(documents: Documents, vocabulary: Vocabulary) -> list[int]:
    """</s> and the retrieved documents, the most similar last, as in the shards."""
    ids = [vocabulary.eos]
    for document in documents:
        ids += [*map(int, document), vocabulary.break_id]
    return ids


def image_prompt(caption: list[int], documents: Documents, vocabulary: Vocabulary) -> list[int]:
    """The image of a caption."""
    return [*begin_sample(documents, vocabulary), *caption, vocabulary.break_id]


def unconditional_prompt(documents: Documents, form: str, vocabulary: Vocabulary) -> list[int]:
    """`image_prompt` without the caption, for the unconditional stream of guidance and CD-K."""
    ids = begin_sample(documents, vocabulary)
    return ids if form == "dropped" else [*ids, vocabulary.sentinel(0), vocabulary.break_id]


def caption_prompt(image: list[int], documents: Documents, form: str, vocabulary: Vocabulary) -> list[int]:
    """The caption of an image, "image_first" or "masked"."""
    ids = begin_sample(documents, vocabulary)
    if form == "image_first":
        return [*ids, *image, vocabulary.break_id]
    mask = vocabulary.sentinel(0)
    return [*ids, mask, vocabulary.break_id, *image, vocabulary.eos, mask]


def split_answer_template(question: str, context: str = "") -> tuple[str, str]:
    """The texts before and after the answer in CM3Leon's template for questions (table 5), with a text in front."""
    return f"{context} Question: {question.strip()} Answer:".lstrip(), "."


def infill_text_prompt(
    left: list[int], right: list[int], image: list[int] | None, documents: Documents, vocabulary: Vocabulary
) -> list[int]:
    """A caption with a masked span, and its image if there is one."""
    mask = vocabulary.sentinel(0)
    after = [vocabulary.break_id, *image] if image is not None else []
    return [*begin_sample(documents, vocabulary), *left, mask, *right, *after, vocabulary.eos, mask]


def infill_image_prompt(
    codes: list[int], start: int, end: int, caption: list[int] | None, documents: Documents, vocabulary: Vocabulary
) -> list[int]:
    """An image (ids) whose codes start..end are masked, and its caption if there is one."""
    mask = vocabulary.sentinel(0)
    before = [*caption, vocabulary.break_id] if caption is not None else []
    masked = [*codes[:start], mask, *codes[end:]]
    return [*begin_sample(documents, vocabulary), *before, *masked, vocabulary.eos, mask]


def continue_image_prompt(
    codes: list[int], start: int, caption: list[int] | None, documents: Documents, form: str, vocabulary: Vocabulary
) -> list[int]:
    """An image (ids) up to its code `start`, after its caption; without one, after `unconditional_prompt` of `form`."""
    if caption is None:
        return [*unconditional_prompt(documents, form, vocabulary), *codes[:start]]
    return [*image_prompt(caption, documents, vocabulary), *codes[:start]]
