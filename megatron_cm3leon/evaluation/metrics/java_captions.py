"""What only the Java programs inside the package pycocoevalcap compute: METEOR 1.5, SPICE, and its PTB tokenizer.

The jars are run directly, not through pycocoevalcap's classes: those start a download for SPICE, write into the
installed package, and end in a broken pipe where Java is missing. SPICE needs two jars of Stanford CoreNLP that the
package does not contain. Nothing is downloaded here; `explain_missing` says what is missing and where it goes.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from megatron_cm3leon.common.progress import track
from megatron_cm3leon.evaluation.metrics.ptb_tokenizer import PUNCTUATION

Tokens = Sequence[str]

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""Jars of stanford-corenlp-full-2015-12-09.zip, which SPICE needs."""
_PACKAGES = ("lang", "math", "net", "text", "util", "util.concurrent")
_OPEN_PACKAGES = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _PACKAGES]
"""SPICE's serialization library uses private fields of these packages, which Java 16 and later refuse."""

# METEOR 1.5's parameters for English: weights of the modules exact, stem, synonym and paraphrase, and the constants of
# Denkowski and Lavie 2014, section 2.
_MODULES = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_COUNTS = 23


@cache
def find_java() -> str:
    """The path of Java; ValueError, with the reason and the remedy, if it is missing or does not start."""
    path = shutil.which("java")
    if path is None:
        raise ValueError("Java is not on PATH; install a Java runtime, such as Debian's default-jre-headless")
    started = subprocess.run([path, "-version"], capture_output=True, text=True)
    if started.returncode:
        raise ValueError(f"{path} -version fails with status {started.returncode}; install a Java runtime that starts")
    return path


def read_java_version() -> str:
    """The first line of `java -version`."""
    return subprocess.run([find_java(), "-version"], capture_output=True, text=True).stderr.split("\n")[0]


