"""A tiny random model in the form of an exported folder, and tokenizers simple enough to compute by hand."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM


def save_random_opt(folder, vocabulary, *, hidden_size=32, layers=2, heads=2, positions=64, init_std=0.3):
    """Save OPT with random weights of seed 0, with the settings that an export has and the decoder requires."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary.size,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=2 * hidden_size,
        max_position_embeddings=positions,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        do_layer_norm_before=True,
        dropout=0.0,
        init_std=init_std,
        bos_token_id=vocabulary.eos,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
    )
    OPTForCausalLM(config).save_pretrained(folder)


def save_random_llama(folder, vocabulary, *, qk_norm=False, **save_options):
    """The same for family llama: two key heads for four query heads, untied embeddings, norm weights other than 1."""
    torch.manual_seed(0)
    shared = {
        "vocab_size": vocabulary.size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": vocabulary.eos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**shared)) if qk_norm else LlamaForCausalLM(LlamaConfig(**shared))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder, **save_options)


class WordTokenizer:
    """One id per word: its position in `words`."""

    def __init__(self, words):
        self.words = words

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[number] for number in ids)


class LevelTokenizer:
    """One code per pixel of a gray image: its level. `decode` repeats the first rows to fill a square."""

    def __init__(self, vocabulary):
        self.grid = vocabulary.image_height, vocabulary.image_width
        self.image_size, self.codebook_size = vocabulary.image_width, vocabulary.image_size

    def encode(self, pixels):
        levels = (pixels[:, 0, : self.grid[0]] + 1) / 2 * (self.codebook_size - 1)
        return levels.round().long().flatten(1)

    def decode(self, codes):
        levels = codes.reshape(-1, 1, *self.grid).float() / (self.codebook_size - 1) * 2 - 1
        repeated = levels[:, :, : self.image_size - self.grid[0]]
        return torch.cat([levels, repeated], dim=2).expand(-1, 3, -1, -1)


def make_tokenizers(words, vocabulary):
    """An object like a loaded tokenizer folder, with the two tokenizers above."""
    return SimpleNamespace(text=WordTokenizer(words), image=LevelTokenizer(vocabulary), vocabulary=vocabulary)
