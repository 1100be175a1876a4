"""What `fusion eval TABLE` does: figures of a feature table, as JSON, as a page and as a summary."""

import argparse
import sys
from functools import partial

from fusion_core import evaluation_page, files, labels, table, towers
from fusion_core.labels import BadLabels
from schemas import records
from schemas.evaluation import EvaluationRecord, EvaluationSpec, Figure

DONE, USAGE = 0, 2


def run(args: argparse.Namespace) -> int:
    """Evaluates the table that the command line names; returns the exit code."""
    try:
        from fusion_core import evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        print("fusion eval needs scikit-learn: pip install 'fusion-features[eval]'", file=sys.stderr)
        return USAGE
    feature_table = table.Table.open(args.place)
    spec = EvaluationSpec(**{name: getattr(args, name) for name in EvaluationSpec.__dataclass_fields__})
    classes = None
    if spec.classes:
        if not spec.labels:
            raise BadLabels("--classes says what to classify among: add --labels, what the rows really are")
        classes = labels.read_classes(spec.classes, spec.templates)
    elif spec.templates:
        raise BadLabels("--templates are prompts for --classes: name a file of them")
    record = evaluate.evaluate(
        feature_table,
        spec,
        classes,
        partial(towers.for_table, feature_table.spec, args.device, args.pretrained),
        partial(print, file=sys.stderr),
    )
    output = files.absolute(args.output or args.place)
    data = records.to_json(record, indent=2)
    files.write_bytes(output, "eval.json", data)
    files.write_bytes(output, "eval.html", evaluation_page.render(record))
    print(data.decode() if args.json else _summary(record, output))
    return DONE


def _summary(record: EvaluationRecord, output: str) -> str:
    lines = [f"{record.table}: {record.sampled_rows:,} of {record.table_rows:,} rows, {record.pairs:,} pairs"]
    for one in record.retrieval:
        said = [f"{name} {_percent(one.figures[name])}" for name in ("hit@1", "hit@10", "recall@10", "mAP", "nDCG@10")]
        lines.append(f"  {one.direction}, {one.queries:,} queries in {one.gallery:,}: {', '.join(said)}")
    if record.geometry:
        space = record.geometry
        coral = "–" if space.coral_relative is None else f"{space.coral_relative:.2f}"
        lines.append(
            f"  alignment {space.alignment:.3f}, uniformity {space.uniformity_image:.2f} and "
            f"{space.uniformity_text:.2f}, modality gap {space.gap:.3f}, MMD² {space.mmd2:.4f} "
            f"(chance {space.mmd2_chance:.4f}), CORAL {coral}, "
            f"JSD of the distributions ≥ {space.jsd_bits or 0:.2f} bits"
        )
    if record.zero_shot:
        figures = record.zero_shot.result.figures
        said = [f"{name} {_percent(of)}" for name, of in figures.items()]
        errors = [f"{of.ece:.3f} at T={of.temperature:.2f}" for of in record.zero_shot.calibration]
        lines.append(f"  zero-shot: {', '.join(said)} (n={figures['accuracy'].n:,}); ECE {', '.join(errors)}")
    for probe in record.probes:
        said = [f"{name} {_percent(of)}" for name, of in probe.result.figures.items()]
        lines.append(f"  {probe.classifier} on {probe.features}: {', '.join(said)}")
    for found in record.differences:
        if found.figure == "macro-F1":
            verdict = ("better" if found.value > 0 else "worse") if found.claimed else "not told apart"
            span = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            lines.append(f"  {found.features} against {found.against}, {found.classifier}: macro-F1 {span}: {verdict}")
    lines += [f"  note: {note}" for note in record.notes]
    return "\n".join([*lines, f"{output}/eval.html: open it in a browser"])


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
