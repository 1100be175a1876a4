"""Runs an installed clip-retrieval on local weights; called by peer.py with the Python that has it.

    peer_runner.py MODEL WEIGHTS SHARDS OUTPUT BATCH READERS

WEIGHTS is a weights file, which `clip inference` takes as it is, or a model folder, for which one loader is added: its
configuration file carries a preprocessing and a vocabulary that clip-retrieval has no option for.

The statistics are kept here, not in the processes that clip-retrieval starts for them: these import torch and more
while the loop runs, which a short run would pay for as it does not in a long one.
"""

import glob
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()


def load_folder(folder: str, use_jit: bool, device: str, cache: str | None) -> tuple[Any, Any, Any]:
    """(model, transform, tokenizer) of a folder with open_clip_config.json, in the form that clip-retrieval wants."""
    import open_clip
    from all_clip.open_clip import OpenClipWrapper

    place, weights = Path(folder), next(Path(folder).glob("*.safetensors"))
    config = json.loads((place / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    open_clip.factory._MODEL_CONFIGS["bench-folder"] = config["model_cfg"]
    model = open_clip.create_model("bench-folder", pretrained=str(weights), device=device, jit=use_jit, cache_dir=cache)
    model.eval()
    preprocess = {"size": config["model_cfg"]["vision_cfg"]["image_size"], **config["preprocess_cfg"]}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), is_train=False)
    own = glob.glob(f"{folder}/*bpe*.txt.gz")
    vocabulary = {"bpe_path": own[0]} if own else {}
    tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"], **vocabulary)
    return OpenClipWrapper(inner_model=model, device=device), transform, tokenizer


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def keep_statistics() -> list[dict[str, float]]:
    """Has clip-retrieval's statistics, one entry a batch, put into the returned list; before them one that holds the
    CPU-seconds spent when its loop begins.
    """
    from clip_retrieval.clip_inference import logger

    kept: list[dict[str, float]] = []
    for kind in (logger.LoggerReader, logger.LoggerWriter):
        kind.start = kind.end = lambda self: None
    logger.LoggerWriter.start = lambda self: kept.append({"cpu_seconds": cpu_seconds()})
    logger.LoggerWriter.__call__ = lambda self, batch: kept.append(batch)
    return kept


def main() -> None:
    """Runs `clip inference` and prints what it cost as JSON."""
    name, weights, shards, output, batch, readers = sys.argv[1:]
    import all_clip.main
    from clip_retrieval.clip_inference.main import main as clip_inference

    model = f"open_clip:{name}/{weights}"
    if Path(weights).is_dir():
        all_clip.main._CLIP_REGISTRY = {"folder:": load_folder, **all_clip.main._CLIP_REGISTRY}
        model = f"folder:{weights}"
    batches = keep_statistics()
    clip_inference(
        shards,
        output,
        input_format="webdataset",
        batch_size=int(batch),
        num_prepro_workers=int(readers),
        clip_model=model,
    )
    whole, (before, *batches) = time.perf_counter() - _STARTED, batches
    cpu = cpu_seconds() - before["cpu_seconds"]
    parts = ("read", "inference", "write")
    found = {f"{part}_seconds": sum(item[f"{part}_duration"] for item in batches) for part in parts}
    loop, samples = sum(item["total_duration"] for item in batches), sum(item["sample_count"] for item in batches)
    print()
    print(
        json.dumps(
            {"samples": samples, "loop_seconds": loop, "loop_cpu_seconds": cpu, "other_seconds": whole - loop, **found}
        )
    )


if __name__ == "__main__":
    main()
