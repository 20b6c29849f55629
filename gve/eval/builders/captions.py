"""Sets whose queries are captions of clips: MSR-VTT, DiDeMo, CaReBench, VDC, CameraBench, DREAM-1K."""

from __future__ import annotations

from collections.abc import Iterator

from gve.eval.builders.files import Row, pick, stem, texts
from gve.eval.builders.layout import Draft, Request, corpus_rows, text_set
from gve.items import InputError


def msrvtt_rows(request: Request) -> list[tuple[str, str, str]]:
    """(query id, clip, sentence) of the 1k-A list: the csv of JSFusion in both dialects, or a table of a hub copy."""
    found = request.files.need(
        "MSRVTT_JSFUSION_test.csv",
        "msrvtt_test.csv",
        "*test_1k*.json*",
        "*test_1k*.parquet",
        "test_1k/*.parquet",
        "test-*.parquet",
        obtain=request.record.source.obtain,
    )
    rows = []
    for number, row in enumerate(request.files.rows(found)):
        said = texts(pick(row, "sentence", "caption"))
        if len(said) != 1:
            raise InputError(f"{found[0]}: row {number} has {len(said)} sentences; the 1k-A list has one")
        clip = str(pick(row, "video_id", "video"))
        rows.append((str(row.get("key") or f"ret{number}"), f"{clip.removesuffix('.mp4')}.mp4", said[0]))
    return rows


def msrvtt(request: Request) -> Draft:
    """One query a row, as the published count has it, although five sentences stand twice."""
    rows = msrvtt_rows(request)
    told: dict[str, list[str]] = {}
    for _, clip, sentence in rows:
        told.setdefault(sentence, []).append(stem(clip))
    draft = Draft(
        [{"id": key, "text": sentence} for key, _, sentence in rows],
        corpus_rows(request, [clip for _, clip, _ in rows]),
        [{"qid": key, "pos": told[sentence]} for key, _, sentence in rows],
    )
    draft.decisions["texts"] = "one query a row; every clip whose sentence is the same is a positive"
    if shared := sum(len(told[sentence]) > 1 for _, _, sentence in rows):
        draft.decisions["queries_with_several_positives"] = shared
    return draft


def didemo(request: Request) -> Draft:
    """All sentences of a video, in the order of the file, joined by one space."""
    if table := request.files.find("didemo_test*.parquet", "didemo_test*.json*", "test-*.parquet"):
        return text_set(
            request, [(str(pick(row, "video")), texts(pick(row, "caption"))) for row in request.files.rows(table)]
        )
    sentences = request.files.need("test_data.json", obtain=request.record.source.obtain)
    listed = request.files.need("test_list.txt", obtain=request.record.source.obtain)
    told: dict[str, list[str]] = {}
    for row in request.files.rows(sentences):
        told.setdefault(str(pick(row, "video")), []).extend(texts(row.get("description")))
    names = [line.strip() for line in request.files.read(listed[0]).decode().splitlines() if line.strip()]
    if unknown := [name for name in names if name not in told]:
        raise InputError(f"{listed[0]}: {unknown[0]} is not in {sentences[0].name}")
    draft = text_set(request, [(name, [" ".join(told[name])]) for name in names])
    draft.decisions["paragraph"] = f"sentences in the order of {sentences[0].name}, each stripped, joined by one space"
    if others := set(told) - set(names):
        # In the official file each of them is a listed video under a second suffix, which carries sentences of its own.
        twins = sum(stem(name) in {*map(stem, names)} for name in others)
        draft.decisions["left_out"] = (
            f"{sum(len(told[name]) for name in others)} sentences of {len(others)} names that are not in "
            f"{listed[0].name}; {twins} of them are listed under another suffix"
        )
    draft.decisions["trim"] = "whole files; the sentences describe the first 30 s only"
    return draft


_CAREBENCH = {"CRB-G": "caption", "CRB-S": "spatial_caption", "CRB-T": "temporal_caption"}


def carebench(request: Request) -> Draft:
    """One field of metadata.json a set."""
    field = _CAREBENCH[request.record.name]
    found = request.files.need("metadata.json", "*carebench*.json", obtain=request.record.source.obtain)
    return text_set(request, [(str(pick(row, "video")), texts(row.get(field))) for row in request.files.rows(found)])


_VDC = {"VDC-O": "main_object_caption", "VDC-D": "detailed_caption"}


def vdc(request: Request) -> Draft:
    """Captions by kind. The files of VDCScore_qa hold questions keyed by video and no caption."""
    field = _VDC[request.record.name]
    found = request.files.need(
        "VDC_1k.jsonl", "VDC_1k_captions.jsonl", "*vdc*.parquet", "*vdc*1k*.json*", obtain=request.record.source.obtain
    )
    rows = request.files.rows(found)
    if rows and not any(field in row for row in rows):
        raise InputError(
            f"{found[0]}: no row has {field}: these look like the questions of VDCScore, get "
            f"{request.record.source.obtain}"
        )
    return text_set(
        request, [(_with_suffix(str(pick(row, "video_name", "video_id"))), texts(row.get(field))) for row in rows]
    )


def camerabench(request: Request) -> Draft:
    """The hub's test.jsonl (path or video, labels, caption), or caption_data.json (video, question, answer)."""
    found = request.files.need("caption_data.json", "test.jsonl", obtain=request.record.source.obtain)

    def clip(row: Row) -> str:
        name = str(pick(row, "video", "path")).rpartition("/")[2]
        return f"{name[:-4]}.mp4" if name.endswith(".gif") else name  # the hub shows GIF copies of the mp4 files

    draft = text_set(request, [(clip(row), texts(pick(row, "caption", "answer"))) for row in request.files.rows(found)])
    for count, reason in request.record.known_counts.items():
        if len(draft.queries) == count:
            draft.deviations.append(f"{count} queries where {request.record.num_queries} are published: {reason}")
    return draft


def dream1k(request: Request) -> Draft:
    """Every event of every clip; equal strings are one query."""
    found = request.files.need("DREAM-1k.jsonl", "*dream*1k*.json*", obtain=request.record.source.obtain)

    def clips() -> Iterator[tuple[str, list[str]]]:
        for row in request.files.rows(found):
            extra = row.get("extra_info")
            events = extra.get("events") if isinstance(extra, dict) else row.get("events")
            yield f"{pick(row, 'vid', 'idx')}.mp4", texts(events or [])

    return text_set(request, clips())


def _with_suffix(name: str) -> str:
    return name if name.lower().endswith((".mp4", ".mkv", ".webm", ".mov", ".avi")) else f"{name}.mp4"
