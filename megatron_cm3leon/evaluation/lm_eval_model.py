"""An exported model as lm-evaluation-harness sees it: log-likelihoods of texts, and texts that continue a prompt.

Tokenization, truncation, windows and stop strings are those of the harness's own `--model hf`, so that an export gives
the same results through both. Log-probabilities are over the whole joint vocabulary, as a stock class computes them.
Generated text consists of text pieces alone and ends at </s> or <break>: an image code cannot be drawn.

To lm_eval there is one rank: each rank of a launch (ranks.py) runs the whole task, and `HarnessModel` shares the
requests among them and returns all answers on every rank.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import FinishedItems
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.grammar import text_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.scoring import score_tokens

Row = tuple[list[int], list[int]]
"""Ids of a context, at least one, and of the continuation that is scored."""
REQUESTS_AT_ONCE = 256
"""Requests of a batch, which one rank answers; finished items are written after each."""
SAMPLING_KEYS = ("do_sample", "temperature", "top_p", "top_k")
"""Generation settings of a task that change what is generated; others than these and the lengths are refused."""


class HarnessModel(TemplateLM):
    """A `Generator` as a model of lm_eval."""

    backend = "causal"

    def __init__(
        self, generator: Generator, finished: FinishedItems, ranks: Ranks | None = None, *, bos: bool = False
    ) -> None:
        """`finished`, of `ranks.open_items`, holds answers, to continue an interrupted task. `bos`: begin every context
        with </s>, as each sample of the training; without it, as with `--model hf` on the same export, only an empty
        context is </s>."""
        super().__init__()
        self.generator, self.finished, self.ranks, self.bos = generator, finished, ranks or Ranks(), bos
        self.truncated = 0
        """Requests whose context was longer than the model's, and lost its beginning."""

    @property
    def prefix_token_id(self) -> int:
        return self.generator.vocabulary.eos

    @property
    def eot_token_id(self) -> int:
        return self.generator.vocabulary.eos

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.generator.decoder.context

    @property
    def max_gen_toks(self) -> int:
        """Generated tokens where a task does not say how many; the harness's default."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes cached requests of the harness."""
        return f"cm3leon-{self.generator.vocabulary.text_sha256}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with </s> in front unless `add_special_tokens` or `bos` is false."""
        ids = self.generator.codec.text.encode(string)
        with_bos = self.bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if with_bos else ids

    def tok_decode(self, ids: Sequence[int]) -> str:
        return self.generator.codec.text.decode(ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(summed log-probability of the continuation, whether greedy decoding gives it) of each request."""

        def answer(part: list[tuple]) -> list[dict]:
            rows = [self._encode_request(*arguments) for arguments in part]
            return [
                {"answer": [value, greedy], "truncated": self._count_excess(row) > 0}
                for row, (value, greedy) in zip(rows, self._score(rows), strict=True)
            ]

        found = self._answer("loglikelihood", requests, answer)
        return [(value, greedy) for value, greedy in found]

    def _encode_request(self, context: str, continuation: str) -> Row:
        # As TemplateLM.loglikelihood, whose rows cannot be saved one by one.
        if context == "":
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        return self._encode_pair(context, continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Summed log-probability of each text, in windows of the model's length."""

        def answer(part: list[tuple]) -> list[dict]:
            rows: list[Row] = []
            owners: list[int] = []
            for number, (text,) in enumerate(part):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                found = [utils.make_disjoint_window(window) for window in windows]
                rows += found
                owners += [number] * len(found)
            sums = [0.0] * len(part)
            for owner, (value, _) in zip(owners, self._score(rows), strict=True):
                sums[owner] += value
            return [{"answer": value, "truncated": False} for value in sums]

        return self._answer("loglikelihood_rolling", requests, answer)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        rows = [(context, continuation) for _, context, continuation in requests]
        self.truncated += sum(self._count_excess(row) > 0 for row in rows)
        return self._score(rows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of its stop strings."""

        def answer(part: list[tuple]) -> list[dict]:
            items: list[dict] = [{}] * len(part)
            groups: dict[str, list[int]] = {}
            for number, (_, settings) in enumerate(part):
                groups.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
            for key, numbers in groups.items():
                made = self._generate([part[number][0] for number in numbers], json.loads(key))
                for number, item in zip(numbers, made, strict=True):
                    items[number] = item
            return items

        return self._answer("generate_until", requests, answer)

    def _generate(self, contexts: list[str], settings: dict) -> list[dict]:
        """Items with the texts after prompts of the same settings."""
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        longest = int(options.pop("max_gen_toks"))
        unknown = sorted(set(options) - set(SAMPLING_KEYS))
        if unknown:
            raise ValueError(
                f"generation_kwargs.{unknown[0]} ({options[unknown[0]]!r}) of the task file is not supported; use "
                f"until, max_gen_toks, {', '.join(SAMPLING_KEYS)}."
            )
        room = self.max_length - longest
        if room < 1:
            raise ValueError(
                f"generation_kwargs.max_gen_toks ({longest}) of the task file must be less than the model's context of "
                f"{self.max_length} tokens; lower it."
            )
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        truncated = [len(ids) > room for ids in prompts]
        prompts = [ids[-room:] for ids in prompts]
        sampling = Sampling(
            temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0,
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
        )
        segment = text_segment(self.generator.vocabulary, longest)
        rows = decode_segments(self.generator.decoder, prompts, segment, sampling, [sampling.seed] * len(prompts))
        codec = self.generator.codec
        texts = [self.tok_decode(codec.trim_text(row)[:longest]) for row in rows]
        return [
            {"answer": postprocess_generated_text(text, until, None), "truncated": cut}
            for text, cut in zip(texts, truncated, strict=True)
        ]

    def _score(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """(summed log-probability, whether it is the greedy one) of rows, cut to the model's length from the left."""
        contexts, continuations = [], []
        for context, continuation in rows:
            excess = self._count_excess((context, continuation))
            if excess >= len(context):
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit into the model's context of "
                    f"{self.max_length}; shorten the choices of the task."
                )
            contexts.append(context[max(0, excess) :])
            continuations.append(continuation)
        scored = score_tokens(self.generator.decoder, contexts, continuations)
        return [(row.total, row.is_greedy) for row in scored]

    def _count_excess(self, row: Row) -> int:
        """Tokens of a context and its continuation that do not fit into the model's context, if positive."""
        return len(row[0]) + len(row[1]) - (self.max_length + 1)

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[[list[tuple]], list[dict]]) -> list:
        """Answers of all requests, on every rank; those that are finished are not computed again."""
        keys = [make_key(kind, request.args) for request in requests]
        given = {key: request.args for key, request in zip(keys, requests, strict=True)}
        # The longest first: a request that does not fit is reported at once, and rows of a batch are of similar length.
        order = sorted(given, key=lambda key: -sum(len(one) for one in given[key] if isinstance(one, str)))
        self.ranks.finish_items(
            {key: given[key] for key in order},
            answer,
            self.finished,
            batch_size=REQUESTS_AT_ONCE,
            label=kind,
            unit="requests",
        )
        items = self.ranks.from_first(lambda: {key: self.finished.items[key] for key in given})
        self.truncated += sum(item.get("truncated", False) for item in items.values())
        return [items[key]["answer"] for key in keys]


def make_key(kind: str, arguments: tuple) -> str:
    """The key of a finished request in items.jsonl."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()
