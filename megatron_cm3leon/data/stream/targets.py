"""Instruction documents in a sample: the form of each, its tokens, and which of them are targets.

The form is drawn per document and epoch, before packing, from the ranges of the targets alone; the tokens follow when
the document is read. A sample that holds one is the same in any packing:

    COMPLETE       </s> Question: q Answer: a. <break> image </s>
    MASKED         </s> Question: q Answer: <sentinel:0>. <break> image </s> <sentinel:0> a <eoss>
    UNCONDITIONAL  </s> <sentinel:0> <break> image </s>      (where the first target is a complete image)

MASKED moves every target that is not at the end of the document to a place after the last </s>, as CM3 masking does
(CM3Leon section 2.2 and appendix E); sentinels are numbered from 0 in each sample. It adds three tokens per target.
"""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.config.schema import SFTConfig
from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.data.stream.order import derive_key, draw_uniform
from megatron_cm3leon.tokenizers.vocab import Vocabulary

PRETRAINING, COMPLETE, MASKED, UNCONDITIONAL = range(4)
"""Forms of a document; the first is that of documents without targets."""
ADDED_TOKENS = 3
"""A moved target adds its sentinel twice and <eoss>."""


@dataclass
class DocumentTargets:
    """What the forms of a corpus's documents depend on; all arrays are int64 [documents]."""

    counts: np.ndarray
    """Targets of each document."""
    tokens: np.ndarray
    """Their tokens."""
    moved: np.ndarray
    """Targets that are not at the end of their document."""
    condition: np.ndarray
    """Tokens before the first target where that is a complete image, its <break> counted; otherwise 0."""

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> "DocumentTargets | None":
        """None if no document has targets."""
        rows, counts = corpus.all_targets()
        if not len(rows):
            return None
        documents, starts, ends = (rows[name].astype(np.int64) for name in ("document", "start", "end"))
        tokens, moved = np.zeros((2, corpus.documents), np.int64)
        np.add.at(tokens, documents, ends - starts)
        np.add.at(moved, documents, ends < corpus.lengths[documents])
        first = np.flatnonzero(np.diff(documents, prepend=-1))
        complete = (rows["image"][first] == 1) & ((ends - starts)[first] == corpus.vocabulary.image_tokens)
        condition = np.zeros(corpus.documents, np.int64)
        condition[documents[first]] = np.where(complete, starts[first], 0)
        return cls(counts, tokens, moved, condition)


class FormSampler:
    """Draws the forms of a source's documents, as a function of (seed, source, epoch, document)."""

    def __init__(self, config: SFTConfig, corpus: Corpus, seed: int, source: str) -> None:
        self.config, self.corpus, self.seed, self.source = config, corpus, seed, source
        self.targets = DocumentTargets.of_corpus(corpus)

    @property
    def is_constant(self) -> bool:
        """Whether every document has the same form in each epoch."""
        chances = (self.config.mask_targets, self.config.drop_condition_probability)
        return self.targets is None or all(chance in (0, 1) for chance in chances)

    def draw(self, epoch: int, documents: np.ndarray) -> np.ndarray:
        """Forms of query documents (int64, any shape) in an epoch; int8, same shape."""
        forms = self.without_change(documents)
        chosen = np.flatnonzero(forms)
        if not len(chosen) or self.targets is None:
            return forms
        numbers = documents[chosen]
        masked = (self.targets.moved[numbers] > 0) & (self.targets.moved[numbers] <= self.corpus.vocabulary.sentinels)
        masked &= self._draw("mask targets", epoch, numbers) < self.config.mask_targets
        dropped = self.targets.condition[numbers] > 0
        dropped &= self._draw("drop condition", epoch, numbers) < self.config.drop_condition_probability
        forms[chosen] = np.where(dropped, UNCONDITIONAL, np.where(masked, MASKED, COMPLETE))
        return forms

    def without_change(self, documents: np.ndarray) -> np.ndarray:
        """Forms of documents in context (-1: none), whose targets stay where they are; int8, same shape."""
        if self.targets is None:
            return np.zeros(documents.shape, np.int8)
        return np.where((documents >= 0) & (self.targets.counts[documents] > 0), COMPLETE, PRETRAINING).astype(np.int8)

    def measure(self, documents: np.ndarray, forms: np.ndarray) -> np.ndarray:
        """Tokens of documents in these forms, int64; those of MASKED include the </s> before the moved targets."""
        lengths = self.corpus.lengths[documents].astype(np.int64)
        if self.targets is not None:
            lengths += np.where(forms == MASKED, ADDED_TOKENS * self.targets.moved[documents] + 1, 0)
            lengths -= np.where(forms == UNCONDITIONAL, self.targets.condition[documents] - 2, 0)
        return lengths

    def report_problems(self, length: int | None) -> list[str]:
        """Sentences about documents that cannot be used as `sft` says; `length`: tokens of a sample, None: no limit."""
        if self.targets is None:
            return []
        targets, sentinels, problems = self.targets, self.corpus.vocabulary.sentinels, []
        many = np.flatnonzero((targets.moved > sentinels) & (self.config.mask_targets > 0))
        if len(many):
            problems.append(
                f"{len(many)} documents of {self.corpus.folder} have more targets to move than the {sentinels} "
                f"sentinels, such as {self._name(many[0])} with {targets.moved[many[0]]}: their targets stay in place."
            )
        if length is not None:
            added = ADDED_TOKENS * targets.moved * ((targets.moved <= sentinels) & (self.config.mask_targets > 0))
            long = np.flatnonzero(targets.tokens + added + 2 > length)
            if len(long):
                problems.append(
                    f"{len(long)} documents of {self.corpus.folder} have targets longer than a sequence of {length} "
                    f"tokens, such as {self._name(long[0])} with {targets.tokens[long[0]]}: the ends of their targets "
                    f"are cut. Raise data.seq_length."
                )
        return problems

    def _name(self, document: np.int64) -> str:
        return f"document {document} ({self.corpus.metadata_row(int(document))['source']})"

    def _draw(self, purpose: str, epoch: int, documents: np.ndarray) -> np.ndarray:
        return draw_uniform(derive_key(self.seed, purpose, self.source, epoch), documents)


