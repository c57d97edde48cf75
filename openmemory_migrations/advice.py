"""What measured searches say about the settings and the index to choose. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .catalog import Extension
from .finding import Finding
from .log import share
from .quality import Quality
from .searching import ITERATIVE

SAME = 0.999  # two exact searches that agree in so much differ by ties only


def advice(quality: Quality, extension: Extension) -> Iterator[Finding]:
    """Each with what to do about it, the most important first."""
    session, best, searched = quality.session, quality.best, quality.searched
    if searched.method is None:
        yield Finding(
            "notice",
            "no-index",
            "there is no valid vector index: searches read every row of a sector, and find everything",
            f"{quality.every_row.all.p50_ms:.1f} ms a search here.",
            "openmemory-migrations index",
        )
        return
    if quality.planned.by_index < quality.queries:
        yield Finding(
            "notice",
            "index-not-taken",
            f"for {quality.queries - quality.planned.by_index:,} of {quality.queries:,} searches the planner takes"
            " another way than the index for now, which is exact",
            "That changes with the rows and with ANALYZE, so the recall that counts is that of the index.",
        )
    if searched.metric != "l2":
        yield Finding(
            "warning",
            "other-metric",
            f"the index is for {searched.metric}, and OpenMemory 1.x searches by <->, which it doesn't serve",
            hint="Change the operator in the application, or: openmemory-migrations index -x index_metric=l2",
        )
    if (agreed := quality.every_row.all.in_memory) is not None and agreed < SAME and searched.metric != "cosine":
        yield Finding(
            "warning",
            "other-than-in-memory",
            f"even an exact search by {searched.metric} brings only {share(agreed)} of what OpenMemory's search in"
            " memory brings, which goes by cosine",
            "The vectors are not of one length.",
            "Search by <=>, with: openmemory-migrations index -x index_metric=cosine",
        )
    recall = session.all.recall
    if recall is not None and recall < quality.wanted:
        defaults = ", ".join(f"{name} = {value}" for name, value in quality.defaults.items())
        found = (
            f"with what a session has by default ({defaults}) the index finds {share(recall)} of the true neighbours,"
            f" {share(quality.wanted)} are wanted"
        )
        if best:
            reached = f"{share(best.all.recall or 0)} in {best.all.p50_ms:.1f} ms, against {session.all.p50_ms:.1f} ms."
            yield Finding("warning", "recall", found, reached, best.way.sql)
        else:
            most = max((one.all.recall or 0 for one in quality.tried), default=0)
            yield Finding(
                "warning",
                "recall-out-of-reach",
                found,
                f"With this index no setting finds more than {share(most)}.",
                "openmemory-migrations tune looks for a better index; openmemory-migrations index builds it.",
            )
    if short := session.all.short:
        iterative = [one for one in quality.tried if not one.all.short and "hnsw.iterative_scan" in one.way.settings]
        hint = None
        if searched.method == "hnsw" and extension.version < ITERATIVE:
            hint = "ALTER EXTENSION vector UPDATE; pgvector 0.8.0 goes on searching (hnsw.iterative_scan)."
        elif searched.method == "hnsw":
            hint = iterative[0].way.sql if iterative else "SET hnsw.iterative_scan = strict_order;"
        elif best:
            hint = best.way.sql
        yield Finding(
            "warning",
            "short",
            f"{short:,} of {session.all.queries:,} searches bring fewer than {quality.k} rows, though there are more",
            "The index gives its nearest rows, and the filter by sector and user takes most of them away.",
            hint,
        )
