"""Classification sets from their own lists: clips ask for the text of their label."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gve.eval.builders.files import pick, stem, texts
from gve.eval.builders.layout import Draft, Request
from gve.eval.classification import BREAKFAST, label_words
from gve.items import InputError

Labelled = tuple[list[tuple[str, str]], Sequence[str]]
"""([(file of a clip, label)], all labels of the set), both as the lists write them."""


def classification(request: Request) -> Draft:
    """One of the five sets, from its own lists or from the rows of MMEB-V2 (video_id, pos_text)."""
    table = request.files.find("test-*.parquet", "*test*.parquet", "mmeb*.json*", f"{request.record.name}*.jsonl")
    read: Callable[[Request], Labelled] = _READERS[request.record.name]
    clips, labels = _mmeb(request, [*table]) if table else read(request)
    words = {label: label_words(request.record, label) for label in (*labels, *(label for _, label in clips))}
    names = sorted({words[label] for label in labels})
    if unknown := sorted({label for _, label in clips if words[label] not in names}):
        raise InputError(f"{request.record.name}: label {unknown[0]!r} is not among the {len(names)} labels of the set")
    if "{name}" not in request.options.label_text:
        raise InputError(f"--label-text {request.options.label_text!r} must hold {{name}}, the place of the label")
    ids = {name: f"label-{number:03d}" for number, name in enumerate(names)}
    kept = [(clip, label) for clip, label in clips if not request.options.skip_missing or request.media.find(clip)]
    if not kept:
        raise InputError(f"{request.record.name}: none of its {len(clips)} clips is below {request.media.folder}")
    draft = Draft(
        [{"id": stem(clip), "video": request.media.listed(clip)} for clip, _ in kept],
        [{"id": ids[name], "text": request.options.label_text.replace("{name}", name)} for name in names],
        [{"qid": stem(clip), "pos": [ids[words[label]]]} for clip, label in kept],
    )
    draft.decisions["label_text"] = request.options.label_text
    draft.decisions["clips"] = "rows of MMEB-V2" if table else request.record.built_from
    if request.record.name in ("UCF101", "HMDB51") and not table:
        draft.decisions["split"] = request.options.split
    if len(kept) < len(clips):
        draft.deviations.append(
            f"{len(clips) - len(kept)} of {len(clips)} clips are not on this disk and were left out"
        )
    if len(names) != request.record.num_corpus:
        draft.deviations.append(f"{len(names)} labels where the set has {request.record.num_corpus}")
    return draft


def _mmeb(request: Request, table: list[Any]) -> Labelled:
    rows = request.files.rows(table)
    clips = [(f"{pick(row, 'video_id')}.mp4", texts(pick(row, "pos_text"))[0]) for row in rows]
    labels = {label for _, label in clips} | {text for row in rows for text in texts(row.get("neg_text") or [])}
    return clips, sorted(labels | set(_label_list(request)))


def _label_list(request: Request) -> list[str]:
    """A list with a label a line, where there is one."""
    found = request.files.find("label_map_k700.txt", "label_map.txt", "classInd.txt")
    lines = request.files.read(found[0]).decode("utf-8-sig").splitlines() if found else []
    return [re.sub(r"^\d+ ", "", line.strip()) for line in lines if line.strip()]


def _kinetics(request: Request) -> Labelled:
    """A csv with the columns label, youtube_id, time_start, time_end, split."""
    found = request.files.need("kinetics*val*.csv", "val*.csv", obtain=request.record.source.obtain)
    clips = []
    for row in request.files.rows(found):
        start, end = (int(float(pick(row, name))) for name in ("time_start", "time_end"))
        clips.append((f"{pick(row, 'youtube_id')}_{start:06d}_{end:06d}.mp4", str(pick(row, "label"))))
    return clips, _label_list(request) or sorted({label for _, label in clips})


def _ucf(request: Request) -> Labelled:
    """`Class/v_Class_gXX_cYY.avi` a line. The folder is the class: HandstandPushups holds files of another spelling."""
    name = f"testlist0{request.options.split}.txt"
    found = request.files.need(name, f"*{name}", obtain=request.record.source.obtain)
    lines = request.files.read(found[0]).decode("utf-8-sig").splitlines()
    clips = [(path, path.split("/")[0]) for line in lines if (path := line.strip().split(" ")[0])]
    if odd := [path for path, _ in clips if "/" not in path]:
        raise InputError(f"{found[0]}: {odd[0]!r} is not Class/v_Class_gXX_cYY.avi")
    return clips, _label_list(request) or sorted({label for _, label in clips})


def _hmdb(request: Request) -> Labelled:
    """51 files `<class>_test_split<N>.txt` (name and flag: 1 train, 2 test, 0 unused), or one csv of all splits."""
    split = request.options.split
    if table := request.files.find("hmdb51.csv"):
        rows = request.files.rows(table)
        labels = sorted({str(pick(row, "label")) for row in rows})
        return [
            (str(row["video_id"]), str(row["label"])) for row in rows if str(pick(row, f"split{split}")) == "2"
        ], labels
    clips, labels = [], []
    for name in request.files.names:
        if match := re.fullmatch(rf"(.+)_test_split{split}\.txt", name.rpartition("/")[2]):
            labels.append(match[1])
            for line in request.files.read(request.files.folder / name).decode().splitlines():
                video, _, flag = line.strip().rpartition(" ")
                if flag == "2":
                    clips.append((video.strip(), match[1]))
    if not labels:
        raise InputError(f"{request.files.folder} holds no *_test_split{split}.txt; get {request.record.source.obtain}")
    return clips, labels


def _ssv2(request: Request) -> Labelled:
    """validation.json (id, template with brackets) and labels.json (template without -> number as text)."""
    found = request.files.need(
        "something-something-v2-validation.json", "*validation.json", obtain=request.record.source.obtain
    )
    listed = request.files.find("something-something-v2-labels.json", "*labels.json")
    labels = [*request.files.document(listed[0])] if listed else _label_list(request)
    if not labels:
        raise InputError(f"{request.files.folder} holds neither labels.json nor label_map.txt")
    return [(f"{pick(row, 'id')}.webm", str(pick(row, "template"))) for row in request.files.rows(found)], labels


def _breakfast(request: Request) -> Labelled:
    """No list: the files' own names, `P03_cam01_P03_cereals.avi` or `P03/cam01/P03_cereals.avi`; camera 1 only."""
    clips = []
    for name in request.media.names:
        match = re.search(r"(P\d+)[_/]cam01[_/]\1_([A-Za-z]+)\.\w+$", f"/{name}")
        if match:
            clips.append((name, match[2]))
    if not clips:
        raise InputError(f"no P03_cam01_P03_cereals.avi or P03/cam01/P03_cereals.avi below {request.media.folder}")
    return clips, [*BREAKFAST]


_READERS: dict[str, Callable[[Request], Labelled]] = {
    "K700": _kinetics,
    "UCF101": _ucf,
    "HMDB51": _hmdb,
    "SSV2": _ssv2,
    "Breakfast": _breakfast,
}
