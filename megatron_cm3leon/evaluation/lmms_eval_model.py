"""An exported model for lmms-eval, found by its entry point group `lmms_eval.models` (see setup.py).

    python -m lmms_eval --model cm3leon --model_args pretrained=exported/ --tasks TASK

Each request has one image and a text; the answer is the masked part of CM3Leon's template (table 5): `Question: {text}
Answer: {answer}. <break> image`. lmms-eval is installed separately: pip install lmms-eval.
"""

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.prompts import infill_text_prompt
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.scoring import score_tokens

LONGEST = 16
"""Text pieces of an answer where a task does not say how many."""
REQUESTS_AT_ONCE = 64
"""Requests whose images are in memory at a time."""


def build_manifest() -> ModelManifest:
    """What lmms-eval's registry reads from the entry point."""
    return ModelManifest("cm3leon", simple_class_path=f"{__name__}.LmmsModel")


class LmmsModel(lmms):
    """A `Generator` as a model of lmms-eval."""

    is_simple = True

    def __init__(
        self, pretrained: str, dtype: str = "fp32", device: str = "auto", batch_size: int = 1, **_: Any
    ) -> None:
        """`pretrained`: folder that tools/convert_checkpoint.py export wrote. Batches are formed by the generator, so
        `batch_size` and further arguments of lmms-eval's command line have no effect."""
        super().__init__()
        self.generator = Generator.load(pretrained, dtype, device)

    def generate_until(self, requests: list) -> list[str]:
        """The answer to each request, up to its first stop string; greedy unless the task sets a temperature."""
        answers: list[str] = []
        for first in range(0, len(requests), REQUESTS_AT_ONCE):
            part = [request.args for request in requests[first : first + REQUESTS_AT_ONCE]]
            groups: dict[tuple, list[int]] = {}
            for number, (_, settings, *_rest) in enumerate(part):
                key = settings.get("max_new_tokens", LONGEST), settings.get("temperature") or 0.0
                groups.setdefault(key, []).append(number)
            texts = [""] * len(part)
            for (longest, temperature), numbers in groups.items():
                made = self.generator.answers(
                    [self._load_image(*part[number][2:]) for number in numbers],
                    [part[number][0] for number in numbers],
                    Sampling(temperature=temperature),
                    longest=longest,
                )
                for number, text in zip(numbers, made, strict=True):
                    texts[number] = _cut(text.strip(), part[number][1].get("until") or [])
            answers += texts
        return answers

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """(summed log-probability of the target as the answer, whether it is the greedy one) of each request."""
        scores: list[tuple[float, bool]] = []
        for first in range(0, len(requests), REQUESTS_AT_ONCE):
            part = [request.args for request in requests[first : first + REQUESTS_AT_ONCE]]
            images = self.generator.codec.encode_image_ids([self._load_image(*arguments[2:]) for arguments in part])
            prompts, answers = [], []
            for (context, target, *where), image in zip(part, images, strict=True):
                answer = target if isinstance(target, str) else target(self._load_document(*where[1:]))
                prompts.append(self._build_prompt(context, image))
                answers.append(self._encode_answer(answer))
            scored = score_tokens(self.generator.decoder, prompts, answers)
            scores += [(row.total, row.is_greedy) for row in scored]
        return scores

    def generate_until_multi_round(self, requests: list) -> list[str]:
        """ValueError: the model was trained on one question per image."""
        raise ValueError("the tasks of several rounds are not supported: cm3leon answers one question about one image.")

    def _build_prompt(self, question: str, image: list[int]) -> list[int]:
        """Ids up to the answer, as Generator.answers has them."""
        codec = self.generator.codec
        left = codec.text.encode(f"Question: {question.strip()} Answer:")
        return infill_text_prompt(left, codec.encode_continuation("."), image, [], self.generator.vocabulary)

    def _encode_answer(self, answer: str) -> list[int]:
        return [*self.generator.codec.encode_continuation(f" {answer.strip()}"), self.generator.vocabulary.eoss]

    def _load_document(self, number: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][number]

    def _load_image(self, doc_to_visual: Any, number: int, task: str, split: str) -> Image.Image:
        """The image of a request; ValueError unless there is exactly one."""
        images = doc_to_visual(self._load_document(number, task, split))
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            raise ValueError(
                f"document {number} of {task} has {len(images)} images or videos; cm3leon answers about one image."
            )
        return images[0].convert("RGB")


def _cut(text: str, until: str | list[str]) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text
