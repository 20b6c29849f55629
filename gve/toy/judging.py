"""The toy world's rules as the judge of an audit: claims as the checker reads them, verdicts as the checker gives them.

So on toy videos an audit's judge is exact, and what its sample says of a captioner can be compared with the checker
over all captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gve.synth.audit.judge import FALSE, KINDS, TRUE, UNTOLD
from gve.toy.claims import Claim, judge, parse
from gve.toy.forms import Fact, Noun
from gve.toy.language import DIALECTS
from gve.toy.scenes import Clip

AUDITED: Mapping[str, str] = {
    "shape": "things",
    "colour": "looks",
    "size": "looks",
    "count": "count",
    "place": "places",
    "relation": "places",
    "ground": "setting",
    "move": "actions",
    "order": "order",
    "camera": "camera",
    "cuts": "camera",
    "theme": "theme",
}
"""The checker's kind of claim -> the audit's."""


def stated(claim: Claim) -> str:
    """The claim as a sentence of its own; two different claims are two different sentences."""
    place = f" (scene {claim.scene + 1})" if claim.scene else ""
    if not claim.form.facts:
        (noun,) = claim.form.nouns
        what = {
            "shape": f"the {noun.color or 'coloured'} thing is a {noun.shape}",
            "colour": f"the {noun.shape or 'thing'} is {noun.color}",
            "size": f"the {noun.color} {noun.shape or 'thing'} is {noun.size}",
        }[claim.kind]
        return what + place
    nouns = " and ".join(_named(noun) for noun in claim.form.nouns)
    facts = "; ".join(_told(fact) for fact in claim.form.facts)
    return f"{nouns}: {facts}{place}" if nouns else facts + place


def split(caption: str) -> dict[str, list[str]]:
    """What a caption claims, by the audit's kinds; sentences that cannot be read claim nothing."""
    claims: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for claim in parse(caption).claims:
        claims[AUDITED[claim.kind]].append(stated(claim))
    return claims


def verdicts(caption: str, claims: Mapping[str, str], clip: Clip) -> dict[str, str]:
    """The checker's verdict on each claim; a sentence that the caption does not say cannot be told.

    Args:
        caption: the whole, since what a noun stands for follows from all that is said of it.
        claims: number -> sentence.
        clip: what is shown.
    """
    read: Sequence[Claim] = parse(caption).claims
    known: dict[str, bool | None] = {stated(claim): true for claim, true in zip(read, judge(read, clip), strict=True)}
    words = {True: TRUE, False: FALSE, None: UNTOLD}
    return {key: words[known.get(claim)] for key, claim in claims.items()}


def _named(noun: Noun) -> str:
    return f"the {' '.join(filter(None, (noun.size, noun.color, noun.shape or 'thing')))}"


def _told(fact: Fact) -> str:
    if fact.kind == "at":
        return DIALECTS["A"].at(fact.value)
    value = ", ".join(map(str, fact.value)) if isinstance(fact.value, tuple) else fact.value
    return fact.kind if value is None else f"{fact.kind} {value}"
