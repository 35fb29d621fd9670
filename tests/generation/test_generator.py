"""Generator: well-formed output, guidance, one seed per sequence, infilling that keeps all other tokens."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.generation import batch
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.grammar import text_segment
from megatron_cm3leon.generation.ranking import Candidates
from megatron_cm3leon.generation.sampling import IMAGE_SAMPLING, Sampling

CAPTIONS = ["a red circle", "blue square on white", "a"]
DOCUMENTS = [[1, 3, 28, *range(10, 22)], [2, 4, 28, *range(14, 26)]]


def codes_of(generated):
    return [result.codes.tolist() for result in generated]


def test_an_image_has_the_codes_of_one_image(generator, vocabulary):
    generated = list(generator.images(CAPTIONS, Sampling(temperature=5.0), candidates=Candidates(2)))
    assert [(m.caption, m.seed) for m in generated] == [(c, s) for c in CAPTIONS for s in (0, 1)]
    for result in generated:
        assert result.codes.shape == (12,) and result.codes.min() >= 0 and result.codes.max() < 16
        assert result.image.size == (4, 4)


def test_a_greedy_image_has_the_most_likely_code_at_each_position(generator, decoder, vocabulary):
    """Compared with full forward passes and the guidance formula written out."""
    generated = next(generator.images(["a red circle"], Sampling(guidance=2.5, temperature=0), retrieved=[DOCUMENTS]))
    given = [27, *DOCUMENTS[0], 28, *DOCUMENTS[1], 28, 0, 1, 3, 28]
    without = [27, *DOCUMENTS[0], 28, *DOCUMENTS[1], 28]
    for code in generated.codes:
        conditional = decoder.all_logits(torch.tensor([given]))[0, -1, 10:26]
        unconditional = decoder.all_logits(torch.tensor([without]))[0, -1, 10:26]
        logits = unconditional + 2.5 * (conditional - unconditional)
        assert code == logits.argmax()
        given.append(10 + int(code))
        without.append(10 + int(code))


def test_the_same_seed_gives_the_same_image_in_any_batch(generator, monkeypatch):
    sampling = Sampling(temperature=1.3, top_p=0.95, guidance=2.0, seed=5)
    single = [codes_of(generator.images([caption], sampling))[0] for caption in CAPTIONS]
    assert codes_of(generator.images(CAPTIONS, sampling)) == single
    assert codes_of(generator.images(CAPTIONS[::-1], sampling)) == single[::-1]
    earlier = replace(sampling, seed=3)
    candidates = codes_of(generator.images(["a red circle"], earlier, candidates=Candidates(4)))
    assert candidates[2] == single[0]
    assert len({tuple(row) for row in candidates}) == 4
    monkeypatch.setattr(batch, "LARGEST_BATCH", 2)  # one image per batch
    assert codes_of(generator.images(CAPTIONS, sampling)) == single


def test_guidance_of_1_is_no_guidance(generator, monkeypatch):
    plain = codes_of(generator.images(CAPTIONS, Sampling(seed=2)))
    near = codes_of(generator.images(CAPTIONS, Sampling(guidance=1.0 + 1e-7, seed=2)))  # with both prompts
    assert plain == near
    strong = Sampling(guidance=6.0, seed=2)
    assert plain != codes_of(generator.images(CAPTIONS, strong))
    other = codes_of(generator.images(CAPTIONS, strong, unconditional="dropped"))
    assert other != codes_of(generator.images(CAPTIONS, strong))


def test_guidance_of_0_ignores_the_caption(generator):
    generated = codes_of(generator.images(CAPTIONS, Sampling(guidance=0.0, temperature=0)))
    assert generated[0] == generated[1] == generated[2]


def test_greedy_contrast_takes_the_largest_ratio_at_each_position(generator, decoder):
    """Compared with full forward passes and the formula of CD-K written out."""
    generated = next(generator.images(["a red circle"], Sampling(contrast_k=3, contrast_alpha=0.5, temperature=0)))
    given, without = [27, 0, 1, 3, 28], [27, 30, 28]
    for code in generated.codes:
        expert, amateur = (
            decoder.all_logits(torch.tensor([ids]))[0, -1, 10:26].softmax(-1) for ids in (given, without)
        )
        allowed = expert >= 0.5 * expert.sort(descending=True).values[2]
        assert code == torch.where(allowed, expert / amateur, 0.0).argmax()
        given.append(10 + int(code))
        without.append(10 + int(code))


def test_candidates_are_ranked(generator):
    """By an encoder that gives dark images a high score."""

    class Dark:
        def encode_images(self, images):
            return np.array([[255.0 - np.asarray(image).mean()] for image in images])

        def encode_texts(self, texts):
            return np.ones((len(texts), 1))

    sampling = replace(IMAGE_SAMPLING, temperature=3.0)
    unranked = list(generator.images(CAPTIONS, sampling, candidates=Candidates(5)))
    ranked_images = list(generator.images(CAPTIONS, sampling, candidates=Candidates(5, Dark(), keep=2)))
    assert [one.caption for one in ranked_images] == [caption for caption in CAPTIONS for _ in range(2)]
    for number in range(len(CAPTIONS)):
        ranked = sorted(unranked[number * 5 : number * 5 + 5], key=lambda one: np.asarray(one.image).mean())
        assert [one.seed for one in ranked_images[number * 2 : number * 2 + 2]] == [one.seed for one in ranked[:2]]
        assert ranked_images[number * 2].score >= ranked_images[number * 2 + 1].score


def test_images_are_returned_batch_by_batch(generator, monkeypatch):
    monkeypatch.setattr(batch, "LARGEST_BATCH", 2)  # both prompts of one image
    drawn = []
    generated = generator.images(CAPTIONS, advance=drawn.append)
    next(generated)
    assert sum(drawn) == 12
    assert len(list(generated)) == 2 and sum(drawn) == 36


def test_answers_fill_the_template(generator, decoder, monkeypatch):
    monkeypatch.setattr(
        generator.codec.text, "words", ["Question:", "Answer:", ".", *generator.codec.text.words[3:9], "x."]
    )
    image = np.arange(12) % 16
    generated = generator.answers([image, image], ["x on", "white"], longest=4)
    ids = [27, 0, 5, 6, 1, 30, 2, 28, *(10 + image), 27, 30]
    assert generated[0].split()[:1] == (
        [generator.codec.text.words[token]] if (token := first_text_or_end(decoder, ids, 29)) < 10 else []
    )
    assert generated == generator.answers([image, image], ["x on", "white"], longest=4)
    with pytest.raises(ValueError, match="1 questions for 2 images"):
        generator.answers([image, image], ["x"])


def first_text_or_end(decoder, ids, end):
    allowed = [*range(10), end]
    return allowed[int(decoder.all_logits(torch.tensor([ids]))[0, -1, allowed].argmax())]


@pytest.mark.parametrize("form", ["image_first", "masked"])
def test_captions_contain_only_text(generator, form):
    images = [np.arange(12) % 16, np.full(12, 3), np.arange(12)[::-1].copy()]
    texts = generator.captions(images, Sampling(temperature=3.0), form=form, longest=9)
    assert all(len(text.split()) <= 9 for text in texts)
    assert len(set(texts)) == 3
    assert generator.captions([images[1]], Sampling(temperature=3.0), form=form, longest=9) == [texts[1]]


def test_text_ends_with_a_token_of_the_grammar(decoder, vocabulary):
    segment = text_segment(vocabulary, 20)
    given = [[27, number % 10, 28] for number in range(60)]
    ids = decode_segments(decoder, given, segment, Sampling(temperature=4.0), list(range(60)))
    ended = 0
    for row in ids:
        generated = row[row >= 0].tolist()
        assert generated and all(token < 10 for token in generated[:-1])
        assert generated[-1] in (vocabulary.eos, vocabulary.break_id)
        ended += len(generated) < 21
    assert ended > 30
    infilled = decode_segments(
        decoder, given, text_segment(vocabulary, 5, infill=True), Sampling(temperature=4.0), [0] * 60
    )
    assert set(infilled[infilled >= 10].tolist()) == {vocabulary.eoss}


def test_a_greedy_caption_is_the_most_likely_text(generator, decoder, vocabulary):
    image = np.arange(12) % 16
    text = generator.captions([image], form="image_first", longest=8)[0]
    ids, generated = [27, *(10 + image), 28], []
    while len(generated) < 8:
        logits = decoder.all_logits(torch.tensor([ids]))[0, -1]
        allowed = [*range(10), 27, 28]
        token = allowed[int(logits[allowed].argmax())]
        if token >= 10:
            break
        ids.append(token)
        generated.append(token)
    assert text == generator.codec.text.decode(generated)


@pytest.mark.parametrize("form", ["masked", "raster"])
def test_an_infilled_image_keeps_all_codes_outside_the_box(generator, form):
    before = np.arange(12) % 16
    for box, positions in [((1, 1, 3, 3), [5, 6, 9, 10]), ((0, 0, 1, 4), [0, 1, 2, 3]), ((2, 3, 3, 4), [11])]:
        changed = set()
        for seed in range(6):
            generated = generator.infill_images(
                [before, before[::-1].copy()],
                box,
                Sampling(guidance=2.0, temperature=3.0, seed=seed),
                captions=["a red circle", "a"],
                form=form,
            )
            changed |= set(np.flatnonzero(generated[0].codes != before).tolist())
            assert set(np.flatnonzero(generated[1].codes != before[::-1]).tolist()) <= set(positions)
        assert changed and changed <= set(positions)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_box_in_raster_order_has_the_most_likely_codes_after_those_before_it(generator, decoder, guidance):
    """Compared with full forward passes and the guidance formula written out; codes after the box have no effect."""
    box, inside, caption = (1, 1, 3, 3), [5, 6, 9, 10], "a red circle"
    rows = [np.arange(12) % 16, (np.arange(12) * 5 + 3) % 16]
    rows.append(np.where(np.arange(12) == 11, 0, rows[0]))
    sampling = Sampling(temperature=0, guidance=guidance)
    found = codes_of(generator.infill_images(rows, box, sampling, captions=[caption] * 3, form="raster"))
    assert found[2][:11] == found[0][:11] and found[2][11] == 0
    for codes, made in zip(rows, found, strict=True):
        given, without = [27, 0, 1, 3, 28], [27, 30, 28]
        for place, code in enumerate(codes.tolist()):
            if place in inside:
                conditional = decoder.all_logits(torch.tensor([given]))[0, -1, 10:26]
                unconditional = decoder.all_logits(torch.tensor([without]))[0, -1, 10:26]
                code = int((unconditional + guidance * (conditional - unconditional)).argmax())
            assert made[place] == code
            given.append(10 + code)
            without.append(10 + code)


def test_a_box_in_raster_order_needs_no_caption(generator):
    codes = np.arange(12) % 16
    sampling = Sampling(temperature=0)
    plain, described = (
        codes_of(generator.infill_images([codes], (0, 0, 2, 4), sampling, captions=captions, form="raster"))[0]
        for captions in (None, ["a red circle"])
    )
    unguided = Sampling(temperature=0, guidance=0.0)  # of the caption, nothing is left
    same = generator.infill_images([codes], (0, 0, 2, 4), unguided, captions=["a red circle"], form="raster")
    assert plain == codes_of(same)[0] != described
    assert codes_of(generator.infill_images([codes], (0, 0, 2, 4), sampling)) == [plain], "auto"


def test_infilled_text_keeps_the_text_before_and_after(generator):
    texts = [("a red ", " on white"), ("", " circle"), ("a ", "")]
    generated = generator.infill_text(texts, Sampling(temperature=2.0), longest=4)
    for (before, after), text in zip(texts, generated, strict=True):
        assert text.startswith(before.strip()) and text.endswith(after.strip())
        assert len(text.split()) <= len(before.split()) + 4 + len(after.split())
    with_image = generator.infill_text(texts[:1], Sampling(temperature=2.0), images=[np.zeros(12, int)])
    assert with_image[0].startswith("a red")


def test_images_are_encoded_by_the_image_tokenizer(generator):
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    image = Image.fromarray(levels).convert("RGB")
    assert generator.codec.encode_images([image]).tolist() == [list(range(12))]
    assert np.asarray(generator.codec.decode_images([list(range(12))])[0])[:3, :, 0].tolist() == levels[:3].tolist()
    assert generator.captions([image]) == generator.captions([np.arange(12)])


def test_invalid_inputs_are_refused(generator, decoder):
    cases = [
        (lambda: generator.images("a"), r"captions \('a'\) must be a list"),
        (lambda: generator.complete(["a"]), r"a document \('a'\) must be a list of texts and images"),
        (
            lambda: list(generator.images(["a"], retrieved=[[[999]]])),
            r"a prompt has the id 999; the model's 36 begin with 0",
        ),
        (lambda: generator.images(["a"], candidates=Candidates(0)), r"candidates \(0\) must be at least 1"),
        (lambda: generator.images(["a"], unconditional="none"), r"unconditional \('none'\) must be one of"),
        (lambda: generator.images(["a"], retrieved=[[], []]), r"retrieved has documents for 2 of 1 captions"),
        (
            lambda: generator.images(["a " * 60]),
            r"62 tokens with 12 to generate needs 73 positions; the model's context has 64. Shorten the text",
        ),
        (lambda: generator.images(["a"], retrieved=[DOCUMENTS * 2]), r"a prompt of 67 tokens"),
        (lambda: generator.captions([np.zeros(11, int)]), r"12 image codes below 16; its codes have shape \(11,\)"),
        (lambda: generator.captions([np.full(12, 16)]), r"12 image codes below 16"),
        (lambda: generator.captions([np.zeros(12, int)], longest=0), r"longest \(0\)"),
        (lambda: generator.infill_images([np.zeros(12, int)], (0, 0, 4, 1)), r"bottom 4.*3 rows and 4 columns"),
        (lambda: generator.infill_images([np.zeros(12, int)], (1, 2, 1, 3)), r"contain at least one"),
        (lambda: generator.infill_images([np.zeros(12, int)], (0, 0, 1, 1), captions=[]), r"0 captions for 1 images"),
        (
            lambda: generator.infill_images([np.zeros(12, int)], (0, 0, 1, 1), Sampling(guidance=3.0)),
            r"guidance \(3.0\) requires captions; give them, or no guidance",
        ),
        (lambda: generator.images(["a", ""]), r"caption 1 is empty: guidance and contrast_k need a condition"),
        (lambda: generator.images(["a"], candidates=Candidates(2, keep=1)), r"keep \(1\) requires an encoder"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    vocabulary = SimpleNamespace(size=35)
    tokenizers = SimpleNamespace(text=None, image=None, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"36 vocabulary rows, its tokenizers 35 ids"):
        Generator(decoder, tokenizers)


def test_empty_inputs_give_empty_results(generator):
    assert list(generator.images([])) == []
    assert generator.captions([]) == []
