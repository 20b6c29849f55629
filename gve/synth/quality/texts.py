"""What is wrong with a caption that came with a video: measured here, judged by `select`.

Rules look at the text alone, so they find what can be seen in it: addresses, names of files, phrases that sell, texts
without a word about the picture, another language. Whether a caption is true is asked of an encoder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gve.items import InputError
from gve.synth.quality.hashes import text_key

PHRASES = Path(__file__).with_name("phrases.v1.json")
"""Word lists; a change of them is a new version of the file, and its hash travels with what was scanned."""

LONGEST_CHARS = 10_000
"""What is read of a caption."""
SHORT_WORDS, SHORT_LETTERS = 5, 20
"""Under these a text in the letters of the language is not judged by its words: names and keywords look like any
language to a model of letter sequences."""
FUNCTION_WORDS = 0.15
"""Share of English function words from which a text is English, whatever the model of letter sequences says."""

_URL = re.compile(
    r"https?://\S+|\bwww\.\S+|\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b"
    # Without a path only endings that are no words: "the beach.In the end" is a missing blank.
    r"|\b(?:[a-z0-9-]+\.)+(?:(?:com|org|net|io|tv|ly|biz|edu|gov|ru|cn|uk)\b(?![.-]\w)|[a-z]{2,10}/\S+)",
    re.IGNORECASE,
)
_SUFFIXES = "mp4|m4v|mov|mkv|webm|avi|mpe?g|wmv|flv|3gp|mts|m2ts|gif|jpe?g|png|heic|srt|zip"
_FILE = re.compile(rf"\b[\w()-]+\.(?:{_SUFFIXES})\b", re.IGNORECASE)
_CAMERA = re.compile(
    r"\b(?:IMG|DSCN?|DSCF|VID|MVI|GOPR|GH|GX|PXL|DJI|MAH|WP|VIDEO|CLIP|MOV|SAM|PICT|REC|TRIM)[_-]?\d{3,}(?:[_-]\w+)*\b"
    r"|\b[0-9a-f]{16,}\b|\b\d{8}[_-]\d{4,6}\b",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[^\W_]+(?:[_-][^\W_]+){2,}", re.IGNORECASE)  # a whole text like final_cut_v2
_PRICE = re.compile(r"[$€£¥]\s?\d|\d\s?(?:usd|eur|€|£)|\d{1,3}\s?%\s?off\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class TextMeasures:
    """What the rules judge by.

    Args:
        words: separated by blanks; of scripts without blanks, letters.
        urls, files: addresses, and names of files, that stand in it.
        selling: weight of phrases that sell: 1 for a strong one or a price, 0.5 for a weak one.
        telling: words that are no numbers and not on the list of words that say nothing of a picture.
        language: ISO 639-1 code of the most likely language; empty where it is not judged.
        foreign: certainty that it is in none of the languages asked for, 0 to 1.
        key: equal for texts that differ in case, punctuation and blanks alone.
    """

    words: int
    urls: int
    files: int
    selling: float
    telling: int
    language: str
    foreign: float
    key: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_text(text: str, languages: Sequence[str]) -> TextMeasures:
    """Measures of a caption.

    Args:
        languages: ISO 639-1 codes that are asked for; none asks for no language.
    """
    text = unicodedata.normalize("NFKC", text[:LONGEST_CHARS]).strip()
    lists = _lists()
    words = [word.casefold().replace("’", "'") for word in _WORD.findall(text)]
    urls = _URL.findall(text)
    rest = _URL.sub(" ", text)
    files = _FILE.findall(rest) + _CAMERA.findall(rest)
    if not files and " " not in text and _JOINED.fullmatch(text) and ("_" in text or any(map(str.isdigit, text))):
        files = [text]
    empty = frozenset(lists["empty"])
    telling = sum(word not in empty and (len(word) > 1 or not word.isascii()) for word in words)
    dense = sum(_dense(char) for char in text)
    tokens = len(text.split()) + max(0, dense - 1)
    language, foreign = _language(rest, words, languages)
    selling = _selling(text, words)
    return TextMeasures(tokens, len(urls), len(files), selling, telling, language, foreign, text_key(text))


def phrases_hash() -> str:
    """Hex SHA-256 of the word lists."""
    return hashlib.sha256(PHRASES.read_bytes()).hexdigest()


@functools.cache
def _lists() -> dict[str, Any]:
    return json.loads(PHRASES.read_bytes())


def _selling(text: str, words: Sequence[str]) -> float:
    padded = f" {' '.join(words)} "
    lists = _lists()["advertisement"]
    strong = sum(f" {phrase} " in padded for phrase in lists["strong"])
    weak = sum(f" {phrase} " in padded for phrase in lists["weak"])
    return strong + 0.5 * weak + len(_PRICE.findall(text))


def _dense(char: str) -> bool:
    """Whether it is a letter of a script that sets no blanks between words."""
    return _script(char) in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@functools.lru_cache(maxsize=1 << 16)
def _script(char: str) -> str:
    """First word of the letter's name, such as LATIN or CYRILLIC; empty for what is no letter."""
    return unicodedata.name(char, "").split(" ")[0] if char.isalpha() else ""


