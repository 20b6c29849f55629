"""`gve index`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gve.items import InputError
from gve.search_cli.model import add_model_options, address_of, model_name, open_model, setting_of, workers_of

if TYPE_CHECKING:
    from gve.search.files import Walk
    from gve.search.index import Index
    from gve.search.indexing import Changes, Update
    from gve.search.windows import Windows

_NAMED = 10  # files told by name of each kind


def main(argv: Sequence[str]) -> int:
    """Brings an index up to date with folders.

    Args:
        argv: the words after `gve index`.

    Returns:
        0 done, 1 a video could not be read, the work failed, or nothing is in the index. A file that is no video beside
        others that are is no failure.

    Raises:
        InputError: a folder, an option or the model cannot be used, or the index is of another model.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _index(arguments)
    except OSError as error:
        print(f"gve index: failed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve index",
        description="Indexes the videos of folders for gve search. Long videos are read in overlapping windows; no "
        "file is cut or copied. Run again, it takes what is new or has changed and nothing else; killed, it goes on "
        "where it stopped. Names that begin with a dot are left out, links to folders are not followed. Exit 1 when a "
        "file broke its reader or was read in part, or nothing is in the index.",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="folders of videos, or single files")
    parser.add_argument("--out", required=True, metavar="INDEX", help="its folder, or s3://bucket/name and the like")
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="length of a window; 0: every file is one clip (default 10)"
    )
    parser.add_argument(
        "--stride", type=float, metavar="SECONDS", help="from one window to the next; half a window when not given"
    )
    parser.add_argument("--prune", action="store_true", help="forget files of these folders that are gone")
    parser.add_argument("--retry", action="store_true", help="look again into files that were no videos")
    parser.add_argument(
        "--max-gib", type=float, default=64.0, metavar="GIB", help="larger files are left out and named (default 64)"
    )
    parser.add_argument(
        "--ivf",
        type=int,
        nargs="?",
        const=0,
        metavar="CELLS",
        help="also make an inverted file for approximate search (gve search --nprobes); square root of the windows "
        "when no number is given",
    )
    parser.add_argument(
        "--batch-windows", type=int, default=2048, metavar="N", help="windows of one commit (default 2048)"
    )
    parser.add_argument("--dry-run", action="store_true", help="look into files and say what would be done")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_model_options(parser, stored=True)
    return parser


def _index(arguments: argparse.Namespace) -> int:
    from gve.encode.ranks import broadcast, joined
    from gve.search.files import walk
    from gve.search.index import Index, IndexRecord, local
    from gve.search.indexing import Changes, check_record, compare, update_index

    if arguments.batch_windows < 1 or arguments.max_gib <= 0:
        raise InputError("--batch-windows and --max-gib must be above 0")
    uri = address_of(arguments.out)
    start = time.monotonic()
    with joined() as place:
        index = Index.open(uri) if broadcast(Index.exists(uri)) else None
        windows = _windows(arguments, index)
        found = walk(arguments.folders, leave_out=[uri] if local(uri) else [])
        changes = Changes()
        if place.rank == 0:
            changes = compare(index, found, max_bytes=int(arguments.max_gib * 2**30), retry=arguments.retry)
        if arguments.dry_run:
            if place.rank == 0:
                _tell_plan(arguments, changes, found, windows)
            return 0
        if not arguments.folders and (index is None or arguments.ivf is None):
            raise InputError("which folders? gve index DIR... --out INDEX")
        record = index.record if index else None
        if record is None and arguments.model is None:
            raise InputError("a new index needs --model")
        model = model_name(arguments.model) if arguments.model else record.model  # type: ignore[union-attr]
        setting = setting_of(arguments, record.setting if record else None)
        adapter = arguments.adapter or (record.adapter if record else "auto")
        base = arguments.base or (record.base if record else "")
        update = None
        if arguments.folders:
            encoder = open_model(arguments, place, setting, model=model, adapter=adapter, base=base)
            if index is None:
                record = IndexRecord(
                    model, encoder.fingerprint, encoder.dim, adapter, base, setting, encoder.inputs, windows
                )
                index = broadcast(None) if place.rank else Index.create(uri, record)
                if place.size > 1:
                    broadcast(True)
                    index = index or Index.open(uri)
            assert index is not None  # made above where there was none
            check_record(index, encoder, windows, model)
            update = update_index(
                index,
                changes,
                encoder,
                prune=arguments.prune,
                batch_windows=arguments.batch_windows,
                jobs=max(1, workers_of(arguments)),
                progress=not arguments.json,
            )
        assert index is not None
        if place.rank == 0:
            if arguments.ivf is not None:
                index.build_ivf(arguments.ivf or None)
            _tell(arguments, index, changes, found, update, time.monotonic() - start)
    if update and not len(index):
        print("gve index: the index is empty: nothing that was named is a video that can be read", file=sys.stderr)
        return 1
    return 1 if update and (update.damaged or _broken(update)) else 0


