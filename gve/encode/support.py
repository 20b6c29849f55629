"""Which of the 16 published models of UVRB run here, and how; the README shows the same table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """One published model.

    Args:
        model: its row in `gve/eval/uvrb_published.csv`.
        hub: hub name of its weights (arXiv 2510.27571, Table 10, gives the name; the owner is the publisher's).
        adapter: what `load_encoder` chooses; empty where the model does not run.
        note: what a user should know, or what is missing.
    """

    model: str
    hub: str
    adapter: str
    note: str

    @property
    def runs(self) -> bool:
        return bool(self.adapter)

    def to_dict(self) -> dict[str, str | bool]:
        """Plain values for JSON."""
        return {"model": self.model, "hub": self.hub, "runs": self.runs, "adapter": self.adapter, "note": self.note}


_OWN_CODE = "needs: its architecture is code of its repository, which is never run here"
_CLIPS_AS_IMAGES = "published for images; clips are shown in the same way"

SUPPORT = (
    Support(
        "CLIP4Clip",
        "Searchium-ai/clip4clip-webvid150k",
        "clip",
        "mean of frame vectors; the paper does not name its weights, these are one public set",
    ),
    Support("ViCLIP", "OpenGVLab/ViCLIP-L-14-hf", "clip", "own pooling of frames, exactly 8 of them"),
    Support(
        "VideoCLIP-XL",
        "alibaba-pai/VideoCLIP-XL",
        "clip",
        "make a folder of VideoCLIP-XL.bin, OpenAI's bpe_simple_vocab_16e6.txt.gz and a config.json of "
        '{"model_type": "viclip"}',
    ),
    Support("LanguageBind", "LanguageBind/LanguageBind_Video_Huge_V1.5_FT", "clip", "own pooling of 8 frames"),
    Support("InternVideo2-1B", "OpenGVLab/InternVideo2-Stage2_1B-224p-f4", "", _OWN_CODE),
    Support("InternVideo2-6B", "OpenGVLab/InternVideo2-Stage2_6B-224p-f4", "", _OWN_CODE),
    Support("GME-2B", "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "gme", _CLIPS_AS_IMAGES),
    Support("Unite-2B", "friedrichor/Unite-Base-Qwen2-VL-2B", "unite", "instructions are left out, as in its demo"),
    Support("VLM2Vec-V2", "VLM2Vec/VLM2Vec-V2.0", "vlm2vec-v2", "DoRA weights, merged into Qwen2-VL-2B"),
    Support("BGE-VL", "BAAI/BGE-VL-v1.5-mmeb", "bge-vl", "published for images; each frame is one image of 576 tokens"),
    Support("UniME-7B", "DeepGlint-AI/UniME-LLaVA-OneVision-7B", "unime", _CLIPS_AS_IMAGES),
    Support("B3-7B", "raghavlite/B3_Qwen2_7B", "b3", f"LoRA weights, merged into Qwen2-VL-7B; {_CLIPS_AS_IMAGES}"),
    Support("GME-7B", "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct", "gme", _CLIPS_AS_IMAGES),
    Support("Unite-7B", "friedrichor/Unite-Base-Qwen2-VL-7B", "unite", "instructions are left out, as in its demo"),
    Support("GVE-3B", "Alibaba-NLP/GVE-3B", "gve", "stock Qwen2.5-VL class, appended end-of-text token pooled"),
    Support("GVE-7B", "Alibaba-NLP/GVE-7B", "gve", "stock Qwen2.5-VL class, appended end-of-text token pooled"),
)


def support_table() -> str:
    """The table in Markdown: model, weights, adapter or "-", note."""
    lines = ["| model | weights | adapter | note |", "|---|---|---|---|"]
    lines += [f"| {own.model} | `{own.hub}` | {own.adapter or '-'} | {own.note} |" for own in SUPPORT]
    return "\n".join(lines)
