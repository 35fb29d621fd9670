"""Conversion: a training checkpoint becomes a folder that stock transformers classes load, and comes back from it.

families.py        which class each model family is, and what its weights are called there
export_folder.py   the folder: written whole or not at all, read strictly
tokenizer_json.py  the text model in Hugging Face's form, with the same ids
check.py           the logits of both, compared layer by layer
card.py            README.md of the folder
export.py          checkpoint -> folder
restore.py         folder -> checkpoint

No more than a few tensors are in memory at a time, whatever the size of the model.
"""

from megatron_cm3leon.export.check import LARGEST_RELATIVE_DIFFERENCE
from megatron_cm3leon.export.folder import DTYPES
from megatron_cm3leon.export.from_hf import import_export
from megatron_cm3leon.export.to_hf import export_checkpoint

__all__ = ["DTYPES", "LARGEST_RELATIVE_DIFFERENCE", "export_checkpoint", "import_export"]
