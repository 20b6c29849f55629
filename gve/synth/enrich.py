"""Stage 2: a captioner writes what the pictures show. Everything that needs it is asked for here, in one conversation
per video, so that a server is always busy: five captions of the video, and for a share of the videos five of one of
its frames, and the texts of composed queries. Stage 3 (gve.synth.extend) makes pairs of them and measures.

Reads the weak pair and, where earlier steps cut them, `frames` and `clips`: lists of locators (gve.synth.media), with
any further keys such as `time_s`. Adds to the row::

    "enrichment": {
        "profile": "temporal", "readability": "plain", "education": "college",
        "captions": [<text>, ...],
        "frame":    {"image": <locator>, "captions": [<text>, ...]},                        of T2I
        "composed": {"TI2V": {"reference": <locator>, "strategy": "new action", **<text>}}  and TV2V
    }

where <text> is {"text": ..., "style": "concise", "words": 17, "cues": {...}, "prompt": <sha256 of the prompt's file>}.
A text that breaks a rule is asked for again with another seed, alone; at last it is a reject with the reply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gve.items import InputError, Part, Text
from gve.synth.profiles import (
    FRAME_SHARES,
    LEANS,
    STRATEGIES,
    VIDEO_SHARES,
    Profile,
    ProfileOptions,
    chance,
    pick,
)
from gve.synth.prompts import Prompt, read_prompt
from gve.synth.records import Reject, Reply, Request
from gve.synth.schemas import (
    FRAME_STYLES,
    VIDEO_STYLES,
    Rules,
    Style,
    Words,
    check_words,
    count_words,
    room,
    schema,
    styles,
    tidy,
)
from gve.synth.units import Context, Outcome, Row
from gve.video import MediaError

PROMPTS = ("video_captions", "frame_captions", "image_query", "clip_query")
ASK: Mapping[str, float] = {"T2I": 0.36, "TI2V": 0.16, "TV2V": 0.06}
"""Share of the videos that is asked for the text of a task: the published share of the task, and half as much again
for what the rules and the encoder will refuse (gve.synth.extend.TASKS)."""
COMPOSED: Mapping[str, tuple[str, str, str]] = {
    "TI2V": ("image_query", "frames", "image"),
    "TV2V": ("clip_query", "clips", "video"),
}
"""Task -> its prompt, the row's references, and what kind of medium they are."""
LONGEST_HINT_CHARS = 500
"""Of the raw caption that is quoted in the prompt."""


@dataclass(frozen=True)
class EnrichOptions(ProfileOptions):
    """What is asked, and what is taken.

    Args:
        words: style of a video's captions -> fewest and most words, where they are not the published ones.
        frame_words: the same of a frame's captions.
        query_words: of the text of a composed query.
        short_words, long_words: at least one caption of a video is under the one and one over the other; 0 asks for
            none.
        min_captions: good captions that a video must have to go on.
        ask: task -> share of the videos that is asked for its texts.
        rounds: how often a text that breaks a rule is asked for in all, each time with another seed.
        raw_caption: whether the prompt quotes the text that came with the video.
        boilerplate: refuse captions that begin with "the video shows" and the like.
        referring: refuse composed queries without a word that points at their picture or clip.
        prompts: name -> a file of one's own, or a version; the newest of the package otherwise.
    """

    words: Mapping[str, Words] = field(default_factory=dict)
    frame_words: Mapping[str, Words] = field(default_factory=dict)
    query_words: Words = (3, 50)
    short_words: int = 20
    long_words: int = 100
    min_captions: int = 5
    ask: Mapping[str, float] = field(default_factory=lambda: dict(ASK))
    rounds: int = 3
    raw_caption: bool = True
    boilerplate: bool = True
    referring: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("query_words", self.query_words)
        if not 1 <= self.min_captions <= len(VIDEO_STYLES) or self.rounds < 1:
            raise InputError(
                f"enrich: min_captions {self.min_captions}, rounds {self.rounds}: use 1 to {len(VIDEO_STYLES)}, and at "
                "least 1"
            )
        if unknown := set(self.ask) - set(ASK):
            raise InputError(f"enrich: ask has no task {min(unknown)!r}: use {', '.join(ASK)}")
        if unknown := set(self.prompts) - set(PROMPTS):
            raise InputError(f"enrich: no prompt {min(unknown)!r}: use {', '.join(PROMPTS)}")
        if any(not 0 <= share <= 1 for share in self.ask.values()):
            raise InputError(f"enrich: ask {dict(self.ask)}: shares of the videos are from 0 to 1")
        shortest = min(style.fewest for style in styles(VIDEO_STYLES, self.words))
        longest = max(style.most for style in styles(VIDEO_STYLES, self.words))
        styles(FRAME_STYLES, self.frame_words)
        if (self.short_words and shortest >= self.short_words) or (self.long_words and longest <= self.long_words):
            raise InputError(
                f"enrich: no style may have under {self.short_words} and over {self.long_words} words: the ranges go "
                f"from {shortest} to {longest}; change short_words and long_words (0 asks for none) or words"
            )