def find_package() -> Path:
    """The folder of pycocoevalcap; ValueError if it is not installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package pycocoevalcap is not installed; run pip install pycocoevalcap==1.2")
    return Path(next(iter(spec.submodule_search_locations)))


def explain_missing(metric: str) -> str | None:
    """What `metric` ("meteor", "spice", "tokenizer") lacks on this machine and where it goes; None if nothing."""
    try:
        folder = find_package()
        find_java()
    except ValueError as error:
        return str(error)
    files = {
        "meteor": ("meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz"),
        "spice": ("spice/spice-1.0.jar", *(f"spice/lib/{name}" for name in CORENLP)),
        "tokenizer": ("tokenizer/stanford-corenlp-3.4.1.jar",),
    }[metric]
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return None
    names = " and ".join(Path(name).name for name in missing)
    origin = "stanford-corenlp-full-2015-12-09.zip" if "corenlp-3.6.0" in names else "the package pycocoevalcap 1.2"
    return f"{names} of {origin} {'is' if len(missing) == 1 else 'are'} not in {(folder / missing[0]).parent}"


def tokenize_with_java(captions: Sequence[str]) -> list[list[str]]:
    """Tokens of each caption by pycocoevalcap's PTB tokenizer, without punctuation.

    Split at any white space, as pycocoevalcap's BLEU and CIDEr do. ValueError if the jar fails.
    """
    folder = find_package() / "tokenizer"
    # One caption per line: other line breaks, such as U+2028, would become lines of their own.
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    arguments = ["-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"]
    lines = _run([*arguments, "-preserveLines", "-lowerCase"], folder, text).split("\n")[:-1]
    if len(lines) != len(captions):
        raise ValueError(f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions.")
    return [[token for token in line.split() if token not in PUNCTUATION] for line in lines]


def align_meteor(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """METEOR's counts of matches of each caption with its best reference, float64 [captions, 23]; see `score_meteor`.

    The first counts take up to a minute: the jar reads its table of paraphrases.
    """
    lines = [
        " ||| ".join(["SCORE", *(_join(reference) for reference in group), _join(caption)])
        for caption, group in zip(captions, references, strict=True)
    ]
    folder = find_package() / "meteor"
    command = [find_java(), "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio"]
    # With its path the table is found in a folder with a space in its name, too (coco-caption's issue 40).
    command += ["-l", "en", "-norm", "-a", "data/paraphrase-en.gz"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        assert process.stdin and process.stdout
        writer = threading.Thread(target=_write_lines, args=(process.stdin, lines))
        writer.start()
        found = [line.split() for line in track(process.stdout, label="METEOR", unit="captions", total=len(lines))]
        writer.join()
        if process.wait() or [len(row) for row in found] != [_METEOR_COUNTS] * len(lines):
            errors.seek(0)
            raise ValueError(f"METEOR's jar scored {len(found)} of {len(lines)} captions and stopped: {_end(errors)}")
    return np.array(found, np.float64)


def score_meteor(counts: np.ndarray) -> float:
    """METEOR 1.5, 0 to 1, of the rows of `align_meteor` together, as the jar computes it.

    A row: length, reference's length, function words of both; for each of the modules exact, stem, synonym and
    paraphrase the matched content words of both and function words of both; chunks; matched words of both.
    """
    length, reference_length, function_words, reference_function_words = counts.sum(0)[:4]
    content, reference_content, function, reference_function = counts.sum(0)[4:20].reshape(4, 4).T
    matched = counts[:, 21:].sum() / 2
    # A caption identical with its reference is one chunk, which is not counted as fragmentation.
    identical = (counts[:, 20] == 1) & (counts[:, 21:] == counts[:, :2]).all(1)
    chunks = counts[~identical, 20].sum()

    def weigh(content_words: float, function_words: float) -> float:
        return _DELTA * content_words + (1 - _DELTA) * function_words

    found = weigh(_MODULES @ content, _MODULES @ function)
    reference_found = weigh(_MODULES @ reference_content, _MODULES @ reference_function)
    if not found or not reference_found:
        return 0.0
    precision = found / weigh(length - function_words, function_words)
    recall = reference_found / weigh(reference_length - reference_function_words, reference_function_words)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return float(mean * (1 - _GAMMA * (chunks / matched) ** _BETA))


def compute_spice(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """SPICE's F of each caption, 0 to 1, float64 [captions]; the corpus score is their mean.

    ValueError if the jar fails. SPICE's cache of parsed references is not used: its database library does not load on
    every machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
        entries = [
            {"image_id": str(number), "test": " ".join(caption), "refs": [" ".join(each) for each in group]}
            for number, (caption, group) in enumerate(zip(captions, references, strict=True))
        ]
        source.write_text(json.dumps(entries), encoding="utf-8")
        arguments = [*_OPEN_PACKAGES, "-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-subset"]
        _run([*arguments, "-silent"], find_package() / "spice")
        if not target.is_file():
            raise ValueError("SPICE's jar ended without scores.")
        rows = json.loads(target.read_text(encoding="utf-8"))
    scores = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
    return np.array([scores[str(number)] for number in range(len(captions))], np.float64)


def _run(arguments: list[str], folder: Path, text: str | None = None) -> str:
    """Standard output of Java in `folder`; ValueError with the end of its messages if it fails."""
    command = [find_java(), "-Dfile.encoding=UTF-8", *arguments]
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        jar = next(each for each in arguments if each.endswith(".jar"))
        lines = done.stderr.strip().split("\n")
        raise ValueError(f"{folder / jar} failed with status {done.returncode}: {lines[0][:300]}")
    return done.stdout


def _write_lines(file: IO[str], lines: list[str]) -> None:
    """Write lines and close the file; the reader may have ended, whose exit status the caller checks."""
    try:
        with file:
            file.writelines(line + "\n" for line in lines)
    except BrokenPipeError:
        return


def _join(tokens: Tokens) -> str:
    """A line's part; ||| separates the parts."""
    return " ".join(tokens).replace("|||", "")


def _end(file: IO[str]) -> str:
    return file.read().strip().split("\n")[-1][:300] or "it printed no reason"
