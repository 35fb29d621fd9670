"""README.md of an export: the model, its training, the check of its logits, and how to use it."""

from dataclasses import asdict

import yaml

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

_CARD = """\
# {title}

A CM3Leon model (arXiv 2309.02591; model.family {family}): one decoder-only transformer that reads and writes text and
images as tokens. Trained by megatron_cm3leon for {step:,} steps on {tokens:,} tokens; weights in {dtype}.

| | |
|---|---|
| class | `{stock}` |
| parameters | {parameters:,} |
| layers, width, heads | {layers}, {hidden_size}, {heads} ({kv_heads} of keys and values) |
| context | {context:,} tokens |
| vocabulary | {size:,} ids, hash {hash} |
| text pieces | 0 to {last_text} |
| image codes | {image_start} to {last_image}; an image is {image_height} x {image_width} of them, row by row |
| special tokens | `<pad>` {pad}, `</s>` {eos}, `<break>` {break_id}, `<eoss>` {eoss}, `<sentinel:0>` {sentinel} ... |

{check}

## Use

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

```
python tools/generate.py image --model . "a caption" --output images
python tools/generate.py caption --model . images/000.png
```

A sample is `</s> text <break> image </s>`, or the image first. {tokenizer} Only `tools/generate.py` keeps the
output well formed and decodes the images; `image/` is the image tokenizer, `text.model` the text model.
`tools/convert_checkpoint.py import` converts this folder to a checkpoint, from which training continues.

## Configuration of the run

```yaml
{configuration}```
"""


def write_card(config: Config, vocabulary: Vocabulary, state: TrainState, metadata: dict, tokenizer_fault: str) -> str:
    """Text of the card.

    `metadata` is the content of cm3leon.json; `tokenizer_fault` says why there is no tokenizer.json, or is empty.
    """
    model, parameters = config.model, metadata["parameters"]
    tokenizer = "`tokenizer.json` gives the ids of text."
    if tokenizer_fault:
        tokenizer = f"There is no tokenizer.json: {tokenizer_fault}."
    return _CARD.format(
        title=f"CM3Leon {config.preset or f'{parameters / 1e6:.0f}M'}",
        family=model.family,
        step=state.step,
        tokens=state.tokens,
        dtype=metadata["dtype"],
        stock=metadata["class"],
        parameters=parameters,
        layers=model.layers,
        hidden_size=model.hidden_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        context=config.data.seq_length,
        size=vocabulary.size,
        hash=vocabulary.hash,
        last_text=vocabulary.image_start - 1,
        image_start=vocabulary.image_start,
        last_image=vocabulary.image_end - 1,
        image_height=vocabulary.image_height,
        image_width=vocabulary.image_width,
        pad=vocabulary.pad,
        eos=vocabulary.eos,
        break_id=vocabulary.break_id,
        eoss=vocabulary.eoss,
        sentinel=vocabulary.sentinel(0),
        check=f"Checked against the trained model: {metadata['check']}.",
        tokenizer=tokenizer,
        configuration=yaml.safe_dump(asdict(config), sort_keys=False),
    )
