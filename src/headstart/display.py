"""What is shown of runs, figures, findings and predictions: text for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TextIO

from headstart.verdicts import describe_evidence

if TYPE_CHECKING:
    from headstart.comparison import Ranked
    from headstart.downloads import Block
    from headstart.engine import Epoch, Step
    from headstart.evaluation import Evaluation
    from headstart.model import Prediction
    from headstart.plan import Plan
    from headstart.quality import Audit
    from headstart.training import Run

Format = Literal["table", "json", "csv"]
NAMED = 10  # findings that a summary names


def shown(text: str) -> str:
    """Text for one line of a terminal: control characters, newlines among them, as escapes."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in text)


def shown_lines(text: str) -> str:
    """Text for a terminal: each line as `shown` gives it."""
    return "\n".join(map(shown, text.split("\n")))


def summary(run: Run, data: str) -> str:
    """What a finished run ends with: what was left out, the figures, what to do next."""
    audit, result = run.audit, run.evaluation
    counts = audit.to_json()["counts"]
    grave = [finding for finding in audit.findings if finding.severity != "note"]
    lines = [f"{'left out' if f.kind == 'unreadable' else f.severity}: {shown(f.message)}" for f in grave[:NAMED]]
    if len(grave) > NAMED:
        lines.append(f"... and {len(grave) - NAMED} more, in audit.json")
    lines += [
        f"{len(audit.clean.samples)} pictures, {len(run.classifier.classes)} classes; "
        f"{len(result.sources)} kept for the report",
        "audit: " + ", ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in counts.items()),
        *_describe_training(run),
        "",
        figures(result),
    ]
    if run.unleaked is not None:
        name, estimate = next(iter(run.unleaked.metrics.items()))
        lines.append(f"\n{run.leaked} report pictures have a duplicate in training; without them: {name} {estimate}")
    elif run.leaked:
        lines.append("\nALL report pictures have a duplicate in training: these figures say nothing")
    lines += ["", f"written to {shown(str(run.path))}", "next:"]
    if any(counts.values()):
        lines.append(f"  {shown(shlex.join(('headstart', 'audit', data)))}")
    lines.append(f"  {shown(shlex.join(('headstart', 'predict', str(run.path))))} PICTURE...")
    return "\n".join(lines)


def planned(plan: Plan) -> str:
    """A plan that was made and not carried out: its phases and its reasons."""
    phases = [phase.phase.replace("_", " a ") for phase in plan.phases]
    return "\n".join((f"plan: {plan.strategy}: {', then '.join(phases)}", *(f"  {reason}" for reason in plan.reasons)))


