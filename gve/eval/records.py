"""What is tested: the sixteen sets of UVRB as the paper defines them, and where their original data come from.

Names, counts, lengths, instructions and metrics are those of arXiv 2510.27571. Facts about the sources were read in
their own repositories and loaders; nothing of them is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FIND = "Find the video according to the "


@dataclass(frozen=True)
class Source:
    """Where the original data of one or several sets come from.

    Args:
        name: its name; also the folder of its clips below `<root>/media`.
        obtain: what to get and from where, in words.
        licence: of its annotations or videos, whichever is narrower, as far as it is stated.
        hub: data set on Hugging Face that holds the annotations; empty where none does.
        files: its annotation files there, as patterns: what `--download` fetches. Never videos.
        terms: why `--download` refuses; empty where the licence lets a program fetch the annotations.
    """

    name: str
    obtain: str
    licence: str
    hub: str = ""
    files: tuple[str, ...] = ()
    terms: str = ""


@dataclass(frozen=True)
class SetRecord:
    """One test set.

    Args:
        name: as in the paper's Table 1.
        ability: the leaf of the ability tree it counts for: CG, S, T, PR, LC, CMP or VIS. Empty for classification,
            which enters no average of UVRB.
        query: modalities of a query, in the order T, I, V.
        num_queries, num_corpus: published counts; `num_corpus` is the size of one pool where `pooled`.
        instruction: precedes the query, joined by one space.
        built_from: the field or file it was made from.
        source: where that comes from.
        seconds: published mean length of a corpus clip, in seconds; 0 where none is published.
        words: published mean number of words of a query text; 0 where there is none.
        k: a query scores when a positive is among the first k.
        pooled: each query ranks its own candidates instead of the whole corpus.
        num_texts: distinct query texts where they are known to be fewer than the queries; 0: as many as queries.
        known_counts: counts of queries or corpus items that the source's public files give although another one is
            published -> the reason, as far as it is known.
        aliases: other names it goes by.
    """

    name: str
    ability: str
    query: str
    num_queries: int
    num_corpus: int
    instruction: str
    built_from: str
    source: Source
    seconds: float = 0.0
    words: float = 0.0
    k: int = 1
    pooled: bool = False
    num_texts: int = 0
    known_counts: Mapping[int, str] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()

    @property
    def licence(self) -> str:
        return self.source.licence

    @property
    def metric(self) -> str:
        """Its name in results and TensorBoard tags."""
        if not self.ability:
            return "accuracy"
        return "precision_at_1" if self.pooled else f"recall_at_{self.k}"

    @property
    def metric_label(self) -> str:
        """Its name in tables."""
        if not self.ability:
            return "Acc"
        return "P@1" if self.pooled else f"R@{self.k}"


MSRVTT = Source(
    "MSR-VTT",
    "MSRVTT_JSFUSION_test.csv (1k-A) in msrvtt_data.zip of the CLIP4Clip releases on GitHub, or data set "
    "friedrichor/MSR-VTT on Hugging Face; clips in MSRVTT.zip of the Frozen in Time mirror (videos/all)",
    "not stated",
    hub="friedrichor/MSR-VTT",
    terms="MSR-VTT states no licence",
)
DIDEMO = Source(
    "DiDeMo",
    "data/test_data.json of LisaAnne/LocalizingMoments on GitHub and misc/datasets/didemo/test_list.txt of "
    "albanie/collaborative-experts; clips from YFCC100M (multimedia-commons on AWS) or the drive that the first names",
    "BSD-2-Clause, videos Creative Commons",
    terms="its annotations are on GitHub, not on the hub",
)
CAREBENCH = Source(
    "CaReBench",
    "data set MCG-NJU/CaReBench on Hugging Face: json/metadata.json, videos/videos.zip (3.9 GB)",
    "MIT",
    hub="MCG-NJU/CaReBench",
    files=("json/metadata.json",),
)
VDC = Source(
    "VDC",
    "data set wchai/Video-Detailed-Caption on Hugging Face: VDC_1k.jsonl, videos/videos_*.tar.gz",
    "Apache-2.0",
    hub="wchai/Video-Detailed-Caption",
    files=("VDC_1k.jsonl",),
)
CAMERABENCH = Source(
    "CameraBench",
    "data set syCen/CameraBench on Hugging Face: test.jsonl (mp4 files in syCen/Videos4CameraBnech), or "
    "camerabench/data/caption_data.json of linzhiqiu/t2v_metrics on GitHub",
    "CC-BY-4.0",
    hub="syCen/CameraBench",
    files=("test.jsonl",),
)
DREAM1K = Source(
    "DREAM-1K",
    "data set omni-research/DREAM-1K on Hugging Face; annotations also in data/annotations/DREAM-1k.jsonl of "
    "bytedance/tarsier on GitHub",
    "Apache-2.0",
    hub="omni-research/DREAM-1K",
    files=("*DREAM-1k*.json*",),
)
LOVR = Source(
    "LoVR",
    "data set debugger123/LoVR-benchmark on Hugging Face: caption_data/*.parquet; video_data/part_aa, part_ab, part_ac "
    "are one tar.gz once joined by cat (97 GB)",
    "CC-BY-NC-SA-4.0",
    hub="debugger123/LoVR-benchmark",
    terms="CC-BY-NC-SA-4.0 over video of LongVideoBench, which is index-only: accept its terms on its page",
)
PEVIDEO = Source(
    "PE-Video",
    "data set facebook/PE-Video on Hugging Face: the tar files of test/ (15,000 videos)",
    "CC-BY-NC-4.0",
    hub="facebook/PE-Video",
    terms="its annotations lie in the tar files beside the videos, and videos are never fetched for you",
)
MOMENTSEEKER = Source(
    "MomentSeeker",
    "data set VLM2Vec/MomentSeeker_1k8 on Hugging Face (rows with candidates, as in MMEB-V2); clips in "
    "TIGER-Lab/MMEB_Raw_Video",
    "CC-BY-NC-SA-4.0",
    hub="VLM2Vec/MomentSeeker_1k8",
    terms="CC-BY-NC-SA-4.0, research only: accept its terms on its page",
)

SETS: tuple[SetRecord, ...] = (
    SetRecord(
        "MSRVTT", "CG", "T", 1000, 1000,
        "Find the clip that corresponds to the described scene in the given video.",
        "JSFusion 1k-A split", MSRVTT, 15.0, 9.4, num_texts=995, aliases=("MSR-VTT 1k-A",),
    ),
    SetRecord(
        "DiDeMo", "CG", "T", 1004, 1004, "Find a video that includes the following described scenes.",
        "all sentences of a test video joined to a paragraph", DIDEMO, 53.9, 29.1,
    ),
    SetRecord(
        "CRB-G", "CG", "T", 1000, 1000, FIND + "general text description.", "`caption`", CAREBENCH, 14.4, 232.2
    ),
    SetRecord(
        "CRB-S", "S", "T", 1000, 1000, FIND + "spatial description.", "`spatial_caption`", CAREBENCH, 14.4, 115.0
    ),
    SetRecord(
        "VDC-O", "S", "T", 1027, 1027, FIND + "object description.", "`main_object_caption`", VDC, 30.1, 91.4
    ),
    SetRecord(
        "CRB-T", "T", "T", 1000, 1000, FIND + "temporal description.", "`temporal_caption`", CAREBENCH, 14.4, 103.2
    ),
    SetRecord(
        "CMRB", "T", "T", 728, 1071, FIND + "camera motion description.", "camera motion captions", CAMERABENCH,
        5.7, 24.8, k=10,
        known_counts={727: "the public captions of its 1,071 videos hold 727 distinct texts; which is the 728th is not "
                      "established"},
        aliases=("CameraBench",),
    ),
    SetRecord(
        "DREAM-E", "PR", "T", 6251, 1000, FIND + "text description.", "distinct `extra_info.events`", DREAM1K, 8.8, 6.5
    ),
    SetRecord(
        "LoVR-TH", "PR", "T", 8854, 8854, FIND + "text description about video theme information.", "themes of clips",
        LOVR, 16.9, 48.1, k=10,
    ),
    SetRecord(
        "PEV-K", "PR", "T", 14427, 15000, FIND + "text description of a series of keywords.",
        "distinct keywords of the test part", PEVIDEO, 16.9, 45.5,
    ),
    SetRecord(
        "LoVR-V", "LC", "T", 100, 467, "Find the long video according to the long text description.",
        "full captions of the test part over all long videos", LOVR, 1560.3, 17364.5,
    ),
    SetRecord(
        "VDC-D", "LC", "T", 1000, 1027, FIND + "detailed text description.", "`detailed_caption`", VDC, 30.1, 508.0
    ),
    SetRecord(
        "MS-TI", "CMP", "TI", 400, 10, "Find the video clip that corresponds to the given text and the given image.",
        "image-conditioned queries and their candidates, as in MMEB-V2", MOMENTSEEKER, 13.5, 68.5, pooled=True,
    ),
    SetRecord(
        "MS-TV", "CMP", "TV", 400, 10, "Find the video clip that corresponds to the given text and the given video.",
        "video-conditioned queries and their candidates, as in MMEB-V2", MOMENTSEEKER, 13.5, 68.5, pooled=True,
    ),
    SetRecord(
        "MSRVTT-I2V", "VIS", "I", 1000, 1000, FIND + "image.", "one frame of each test video", MSRVTT, 15.0
    ),
    SetRecord(
        "LoVR-C2V", "VIS", "V", 467, 467, "Find the original long video according to the short video clip.",
        "one clip of each long video", LOVR, 1560.3,
    ),
)  # fmt: skip  # a set is read as a paragraph, not as a column of its fields
