"""The command line's options. Nothing here imports what a job imports, so that `fusion --help` is quick."""

import argparse
from dataclasses import fields

from schemas.columns import CaptionSpec
from schemas.dedup import DedupSpec
from schemas.evaluation import EvaluationSpec
from schemas.feature_table import InputSpec
from schemas.fuser import TrainJob
from schemas.index import META

_DEFAULTS = {item.name: item.default for item in fields(InputSpec)}
_TRAIN_DEFAULTS = {item.name: item.default for item in fields(TrainJob)}
_TRAINING = {
    "epochs": "passes over the rows, at most; 0 is 25, but between 500 and about 5,000 steps",
    "patience": "passes without a better validation after which to stop; 0 is a quarter of all",
    "batch_rows": "rows in a batch",
    "learning_rate": "of AdamW, falling to 0 by a cosine",
    "weight_decay": "of the matrices",
    "modality_dropout": "share of training rows that lose one modality",
    "label_weight": "of the labels' cross-entropy beside views or triplets",
    "logit_adjustment": "for rare labels: times the log of a label's share, 1 is usual",
    "coral": "weight of this distance between modalities as a regulariser",
    "mmd": "weight of this distance between modalities as a regulariser",
    "jsd": "weight of the divergence of what the modalities find, as a regulariser",
    "max_rows": "rows of TABLE that are used, drawn in row groups",
    "seed": "of the split, the sample, the order and the start",
}


def build() -> argparse.ArgumentParser:
    """The parser of `fusion`."""
    parser = argparse.ArgumentParser(
        prog="fusion", description="Feature tables and retrieval indexes from image–caption shards.", allow_abbrev=False
    )
    parser.epilog = (
        "Exit codes: 0 done; 1 something failed, run it again; 2 wrong usage, found before work starts; 3 done, but "
        "more dead letters than --max-dead-letters allows; 4 a limit of `fusion run` tripped, nothing is published; "
        "5 another `fusion run` is at work."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(_command(commands, "demo", "the whole way on generated shards; ends with a report to open"))
    _embed(
        _command(commands, "embed", "embed shards into a feature table; run it again to resume or to add new shards")
    )
    _table(_command(commands, "status", "where a running or finished job stands"))
    _retry(_command(commands, "retry", "the dead letters again, after a repair"))
    _verify(_command(commands, "verify", "check hashes, counts and alignment of a table; say what is wrong"))
    _index(_command(commands, "index", "build a retrieval index from a table's embeddings"))
    _search(_command(commands, "search", "search an index by text, by image, by both, or for more like a row"))
    _dedup(_command(commands, "dedup", "find a table's duplicates: columns beside its rows that say which to keep"))
    _eval(_command(commands, "eval", "measure a table or an index: how good it is, and at what cost; a page and JSON"))
    _label(_command(commands, "label", "zero-shot class probabilities, as columns beside a table's rows"))
    _caption(_command(commands, "caption", "captions for the pictures that have none, as columns beside the rows"))
    _serve(_command(commands, "serve", "search an index over HTTP: an API and a page"))
    _fuse(
        _command(commands, "fuse", "a table with the vectors of another fuser or text tower, without touching a pixel")
    )
    _export(_command(commands, "export", "a table's rows as WebDataset tars, or in clip-retrieval's layout"))
    _import(_command(commands, "import", "embeddings that clip-retrieval made, as a feature table"))
    _run(_command(commands, "run", "a job file: embed, fuse, index, evaluate and publish, for schedulers"))
    _train(_command(commands, "train", "fit a fuser to a table's embeddings, and tell whether it is worth having"))
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo-output", metavar="DIR", help="where to work (default: %(default)s)")
    parser.add_argument("--pairs", type=positive, default=2400, help="good pairs to generate (default: %(default)s)")


def _embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", action="extend", nargs="+", required=True, metavar="PATTERN",
        help="shards: tar, Parquet, CSV/TSV/JSONL listings or folders; paths or URIs with globs and {00000..00099}",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--model", required=True, help="an OpenCLIP name, hf-hub:…, a model folder, a config JSON, or fusion-demo"
    )
    parser.add_argument(
        "--pretrained", default="", metavar="TAG|FILE", help="the weights, where the model does not bring its own"
    )
    parser.add_argument(
        "--precision", default="auto", help="auto (bf16 where the hardware computes in it), fp32, bf16, fp16"
    )
    parser.add_argument(
        "--fuser", default="", metavar="SPEC",
        help="also write fused_embedding: weighted_sum:image=0.5,text=0.5, concat, hadamard, or a fuser's folder",
    )  # fmt: skip
    for name, what in (("image", "bytes"), ("caption", "text"), ("key", "keys"), ("url", "URLs")):
        parser.add_argument(
            f"--{name}-column",
            default=_DEFAULTS[f"{name}_column"],
            metavar="NAME",
            help=f"where a Parquet file or listing has the {what}",
        )
    parser.add_argument(
        "--max-image-bytes", type=positive, default=_DEFAULTS["max_image_bytes"], help="default: %(default)s"
    )
    parser.add_argument("--max-pixels", type=positive, default=_DEFAULTS["max_pixels"], help="default: %(default)s")
    parser.add_argument("--shard-index", type=int, default=0, help="which of several launchers on one table this is")
    parser.add_argument("--num-shards", type=positive, default=1, help="how many launchers share the table")
    _removing(parser)
    _running(parser)


