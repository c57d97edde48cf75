"""What measured searches say about the settings and the index to choose. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..db.catalog import Extension, Index
from ..finding import Finding
from ..log import share
from .recall import Quality
from .search import ITERATIVE, listed

PAGE, CENTRE = 8192, 28  # bytes of a page; that a centre has beside its vector (src/ivfflat.h)
UNEVEN, FEW_PAGES = 3, 200  # lists are never quite even, and what is small doesn't matter
SAME = 0.999  # two exact searches that agree in so much differ by ties only


def advice(quality: Quality, extension: Extension, index: Index | None) -> Iterator[Finding]:
    """Each with what to do about it, the most important first; `index` is the one that was searched by."""
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
    if index and (uneven := _uneven(quality, index)):
        yield uneven
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
        found = (
            f"with what a session has by default ({listed(quality.defaults)}) the index finds {share(recall)}"
            f" of the true neighbours, {share(quality.wanted)} are wanted"
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


def _uneven(quality: Quality, index: Index) -> Finding | None:
    """An ivfflat index that was built on an empty table, or on a few rows, has nearly all of them in a few lists.

    It finds much, since it reads much: recall can't tell. Where each leaf of a tree has its own, nothing is said.
    """
    pages = index.size // PAGE
    if quality.searched.method != "ivfflat" or not pages:
        return None
    lists, probes = quality.searched.options["lists"], int(quality.defaults.get("ivfflat.probes", "1"))
    # every search reads all centres; then the pages of its lists, and one of the table for each row in them
    centre = CENTRE + (2 if quality.searched.half else 4) * quality.dimensions
    centres = -(-lists // max(1, PAGE // centre))
    even = centres + (max(0, pages - centres) + quality.rows) * min(1, probes / lists)
    if quality.pages < max(UNEVEN * even, even + FEW_PAGES):
        return None
    return Finding(
        "warning",
        "lists-uneven",
        f"a search by {probes} of {lists:,} lists reads {quality.pages:,.0f} pages, of an index of {pages:,}",
        "Most rows are in a few lists: it was built on an empty table, or on few rows, and is hardly faster than none.",
        "openmemory-migrations index --rebuild",
    )
