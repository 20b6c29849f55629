"""The command line: `python -m gve COMMAND` or `gve COMMAND`. It dispatches and holds no logic.

The command's module is imported only after the command is known, so `gve --help` needs neither torch nor Lightning.
Exit codes: 0 done, 1 the work failed, 2 the input cannot be used (one line on stderr says what and how to mend it), 85
`fit` was asked to stop (SIGTERM, SIGUSR1) and has saved its state: the same command with `--ckpt_path auto` goes on.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from gve import __version__
from gve.items import InputError, one_line

# command -> (module with `main(argv) -> int`, one line for the overview)
COMMANDS = {
    "fit": ("gve.lightning_cli", "train: --config configs/<recipe>.yaml, any key as --trainer.x, --model.x, --data.x"),
    "validate": (
        "gve.lightning_cli",
        "dev split and UVRB of a checkpoint, trained beside untrained",
    ),
    "test": ("gve.lightning_cli", "the same as validate under Lightning's test loop"),
    "predict": ("gve.lightning_cli", "embeddings of the dev split's queries and targets"),
    "plan": (
        "gve.plan_report.plan_cli",
        "steps, passes, tokens, memory, disk and GPU-hours of a recipe, without a GPU",
    ),
    "toy": ("gve.toy.toy_cli", "the toy world: videos, captions, shards, a mini UVRB, a tiny base (make, show, base)"),
    "shards": ("gve.data.shards_cli", "WebDataset shards: build from a list, check, stats"),
    "uvrb": ("gve.uvrb_cli", "the benchmark, for any embedder: list, prepare, check, run, compare, report"),
    "synth": ("gve.synth_cli", "V-SynFlow, from weakly captioned videos to training shards: run, status, audit"),
    "sweep": ("gve.sweep.cli", "many runs from one file, here or as a SLURM array: run, status, collect"),
    "embed": ("gve.search_cli.embed", "texts, pictures, videos and mixes of them to vectors in one file"),
    "index": (
        "gve.search_cli.index",
        "folders of videos to an index of their moments; run again, it takes what is new",
    ),
    "search": ("gve.search_cli.search", "moments of indexed videos by text, picture, clip or a mix, with times"),
    "serve": ("gve.serve.cli", "an index as a web page for this machine, and an OpenAI-style embeddings route"),
    "mine": ("gve.mining_cli", "hard negatives for the pairs of a shard folder, by any model"),
    "export": ("gve.export.cli", "a trained model for transformers, sentence-transformers and vLLM, with a proof"),
    "bench": ("gve.bench.cli", "what this machine does, beside the stock way of the same work: table and JSON"),
    "doctor": (
        "gve.doctor.cli",
        "what works on this machine, tried: packages, kernels, codecs, disk, hub; what to install",
    ),
    "slurm": ("gve.slurm.cli", "fit, validate, uvrb, sweep or synth as a job of a SLURM cluster"),
}


def overview() -> str:
    """The text of `gve --help`."""
    head = [
        f"gve {__version__}: embed text, images, videos and any mix of them for retrieval",
        "",
        "usage: gve COMMAND [...]",
        "",
    ]
    commands = [f"  {name:<10}{line}" for name, (_, line) in COMMANDS.items()]
    codes = "Exit codes: 0 done, 1 work failed, 2 bad input, 85 stopped, saved."
    foot = ["", f"`gve COMMAND --help` explains one of them. {codes}"]
    return "\n".join(head + commands + foot)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code.

    Args:
        argv: the words after `gve`; those of the process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"gve {__version__}")
        raise SystemExit(0)
    name = words[0]
    if name not in COMMANDS:
        print(f"gve: error: unknown command {name!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    arguments = words if COMMANDS[name][0] == "gve.lightning_cli" else words[1:]
    # A cluster may ask a run to stop while it imports: the request is held back until it can save its state
    # (gve.callbacks.preemption), instead of killing it.
    held = {signal.SIGUSR1} if name == "fit" else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        code = importlib.import_module(COMMANDS[name][0]).main(arguments)
    except InputError as error:
        print(f"gve {name}: error: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"gve {name}: interrupted", file=sys.stderr)
        code = 130
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    raise SystemExit(code)
