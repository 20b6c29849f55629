"""An export in other environments than ours: transformers 4.52, and transformers 5 beside torchvision. Needs pip.

The environments are made of wheels of their own before the packages of this one, so torch is not installed again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import av
import numpy as np
import pytest

from gve.encode.pretrained import load_encoder
from gve.inputs import InputPolicy
from gve.items import Item
from test_export import difference, gve, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TORCHVISION = ("torchvision==0.28.0", "qwen-vl-utils==0.0.14")
TRANSFORMERS_4 = ("transformers==4.52.4", "tokenizers==0.21.4", "huggingface_hub==0.36.0")
SIDES = (280, 392)  # 140 tokens: no program resizes it
QUERY = "Find a similar video."

# torchvision's wheel wants the CUDA build of torch for its operators, of which only the names are needed here.
HEAD = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def environment(folder: Path, wheels: tuple[str, ...]) -> Path:
    """A Python with these wheels before our packages; skips where pip cannot fetch them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *wheels]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot install {', '.join(wheels)}: {done.stderr.strip().splitlines()[-1]}")
    (site / "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{Path(__file__).resolve().parent.parent}\n")
    return folder / "bin" / "python"


def run(python: Path, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, "-c", HEAD + code], capture_output=True, text=True, timeout=400, cwd=folder, env=env)


def snippet(folder: Path) -> str:
    """The model card's code for transformers, as it stands there."""
    return (folder / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]


def write_clip(path: Path, seconds: int, fps: int = 10) -> None:
    rows, columns = np.mgrid[0 : 1 : SIDES[0] * 1j, 0 : 1 : SIDES[1] * 1j]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *SIDES, "yuv420p"
        for number in range(seconds * fps):
            time = number / (seconds * fps)
            waves = [np.sin(6.28 * (3 * rows + 2 * columns * (k + 1) + time * (k + 2))) for k in range(3)]
            picture = (127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, an export by the released policy, and clips of 4, 15 and 60 s."""
    folder = tmp_path_factory.mktemp("versions")
    checkpoint = write_checkpoint(folder / "best.ckpt", InputPolicy())
    assert gve("export", checkpoint, folder / "model", "--dtype", "float32") == 0
    for seconds in (4, 15, 60):
        write_clip(folder / f"{seconds}.mp4", seconds)
    return folder


def test_the_cards_snippet_in_transformers_4_52(folder: Path, tmp_path: Path) -> None:
    """Run as it stands; its vectors are ours wherever 4.52 keeps the seconds between frames: 2.0 s of the clip of 4 s
    and 15.0 of 60, not the 3.75 of 15, which it cuts to 3. By the rule that cuts too, all are equal."""
    python = environment(tmp_path / "env", (*TORCHVISION, *TRANSFORMERS_4))
    card = snippet(folder)
    assert 'AutoModel.from_pretrained("model")' in card
    code = "import numpy as np, shutil, transformers\nassert transformers.__version__ == '4.52.4'\nfound = []\n"
    for seconds in (4, 15, 60):
        code += f"shutil.copy('{seconds}.mp4', 'clip.mp4')\n{card}\nfound.append(vector[0].numpy())\n"
    code += "np.save('card.npy', np.stack(found))\n"
    code += (
        "ids = processor(text=['a dog'])['input_ids'][0]\n"
        "assert ids[-1] == processor.tokenizer.convert_tokens_to_ids('<|endoftext|>')\n"
    )
    done = run(python, code, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(folder / "card.npy")
    items = [Item.of(QUERY, video=folder / f"{seconds}.mp4") for seconds in (4, 15, 60)]
    released, cut = (
        load_encoder(str(folder / "model"), inputs={"times": times}).encode(items).vectors
        for times in ("released", "whole_seconds")
    )
    own = [[difference(a[row], found[row]) for row in range(3)] for a in (released, cut)]
    print("1 - cosine of 4, 15, 60 s in 4.52.4, released and whole seconds:", own)
    assert max(own[1]) < 1e-4
    assert max(own[0][0], own[0][2]) < 1e-4
    assert own[0][1] > 1e-4  # negative control: another rule is seen


def test_all_forms_in_transformers_5_beside_torchvision(folder: Path, tmp_path: Path) -> None:
    """sentence-transformers and the processors run for real; of the card's arguments, the rate as a list is refused."""
    python = environment(tmp_path / "env", TORCHVISION)
    code = """
import json
from pathlib import Path
from gve.encode.pretrained import load_encoder
from gve.export import parity
encoder = load_encoder("best.ckpt")
items = parity.probes(encoder.builder)
reference = dict(zip(items, encoder.encode(list(items.values())).vectors))
rows = parity.check(reference, items, Path("model"), "cpu")
Path("rows.json").write_text(json.dumps([row.to_dict() for row in rows]))
"""
    done = run(python, code, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == 21
    for row in rows:
        # In a clip of 4 s the frame is wider than the clip is long, by count of positions: both rules go on alike.
        moved = row["form"] != "gve" and row["content"] in ("video 15 s", "video 60 s", "text + video 15 s")
        assert row["verdict"] == ("stated" if moved else "ok"), row
    print({(row["form"], row["content"]): round(row["cosine"], 6) for row in rows})
    # Programs of one version agree with each other where both are moved.
    by = {(row["form"], row["content"]): row["difference"] for row in rows}
    for (form, kind), value in by.items():
        if form == "transformers":
            assert abs(value - by["sentence-transformers", kind]) < 1e-4

    (folder / "clip.mp4").write_bytes((folder / "15.mp4").read_bytes())
    card = snippet(folder)
    done = run(python, card, folder)
    assert done.returncode != 0
    assert "Field 'fps' with value [" in done.stderr
    mended = card.replace("return_video_kwargs=True", "return_video_kwargs=True, return_video_metadata=True")
    mended = mended.replace("inputs = processor", "videos, metadata = zip(*videos)\ninputs = processor")
    mended = mended.replace("**options", "video_metadata=list(metadata), do_sample_frames=False")
    done = run(python, f"{mended}\nimport numpy as np\nnp.save('card5.npy', vector[0].float().numpy())\n", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    item = Item.of(QUERY, video=folder / "15.mp4")
    moved, released = (
        load_encoder(str(folder / "model"), inputs={"positions": rule}).encode([item]).vectors[0]
        for rule in ("transformers5", "released")
    )
    found = np.load(folder / "card5.npy")
    assert difference(moved, found) < 1e-4
    assert difference(released, found) > 1e-4
