"""Writes a small export with the tree of commit ad3992f, in which it is run: a fixture of test_old_runs.py.

cp tests/golden/write_old_export.py /tmp && cd TREE_OF_AD3992F
PYTHONPATH=$PWD python /tmp/write_old_export.py /tmp/old-export
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C /tmp -cJf .../ad3992f-export.tar.xz old-export
"""

import importlib
import shutil
import sys
from pathlib import Path


def main() -> None:
    convert, builders, corpora, vocab = map(
        importlib.import_module,  # module names of that commit, which do not exist in the current source tree
        (
            "megatron_cm3leon.checkpoint.convert",
            "tests.checkpoint.builders",
            "tests.data.corpora",
            "megatron_cm3leon.tokenizers.vocab",
        ),
    )
    folder = Path(sys.argv[1])
    builders.write_tokenizers(folder / "tokenizer")
    vocabulary = vocab.Vocabulary.load(folder / "tokenizer")
    corpora.write_shards(folder / "shards", corpora.make_pairs(6, vocabulary), vocabulary)
    config = builders.family_config(f"data.shards={folder / 'shards'}")
    checkpoint = builders.write_random_checkpoint(folder / "run", config, vocabulary)
    convert.export_checkpoint(checkpoint, folder / "tokenizer", folder / "export")
    for path in (folder / "export").iterdir():
        path.rename(folder / ("image-tokenizer" if path.name == "image" else path.name))
    for name in ("tokenizer", "shards", "run", "export"):
        shutil.rmtree(folder / name)
    (folder / "image-tokenizer").rename(folder / "image")


main()
