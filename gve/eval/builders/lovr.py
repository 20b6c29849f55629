"""LoVR: captions of long videos (LoVR-V), a clip that asks for its long video (LoVR-C2V), themes of clips (LoVR-TH).

The data set ships clips only: a long video is made from its scenes, in the order of their numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gve.eval.builders.files import Row, pick, stem, texts
from gve.eval.builders.layout import Draft, Request, choose, text_set
from gve.items import InputError

LONG = "LoVR-long"
"""Folder of the joined videos below `<root>/media`."""

_SCENE = re.compile(r"(.+)-Scene-(\d+)")
_TIMEOUT_S = 1800.0


def scenes(request: Request) -> dict[str, list[str]]:
    """Long video -> its clips below the media folder, in the order of the scene numbers (not of their text)."""
    numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in request.media.names:
        if match := _SCENE.fullmatch(stem(name.rpartition("/")[2])):
            numbered[match[1]].append((int(match[2]), name))
    return {video: [name for _, name in sorted(clips)] for video, clips in sorted(numbered.items())}


def _captions(request: Request, *patterns: str) -> dict[str, str]:
    """Long video -> caption, from the first of these files that is there."""
    found = request.files.find(*patterns)
    rows = request.files.rows(found) if found else []
    return {str(pick(row, "vid", "video_id")): " ".join(texts(row.get("cap") or row.get("caption"))) for row in rows}


def lovr_v(request: Request) -> Draft:
    """Captions of the test part; every long video is in the corpus."""
    tested = _captions(request, "video_test.parquet", "video_test*.parquet", "video_test*.json*")
    if not tested:
        raise InputError(
            f"{request.files.folder} holds no video_test.parquet, which says what is tested (all_video.jsonl does "
            f"not); get {request.record.source.obtain}"
        )
    everything = {**_captions(request, "video_train*.parquet", "video_train*.json*"),
                  **_captions(request, "all_video.json*"), **tested}  # fmt: skip
    clips = scenes(request)
    videos = sorted(everything.keys() | clips.keys())
    draft = text_set(request, [(f"{video}.mp4", texts(tested.get(video))) for video in videos])
    _place_long_videos(request, draft, videos, clips)
    return draft


def lovr_c2v(request: Request) -> Draft:
    """One clip of every long video asks for it."""
    clips = scenes(request)
    if not clips:
        raise InputError(f"no <video>-Scene-<number> clips below {request.media.folder}: name their folder by --media")
    videos = [video for video, own in clips.items() if own]
    seed = request.options.seed
    chosen = {video: clips[video][choose(len(clips[video]), "C2V", seed, video)] for video in videos}
    draft = Draft(
        [{"id": f"{video}-clip", "video": request.media.listed(chosen[video])} for video in videos],
        [{"id": video, "video": f"../media/{LONG}/{video}.mp4"} for video in videos],
        [{"qid": f"{video}-clip", "pos": [video]} for video in videos],
    )
    draft.decisions["clip"] = f"drawn by seed {seed} and the video's name; it stays in the long video"
    draft.deviations.append(
        f"the query clips were drawn by this project with seed {seed} and stay in the long videos; which clips the "
        "paper took is not known"
    )
    _place_long_videos(request, draft, videos, clips)
    return draft


def lovr_th(request: Request) -> Draft:
    """Themes of clips. No public file holds them: rows of (path, theme) or an object {clip: theme} are read."""
    found = request.files.need(
        "*theme*.parquet",
        "*theme*.json*",
        obtain="the themes: LoVR's public files hold none, so use UVRB's own release",
    )
    rows: Iterable[Row]
    rows = request.files.rows(found) if not _is_mapping(found[0]) else [
        {"path": clip, "theme": theme} for clip, theme in request.files.document(found[0]).items()
    ]  # fmt: skip
    draft = text_set(
        request,
        [
            (_clip_name(str(pick(row, "path", "clip", "clip_id"))), texts(pick(row, "theme", "theme_src", "cap")))
            for row in rows
        ],
    )
    draft.deviations.append("the themes are not from LoVR's public files, which hold none")
    return draft


def _is_mapping(path: Path) -> bool:
    """Whether the file is one object of texts instead of rows."""
    if path.suffix.lower() != ".json":
        return False
    content = json.loads(path.read_text())
    return isinstance(content, dict) and not any(isinstance(value, dict) for value in content.values())


def _clip_name(path: str) -> str:
    base = path.rpartition("/")[2]
    return base if base.lower().endswith(".mp4") else f"{base}.mp4"


def _place_long_videos(
    request: Request, draft: Draft, videos: Sequence[str], clips: Mapping[str, Sequence[str]]
) -> None:
    """Points the corpus at whole files: the user's own where there are some, else joined from the clips."""
    whole = {video: name for video in videos if (name := request.media.find(f"{video}.mp4"))}
    for row in draft.corpus:
        video = row["id"]
        path = f"../media/{request.media.link}/{whole[video]}" if video in whole else f"../media/{LONG}/{video}.mp4"
        row["video"] = path
    request.media.absent.difference_update(f"{video}.mp4" for video in videos)
    request.media.found.update(f"{video}.mp4" for video in whole)
    todo = {
        video: [request.media.folder / name for name in clips.get(video, ())] for video in videos if video not in whole
    }
    draft.decisions["long_videos"] = (
        f"{len(whole)} whole files of the user, {len(todo)} joined from their clips in the order of scene numbers: "
        "packets copied, nothing encoded again, no sound"
    )
    gaps = {video: missing for video, own in clips.items() if (missing := _missing_numbers(own))}
    if gaps:
        draft.decisions["scene_numbers_that_are_not_there"] = gaps
    if not request.has_media and not clips:
        request.media.absent.update(f"{video}.mp4" for video in todo)
        return  # listings only
    draft.failed |= join_scenes(todo, request)