class Enrich:
    """Asks for captions and for the texts of composed queries."""

    Options: ClassVar[type] = EnrichOptions

    def __init__(self, options: EnrichOptions, context: Context) -> None:
        self._options, self._seed, self._media = options, context.seed, context.media
        self._prompts = {name: read_prompt(name, options.prompts.get(name, "")) for name in PROMPTS}
        self._rules = Rules(options.boilerplate, options.referring)
        self._video_styles = styles(VIDEO_STYLES, options.words)
        self._frame_styles = styles(FRAME_STYLES, options.frame_words)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """SHA-256 of the prompts' files and of the word lists."""
        prompts = {name: f"{prompt.version} {prompt.sha256}" for name, prompt in self._prompts.items()}
        return {"prompts": prompts, "lexicon": self._rules.sha256}

    def work(self, row: Row) -> Generator[Sequence[Request], Sequence[Reply], Outcome]:
        """The row with its `enrichment`; dropped for "few-captions", "no-short-caption" or "no-long-caption"."""
        profile = Profile.of(self._options, self._seed, row["id"])
        try:
            captions = self._video_question(row, profile)
            frame = self._frame_question(row, profile)
            queries = {task: self._query_question(row, task) for task in COMPOSED if self._asked(row, task)}
        except MediaError as error:
            return Outcome.drop(row, "enrich", error.reason, detail=str(error))
        questions = [question for question in (captions, frame, *queries.values()) if question]
        for number in range(self._options.rounds):
            asking = [question for question in questions if question.wanted]
            if not asking:
                break
            replies = yield [question.request(number) for question in asking]
            for question, reply in zip(asking, replies, strict=True):
                question.take(reply)
                if question is captions and number + 1 < self._options.rounds:
                    self._spread(question)
        rejects = [reject for question in questions for reject in question.rejects()]
        made = sum(len(question.texts) for question in questions)
        reason = self._set_fault(captions)
        if reason:
            score = float(len(captions.texts))
            detail = json.dumps([text["words"] for text in captions.made()])
            rejects.insert(0, Reject(row["id"], "enrich", reason, score, detail=f"words of its captions: {detail}"))
            return Outcome(row["id"], (), tuple(rejects), made + len(rejects) - 1, made)
        enrichment: dict[str, Any] = {
            "profile": profile.information,
            "readability": profile.readability,
            "education": profile.education,
            "captions": captions.made(),
        }
        if frame and frame.texts:
            enrichment["frame"] = {**frame.about, "captions": frame.made()}
        enrichment["composed"] = {
            task: {**question.about, **question.made()[0]} for task, question in queries.items() if question.texts
        }
        return Outcome(row["id"], ({**row, "enrichment": enrichment},), tuple(rejects), made + len(rejects), made)

    def _asked(self, row: Row, task: str) -> bool:
        """Whether this video is among those that are asked for a task, and has what the task needs."""
        references = row.get(COMPOSED[task][1] if task in COMPOSED else "frames")
        return bool(references) and chance(self._seed, row["id"], task) < self._options.ask.get(task, 0)

    def _video_question(self, row: Row, profile: Profile) -> Question:
        hint = row["caption"][:LONGEST_HINT_CHARS] if self._options.raw_caption else ""
        values = {
            "shares": VIDEO_SHARES,
            "profile": profile.information,
            "lean": LEANS[profile.information],
            "readability": profile.readability,
            "education": profile.education,
            "caption": json.dumps(hint, ensure_ascii=False) if hint else "",
        }
        parts = (self._media.video(row["video"]),)
        prompt = self._prompts["video_captions"]
        return Question(f"{row['id']}/captions", prompt, parts, self._video_styles, values, self._rules, self._seed)

    def _frame_question(self, row: Row, profile: Profile) -> Question | None:
        if not self._asked(row, "T2I"):
            return None
        locator = self._reference(row, "frames", "T2I")
        values = {"shares": FRAME_SHARES, "readability": profile.readability, "education": profile.education}
        question = Question(
            f"{row['id']}/frame",
            self._prompts["frame_captions"],
            (self._media.image(locator),),
            self._frame_styles,
            values,
            self._rules,
            self._seed,
        )
        question.about = {"image": locator}
        return question

    def _query_question(self, row: Row, task: str) -> Question:
        name, references, kind = COMPOSED[task]
        locator = self._reference(row, references, task)
        kinds = STRATEGIES[task]
        strategy = kinds[pick(len(kinds), self._seed, row["id"], task, "strategy")]
        reference: Part = self._media.image(locator) if kind == "image" else self._media.video(locator)
        question = Question(
            f"{row['id']}/{task.lower()}",
            self._prompts[name],
            (reference, self._media.video(row["video"])),
            (Style("query", "query", *self._options.query_words),),
            {"strategy": strategy},
            self._rules,
            self._seed,
        )
        question.about = {"reference": locator, "strategy": strategy}
        return question

    def _reference(self, row: Row, references: str, task: str) -> Mapping[str, Any]:
        return row[references][pick(len(row[references]), self._seed, row["id"], task, "reference")]

    def _spread(self, question: Question) -> None:
        """Asks again for the shortest or the longest style where no caption is short, or none is long."""
        short, long = self._options.short_words, self._options.long_words
        if question.wanted or not question.texts:
            return
        if not _has(question, lambda words: not short or words < short):
            style = min(self._video_styles, key=lambda style: style.fewest)
            question.again(style.within(style.fewest, min(style.most, short - 1)))
        if not _has(question, lambda words: not long or words > long):
            style = max(self._video_styles, key=lambda style: style.most)
            question.again(style.within(max(style.fewest, long + 1), style.most))

    def _set_fault(self, question: Question) -> str:
        short, long = self._options.short_words, self._options.long_words
        if len(question.texts) < self._options.min_captions:
            return "few-captions"
        if not _has(question, lambda words: not short or words < short):
            return "no-short-caption"
        return "" if _has(question, lambda words: not long or words > long) else "no-long-caption"


