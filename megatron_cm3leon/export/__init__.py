"""Conversion: a training checkpoint becomes a folder that stock transformers classes load, and back.

layouts.py         each model family's stock class, its config.json and the names of its weights
parts.py           one weight of a checkpoint <-> its stock weights
to_hf.py           checkpoint -> folder
from_hf.py         folder -> run folder with a checkpoint
reader.py          folder -> shape and weights, for generation
folder.py          the folder: written tensor by tensor, read strictly
tokenizer_json.py  the text model in Hugging Face's form, with the same ids
check.py           the logits of both sides, compared layer by layer
card.py            README.md of the folder

A few tensors are in memory at a time, whatever the size of the model.
"""

from megatron_cm3leon.export.check import LARGEST_RELATIVE_DIFFERENCE
from megatron_cm3leon.export.from_hf import import_export
from megatron_cm3leon.export.layouts import DTYPES
from megatron_cm3leon.export.to_hf import export_checkpoint

__all__ = ["DTYPES", "LARGEST_RELATIVE_DIFFERENCE", "export_checkpoint", "import_export"]