def _missing_numbers(clips: Sequence[str]) -> list[int]:
    """Scene numbers below the last one that no clip has."""
    numbers = {int(match[2]) for name in clips if (match := _SCENE.fullmatch(stem(name.rpartition("/")[2])))}
    return sorted(set(range(1, max(numbers, default=0) + 1)) - numbers)


def join_scenes(todo: Mapping[str, Sequence[Path]], request: Request) -> dict[str, str]:
    """Makes the long videos that are not there yet.

    Returns:
        Video -> why it could not be made.

    Raises:
        InputError: the disk has no room for them.
    """
    folder = request.root / "media" / LONG
    folder.mkdir(parents=True, exist_ok=True)
    missing = {video: clips for video, clips in todo.items() if not (folder / f"{video}.mp4").is_file()}
    needed = sum(clip.stat().st_size for clips in missing.values() for clip in clips)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: the long videos need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def join(video: str) -> str:
        return _join(missing[video], folder / f"{video}.mp4")

    failed = {}
    with ThreadPoolExecutor(request.options.jobs) as pool:
        for done, (video, problem) in enumerate(zip(missing, pool.map(join, missing), strict=True), 1):
            request.progress("long videos", done, len(missing))
            if problem:
                failed[f"{video}.mp4"] = problem
    return failed


def _join(clips: Sequence[Path], target: Path) -> str:
    """One long video, in a child process; returns what went wrong."""
    if not clips:
        return "none of its clips is on the disk"
    draft = target.with_name(f"{target.name}.tmp")
    task = {"clips": [os.path.abspath(clip) for clip in clips], "target": os.path.abspath(draft)}
    command = [sys.executable, "-P", str(Path(__file__).with_name("concat.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        draft.unlink(missing_ok=True)
        return f"joining its {len(clips)} clips took more than {_TIMEOUT_S:g} s"
    reply = json.loads(done.stdout) if done.returncode == 0 else {"error": f"the process ended with {done.returncode}"}
    if "error" in reply:
        draft.unlink(missing_ok=True)
        return str(reply["error"])
    os.replace(draft, target)
    return ""