def _has(question: Question, suits: Callable[[int], bool]) -> bool:
    return any(suits(count_words(text)) for text in question.texts.values())


class Question:
    """Several texts about the same media, and what has become of each of them.

    Args:
        id: of its requests, with round and slots behind it.
        prompt: what renders it.
        parts: media of the user turn, in order.
        slots: the texts.
        values: of the prompt, beside `styles` and `wanted`.
        rules: of wording.
        seed: of the run; seeds of the requests follow from it.
    """

    def __init__(
        self,
        id: str,
        prompt: Prompt,
        parts: tuple[Part, ...],
        slots: Sequence[Style],
        values: Mapping[str, Any],
        rules: Rules,
        seed: int,
    ) -> None:
        self.id = id
        self.about: dict[str, Any] = {}  # facts that go with its texts
        self.texts: dict[str, str] = {}  # good ones by slot
        self.wanted = {slot.key: slot for slot in slots}  # still to be asked for
        self._prompt, self._parts, self._slots, self._values, self._rules = prompt, parts, tuple(slots), values, rules
        self._seed = seed
        self._faults: dict[str, tuple[str, str]] = {}  # slot -> reason, and the reply

    def request(self, number: int) -> Request:
        """Asks for what is wanted; its id says all that an earlier reply has decided of it."""
        wanted = tuple(self.wanted.values())
        system, user = self._prompt.render({**self._values, "styles": self._slots, "wanted": wanted})
        asked = ",".join(f"{slot.key}={slot.fewest}-{slot.most}" for slot in wanted)
        return Request(
            f"{self.id}/{number}/{asked}",
            system,
            (*self._parts, Text(user)),
            schema(wanted),
            self._prompt.name,
            room(wanted),
            seed=pick(1 << 31, self._seed, self.id, str(number)),
        )

    def take(self, reply: Reply) -> None:
        """Sorts the texts of a reply into good ones and faults.

        A captioner that gave no valid reply has tried as often as it was told to, so it is not asked again.
        """
        if reply.value is None:
            # A message may hold places and values; what stands before the colon is the code that is counted.
            fault = reply.error.split(":")[0] or "no-reply", f"{reply.error}\n{reply.text}"
            self._faults |= dict.fromkeys(self.wanted, fault)
            self.wanted = {}
            return
        for key, slot in list(self.wanted.items()):
            text = tidy(reply.value[key])
            fault_of = self._rules.query_fault if slot.label == "query" else self._rules.caption_fault
            reason = fault_of(text, slot)
            if not reason and text.casefold() in map(str.casefold, self.texts.values()):
                reason = "repeated"
            if reason:
                self._faults[key] = reason, reply.text or text
            else:
                self.texts[key] = text
                del self.wanted[key]
                self._faults.pop(key, None)

    def again(self, slot: Style) -> None:
        """Wants a text anew that was good, by a narrower range; until there is one the slot is empty."""
        self.wanted[slot.key] = slot
        self._faults[slot.key] = "spread", self.texts.pop(slot.key, "")

    def made(self) -> list[dict[str, Any]]:
        """The good texts in the order of their slots."""
        return [
            {
                "text": self.texts[slot.key],
                "style": slot.label,
                "words": count_words(self.texts[slot.key]),
                "cues": self._rules.cues(self.texts[slot.key]),
                "prompt": self._prompt.sha256,
            }
            for slot in self._slots
            if slot.key in self.texts
        ]

    def rejects(self) -> list[Reject]:
        """One for each slot without a good text, with the last reply."""
        return [
            Reject(f"{self.id}/{key}", "enrich", reason, detail=detail)
            for key, (reason, detail) in self._faults.items()
            if key not in self.texts
        ]
