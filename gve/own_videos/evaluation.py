"""The held-out videos as retrieval sets, scored by the engine of the benchmark."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from gve.encode.encoder import Execution, LoadedEncoder
from gve.encode.pretrained import load_encoder
from gve.eval.records import SetRecord, Source
from gve.eval.run import BenchmarkRun, Setting, SettingRun
from gve.eval.uvrb import RetrievalSet, find_record
from gve.items import InputError, Item
from gve.own_videos.videos import ASKS_LIKE, OwnVideo

_OWN = Source("own videos", "the folder or csv of the user", "the user's")


def held_out_sets(videos: Sequence[OwnVideo]) -> list[RetrievalSet]:
    """own-T2V: captions ask for their videos, own-I2V: a frame of each does; all against all held-out videos.

    Captions that are equal but for case are one query with several answers. own-T2V is left out where no held-out
    video has a caption.

    Args:
        videos: held out.
    """
    corpus = tuple(Item.of(video=video.path, id=video.sha256[:16]) for video in videos)
    asked: dict[str, dict[str, list[int]]] = {"T2V": {}, "I2V": {}}
    for row, video in enumerate(videos):
        asked["I2V"][video.frame] = [row]
        for caption in video.captions:
            answers = asked["T2V"].setdefault(caption.casefold(), [])
            if row not in answers:
                answers.append(row)
    texts = {caption.casefold(): caption for video in videos for caption in video.captions}
    sets = []
    for task, queries in asked.items():
        if not queries:
            continue
        model = find_record(ASKS_LIKE[task])
        record = SetRecord(
            f"own-{task}", model.ability, model.query, len(queries), len(corpus), model.instruction, "own videos", _OWN
        )
        items = tuple(
            Item.of(
                text=texts[query] if task == "T2V" else None,
                image=query if task == "I2V" else None,
                instruction=model.instruction,
                id=f"{task}-{number}",
            )
            for number, query in enumerate(queries)
        )
        named = [[videos[row].sha256 for row in rows] for rows in queries.values()]
        data = json.dumps([list(queries) if task == "T2V" else named, named, [video.sha256 for video in videos]])
        sets.append(
            RetrievalSet(
                record,
                items,
                corpus,
                tuple(tuple(rows) for rows in queries.values()),
                None,
                notes=("the user's own videos, held out by content",),
                data_hash=hashlib.sha256(data.encode()).hexdigest(),
            )
        )
    return sets


def evaluate_own(
    videos: Sequence[OwnVideo], model: str, out: Path, setting: Setting, execution: Execution, *, base: str = ""
) -> SettingRun:
    """Scores one model on held-out videos; `out` becomes a run that `gve uvrb compare` and `report` read.

    Args:
        videos: held out.
        model: as `load_encoder` takes it.
        out: folder of the run; its vectors are kept, so an interrupted evaluation goes on.
        setting: frames, tokens.
        execution: device, dtype, workers.
        base: where a checkpoint's base lies.

    Raises:
        InputError: there are too few videos, or the model cannot be opened.
    """
    if len(videos) < 2:
        raise InputError(f"{len(videos)} held-out videos cannot be told apart: hold out two at least")

    def load(own: Setting) -> LoadedEncoder:
        # Pictures too: a checkpoint has a budget for them, and its base would take another.
        inputs = {**own.inputs, "max_image_tokens": own.tokens}
        return load_encoder(model, base=base, inputs=inputs, execution=execution)

    facts = {"held_out": len(videos), "base": base, **dataclasses.asdict(execution)}
    return BenchmarkRun(model, load, held_out_sets(videos), out, facts=facts, execution=execution).run([setting])[0]
