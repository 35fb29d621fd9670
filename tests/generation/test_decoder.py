"""Decoder: the logits of the stock class; the same tokens with the cache, without it and in ragged batches."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_cm3leon.generation.decoder import Decoder
from tests.models import save_random_llama, save_random_opt

PROMPTS = [[27, 3, 1, 4], [27], [27, 5, 5, 2, 9, 0, 1], [27, 1]]


@pytest.fixture(scope="module", params=["opt", "llama", "qwen3"])
def folder(request, tmp_path_factory, vocabulary):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "opt":
        save_random_opt(path, vocabulary, layers=3, heads=4)
    else:
        save_random_llama(path, vocabulary, qk_norm=request.param == "qwen3")
    return path


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def decoder(folder):
    return Decoder.load(folder)


def decode_greedily(decoder, prompts, count):
    """Tokens with the cache, and the logits that each was chosen from."""
    state, cache = decoder.start(prompts, count)
    tokens, logits = [], []
    for step in range(count):
        logits.append(decoder.logits(state))
        tokens.append(logits[-1].argmax(-1))
        if step + 1 < count:
            state = decoder.step(tokens[-1], cache)
    return torch.stack(tokens, 1).tolist(), torch.stack(logits, 1)


def decode_without_cache(compute_logits, prompt, count):
    """Tokens without a cache: a forward pass over all ids for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(compute_logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_logits_are_those_of_the_stock_class(decoder, stock, vocabulary):
    ids = torch.randint(vocabulary.size, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(ids).logits
    assert (decoder.all_logits(ids) - expected).abs().max() < 1e-5
    assert expected.std() > 0.5


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [PROMPTS[0], [27, 9, 9, 9]], PROMPTS])
def test_the_cache_gives_the_tokens_of_a_full_forward_pass(decoder, prompts):
    tokens, logits = decode_greedily(decoder, prompts, 20)
    for prompt, row, step_logits in zip(prompts, tokens, logits, strict=True):
        assert row == decode_without_cache(decoder.all_logits, prompt, 20)
        expected_row = decoder.all_logits(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
        assert (step_logits - expected_row).abs().max() < 1e-5 * max(1, expected_row.abs().max())


def test_greedy_equals_transformers_generate(decoder, stock):
    tokens, _ = decode_greedily(decoder, PROMPTS, 16)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        generated = stock.generate(
            torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert generated[0, len(prompt) :].tolist() == row


def test_equal_prompts_continue_independently(decoder):
    _, cache = decoder.start([PROMPTS[1], PROMPTS[0], PROMPTS[1]], 4)
    after = decoder.step(torch.tensor([3, 4, 5]), cache)
    for row, (prompt, token) in enumerate([(PROMPTS[1], 3), (PROMPTS[0], 4), (PROMPTS[1], 5)]):
        expected = decoder.all_logits(torch.tensor([[*prompt, token]]))[0, -1]
        assert (decoder.logits(after[row]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("kind", "share"), [("bf16", 0.15), ("fp16", 0.15), ("int8", 0.15), ("fp8", 0.45)])
def test_smaller_dtypes_are_close(folder, decoder, kind, share):
    small = Decoder.load(folder, dtype=kind)
    ids = torch.tensor([PROMPTS[2]])
    expected = decoder.all_logits(ids)
    assert 0 < (small.all_logits(ids) - expected).abs().max() < share * expected.std()
    assert small.all_logits(ids).dtype == torch.float32
    tokens, logits = decode_greedily(small, PROMPTS, 8)
    for prompt, row, step_logits in zip(PROMPTS, tokens, logits, strict=True):
        expected_row = small.all_logits(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
        assert (step_logits - expected_row).abs().max() < 0.15 * expected.std()


def test_int8_rows_do_not_depend_on_the_batch(folder):
    small = Decoder.load(folder, dtype="int8")
    together, _ = decode_greedily(small, PROMPTS, 12)
    assert together == [decode_greedily(small, [prompt], 12)[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize("flat", [True, False])
def test_a_step_of_fixed_shapes_gives_the_same_tokens(decoder, flat):
    """As a GPU replays it: attention over the full cache with a mask, in memory that an earlier batch has used."""
    expected, _ = decode_greedily(decoder, PROMPTS, 6)
    with torch.inference_mode():
        cache = decoder.build_cache(len(PROMPTS), 20, flat)
        decoder.start([[27] * 9] * 4, 10, cache)
        state, _ = decoder.start(PROMPTS, 6, cache)
        tokens = [decoder.logits(state).argmax(-1)]
        for _ in range(5):
            state = decoder.advance(tokens[-1], cache, cache.size, True)
            tokens.append(decoder.logits(state).argmax(-1))
    assert torch.stack(tokens, 1).tolist() == expected


def test_a_cleared_cache_contains_no_nan(decoder):
    cache = decoder.build_cache(1, 20)
    cache.values[0].fill_(float("nan"))
    cache.clear()
    decoder.start([[27, 3]], 4, cache)
    assert decoder.advance(torch.tensor([3]), cache, cache.size, True).isfinite().all()


def test_attention_on_a_gpu_does_not_use_cudnn():
    """cuDNN plans its kernels for each shape, and almost every prompt has another shape."""
    from megatron_cm3leon.generation.decoder import attention_kernels

    with attention_kernels(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_logits_of_selected_ids_use_a_part_of_the_head(decoder, vocabulary):
    state, _ = decoder.start([PROMPTS[0]], 1)
    allowed = torch.tensor([1, 5, 28])
    selected = decoder.logits(state, decoder.head(allowed))
    assert torch.allclose(selected, decoder.logits(state)[:, allowed], atol=1e-5)
    assert decoder.head(allowed) is decoder.head(allowed.clone())


def test_shards_are_read_by_their_index(folder, decoder, stock, tmp_path):
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(Decoder.load(tmp_path).all_logits(ids), decoder.all_logits(ids))
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-.*safetensors; export the checkpoint again"):
        Decoder.load(tmp_path)


def test_the_last_position_is_usable_and_the_next_is_refused(decoder):
    tokens, _ = decode_greedily(decoder, [[27] * 60], 5)
    assert tokens[0] == decode_without_cache(decoder.all_logits, [27] * 60, 5)
    with pytest.raises(ValueError, match=r"60 tokens with 6 to generate needs 65 positions.*context has 64"):
        decoder.start([[27] * 60], 6)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, name: w.pop(name), r"lacks 1 weights \({name}\); export the checkpoint again"),
        (lambda w, name: w.update(extra=torch.ones(1)), r"has unknown 1 weights \(extra\)"),
        (lambda w, name: w[name].view(-1)[3].fill_(float("nan")), r"{name} has NaN or infinite values as float32"),
        (lambda w, name: w.update({name: w[name].int()}), r"{name} has type I32, not F32, BF16, F16"),
        (lambda w, name: w.update({name: w[name][:-1].clone()}), r"{name} has shape \[31, .*config.json requires \[32"),
    ],
)
def test_weights_are_checked(copy, change, message):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in sorted(weights) if "layers.1.self_attn.q_proj" in name)
    change(weights, name)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message.replace("{name}", name)):
        Decoder.load(copy)


def test_a_folder_that_is_not_an_export_is_refused(folder, copy, tmp_path):
    with pytest.raises(ValueError, match=r"not an exported model: it has no config.json; give a folder"):
        Decoder.load(tmp_path)
    config = json.loads((copy / "config.json").read_text())
    for change, message in [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2', not one of opt, llama, qwen3"),
        ({"num_hidden_layers": 4}, r"lacks (6|9|11) weights \(model.*layers.3.* ...\)"),
        ({"enable_bias": True, "attention_bias": True}, r"(enable|attention)_bias is True, not False"),
        ({"num_attention_heads": "four"}, r"config.json lacks a field or has a wrong one"),
    ]:
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            Decoder.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not valid JSON"):
        Decoder.load(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        Decoder.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        Decoder.load(copy)
    with pytest.raises(ValueError, match=r"dtype \('int3'\) must be one of: fp32, bf16, fp16, int8, fp8, int4"):
        Decoder.load(folder, dtype="int3")
    with pytest.raises(ValueError, match=r"dtype \(int4\) on cuda: int4 is computed on a CPU only; use int8 or fp8"):
        Decoder.load(folder, "int4", "cuda")
