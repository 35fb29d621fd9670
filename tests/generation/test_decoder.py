"""Decoder: stock OPT's logits, and the same tokens with the cache, without it and in ragged batches."""

import json
import shutil

import pytest
import torch

from megatron_cm3leon.generation.decoder import Decoder

PROMPTS = [[27, 3, 1, 4], [27], [27, 5, 5, 2, 9, 0, 1], [27, 1]]


def decode_greedily(decoder, prompts, count):
    """Tokens with the cache, and the logits each was chosen by."""
    state, cache = decoder.start(prompts, count)
    tokens, seen = [], []
    for turn in range(count):
        seen.append(decoder.logits(state))
        tokens.append(seen[-1].argmax(-1))
        if turn + 1 < count:
            state = decoder.step(tokens[-1], cache)
    return torch.stack(tokens, 1).tolist(), torch.stack(seen, 1)


def continue_fully(logits_of, prompt, count):
    """Tokens by a whole forward pass for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_logits_are_stock_opt_s(decoder, stock, vocabulary):
    ids = torch.randint(vocabulary.size, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(ids).logits
    assert (decoder.all_logits(ids) - expected).abs().max() < 1e-5
    assert expected.std() > 0.5


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [PROMPTS[0], [27, 9, 9, 9]], PROMPTS])
def test_cache_equals_full_forward(decoder, prompts):
    tokens, logits = decode_greedily(decoder, prompts, 20)
    for prompt, row, seen in zip(prompts, tokens, logits, strict=True):
        assert row == continue_fully(decoder.all_logits, prompt, 20)
        whole = decoder.all_logits(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
        assert (seen - whole).abs().max() < 1e-5


def test_greedy_equals_transformers_generate(decoder, stock):
    tokens, _ = decode_greedily(decoder, PROMPTS, 16)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        made = stock.generate(
            torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert made[0, len(prompt) :].tolist() == row


def test_selected_sequences_go_on_apart(decoder):
    _, cache = decoder.start([PROMPTS[0], PROMPTS[1]], 4)
    chosen = cache.select(torch.tensor([1, 0, 1]))
    after = decoder.step(torch.tensor([3, 4, 5]), chosen)
    for row, (prompt, token) in enumerate([(PROMPTS[1], 3), (PROMPTS[0], 4), (PROMPTS[1], 5)]):
        expected = decoder.all_logits(torch.tensor([[*prompt, token]]))[0, -1]
        assert (decoder.logits(after[row]) - expected).abs().max() < 1e-5


def test_bf16_is_close(folder, decoder):
    half = Decoder.load(folder, dtype="bf16")
    ids = torch.tensor([PROMPTS[2]])
    assert (half.all_logits(ids) - decoder.all_logits(ids)).abs().max() < 0.1 * decoder.all_logits(ids).std()
    assert half.all_logits(ids).dtype == torch.float32


def test_the_last_position_is_usable_and_no_further(decoder):
    tokens, _ = decode_greedily(decoder, [[27] * 60], 5)
    assert tokens[0] == continue_fully(decoder.all_logits, [27] * 60, 5)
    with pytest.raises(ValueError, match=r"60 tokens with 6 to generate needs 65 positions.*context has 64"):
        decoder.start([[27] * 60], 6)


def test_what_is_no_export_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no exported model: it has no config.json; give a folder"):
        Decoder.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "enable_bias": True}))
    with pytest.raises(ValueError, match=r"enable_bias is True, not False"):
        Decoder.load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks 6 weights \(model.decoder.layers.3"):
        Decoder.load(copy)
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        Decoder.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        Decoder.load(copy)
    with pytest.raises(ValueError, match=r"dtype \('int8'\) must be one of: fp32"):
        Decoder.load(folder, dtype="int8")
