"""The claims: which arm is expected to be better than which other, by which measures."""

from dataclasses import dataclass

Arm = tuple[str, str]
"""(study, arm)."""
ARMS = {
    "0 documents": ("retrieval", "documents-0"),
    "1 document": ("retrieval", "documents-1"),
    "2 documents": ("retrieval", "documents-2"),
    "2 random": ("retrieval", "random-2"),
    "trained without": ("retrieval", "trained-without"),
    "copy": ("retrieval", "copy"),
    "clip": ("retrieval", "clip"),
    "bank": ("memory", "bank-2"),
    "given": ("memory", "given-2"),
    "clip in bank": ("memory", "clip-bank"),
    **{f"shown {count}": ("memory", f"demonstrations-{count}") for count in range(5)},
    "no guidance": ("decoding", "guidance-1"),
    "guidance 2": ("decoding", "guidance-2"),
    "CD-K 1": ("decoding", "contrast-1"),
    "CD-K 8": ("decoding", "pool-contrast"),
    "best of guidance": ("decoding", "best-guidance"),
    "best of CD-K": ("decoding", "best-contrast"),
    "best of both": ("decoding", "best-together"),
    "masked": ("cm3", "masked"),
    "causal": ("cm3", "causal"),
}
"""Short name of an arm in the list below."""


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse`, arms of one family, by `measure`."""

    text: str
    measure: str
    better: Arm
    worse: Arm
    paper: str = ""
    """The figures of CM3Leon's table 1, in the order of the arms."""
    sizes: tuple[int, int] | None = None
    """Places of both arms in the list of sizes, if they are not the main size."""


STATEMENTS = """
one retrieved document, not none | loss fd right | 1 document | 0 documents | FID 5.78, 10.82
two documents, not one | loss fd right | 2 documents | 1 document | FID 4.88, 5.78
two documents, not none | loss loss_text loss_image fd score right | 2 documents | 0 documents | FID 4.88, 10.82
two retrieved documents, not random ones | loss fd right | 2 documents | 2 random |
trained with retrieval (two documents), not without | loss fd right | 2 documents | trained without |
the model, not the training image of the nearest caption | fd right | 2 documents | copy |
the model, not the training image nearest by CLIP | fd right | 2 documents | clip |
names that only the bank has: two of its documents, not none | loss fd right | bank | 0 documents |
names that only the bank has: its documents, not random ones | loss right | bank | 2 random |
names that only the bank has: that bank, not one without the names | loss right | bank | 2 documents |
the name in two other styles in context, not nothing | loss fd right | given | 0 documents |
the model with that bank, not the image of the bank nearest by CLIP | fd right | bank | clip in bank |
held-out style: one demonstration, not none | loss_image fd right | shown 1 | shown 0 |
held-out style: four demonstrations, not one | loss_image fd right | shown 4 | shown 1 |
guidance 2, not 1 (none) | fd score right | guidance 2 | no guidance |
CD-K with k = 8, not guidance 1 | fd score right | CD-K 8 | no guidance |
CD-K with k = 8, not 1 | fd right | CD-K 8 | CD-K 1 |
best of 8 by CLIP, not one image | fd score right | best of guidance | 2 documents |
best of 4 by guidance and 4 by CD-K, not of 8 by guidance | fd right | best of both | best of guidance |
best of 4 by guidance and 4 by CD-K, not of 8 by CD-K | fd right | best of both | best of CD-K |
infilling: CM3 masking, not causal training | text_right text_nats box_right box_nats | masked | causal |
loss: causal training, not CM3 masking | loss loss_text loss_image | causal | masked |
"""
"""Text | measures | better arm | worse arm | the paper's figures, which belong to the measure fd."""
SCALE = ("FID 6.61, 14.20", "FID 4.88, 6.61")
"""The paper's figures of the second size against the first, and of the third against the second."""


def list_claims(sizes: int) -> list[Claim]:
    """All claims, for this many sizes."""
    claims = []
    for line in STATEMENTS.strip().splitlines():
        text, measures, better, worse, paper = (cell.strip() for cell in line.split("|"))
        for measure in measures.split():
            claims.append(Claim(text, measure, ARMS[better], ARMS[worse], paper if measure == "fd" else ""))
    for small in range(sizes - 1):
        places = small + 1, small
        better, worse = (("retrieval" if place == sizes // 2 else "scale", "documents-2") for place in places)
        for measure in ("loss", "fd", "right"):
            paper = SCALE[small] if measure == "fd" and small < len(SCALE) else ""
            claims.append(Claim("the next larger model, equal tokens", measure, better, worse, paper, places))
    return claims