def _windows(arguments: argparse.Namespace, index: Index | None) -> Windows:
    """The policy that is asked for; what is not given is the index' own."""
    from gve.search.windows import Windows

    if index is None:
        length = 10.0 if arguments.window is None else arguments.window
        return Windows(length, length / 2 if arguments.stride is None else arguments.stride)
    own = index.record.windows
    length = own.length_s if arguments.window is None else arguments.window
    usual = own.stride_s if length == own.length_s else length / 2
    return Windows(length, usual if arguments.stride is None else arguments.stride)


def _broken(update: Update) -> dict[str, str]:
    """Rejected files that are videos: damaged, too large to decode, or out of time. Others are none at all."""
    return {name: reason for name, reason in update.rejected.items() if not _no_video(reason)}


def _no_video(reason: str) -> bool:
    return reason.endswith(("(not-a-video)", "(no-video-stream)", "(empty)"))


def _tell_plan(arguments: argparse.Namespace, changes: Changes, found: Walk, windows: Windows) -> None:
    """What a run would do."""
    from gve.search.indexing import inspect

    rejected, count, seconds, touched = {}, 0, 0.0, 0
    for seen in inspect(changes, jobs=max(1, workers_of(arguments))):
        if seen.touched:
            touched += 1
        elif seen.file is None:
            rejected[seen.found.name] = seen.reason
        else:
            count += len(windows.spans(seen.file.duration_s))
            seconds += seen.file.duration_s
    told = {
        "dry_run": True,
        "new": len(changes.new),
        "changed": len(changes.changed) - touched,
        "unchanged": changes.unchanged + touched,
        "windows": count,
        "seconds": round(seconds, 1),
        "vanished": list(changes.vanished.values()),
        "rejected": rejected,
        **_left_out(changes, found),
    }
    if arguments.json:
        print(json.dumps(told))
        return
    print(
        f"{told['new']} new and {told['changed']} changed files, {len(rejected)} of them no videos that can be used; "
        f"{count} windows of {seconds / 60:.1f} minutes to embed ({windows}); {told['unchanged']} files as they are"
    )
    _tell_names("no video", (f"{name}: {reason}" for name, reason in rejected.items()))
    _tell_names("gone" if arguments.prune else "gone, kept without --prune", changes.vanished.values())
    _tell_left_out(told)


def _left_out(changes: Changes, found: Walk) -> dict[str, Any]:
    from gve.search.files import printable

    return {
        "known_bad": changes.known_bad,
        "huge": [file.name for file in changes.huge],
        "unreadable": {printable(path): reason for path, reason in found.unreadable.items()},
        "hidden": found.hidden,
    }


def _tell(
    arguments: argparse.Namespace, index: Index, changes: Changes, found: Walk, update: Update | None, seconds: float
) -> None:
    told: dict[str, Any] = {
        "index": index.uri,
        "model": index.record.model,
        "windows": len(index),
        "files": len(index.files()),
        "seconds": round(seconds, 1),
        "ivf": index.approximate,
    }
    if update is not None:
        told |= {
            "update": asdict(update),
            "unchanged": changes.unchanged,
            "vanished": list(changes.vanished.values()),
            **_left_out(changes, found),
        }
    if arguments.json:
        print(json.dumps(told))
        return
    if update is not None:
        print(
            f"{update.added} files added, {update.changed} changed, {changes.unchanged + update.touched} as they were, "
            f"{update.pruned} forgotten; {update.windows} windows, {update.reused} known before; {seconds:.0f} s"
        )
        broken = _broken(update)
        _tell_names("cannot be read", broken.values())
        _tell_names("partly read", (f"{name}: {reason}" for name, reason in update.damaged.items()))
        _tell_names("no video", (name for name in update.rejected if name not in broken))
        _tell_names("changed while it was read, run again", update.unstable)
        if not arguments.prune:
            _tell_names("gone, kept without --prune", changes.vanished.values())
        _tell_left_out(told)
    print(f"{index.uri}: {told['windows']} windows of {told['files']} files, {index.record.windows}")


def _tell_left_out(told: dict[str, Any]) -> None:
    _tell_names("larger than --max-gib", told["huge"])
    _tell_names("not looked at", (f"{name}: {reason}" for name, reason in told["unreadable"].items()))
    if told["known_bad"]:
        print(f"no videos, as before: {told['known_bad']} files (--retry looks again)")
    if told["hidden"]:
        print(f"hidden: {told['hidden']} names begin with a dot")


def _tell_names(kind: str, names: Iterable[str]) -> None:
    listed = list(names)
    if not listed:
        return
    print(f"{kind}: {len(listed)}")
    for name in listed[:_NAMED]:
        print(f"  {name}")
    if len(listed) > _NAMED:
        print(f"  and {len(listed) - _NAMED} more")
