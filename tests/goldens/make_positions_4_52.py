"""Records M-RoPE positions of transformers 4.x into positions_4_52.json, to be read by tests/test_inputs.py.

Nothing of gve is imported, so that the goldens judge it. Run once per version, each adds its own entry:

    python3 -m venv env
    for version in 4.51.3 4.52.4; do
        env/bin/pip install torch==2.13.0 numpy pillow transformers==$version
        env/bin/python tests/goldens/make_positions_4_52.py
    done

The prompt is written for a tokenizer of one token a byte (the test builds the same one), so lengths follow from the
text. Two versions, because they differ: 4.52 cuts the seconds between grid steps to whole seconds, 4.51 does not.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

TEXT, IMAGE, VIDEO, START, END, PAD = 1, 2, 3, 4, 5, 0
CONFIG = SimpleNamespace(
    vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2),
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
)


def clip(total, fps, frames, height=56, width=84):
    """A clip of `total` frames at `fps`, of which `frames` are sampled, already of a size that needs no resize."""
    return {"kind": "video", "total": total, "fps": fps, "frames": frames, "height": height, "width": width}


def image(height=56, width=84):
    return {"kind": "image", "height": height, "width": width}


BATCHES = {
    # uniform(8) on 4, 15 and 60 s, and a text.
    "uniform": [
        {"media": [clip(100, 25.0, 8)], "text": "four s"},
        {"media": [clip(375, 25.0, 8)], "text": "fifteen s"},
        {"media": [clip(1800, 30.0, 8)], "text": "sixty s"},
        {"media": [], "text": "words"},
    ],
    # fps(1, 8) on 4, 6.5, 15 and 60 s, odd rates.
    "fps": [
        {"media": [clip(120, 30000 / 1001, 4)], "text": "four"},
        {"media": [clip(156, 24000 / 1001, 6)], "text": "six"},
        {"media": [clip(375, 25.0, 8)], "text": ""},
        {"media": [clip(1439, 24000 / 1001, 8)], "text": "sixty"},
    ],
    # Images, wide grids, half a second, and several media in one input.
    "mixed": [
        {"media": [image(), image(84, 56)], "text": "two pictures"},
        {"media": [image(), clip(375, 25.0, 8)], "text": "picture, clip"},
        {"media": [clip(375, 25.0, 4), image(56, 56), clip(1800, 30.0, 4, 84, 56)], "text": "clip, picture, clip"},
        {"media": [clip(100, 25.0, 4, 28, 252)], "text": "wide"},
        {"media": [clip(12, 24.0, 8)], "text": "half a second"},
    ],
}


def sequence(row):
    """Token kinds of one prompt, the grids of its images and clips, and the seconds between grid steps."""
    ids = [TEXT] * len("^system\nS$\n^user\n")  # ^ and $ stand for im_start and im_end, one token each
    images, videos, seconds = [], [], []
    for medium in row["media"]:
        steps = 1 if medium["kind"] == "image" else medium["frames"] // 2
        grid = [steps, medium["height"] // 14, medium["width"] // 14]
        holder = IMAGE if medium["kind"] == "image" else VIDEO
        ids += [START, *[holder] * (steps * grid[1] * grid[2] // 4), END]
        (images if medium["kind"] == "image" else videos).append(grid)
        if medium["kind"] == "video":
            # qwen-vl-utils: sample_fps = nframes / total_frames * video_fps; the processor divides 2 by it.
            seconds.append(2 / (medium["frames"] / medium["total"] * medium["fps"]))
    return ids + [TEXT] * len(row["text"] + "$\n^assistant\n%"), images, videos, seconds  # % stands for endoftext


def positions(rows, side):
    """[3, B, L] positions of a padded batch, as nested lists by row: [[time, height, width], ...]."""
    built = [sequence(row) for row in rows]
    longest = max(len(ids) for ids, *_ in built)
    pads = [[PAD] * (longest - len(ids)) for ids, *_ in built]
    ids = torch.tensor([p + b[0] if side == "left" else b[0] + p for p, b in zip(pads, built, strict=True)])
    images, videos, seconds = ([one for b in built for one in b[i]] for i in (1, 2, 3))
    # 4.51 has the method on the class with the head.
    owner = modeling.Qwen2_5_VLModel
    owner = owner if hasattr(owner, "get_rope_index") else modeling.Qwen2_5_VLForConditionalGeneration
    result, _ = owner.get_rope_index(
        SimpleNamespace(config=CONFIG),
        ids,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        second_per_grid_ts=torch.tensor(seconds),  # float32, as the processor's batch holds it
        attention_mask=(ids != PAD).long(),
    )
    return result.transpose(0, 1).tolist()


def main():
    path = Path(__file__).with_name("positions_4_52.json")
    recorded = json.loads(path.read_text())["positions"] if path.exists() else {}
    recorded[transformers.__version__] = {
        name: {side: positions(rows, side) for side in ("right", "left")} for name, rows in BATCHES.items()
    }
    text = json.dumps({"batches": BATCHES, "positions": dict(sorted(recorded.items()))}, indent=1)
    # One list of numbers a line.
    lines, numbers = [], []
    for line in text.splitlines():
        if line.strip().rstrip(",").lstrip("-").isdigit():
            numbers.append(line.strip())
            continue
        if numbers:
            lines[-1] += "".join(numbers) + line.strip()
            numbers = []
        else:
            lines.append(line)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
