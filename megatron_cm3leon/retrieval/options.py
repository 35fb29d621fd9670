"""How an index is built: what tools/build_index.py asks for."""

from dataclasses import dataclass

STAGES = ("", "encode", "index", "neighbors")


@dataclass(kw_only=True)
class IndexOptions:
    """How an index is built."""

    neighbors: int = 8
    """Neighbours kept for each document, M: found by its text and by its pictures in turn."""
    threshold: float = 0.9
    """Largest score (cosine) of a neighbour to the query and to another neighbour."""
    query_dropout: float = 0.2
    """Share of the query's text tokens that is left out when searching."""
    pictures: str = "source"
    """source: encode the raw pictures; tokens: pictures decoded from the shards."""
    tokenizer: str = ""
    """Tokenizer folder, which pictures=tokens and documents other than pairs need."""
    factory: str = ""
    """FAISS factory string; empty chooses by the size of the bank."""
    search: str = ""
    """FAISS search parameters, such as nprobe=64; empty chooses them by measured recall."""
    recall: float = 0.95
    """recall@10 that search parameters are chosen for."""
    candidates: int = 32
    """Candidates searched first for each document, by text and by picture each."""
    max_candidates: int = 4096
    """Candidates searched at most where the filters left fewer neighbours than asked for."""
    recall_queries: int = 1000
    """Queries of the samples on which recall@10 is measured against exact search."""
    seed: int = 0
    """Seed of the query dropout, of the index training and of the recall samples."""
    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:1 ..."""

    def to_dict(self) -> dict:
        """The options as index.json has them."""
        return {
            "neighbors": self.neighbors,
            "threshold": self.threshold,
            "query_dropout": self.query_dropout,
            "pictures": self.pictures,
            "tokenizer": self.tokenizer,
            "factory": self.factory,
            "search": self.search,
            "recall": self.recall,
            "candidates": self.candidates,
            "max_candidates": self.max_candidates,
            "recall_queries": self.recall_queries,
            "seed": self.seed,
            "device": self.device,
        }

    def validate(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.neighbors < 1:
            raise ValueError(f"--neighbors ({self.neighbors}) must be at least 1.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold ({self.threshold}) must be above 0 and at most 1; the paper has 0.9.")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"--query-dropout ({self.query_dropout}) must be in [0, 1); the paper has 0.2.")
        if not 0 < self.recall <= 1:
            raise ValueError(f"--recall ({self.recall}) must be above 0 and at most 1.")
        if self.pictures not in ("source", "tokens"):
            raise ValueError(f"--pictures ({self.pictures}) must be source or tokens.")
        if self.pictures == "tokens" and not self.tokenizer:
            raise ValueError("--pictures tokens needs --tokenizer, the folder the shards were made with.")
        if min(self.candidates, self.max_candidates, self.recall_queries) < 1:
            raise ValueError("--candidates, --max-candidates and --recall-queries must be at least 1.")
