"""Tasks of tools/evaluate.py, a module each: `add_options(parser)` and `evaluate(...) -> Result`.

The names of the options are those of evaluate's keyword arguments. The tasks of SHARED also have the argument `ranks`
and share their items among the ranks of a launch (ranks.py). A module is imported when its task is chosen, so a
task whose libraries (the extra `evaluation`) are not installed does not prevent the others.
"""

import importlib
from types import ModuleType

TASKS: dict[str, str] = {
    "caption": "captions of images: CIDEr-D, BLEU, ROUGE-L, METEOR, SPICE",
    "clip": "CLIP score of images and their captions, and of the best of N by an independent encoder",
    "fd": "Fréchet distance and CMMD by a CLIP folder or EfficientNet-Lite0",
    "fid": "FID, KID, precision and recall by the Inception network",
    "geneval": "GenEval's folder of images, and its score by a checker of the corpus",
    "harness": "lm-evaluation-harness on local task files; a TSV for VLMEvalKit",
    "infill": "hidden words of captions and hidden boxes of images, filled",
    "loss": "nats per token, byte and pixel of held-out documents, with 0..n retrieved documents",
    "ocr": "text drawn in images, read back by an OCR model",
    "vqa": "answers to questions about images: VQA, VizWiz, OK-VQA, ScienceQA, VisDial",
}
"""Task -> what it measures, as `tools/evaluate.py --help` shows it."""
SHARED = ("caption", "clip", "geneval", "harness", "infill", "loss", "vqa")
"""Tasks that run on several ranks."""


def load_task(name: str) -> ModuleType:
    """The module of a task; ValueError if a library that it needs is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("megatron_cm3leon"):
            raise
        raise ValueError(
            f"the task {name} needs the package {error.name}, which is not installed; install it by "
            f'pip install -c constraints.txt -e ".[evaluation]".'
        ) from error
