"""Golden files: what existing run folders, shards, indexes and exports rely on, in golden.json.

Integers, texts and hashes of integers, the same on every machine. To regenerate it:

    python -m tests.golden.golden

Do this only for a reviewed change of a format: the commit says why, and how older files stay readable.
"""

import json
import tempfile
from pathlib import Path

from tests.golden import formats, streams

GOLDEN = Path(__file__).with_name("golden.json")


def collect() -> dict:
    """The content of golden.json as this source tree generates it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {
            "streams": streams.describe_streams(folder / "streams"),
            "shards": formats.describe_shards(folder / "shards"),
            "instructions": formats.describe_instructions(folder / "instructions"),
            "checkpoint": formats.describe_checkpoint(folder / "checkpoint"),
            "tokenizers": formats.describe_tokenizers(folder / "tokenizers"),
            "exports": formats.describe_exports(folder / "exports"),
            "generated": formats.describe_generated(folder / "generated"),
            "evaluation": formats.describe_evaluation(folder / "evaluation"),
            "options": formats.describe_options(),
            "run": formats.describe_run(folder / "run"),
        }
    return json.loads(json.dumps(found))  # lists instead of tuples


def list_differences(golden, found, name: str = ""):
    """Yield a description of each difference. A field that golden.json does not have is new, and accepted."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key, value in golden.items():
            if key not in found:
                yield f"{name}/{key} is missing"
            else:
                yield from list_differences(value, found[key], f"{name}/{key}")
    elif golden != found:
        yield f"{name}: {found!r} instead of {golden!r}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(collect(), indent=1) + "\n")
    print(f"wrote {GOLDEN}")