def _language(text: str, words: Sequence[str], languages: Sequence[str]) -> tuple[str, float]:
    """The likeliest language, and how sure it is that it is none of those asked for.

    Short texts are where such models fail, so they are judged by their letters alone: other letters than those of the
    languages make a text foreign at any length, words only in texts that are long enough.
    """
    letters = [script for char in text if (script := _script(char))]
    if not languages or len(letters) < 2:
        return "", 0.0
    known = {script for language in languages for script in SCRIPTS.get(language, ("LATIN",))}
    strange = sum(script not in known for script in letters) / len(letters)
    if strange <= 0.5:
        if len(words) < SHORT_WORDS or len(letters) < SHORT_LETTERS:
            return "", 0.0
        if "en" in languages:
            english = sum(word in _lists()["english"] for word in words) / len(words)
            if english >= FUNCTION_WORDS:
                return "en", 0.0
    ranked = _identifier().rank(text.casefold())
    language = str(ranked[0][0])
    wanted = sum(score for code, score in ranked if code in languages)
    foreign = strange if strange > 0.5 else 1.0 - wanted
    if language in languages:
        foreign = 0.0
    return language, round(float(foreign), 4)


def check_languages(languages: Sequence[str]) -> None:
    """Raises InputError for a code that is not known."""
    if languages and (unknown := sorted(set(languages) - set(_identifier().labels))):
        raise InputError(f"scan: language {unknown[0]!r} is unknown: use ISO 639-1 codes such as en, de, zh")


@functools.cache
def _identifier() -> Any:
    """The model of py3langid with calibrated probabilities; 0.7 s to load, 25 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


SCRIPTS = {
    **dict.fromkeys(("ru", "uk", "bg", "mk", "be", "kk", "ky", "mn"), ("CYRILLIC",)),
    "sr": ("CYRILLIC", "LATIN"),
    "el": ("GREEK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "zh": ("CJK",),
    "ko": ("HANGUL", "CJK"),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), ("ARABIC",)),
    "he": ("HEBREW",),
    **dict.fromkeys(("hi", "mr", "ne"), ("DEVANAGARI",)),
    **{
        code: (name,)
        for code, name in {
            "th": "THAI", "lo": "LAO", "km": "KHMER", "ka": "GEORGIAN", "hy": "ARMENIAN", "am": "ETHIOPIC",
            "bn": "BENGALI", "as": "BENGALI", "gu": "GUJARATI", "kn": "KANNADA", "ml": "MALAYALAM", "or": "ORIYA",
            "pa": "GURMUKHI", "si": "SINHALA", "ta": "TAMIL", "te": "TELUGU", "dz": "TIBETAN",
        }.items()
    },
}  # fmt: skip
"""Language -> scripts of its letters, as Unicode names them; LATIN where none is given."""
