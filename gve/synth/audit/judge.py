"""The judge pass: captions of a sample are taken apart into claims, and each claim is checked against the pictures.

Two questions for each caption, to any captioner: what does it claim (text alone, so that the pictures cannot mend it),
and which of that is true (pictures, caption and claims). The share of false claims among those that could be decided is
the hallucination rate. Claims of one video are not independent, so its interval is by clusters.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gve.items import Text
from gve.synth.asking import converse
from gve.synth.audit.notes import Notes
from gve.synth.audit.rates import Rate, rate
from gve.synth.media import MediaStore
from gve.synth.profiles import pick
from gve.synth.prompts import Prompt, read_prompt
from gve.synth.records import Captioner, Reply, Request
from gve.synth.units import Outcome, Row
from gve.video import MediaError

KINDS: Mapping[str, str] = {
    "things": "that something or someone is there, and what it is",
    "looks": "how it looks: colour, size, form, material, clothing, writing on it",
    "count": "how many there are",
    "places": "where it is, or how it stands to something else",
    "setting": "the surroundings: ground, background, room, weather, light",
    "actions": "what it does, or that it rests",
    "order": "what comes before, after or during something else",
    "camera": "how the camera moves, from where it looks, cuts",
    "theme": "the whole: mood, pace, style, genre",
}
"""Kind of claim -> what belongs to it."""
TRUE, FALSE, UNTOLD = VERDICTS = ("true", "false", "cannot tell")
MOST_CLAIMS = 40
"""Of one kind in one caption; the longest captions of the toy world have 24."""
LONGEST_CLAIM_CHARS = 240
TOGETHER = 24
"""Claims that are checked in one request."""
CLAIMS, CHECK = "claims", "verdicts"
"""Names of the prompts and of the replies' schemas."""


@dataclass(frozen=True)
class Told:
    """A caption of the sample.

    Args:
        id: unique in the run.
        video: id of the weak pair.
        of: "video" or "frame": what it tells of.
        style: of its caption.
        text: as it stands.
        medium: locator of the video or the picture.
    """

    id: str
    video: str
    of: str
    style: str
    text: str
    medium: Mapping[str, Any]


def captions_of(row: Row) -> Iterator[Told]:
    """Every caption of a row of `enrich` that speaks for itself; the text of a composed query does not."""
    enrichment = row["enrichment"]
    for place, caption in enumerate(enrichment["captions"]):
        yield Told(f"{row['id']}/{place}", row["id"], "video", caption["style"], caption["text"], row["video"])
    if frame := enrichment.get("frame"):
        for place, caption in enumerate(frame["captions"]):
            id = f"{row['id']}/frame/{place}"
            yield Told(id, row["id"], "frame", caption["style"], caption["text"], frame["image"])


def material(caption: str, claims: Mapping[str, str] | None = None) -> str:
    """What a request is about, as one JSON object that stands on a line of its own in the user turn."""
    values: dict[str, Any] = {"caption": caption}
    if claims is not None:
        values["claims"] = claims
    return json.dumps(values, ensure_ascii=False)


def read_material(request: Request) -> tuple[str, Mapping[str, str]]:
    """Caption and claims of a request of the judge pass, for a judge that is no language model.

    Raises:
        LookupError: it shows none.
    """
    for part in request.parts:
        for line in part.text.split("\n") if isinstance(part, Text) else ():
            if line.startswith('{"caption": '):
                values = json.loads(line)
                return values["caption"], values.get("claims", {})
    raise LookupError("the prompt shows no material")


def claims_schema() -> dict[str, Any]:
    """A list of sentences for each kind."""
    sentence = {"type": "string", "minLength": 1, "maxLength": LONGEST_CLAIM_CHARS}
    lists = {kind: {"type": "array", "items": sentence, "maxItems": MOST_CLAIMS} for kind in KINDS}
    return {"type": "object", "properties": lists, "required": list(lists), "additionalProperties": False}


def verdicts_schema(keys: Sequence[str]) -> dict[str, Any]:
    """A verdict for each claim, by its number."""
    own = {key: {"type": "string", "enum": list(VERDICTS)} for key in keys}
    return {"type": "object", "properties": own, "required": list(keys), "additionalProperties": False}