def _retry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved"
    )
    _running(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    _table(parser)
    parser.add_argument("--repair", action="store_true", help="run again what is wrong, from its shards")
    parser.add_argument(
        "--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved"
    )
    _running(parser)


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=positive,
        default=0,
        help="images or captions in one forward (default: what suits device and model)",
    )
    parser.add_argument("--workers", type=positive, help="units worked on at once (default: one for each core)")
    parser.add_argument(
        "--max-dead-letters",
        type=share,
        metavar="N|P%",
        help="exit with 3 when the table has more dead letters than this",
    )
    _opting_out(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.epilog = "Options that are not ours go to Beam, e.g. --runner=FlinkRunner."


def _opting_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--opt-out", metavar="FILE|none",
        help="keys that are to be in no table, one on each line, or as column `key` of a Parquet, CSV or TSV file: "
        "they are left out, and leave what is recorded; a table made with a list asks for one each time",
    )  # fmt: skip


def _removing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remove-missing", type=share, nargs="?", const=(10.0, True), metavar="N|P%",
        help="have what came from shards that are not in the input any more leave the table; refused, with nothing "
        "done, if those are more than so many samples of the table (default: 10%%)",
    )  # fmt: skip


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument("--output", required=True, metavar="INDEX", help="the index's folder")
    parser.add_argument(
        "--column",
        default="image_embedding",
        help="image_embedding, text_embedding or fused_embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--target-recall",
        type=fraction,
        default=0.95,
        help="recall@10 against exact search, for queries of either modality (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes-per-vector", type=positive, default=0, metavar="N",
        help="no larger index than this; a table of up to 20,000 rows is searched exactly, whatever that takes",
    )  # fmt: skip
    parser.add_argument(
        "--keep", metavar="DEDUP", default="", help="leave out the rows that `fusion dedup TABLE --output DEDUP` drops"
    )
    parser.add_argument(
        "--max-shard-bytes", type=positive, default=4 << 30, metavar="N", help="per file (default: %(default)s)"
    )
    parser.add_argument(
        "--tune-seconds",
        type=positive,
        default=120,
        help="time for the choice among types of index (default: %(default)s)",
    )
    parser.add_argument("--workers", type=positive, help="pieces worked on at once (default: one for each core)")
    parser.epilog = "Options that are not ours go to Beam, e.g. --runner=FlinkRunner."


