"""What `fusion eval INDEX` does: measures an index on its table and says what came out."""

import argparse
import sys
from functools import partial

from fusion_core import evaluate_index, files, vectors
from schemas import records
from schemas.index_evaluation import Claim, IndexEvaluation

DONE, USAGE = 0, 2
_SHOWN = (1, 10, 100)


def run(args: argparse.Namespace, place: str) -> int:
    """Evaluates the index at `place` as the command line asks; returns the exit code."""
    try:
        gpu = vectors.may_use_gpu(args.device)
    except ValueError as error:
        print(f"fusion eval: {error}", file=sys.stderr)
        return USAGE
    log = partial(print, file=sys.stderr)
    found = evaluate_index.run(place, args.table, args.output, args.queries, args.seed, gpu, log)
    if args.json:
        print(records.to_json(found).decode())
    else:
        _print(found)
        print(f"{files.join(files.absolute(args.output or place), 'eval.html')}: open it in a browser")
    return DONE


def _print(found: IndexEvaluation) -> None:
    parameters = "".join(f", {name} {value}" for name, value in found.parameters.items())
    print(f"{found.index}: {found.rows_indexed:,} of {found.rows_table:,} rows, {found.factory}{parameters}")
    for note in found.notes:
        print(f"  note: {note}")
    if found.queries_are_new:
        print("  queries: rows that the index was not tuned with")
    for kind in dict.fromkeys(item.queries for item in found.recalls):
        of_kind = {item.k: item for item in found.recalls if item.queries == kind}
        figures = ", ".join(f"@{k} {of_kind[k].recall:.4f}" for k in _SHOWN if k in of_kind)
        print(f"  recall of {kind} queries against exact search: {figures} (n={of_kind[1].n_queries})")
    for claim in found.claims:
        print(f"  {_said(claim)}")
    for item in found.retrievals:
        for by, shares in (("exact search", item.exact), ("this index", item.indexed)):
            if shares:
                figures = ", ".join(f"R@{k} {shares[k]:.4f}" for k in _SHOWN)
                print(f"  {item.queries} → {item.answers} by {by}: {figures} (n={item.n_queries})")
    for latency in found.latencies:
        print(
            f"  {latency.concurrent} at once: p50 {latency.p50_ms:.3f} ms, p99 {latency.p99_ms:.3f} ms, "
            f"mean {latency.mean_ms:.3f} ms, {latency.queries_per_second:,.0f} queries/s"
        )
    print(
        f"  bytes for a vector: {found.bytes_vectors / found.rows_indexed:,.0f}; of all files "
        f"{found.bytes_files / found.rows_indexed:,.0f}"
    )


def _said(claim: Claim) -> str:
    verdict = {True: "within 0.01", False: "off by more than 0.01", None: "off by more than 0.01, perhaps by chance"}
    kind, k = claim.reported.queries, claim.reported.k
    return (
        f"index.json reports recall@{k} of {kind} queries {claim.reported.recall:.4f}; measured {claim.measured:.4f}: "
        f"{verdict[claim.holds]}"
    )
