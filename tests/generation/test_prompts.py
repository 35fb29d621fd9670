"""Prompts: the exact ids of each form."""

import pytest

from megatron_cm3leon.generation import prompts

PAD, EOS, BREAK, EOSS, MASK = 26, 27, 28, 29, 30
DOCUMENT = [1, 3, BREAK, 10, 11, 12]


def test_each_form_has_these_ids(vocabulary):
    v = vocabulary
    assert (v.pad, v.eos, v.break_id, v.eoss, v.sentinel(0)) == (PAD, EOS, BREAK, EOSS, MASK)
    assert prompts.image_prompt([1, 2], [], v) == [EOS, 1, 2, BREAK]
    assert prompts.image_prompt([1, 2], [DOCUMENT, [4]], v) == [EOS, *DOCUMENT, BREAK, 4, BREAK, 1, 2, BREAK]
    assert prompts.unconditional_prompt([], "dropped", v) == [EOS]
    assert prompts.unconditional_prompt([], "sentinel", v) == [EOS, MASK, BREAK]
    assert prompts.unconditional_prompt([DOCUMENT], "dropped", v) == [EOS, *DOCUMENT, BREAK]
    assert prompts.caption_prompt([10, 11], [], "image_first", v) == [EOS, 10, 11, BREAK]
    assert prompts.caption_prompt([10, 11], [], "masked", v) == [EOS, MASK, BREAK, 10, 11, EOS, MASK]
    assert prompts.infill_text_prompt([1], [3], [10], [], v) == [EOS, 1, MASK, 3, BREAK, 10, EOS, MASK]
    assert prompts.infill_text_prompt([1], [], None, [], v) == [EOS, 1, MASK, EOS, MASK]
    codes = [10, 11, 12, 13]
    assert prompts.infill_image_prompt(codes, 1, 3, [2], [], v) == [EOS, 2, BREAK, 10, MASK, 13, EOS, MASK]
    assert prompts.infill_image_prompt(codes, 0, 4, None, [], v) == [EOS, MASK, EOS, MASK]
    assert prompts.continue_image_prompt(codes, 2, [2], [[4]], "", v) == [EOS, 4, BREAK, 2, BREAK, 10, 11]
    assert prompts.continue_image_prompt(codes, 1, None, [], "sentinel", v) == [EOS, MASK, BREAK, 10]
    assert prompts.continue_image_prompt(codes, 0, None, [[4]], "dropped", v) == [EOS, 4, BREAK]


def test_a_masked_sequence_of_the_stream_begins_with_the_infilling_prompt(vocabulary):
    """The same form as in training: the masked source, then the span after its sentinel."""
    np = pytest.importorskip("numpy")
    cm3 = pytest.importorskip("megatron_cm3leon.data.stream.cm3")
    source = np.array([EOS, 1, 2, 3, BREAK, 10, 11, 12, EOS])
    tokens, weights = np.full(14, PAD), np.zeros(14, np.float32)
    cm3.apply_spans(source, np.ones(9, np.float32), [(2, 3)], vocabulary, tokens, weights)
    prompt = prompts.infill_text_prompt([1], [3], [10, 11, 12], [], vocabulary)
    assert tokens.tolist()[: len(prompt) + 2] == [*prompt, 2, EOSS]


def test_auto_depends_on_the_training_settings():
    caption, unconditional = prompts.choose_caption_form, prompts.choose_unconditional_form
    assert caption("auto", {"image_first_probability": 0.5}) == caption("auto", {}) == "image_first"
    assert caption("auto", {"image_first_probability": 0.0}) == "masked"
    assert unconditional("auto", [], {}) == "sentinel" and unconditional("auto", [DOCUMENT], {}) == "dropped"
    assert unconditional("auto", [DOCUMENT], {"image_first_probability": 0.0}) == "sentinel"
    assert unconditional("auto", [], {"cm3_probability": 0.0}) == "dropped"
    assert unconditional("dropped", [], {}) == "dropped"
    box = prompts.choose_box_form
    assert box("auto", {}) == box("auto", {"cm3_probability": 0.3, "cm3_infill_probability": 0.5}) == "raster"
    assert box("auto", {"cm3_probability": 0.5, "cm3_infill_probability": 0.4}) == "masked"
    assert box("raster", {"cm3_infill_probability": 1.0}) == "raster" and box("masked", {}) == "masked"
    with pytest.raises(ValueError, match=r"form \('reverse'\) must be one of: auto, masked, raster"):
        box("reverse", {})
    with pytest.raises(ValueError, match=r"form \('reverse'\) must be one of: auto, image_first, masked"):
        caption("reverse", {})
