"""Cut the fairy-tale corpus into clean tales, and set the held-out ones aside.

The corpus keeps one blank line between paragraphs and two between books. Headings, tables of contents, footnotes and
licence texts remain in it; they are dropped here, and headings serve as the borders between tales.
"""

import lzma
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

MIN_TALE_CHARS = 400
HELDOUT_TALE_CHARS = range(3_000, 12_000)

_SENTENCE_END = re.compile(r"[.!?:;,)\-]['\"]*$")
_NOISE = re.compile(
    r"etexts?\b|gutenberg|copyright|footnote|small print|hart@|ftp|newsletter|donations"
    r"|^(source|parallels|remarks|notes?)\b.{0,3}--|^[\[(*|]|[@#|=+~]|_{2}",
    re.IGNORECASE,
)
_CREDIT = re.compile(r"^((adapted )?from|told) .{0,80}$|^[^'\"]{0,25}[^'\"!?]$", re.IGNORECASE)
_OPENING_CAPITALS = re.compile(r"^(['\"]?[A-Z])([A-Z]+)\b")
_FOOTNOTE_MARK = re.compile(r" ?\(\d+\)| ?\[[^\]]{0,200}\]|\*")
_NOTES_HEADING = "NOTES AND REFERENCES"


@dataclass(frozen=True, slots=True)
class Tale:
    """One tale or chapter of a book, without its heading."""

    book: int
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, one blank line between them."""
        return "\n\n".join(self.paragraphs)


def load_tales(path: Path) -> list[Tale]:
    """Read the corpus (plain or .xz) and return its tales in order."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    books = re.split(r"\n{3,}", text.strip())
    return [Tale(number, tale) for number, book in enumerate(books) for tale in split_book(book)]


def split_book(book: str) -> list[tuple[str, ...]]:
    """Cut one book at its headings; a tale is a tuple of clean paragraphs."""
    tales: list[tuple[str, ...]] = []
    current: list[str] = []
    in_notes = False
    for raw in book.split("\n\n"):
        paragraph = " ".join(raw.split())
        if _is_heading(paragraph):
            tales.append(tuple(current))
            current = []
            # The notes of one book end where its next volume begins with a contents page.
            in_notes = paragraph == _NOTES_HEADING or (in_notes and paragraph != "CONTENTS")
        elif not in_notes and _is_prose(paragraph):
            current.append(_tidy(paragraph))
    tales.append(tuple(current))
    return [tale for tale in tales if sum(map(len, tale)) >= MIN_TALE_CHARS]


def split_heldout(tales: list[Tale], num_chars: int) -> tuple[list[Tale], list[Tale]]:
    """Set about `num_chars` aside: one whole tale a book in turn, chosen by checksum so that the choice never moves.

    A tale that is also told in another book (the collections overlap) is not eligible: it would not be unseen.

    Returns:
        The tales to train on and the held-out tales.
    """
    owners = _shingle_owners(tales)
    eligible = [
        i
        for i, tale in enumerate(tales)
        if len(tale.text) in HELDOUT_TALE_CHARS and not _is_told_elsewhere(i, tale, owners)
    ]
    eligible.sort(key=lambda i: zlib.crc32(tales[i].text.encode()))
    chosen: dict[int, int] = {}
    total = 0
    for i in eligible:
        if total < num_chars and tales[i].book not in chosen:
            chosen[tales[i].book] = i
            total += len(tales[i].text)
    heldout = set(chosen.values())
    return (
        [tale for i, tale in enumerate(tales) if i not in heldout],
        [tales[i] for i in sorted(heldout)],
    )


def _is_heading(paragraph: str) -> bool:
    has_letters = any(c.isalpha() for c in paragraph)
    is_short_title = len(paragraph) <= 90 and paragraph[:1].isupper() and not _SENTENCE_END.search(paragraph)
    return has_letters and (is_short_title or paragraph.upper() == paragraph) and "Line-Art" not in paragraph


def _is_prose(paragraph: str) -> bool:
    return bool(_SENTENCE_END.search(paragraph)) and not _NOISE.search(paragraph) and not _CREDIT.search(paragraph)


def _tidy(paragraph: str) -> str:
    """Drop footnote marks and print the first word in small letters where the book has it in capitals."""
    return _OPENING_CAPITALS.sub(lambda m: m[1] + m[2].lower(), _FOOTNOTE_MARK.sub("", paragraph))


def _shingles(text: str, size: int = 8) -> set[int]:
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size)}


def _shingle_owners(tales: list[Tale]) -> dict[int, int]:
    """Map each run of eight words to its only tale, or to -1 when several tales have it."""
    owners: dict[int, int] = {}
    for i, tale in enumerate(tales):
        for shingle in _shingles(tale.text):
            owners[shingle] = i if owners.get(shingle, i) == i else -1
    return owners


def _is_told_elsewhere(index: int, tale: Tale, owners: dict[int, int]) -> bool:
    shingles = _shingles(tale.text)
    return sum(owners[shingle] != index for shingle in shingles) > 0.01 * len(shingles)