class Check:
    """Asks about one caption; a `gve.synth.units.AskingStage` without a configuration.

    Args:
        media: of the run.
        seed: of the requests.
        prompts: name -> a file of one's own, or a version; the newest of the package otherwise.
    """

    def __init__(self, media: MediaStore, seed: int = 0, prompts: Mapping[str, str] | None = None) -> None:
        self._media, self._seed = media, seed
        self._prompts = {name: read_prompt(name, (prompts or {}).get(name, "")) for name in (CLAIMS, CHECK)}

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Version and SHA-256 of each prompt."""
        return {name: f"{prompt.version} {prompt.sha256}" for name, prompt in self._prompts.items()}

    def work(self, row: Row) -> Generator[Sequence[Request], Sequence[Reply], Outcome]:
        """The caption with its `claims`: [{"kind", "claim", "verdict"}]; dropped with the error of a failed request."""
        told = Told(**row["told"])
        id = f"{told.id}/{hashlib.sha256(told.text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        try:
            shown = self._media.video(told.medium) if told.of == "video" else self._media.image(told.medium)
        except MediaError as error:
            return Outcome.drop(row, "audit", error.reason, detail=str(error))
        values = {"kinds": KINDS, "material": material(told.text)}
        (reply,) = yield [self._request(self._prompts[CLAIMS], id, (), values, claims_schema(), 4096)]
        if reply.value is None:
            return _failed(row, reply)
        claims = list(dict.fromkeys((kind, claim.strip()) for kind in KINDS for claim in reply.value[kind]))
        numbered = {str(number): claim for number, (_, claim) in enumerate(claims, 1) if claim}
        requests = []
        for begin in range(0, len(numbered), TOGETHER):
            keys = list(numbered)[begin : begin + TOGETHER]
            shown_claims = material(told.text, {key: numbered[key] for key in keys})
            values = {"verdicts": ", ".join(map(json.dumps, VERDICTS)), "material": shown_claims, "wanted": keys}
            schema, room = verdicts_schema(keys), 64 + 16 * len(keys)
            asked = f"{id}/{hashlib.sha256(shown_claims.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
            requests.append(self._request(self._prompts[CHECK], asked, (shown,), values, schema, room))
        verdicts: dict[str, str] = {}
        if requests:
            for reply in (yield requests):
                if reply.value is None:
                    return _failed(row, reply)
                verdicts |= reply.value
        found = [
            {"kind": claims[int(key) - 1][0], "claim": claim, "verdict": verdicts[key]}
            for key, claim in numbered.items()
        ]
        return Outcome(row["id"], ({**row, "claims": found},))

    def _request(
        self, prompt: Prompt, id: str, parts: tuple[Any, ...], values: Mapping[str, Any], schema: Any, room: int
    ) -> Request:
        system, user = prompt.render(values)
        id = f"{id}/{prompt.name}"
        seed = pick(1 << 31, self._seed, id)
        return Request(id, system, (*parts, Text(user)), schema, prompt.name, room, seed=seed)


def _failed(row: Row, reply: Reply) -> Outcome:
    reason = reply.error.split(":")[0] or "no-reply"
    return Outcome.drop(row, "audit", reason, detail=f"{reply.error}\n{reply.text}"[:2000])


class _Journal:
    """Good replies, kept; what failed is asked again by the next audit."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def recall(self, row: str, request: str) -> Reply | None:
        value = self._notes.get(request)
        return Reply(**value) if value else None

    def keep(self, row: str, reply: Reply) -> None:
        if reply.value is not None:
            self._notes.put(reply.id, asdict(reply))


@dataclass(frozen=True)
class Verdicts:
    """What became of the sample.

    Args:
        judged: captions in the order of the sample, each with the fields of Told and its `claims`.
        failed: reason -> captions about which the judge gave no valid reply.
        examples: one failed request of each reason, for the eye.
        tokens: read and written.
    """

    judged: Sequence[Mapping[str, Any]]
    failed: Mapping[str, int]
    examples: Mapping[str, str]
    tokens: tuple[int, int]

    def rates(self) -> dict[str, Any]:
        """Hallucination rates: of all, by kind of claim, by style of caption, of videos and of frames apart."""
        groups: dict[str, dict[str, list[tuple[str, str]]]] = {name: defaultdict(list) for name in ("kind", "style")}
        everything: list[tuple[str, str]] = []
        for caption in self.judged:
            for claim in caption["claims"]:
                entry = caption["video"], claim["verdict"]
                everything.append(entry)
                groups["kind"][claim["kind"]].append(entry)
                groups["style"][f"{caption['of']}: {caption['style']}"].append(entry)
        return {
            "all": _rate(everything).to_dict(),
            "by_kind": {kind: _rate(groups["kind"][kind]).to_dict() for kind in KINDS if kind in groups["kind"]},
            "by_style": {style: _rate(own).to_dict() for style, own in sorted(groups["style"].items())},
        }


def _rate(entries: Sequence[tuple[str, str]]) -> Rate:
    decided = [(video, verdict == FALSE) for video, verdict in entries if verdict != UNTOLD]
    return rate([false for _, false in decided], [video for video, _ in decided], len(entries) - len(decided))


def judge(
    sample: Iterable[Told], captioner: Captioner, check: Check, notes: Notes, advance: Callable[[], object]
) -> Verdicts:
    """Asks about every caption of a sample.

    Args:
        sample: captions.
        captioner: the judge.
        check: how it is asked.
        notes: of good replies; what is there is not asked again.
        advance: called after each caption.

    Raises:
        InputError: the judge does not answer.
    """
    rows: list[Row] = [{"id": told.id, "told": asdict(told)} for told in sample]
    outcomes: dict[str, Outcome] = {}

    def emit(outcome: Outcome) -> None:
        outcomes[outcome.id] = outcome
        advance()

    async def ask() -> None:
        await captioner.check()
        await converse(check, captioner, rows, _Journal(notes), emit)  # type: ignore[arg-type]

    asyncio.run(ask())
    judged, failed, examples = [], Counter[str](), dict[str, str]()
    read = written = 0
    for row in rows:
        outcome = outcomes[row["id"]]
        read, written = read + outcome.usage.prompt_tokens, written + outcome.usage.completion_tokens
        for reject in outcome.rejects:
            failed[reject.reason] += 1
            examples.setdefault(reject.reason, f"{reject.id}: {reject.detail}")
        judged += [{**made["told"], "claims": made["claims"]} for made in outcome.rows]
    return Verdicts(judged, dict(failed.most_common()), examples, (read, written))
