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


def choose_form(form: str, forms: tuple[str, ...], image_first_probability: float, name: str) -> str:
    """Resolve "auto": what begins with a picture is native to a model that was trained on such pairs.

    Such a model has seen `</s> picture <break> caption` as often as the other order. <sentinel:0> for a *whole*
    caption it has met only where a span happened to cover one, or where rotation was on.
    """
    if form not in forms:
        raise ValueError(f"{name} ({form!r}) must be one of: {', '.join(forms)}.")
    if form != "auto":
        return form
    return forms[1] if image_first_probability > 0 else forms[2]


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
