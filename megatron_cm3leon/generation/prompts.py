"""Prompts: the forms in which a CM3-trained model has seen a pair, up to the point where it should go on.

    picture of a caption    </s> documents caption <break>                            -> image codes
    without the caption     </s> documents                  ("dropped")               -> image codes
                            </s> documents <sentinel:0> <break>  ("sentinel")         -> image codes
    caption of a picture    </s> documents picture <break>  ("image_first")           -> text, </s> or <break>
                            </s> documents <sentinel:0> <break> picture </s> <sentinel:0>   ("masked")
                                                                                      -> text, <eoss>
    infilling               </s> documents left <sentinel:0> right </s> <sentinel:0>  -> the span, <eoss>

`documents` are retrieved ones, each followed by <break>. All functions take and give lists of ids.
"""

from megatron_cm3leon.tokenizers.vocab import Vocabulary

UNCONDITIONAL_FORMS = ("auto", "dropped", "sentinel")
CAPTION_FORMS = ("auto", "image_first", "masked")


def choose_caption_form(form: str, training: dict) -> str:
    """Resolve "auto": the order in which pairs stood, where the model was trained on pictures before texts.

    <sentinel:0> for a *whole* caption is rarer in training: a span has to cover one, or rotation to be on.
    """
    _check_form(form, CAPTION_FORMS, "form")
    if form != "auto":
        return form
    return "image_first" if training.get("image_first_probability", 0.5) > 0 else "masked"


def choose_unconditional_form(form: str, documents, training: dict) -> str:
    """Resolve "auto" as CM3Leon does: a sentinel for the caption, or behind retrieved documents none at all.

    Unless the model has not met it: sentinels without CM3 masking, or documents that begin with their picture.
    """
    _check_form(form, UNCONDITIONAL_FORMS, "unconditional")
    if form != "auto":
        return form
    if training.get("cm3_probability", 1.0) == 0:
        return "dropped"
    begins_with_picture = training.get("image_first_probability", 0.5) > 0
    return "dropped" if len(documents) and begins_with_picture else "sentinel"


def _check_form(form: str, forms: tuple[str, ...], name: str) -> None:
    if form not in forms:
        raise ValueError(f"{name} ({form!r}) must be one of: {', '.join(forms)}.")


def begin_sample(documents, vocabulary: Vocabulary) -> list[int]:
    """</s> and the retrieved documents, farthest first, as they stand in the shards."""
    ids = [vocabulary.eos]
    for document in documents:
        ids += [*map(int, document), vocabulary.break_id]
    return ids


def picture_prompt(caption: list[int], documents, vocabulary: Vocabulary) -> list[int]:
    return [*begin_sample(documents, vocabulary), *caption, vocabulary.break_id]


def unconditional_prompt(documents, form: str, vocabulary: Vocabulary) -> list[int]:
    """What guidance contrasts `picture_prompt` with: the same without the caption."""
    ids = begin_sample(documents, vocabulary)
    return ids if form == "dropped" else [*ids, vocabulary.sentinel(0), vocabulary.break_id]


def caption_prompt(picture: list[int], documents, form: str, vocabulary: Vocabulary) -> list[int]:
    ids = begin_sample(documents, vocabulary)
    if form == "image_first":
        return [*ids, *picture, vocabulary.break_id]
    mask = vocabulary.sentinel(0)
    return [*ids, mask, vocabulary.break_id, *picture, vocabulary.eos, mask]


def infill_text_prompt(
    left: list[int], right: list[int], picture: list[int] | None, documents, vocabulary: Vocabulary
) -> list[int]:
    """A caption whose middle is masked, with its picture where there is one."""
    mask = vocabulary.sentinel(0)
    after = [vocabulary.break_id, *picture] if picture is not None else []
    return [*begin_sample(documents, vocabulary), *left, mask, *right, *after, vocabulary.eos, mask]


def infill_picture_prompt(
    codes: list[int], start: int, end: int, caption: list[int] | None, documents, vocabulary: Vocabulary
) -> list[int]:
    """A picture whose codes start..end are masked, with its caption where there is one."""
    mask = vocabulary.sentinel(0)
    before = [*caption, vocabulary.break_id] if caption is not None else []
    masked = [*codes[:start], mask, *codes[end:]]
    return [*begin_sample(documents, vocabulary), *before, *masked, vocabulary.eos, mask]