def ranking(ranked: Sequence[Ranked], chosen: Ranked, data: str, given: Mapping[str, object]) -> str:
    """Networks, the best first, each with what sets it apart, and the command for the recommended one.

    Args:
        ranked: the networks.
        chosen: the one to recommend.
        data: the pictures, as they were given.
        given: the settings that were, by name.
    """
    width = max(len(entry.name) for entry in ranked)
    lines = []
    for entry in ranked:
        behind = "" if entry.behind is None else f"  behind by {entry.behind}"
        lines.append(
            f"{entry.name:<{width}}  accuracy {entry.accuracy}  log-loss {entry.log_loss:.3f}  "
            f"{entry.milliseconds:.1f} ms a picture  {entry.megabytes:.0f} MB{behind}"
        )
    why = (
        "the least log-loss"
        if chosen is ranked[0]
        else "no less accurate than the first for all that can be told, and faster"
    )
    words = [
        "headstart",
        "train",
        data,
        "--backbone",
        chosen.name,
        *(("--weights", chosen.file) if chosen.file else ()),
    ]
    for name, value in given.items():
        if name not in ("backbone", "weights", "time_budget"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    lines += ["", f"recommended: {chosen.name}, {why}", f"  {shown(shlex.join(words))}"]
    return "\n".join(lines)


def progress(item: object) -> tuple[str, bool]:
    """(a step or epoch of training in words, whether it is worth keeping on the screen); nothing for a picture."""
    if hasattr(item, "received"):
        block: Block = item  # type: ignore[assignment]
        return f"{block.received / 1e6:.0f} of {block.size / 1e6:.0f} MB", False
    if hasattr(item, "select"):
        epoch: Epoch = item  # type: ignore[assignment]
        words = f"epoch {epoch.epoch}" if epoch.epoch else "before training"
        if not math.isnan(epoch.loss):
            words += f": loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.3f}"
        figures = ", ".join(f"{name} {value:.3f}" for name, value in list(epoch.select.items())[:2])
        return f"{words}; on select {figures}{' (best so far)' if epoch.best else ''}, {epoch.seconds:.1f} s", True
    if hasattr(item, "rate"):
        step: Step = item  # type: ignore[assignment]
        words = f"epoch {step.epoch}, step {step.step}/{step.steps}: loss {step.loss:.4f}"
        return f"{words}, accuracy {step.accuracy:.3f}, {step.speed:.0f} pictures/s", False
    return "", False


def _describe_training(run: Run) -> list[str]:
    """What was fitted and trained, a line a phase."""
    provenance = run.classifier.provenance
    heads = provenance["heads"]
    tried = ", ".join(f"{head['kind']} {head['log_loss']:.3f}" for head in heads)
    competing = {kind for phase in run.plan.phases if phase.phase == "fit_head" for kind in phase.heads}
    if any(head["log_loss"] < heads[0]["log_loss"] for head in heads if head["kind"] in competing):
        tried += " (the blend is taken unless another clearly leads)"
    lines = [
        f"plan:  {run.plan.strategy}; heads by {phase.folds}-fold log-loss, the first taken: {tried}"
        for phase in run.plan.phases
        if phase.phase == "fit_head"
    ]
    for facts in provenance.get("training", []):
        best = facts["best_epoch"]
        kept = "the start was kept: no epoch was better" if best == 0 else f"epoch {best} of {facts['epochs']} was kept"
        lines.append(
            f"plan:  {run.plan.strategy}; {facts['trainable']:,} of {facts['parameters']:,} parameters trained "
            f"in {facts['seconds']:.0f} s; {kept}"
        )
    if run.plan.evidence is not None:
        lines += [f"why:   {line}" for line in describe_evidence(run.plan.evidence, brief=True)]
    return lines + [f"why:   {line}" for line in run.plan.further]


def figures(result: Evaluation) -> str:
    """Metrics and classes with their intervals, a line each."""
    from rich.cells import cell_len

    lines = [f"{name.replace('_', ' '):<20} {estimate}" for name, estimate in result.metrics.items()]
    if result.task == "single":
        most = max(result.by_class, key=lambda label: result.by_class[label]["support"])
        share = result.by_class[most]["support"] / len(result.sources)
        lines.append(f"{'(for comparison)':<20} always saying {shown(most)!r} gives accuracy {share:.3f}")
    width = max(cell_len(shown(label)) for label in result.classes)
    rows = list(result.by_class.items())[:20]
    lines.append("")
    for label, row in rows:
        pad = " " * (width - cell_len(shown(label)))
        lines.append(f"{shown(label)}{pad}  precision {row['precision']}  recall {row['recall']}")
    if len(result.by_class) > len(rows):
        lines.append(f"... and {len(result.by_class) - len(rows)} more classes, in metrics.json")
    if result.undefined and result.task == "multi":
        names = ", ".join(map(shown, result.undefined))
        lines.append(f"no figures, and left out of means, for want of positives or negatives: {names}")
    return "\n".join(lines)


def findings(result: Audit) -> str:
    """The findings as a table, gravest first."""
    count = len(result.clean.samples)
    if not result.findings:
        return f"{count} pictures, {len(result.clean.classes)} classes: nothing found"
    lines = [f"{count} pictures, {len(result.clean.classes)} classes"]
    width = max(len(finding.kind) for finding in result.findings)
    lines += [
        f"{finding.severity:<8} {finding.kind:<{width}}  {shown(finding.message)}. {finding.remedy}"
        for finding in result.findings
    ]
    return "\n".join(lines)


def write_predictions(
    predictions: Iterable[Prediction], classes: Sequence[str], format: Format, top: int | None, file: TextIO
) -> tuple[int, int]:
    """Write predictions as they come; (how many pictures were read, how many were not)."""
    read = failed = 0
    writer = csv.writer(file)
    if format == "csv":
        ranks = range(1, min(top or 0, len(classes)) + 1)
        columns = [name for rank in ranks for name in (f"class_{rank}", f"p_{rank}")]
        writer.writerow(("source", "label", "confidence", "error", *(columns or [f"p:{label}" for label in classes])))
    for prediction in predictions:
        failed, read = failed + bool(prediction.error), read + (not prediction.error)
        if format == "json":
            file.write(json.dumps(prediction.to_json(top)) + "\n")
        elif format == "csv":
            writer.writerow(_csv_row(prediction, classes, top))
        elif prediction.error:
            print(f"{shown(prediction.source)}: {prediction.error}", file=sys.stderr, flush=True)
        else:
            ranked = list(prediction.probabilities.items())[: top or 3]
            text = ", ".join(f"{shown(label)} {value:.1%}" for label, value in ranked)
            given = f"  -> {shown(prediction.label) or '(none)'}" if prediction.multi else ""
            file.write(f"{shown(prediction.source)}: {text}{given}\n")
    file.flush()
    return read, failed


def _csv_row(prediction: Prediction, classes: Sequence[str], top: int | None) -> list[str]:
    if prediction.error:
        empty = len(classes) if top is None else 2 * min(top, len(classes))
        return [prediction.source, "", "", prediction.error, *[""] * empty]
    confidence = "|".join(f"{prediction.probabilities[label]:.6g}" for label in prediction.labels)
    row = [prediction.source, prediction.label, confidence, ""]
    if top is None:
        return row + [f"{prediction.probabilities[label]:.6g}" for label in classes]
    return row + [cell for label, p in list(prediction.probabilities.items())[:top] for cell in (label, f"{p:.6g}")]