def build_form(
    ids: np.ndarray, targets: np.ndarray, form: int, room: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """A document in its form, of at most `room` tokens: its ids, and which of them are targets (bool).

    `ids` [tokens] and its targets, int64 [targets, 2], are those of the shard. A document that does not fit loses
    tokens as shorten_prompts says.
    """
    marks = np.zeros(len(ids), bool)
    for start, end in targets.tolist():
        marks[start:end] = True
    if form == UNCONDITIONAL:
        kept = int(targets[0, 0]) - 1  # the <break>
        ids, marks = np.append(vocabulary.sentinel(0), ids[kept:]).astype(ids.dtype), np.append(False, marks[kept:])
    if form != MASKED:
        keep = shorten_prompts(ids, marks, room, vocabulary)
        return ids[keep], marks[keep]
    moved = [(start, end) for start, end in targets.tolist() if end < len(ids)]
    keep = shorten_prompts(ids, marks, max(1, room - ADDED_TOKENS * len(moved) - 1), vocabulary)
    body, tail, done = [], [np.array([vocabulary.eos])], 0
    for number, (start, end) in enumerate(moved):
        sentinel = np.array([vocabulary.sentinel(number)])
        body += [ids[done:start][keep[done:start]], sentinel]
        tail += [sentinel, ids[start:end][keep[start:end]], np.array([vocabulary.eoss])]
        done = end
    body.append(ids[done:][keep[done:]])
    is_target = [np.zeros(len(piece), bool) for piece in body[:-1]] + [marks[done:][keep[done:]]]
    is_target += [np.full(len(piece), number % 3 == 2) for number, piece in enumerate(tail)]
    return np.concatenate([*body, *tail]).astype(ids.dtype)[:room], np.concatenate(is_target)[:room]


def shorten_prompts(ids: np.ndarray, marks: np.ndarray, room: int, vocabulary: Vocabulary) -> np.ndarray:
    """Which tokens of a document remain if it has at most `room`; bool [tokens]. `marks`: which ones are targets.

    The longest texts of the prompt lose their ends, but for one token of each. If that is not enough, the prompt loses
    its first tokens, images too. Targets are cut last: the longest one loses its end first.
    """
    keep, excess = np.ones(len(ids), bool), len(ids) - room
    if excess <= 0:
        return keep
    excess = _cut_ends(keep, vocabulary.is_text(ids) & ~marks, excess)
    prompt = np.flatnonzero(keep & ~marks)[: max(0, excess)]
    keep[prompt] = False
    excess = _cut_ends(keep, marks, excess - len(prompt))
    keep[np.flatnonzero(keep)[room:]] = False
    return keep


def _cut_ends(keep: np.ndarray, chosen: np.ndarray, excess: int) -> int:
    """Clear `keep` at the ends of the runs of `chosen`, the longest run first; returns the tokens still to cut."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2).tolist()
    for start, end in sorted(edges, key=lambda run: run[0] - run[1]):
        n_cut = min(excess, end - start - 1)
        keep[end - n_cut : end] = False
        excess -= n_cut
    return excess
