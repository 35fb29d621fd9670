"""How an index is built: the options of tools/build_index.py."""

from dataclasses import dataclass

STAGES = ("", "encode", "index", "neighbors")


@dataclass(kw_only=True)
class IndexOptions:
    """How an index is built."""

    neighbors: int = 8
    """Neighbors kept per document, M: found by its text and by its images in turn."""
    threshold: float = 0.9
    """Largest score (cosine) of a neighbor to the query and to another neighbor."""
    query_dropout: float = 0.2
    """Share of the query's text tokens that is dropped for the search."""
    images: str = "source"
    """source: encode the raw images; tokens: encode images decoded from the shards."""
    tokenizer: str = ""
    """Tokenizer folder, required by images=tokens and by documents other than pairs."""
    factory: str = ""
    """FAISS factory string; empty: chosen by the size of the bank."""
    search: str = ""
    """FAISS search parameters, such as nprobe=64; empty: chosen by measured recall."""
    recall: float = 0.95
    """Target recall@10 when search parameters are chosen."""
    candidates: int = 32
    """Candidates of the first search per document, by text and by image each."""
    max_candidates: int = 4096
    """Most candidates that are searched if the filters leave fewer neighbors than requested."""
    recall_queries: int = 1000
    """Queries per sample on which recall@10 is measured against exact search."""
    seed: int = 0
    """Seed of the query dropout, of the index training and of the recall samples."""
    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:1 ..."""

    def to_dict(self) -> dict:
        """The options as index.json records them."""
        return {
            "neighbors": self.neighbors,
            "threshold": self.threshold,
            "query_dropout": self.query_dropout,
            "pictures": self.images,
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
            raise ValueError(f"--threshold ({self.threshold}) must be above 0 and at most 1; the paper uses 0.9.")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"--query-dropout ({self.query_dropout}) must be in [0, 1); the paper uses 0.2.")
        if not 0 < self.recall <= 1:
            raise ValueError(f"--recall ({self.recall}) must be above 0 and at most 1.")
        if self.images not in ("source", "tokens"):
            raise ValueError(f"--images ({self.images}) must be source or tokens.")
        if self.images == "tokens" and not self.tokenizer:
            raise ValueError("--images tokens requires --tokenizer, the folder the shards were made with.")
        if min(self.candidates, self.max_candidates, self.recall_queries) < 1:
            raise ValueError("--candidates, --max-candidates and --recall-queries must be at least 1.")