def _search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="the index's folder")
    parser.add_argument("--text", help="what to look for, in words")
    parser.add_argument("--image", metavar="FILE", help="what to look for, as a picture")
    parser.add_argument("--key", help="more like the row of this key")
    parser.add_argument("--id", type=int, metavar="N", help="more like this row of the table")
    parser.add_argument(
        "--queries", metavar="FILE",
        help="many queries: a text on each line, or an object with text, image, vector, id, key, k, image_weight, "
        "by_rank, by_score, where, collapse, diversity; answers are JSON lines with the number of the query's line",
    )  # fmt: skip
    parser.add_argument(
        "--image-weight",
        type=float,
        default=0.5,
        help="of the image, 0 to 1, when both are given (default: %(default)s)",
    )
    parser.add_argument(
        "--fuser", default="", metavar="DIR|SPEC",
        help="weighs text and image instead: a folder of `fusion train` whose space is the backbone's",
    )  # fmt: skip
    parser.add_argument(
        "--by-rank", action="store_true",
        help="search by text and by image and join the two rankings (reciprocal rank fusion), instead of weighing",
    )  # fmt: skip
    parser.add_argument(
        "--by-score", action="store_true",
        help="the same, joining z-normed scores by --image-weight: neither decides by a wider spread of its scores",
    )  # fmt: skip
    parser.add_argument(
        "--where", metavar="CONDITION",
        help="only rows for which this holds, as in SQL: \"width >= 512 and (similarity > 0.28 or caption ilike "
        f"'%%dog%%')\"; columns: {', '.join(META.names)}; = != < <= > >= in (…) like ilike is null and or not",
    )  # fmt: skip
    parser.add_argument(
        "--collapse", type=float, metavar="COSINE",
        help="drop results closer than this to a better one, and copies of its picture (0 to 1)",
    )  # fmt: skip
    parser.add_argument(
        "--diversity", type=float, default=0.0, metavar="SHARE",
        help="0 (the best) to 1 (the most different) of the best 4 k: maximal marginal relevance (default: 0)",
    )  # fmt: skip
    parser.add_argument("--save-images", metavar="DIR", help="write the pictures found, from their shards, as RANK-KEY")
    parser.add_argument("--allow-url", action="store_true", help="--image may be an http or https URL")
    parser.add_argument("-k", type=positive, default=10, help="how many results (default: %(default)s)")
    parser.add_argument(
        "--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _dedup(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds a table's duplicates and writes, beside its rows, which cluster each is in and whether it is kept. Rows "
        "of equal image bytes always are duplicates; near pictures and near vectors are if asked for. What is dropped "
        "is always a duplicate of the very row that is kept in its place."
    )
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument("--output", required=True, metavar="COLUMNS", help="the folder for the columns")
    parser.add_argument(
        "--near", action="store_true",
        help="also pictures that were encoded anew or resized, by perceptual hash; slow the first time, because every "
        "picture is read and decoded again (the hashes are kept)",
    )  # fmt: skip
    parser.add_argument(
        "--near-bits", type=int, metavar="N",
        help="as --near: in how many of 64 bits the hashes may differ, 0 to 10 (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--cosine", type=float, metavar="C", help="also rows whose vectors have at least this cosine, e.g. 0.95"
    )
    parser.add_argument(
        "--column",
        default=DedupSpec.column,
        help="of the vectors: image_embedding, text_embedding or fused_embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", default=DedupSpec.keep, choices=("similarity", "pixels", "first"),
        help="the best row of a cluster: whose caption fits best, which has most pixels, or the first in the "
        "table; the others decide between equals (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--memory-bytes", type=positive, default=2 << 30, metavar="N",
        help="of what is compared at a time; the rest waits in a scratch folder (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=positive, help="shards read at once for --near (default: one for each core)")
    parser.add_argument(
        "--device", default="auto", help="for --cosine: auto, cpu, cuda or cuda:N (default: %(default)s)"
    )


EVAL_INDEX = {"--table", "--queries"}
EVAL_TABLE = {"--pretrained", "--labels", "--classes", "--templates", "--max-rows", "--probe-rows", "--folds"}


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="TABLE|INDEX", help="the folder or URI of a feature table or an index")
    parser.add_argument(
        "--output", default="", metavar="DIR",
        help="where eval.json and eval.html go (default: into the folder itself)",
    )  # fmt: skip
    parser.add_argument("--seed", type=natural, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print eval.json instead of a summary")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    index = parser.add_argument_group("an INDEX: recall, retrieval, latency, size")
    index.add_argument("--table", default="", help="where its table lies now, if it was moved")
    index.add_argument(
        "--queries", type=positive, default=1000, metavar="N",
        help="rows of the table that are asked, of each kind (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("a TABLE: retrieval, zero-shot classes, probes, geometry")
    group.add_argument("--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved")
    group.add_argument(
        "--labels", default=EvaluationSpec.labels, metavar="COLUMN|FILE",
        help="the rows' true classes, for probes: a column, meta.NAME for a field of the sidecar, or a CSV, TSV or "
        "Parquet file with columns key and label",
    )  # fmt: skip
    group.add_argument(
        "--classes", default=EvaluationSpec.classes, metavar="FILE",
        help="classify zero-shot among these: a label on each line, optionally with tabs and phrases that stand for it",
    )  # fmt: skip
    group.add_argument(
        "--templates", default=EvaluationSpec.templates, metavar="FILE",
        help="prompts, one on each line, with {} for the label (default: 'a photo of a {}' and the like)",
    )  # fmt: skip
    group.add_argument(
        "--max-rows", type=positive, default=EvaluationSpec.max_rows, help="rows drawn (default: %(default)s)"
    )
    group.add_argument(
        "--probe-rows", type=positive, default=EvaluationSpec.probe_rows,
        help="labelled rows of these that probes are fitted on (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--folds", type=positive, default=EvaluationSpec.folds, help="of the cross-validation (default: %(default)s)"
    )


def _label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--labels", required=True, metavar="FILE",
        help="a label on each line, optionally with tabs and phrases that stand for it in prompts",
    )  # fmt: skip
    parser.add_argument(
        "--templates", default="", metavar="FILE",
        help="prompts, one on each line, with {} for the label (default: 'a photo of a {}' and the like)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="COLUMNS", help="the folder for the columns")
    parser.add_argument("--top-k", type=positive, default=5, help="labels listed for a row (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, metavar="COSINE", help="'none' where the best label's cosine is below, -1 to 1"
    )
    parser.add_argument(
        "--fit", default="", metavar="COLUMN|FILE",
        help="true classes of some rows, to fit the temperature of the probabilities on: a column, meta.NAME, or a "
        "CSV, TSV or Parquet file with columns key and label",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _caption(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes, for rows with an image and no caption, a caption by a CoCa model, beside the table's rows and never "
        "over its captions. Pictures are read from their shards again; what cannot be read is told with its reason, "
        "and tried again by the next run."
    )
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--model", required=True, help="a CoCa model: an OpenCLIP name like coca_ViT-B-32, a model folder, hf-hub:…"
    )
    parser.add_argument(
        "--pretrained", default="", metavar="TAG|FILE", help="the weights, where the model does not bring its own"
    )
    parser.add_argument("--output", required=True, metavar="COLUMNS", help="the folder for the columns")
    parser.add_argument(
        "--max-tokens", type=positive, default=CaptionSpec.max_tokens, help="of a caption (default: %(default)s)"
    )
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="the index's folder")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--token",
        default="",
        help="a secret that requests must bring; better set FUSION_TOKEN: other users see options",
    )
    parser.add_argument(
        "--pretrained", default="", metavar="FILE", help="where the weights lie now, if they were moved"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--max-k", type=positive, default=1000, help="most results of a request (default: %(default)s)")
    parser.add_argument(
        "--max-body-bytes", type=positive, default=20_000_000, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-waiting", type=positive, default=128, help="requests in progress; more get a 503 (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=seconds, default=10.0, help="seconds for a request (default: %(default)s)")


def _fuse(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a table with all columns of TABLE, row for row, and the fused_embedding of a fuser, or with captions "
        "embedded by another text tower, or both. Nothing but TABLE is read. Run it again to resume, or to follow "
        "TABLE where that has grown or changed."
    )
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--fuser", default="", metavar="DIR|SPEC",
        help="a folder of `fusion train`, or weighted_sum:image=0.7,text=0.3, concat, hadamard; without, the new table "
        "has no fused_embedding",
    )  # fmt: skip
    parser.add_argument(
        "--text-model", default="", metavar="MODEL",
        help="embed the captions anew by this model's text tower, which was trained for the space of TABLE's images, "
        "as by fine-tuning or LiT: an OpenCLIP name, hf-hub:…, a model folder or a config JSON",
    )  # fmt: skip
    parser.add_argument(
        "--text-pretrained", default="", metavar="TAG|FILE", help="its weights, where the model does not bring its own"
    )
    parser.add_argument(
        "--precision", default="auto", help="of the text tower: auto, fp32, bf16, fp16 (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="auto", help="of the text tower: auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--output", required=True, metavar="TABLE2", help="the new table's folder or URI")
    parser.add_argument(
        "--weights", action="store_true", help="also fusion_weights: how much image and text weighed in each row"
    )
    parser.add_argument("--workers", type=positive, help="units worked on at once (default: one for each core)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.epilog = "Options that are not ours go to Beam, e.g. --runner=FlinkRunner."


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--format", required=True, choices=("webdataset", "clip-retrieval"),
        help="tars of key.txt, key.json, key.image_embedding.npy, …; or img_emb/, text_emb/ and metadata/",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder or URI for the files")
    parser.add_argument(
        "--images", action="store_true", help="webdataset: the original pictures too, read from their shards"
    )
    parser.add_argument(
        "--modality", default="both", choices=("both", "image", "text"),
        help="clip-retrieval: what a row must have; the others are left out and counted (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rows-per-file", type=positive, default=0, metavar="N", help="default: 10,000 in a tar, 1,000,000 in a .npy"
    )


def _import(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a feature table from a folder in clip-retrieval's layout: img_emb/, text_emb/ (or one of the two) and "
        "metadata/. Vectors are brought to length 1; some captions are embedded anew, and a model that does not give "
        "their vectors is refused. Run it again to resume, or to follow the folder where it has grown or changed."
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder or URI that holds img_emb/, text_emb/, metadata/")
    parser.add_argument("--output", required=True, metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument(
        "--model", required=True, help="what made the vectors: an OpenCLIP name, hf-hub:…, a model folder, fusion-demo"
    )
    parser.add_argument(
        "--pretrained", default="", metavar="TAG|FILE", help="its weights, where the model does not bring its own"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    _opting_out(parser)
    _removing(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embeds, fuses, indexes and evaluates as a job file says, doing what is not done, and publishes the indexes "
        "where nothing trips a limit. One run at a time on one output."
    )
    parser.add_argument(
        "job",
        metavar="JOB.toml",
        help="the job file; relative paths in it are relative to it, or to this folder where it is in an object store",
    )
    parser.add_argument("--rollback", action="store_true", help="make the version before the current one current")
    parser.add_argument("--json", action="store_true", help="print the run's record")
    parser.add_argument("--quiet", action="store_true", help="say nothing, unless something is wrong")
    parser.epilog = (
        "Exit codes: 0 done; 1 failed or interrupted, try again; 2 wrong job file; 4 a limit tripped, nothing is "
        "published; 5 another run is at work."
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fits a fuser to the frozen embeddings of a table, from degraded views of its rows, from triplets or from "
        "labels. On rows that were held out it is compared with the best single modality and the best weighted sum; "
        "one that is not certain to beat both is marked as not promoted."
    )
    parser.add_argument("table", metavar="TABLE", help="the feature table's folder or URI")
    parser.add_argument("--output", required=True, metavar="DIR", help="the fuser's folder")
    parser.add_argument(
        "--fuser", default="combiner", metavar="TYPE", help="gate, gmu, combiner or attention (default: %(default)s)"
    )
    parser.add_argument(
        "--views", action="extend", nargs="+", default=[], metavar="TABLE",
        help="tables of the same keys, from blurred or cropped images or from shortened captions: their rows are to "
        "find the rows of TABLE",
    )  # fmt: skip
    parser.add_argument(
        "--triplets", default="", metavar="FILE",
        help="CSV, JSONL or Parquet with query_image_key, query_text_key and target_key, all keys of TABLE",
    )  # fmt: skip
    parser.add_argument(
        "--labels", default="", metavar="COLUMN|FILE",
        help="a column of TABLE, meta.NAME for a field of its sidecars, or a CSV, TSV or Parquet of key and label",
    )  # fmt: skip
    for name, what in _TRAINING.items():
        default = _TRAIN_DEFAULTS[name]
        kind = float if name == "modality_dropout" else type(default)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N",
            help=f"{what} (default: {'0.2 if any row lacks one, else 0' if default is None else default})",
        )  # fmt: skip
    parser.add_argument(
        "--target", default="image", choices=("image", "text"), help="what a query is to find (default: %(default)s)"
    )
    parser.add_argument(
        "--loss",
        default="info_nce",
        choices=("info_nce", "siglip"),
        help="of views and triplets (default: info_nce)",
    )
    parser.add_argument("--class-weights", action="store_true", help="rare labels count as much as frequent ones")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def natural(text: str) -> int:
    """A whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def fraction(text: str) -> float:
    """A number above 0 and not above 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def share(text: str) -> tuple[float, bool]:
    """A number of samples, or a percentage: (value, whether it is a percentage)."""
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (not percent and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor a percentage like 1%")
    return value, percent


def is_more(count: int, whole: int, limit: tuple[float, bool]) -> bool:
    """Whether a count is more than the limit that `share` read, of a whole; exact, as 29 / 100 * 100 is below 29."""
    value, percent = limit
    return (100 * count / whole if percent and whole else count) > value
