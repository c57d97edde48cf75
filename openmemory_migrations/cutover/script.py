"""The cutover and the way back as a script for psql, which asks the database for itself, as offline.Script's steps do.

It ends in the state that `forward` and `restore` end in. With OM_SINGLE_TRANSACTION the table is locked instead of
being prepared while the application writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import followers, indexes, switching
from ..errors import ANEW, INDEX_ANEW
from ..indexes import INDEX_DIMENSIONS, NoIndex
from ..offline import TIMED, UNTIMED, UNTIMED_HERE, Script
from ..offline_sql import BATCHES, DROP_CONVERT
from ..target import Target, literal, quote
from ..verification import MEANING
from . import backtrigger, gate, kept, mark, script_sql
from .forward import LEFT_INDEX
from .mark import UNDO
from .restore import MOST_IDLE

Names = Mapping[str, Any]


def check(script: Script) -> None:
    """What needs no row: inside the transaction that is open, so that a refusal leaves nothing."""
    names = _forward(script)
    script.write(UNTIMED_HERE)
    script.emit(script_sql.CHECK, **names)


def upgrade(script: Script) -> None:
    single, swap = script.settings.single_transaction, script.settings.cutover == "swap"
    names = _forward(script)
    script.stop_at_errors()
    script.write(UNTIMED_HERE if single else UNTIMED)
    script.emit(script_sql.VERIFY, **names)
    if single:
        script.emit(script_sql.LOCK, **names, left_to_do=names["to_cut_over"])
    if swap:
        _newer_index(script, names)
    if not single:
        script.write(UNTIMED)
        script.emit_each(script_sql.DROP_LEFT, **names)
        script.emit_each(script_sql.INDEX_LEFT, **names)
        script.emit(script_sql.KEEP, **names)
        if swap:
            script.emit(script_sql.PROVE, **names, variables="")
    script.emit(script_sql.SWITCH, **names)
    if not single:
        script.write(TIMED)


def check_back(script: Script) -> None:
    names = _back(script)
    script.emit(script_sql.CHECK_BACK, **{**names, "gate_back": names["gate_loudly"]})


def downgrade(script: Script) -> None:
    single = script.settings.single_transaction
    names = _back(script)
    to_undo = script_sql.TO_UNDO.format_map(script.names())
    script.stop_at_errors()
    script.write(UNTIMED_HERE if single else UNTIMED)
    if single:
        script.emit(script_sql.LOCK, **names, left_to_do=to_undo)
    script.emit(script_sql.FOLLOW, **names)
    script.emit(script_sql.REBUILD, **names)
    script.emit(script_sql.PUT_BACK, **{**names, **_of_kept(script, names)})
    script.emit(script_sql.VERIFY_BACK, **names)
    if not single:
        script.emit(script_sql.PROVE, **names, variables=script_sql.VARIABLES_BACK)
    of_old, of_new = _named(script.target.old), _named(script.target.new)
    script.emit_each(script_sql.DROP_NAMED, **names, named=f"{of_old}, {of_new}", when=to_undo)
    script.emit(script_sql.SWITCH_BACK, **names)
    # also where the run before this one has ended with the switch
    script.emit_each(script_sql.DROP_NAMED, **names, named=of_old, when="true")
    if not single:
        script.write(TIMED)


def _newer_index(script: Script, names: Names) -> None:
    """As forward._newer_index: what newer OpenMemory makes when it starts, unless it only needs its name."""
    if script.target.newer.index_name is None:
        return
    wants = replace(script.settings, index="hnsw", index_metric="cosine", index_halfvec=False)
    newer = replace(script, target=script.target.newer, settings=wants)
    wanted = newer.index() if script.settings.index != "none" else NoIndex("OM_INDEX is none")
    if isinstance(wanted, NoIndex):
        script.write(f"-- no index {literal(newer.target.index)}: {wanted.reason}")
    elif script.size > INDEX_DIMENSIONS:
        script.write(f"-- no index for newer OpenMemory, whose own takes {INDEX_DIMENSIONS:,} dimensions at most")
    else:
        newer.build_index(wanted, unless=script_sql.UNLESS_RENAMED.format_map(names))


def _forward(script: Script) -> Names:
    target, settings, sql = script.target, script.settings, script.sql
    mode = gate.require_mode(settings, target)
    own = target.names()
    wanted = script.index()
    swapped = mark.names(target.swapped)
    names: dict[str, Any] = {
        **_common(script),
        "mode": mode,
        "dependents": switching.DEPENDENTS.replace(":tables", f"ARRAY[{literal(own['table'])}::regclass::oid]")
        .replace(":column", literal(target.source))
        .replace(":ours", f"ARRAY[{literal(target.sync)}, {literal(target.left)}]"),
        "publications": followers.PUBLICATIONS.replace(":tables", f"ARRAY[{literal(own['table'])}::regclass::oid]"),
        "publishes": literal(f" sends {target} to its subscribers"),
        "already_cut_over": literal(
            f"column {quote(target.source)} of {target} is of type vector already, nothing to cut over"
        ),
        "not_ended": literal(f"the backfill of {target} has not ended: {quote(target.adopted)} is still there"),
        "no_dimensions": literal(f"column {quote(target.vector)} of {target} has no dimensions"),
        "anew": literal(f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}."),
        "sync_text": literal(target.sync),
        "no_trigger": literal(
            f"trigger {quote(target.sync)} of {target} is missing or disabled: what is written now has a stale vector"
        ),
        "enable_trigger": literal(
            f"ALTER TABLE … ENABLE TRIGGER {quote(target.sync)}; or, with OM_SYNC_TRIGGER=on: {ANEW}."
            " Then the cutover again."
        ),
        "hangs": literal(f"what hangs on {quote(target.source)} of {target} would not go over: "),
        "archive_taken": literal(f"{target} has a column {quote(target.archive)} already"),
        "kept_taken": literal(f"the name {quote(target.kept)} is taken by something that isn't this package's"),
        "index_possible": "false" if isinstance(wanted, NoIndex) else "true",
        "least_rows": indexes.ROWS_A_LIST if settings.index == "ivfflat" and not settings.index_lists else 0,
        "version": script.rules()["version"],
        "no_index": literal(f"no valid index on {quote(target.vector)} of {target}"),
        "no_index_hint": literal(f"First: {INDEX_ANEW}. Or set OM_INDEX=none, if there is to be none."),
        "stale": literal(MEANING["stale"]),
        "missing": literal(MEANING["missing"]),
        "differs": literal(MEANING["differs"]),
        "wrong": literal(f" rows of {target} are not right, so nothing is cut over"),
        "mend": literal(
            "; ".join(dict.fromkeys(gate.MENDS.values())).format(source=own["source"]) + ". Then the script again."
        ),
        "verified": literal(f"every row of {target} is verified to the bit: "),
        "unfit": literal(f" rows of {target} have bytes that no vector can hold"),
        "are_kept": literal(f": their bytes are then kept in table {quote(target.kept)}."),
        "no_key": literal(f"{target} has no primary key, so bytes that no vector can hold can't be kept beside it"),
        "count_nulls": sql("SELECT count(*) FROM {table} WHERE {vector} IS NULL"),
        "nulls_shown": literal(f" rows of {target} have no {own['vector']}, which is to be NOT NULL"),
        "count_left": sql("SELECT count(*) FROM {table} WHERE " + kept.LEFT),
        "create_left": sql(LEFT_INDEX, index=own["left"]),
        "has_newer": "true" if mode == "swap" and _has_newer(script) else "false",
        "m": settings.index_m,
        "ef_construction": settings.index_ef_construction,
        "prove": sql("ALTER TABLE {table} ADD CONSTRAINT {left} CHECK ({vector} IS NOT NULL) NOT VALID"),
        "create_kept": sql(kept.CREATE, keys="@keys@", **_columns_of_kept()),
        "key_of_kept": sql("ALTER TABLE {kept} ADD PRIMARY KEY (@keys@)"),
        "hide_kept": sql(kept.HIDE),
        "comment_kept": sql("COMMENT ON TABLE {kept} IS {text}", text=literal(f"{kept.COMMENT}{target}")),
        "copy_kept": sql(kept.COPY, keys="@keys@", **_columns_of_kept()),
        "clean_kept": sql(kept.CLEAN, same="@same@"),
        "was_cut_over": literal(mark.said(target, "swap" if mode == "swap" else "drop")),
        "no_more_bytes": literal(
            f"A writer that still sends bytes to {quote(target.source)} gets an error from now on."
        ),
        "create_forgetting": sql(backtrigger.CREATE_FORGETTING, **swapped),
        "forgetting": sql(backtrigger.FORGETTING, **swapped),
        "index": quote(target.index),
    }
    base = script.names() | names
    of_source, of_vector = _grants(base, target.source), _grants(base, target.vector)
    base |= {
        "attributes_of_source": _attributes(base, target.source),
        "attributes_of_vector": _attributes(base, target.vector),
        "grants_to_source": _exchange(base, own["source"], present=of_vector, wanted=of_source),
        "grants_to_archive": _exchange(base, own["archive"], present=of_source, wanted=of_vector),
        "say": "NOTICE",
    }
    base["gate"] = script_sql.GATE.format_map(base)
    base["say"] = "DEBUG"
    return _filled(
        base,
        gate_again=script_sql.GATE,
        find_key=script_sql.FIND_KEY,
        require_accepted=script_sql.REQUIRE_ACCEPTED,
        not_null_of_source=script_sql.NOT_NULL_OF_SOURCE,
        require_values=script_sql.REQUIRE_VALUES if mode == "swap" else "",
        whether_not_null=script_sql.WHETHER_NOT_NULL,
        to_cut_over=script_sql.TO_CUT_OVER,
        is_left=script_sql.IS_LEFT,
        is_ready=script_sql.IS_READY,
        renamed=script_sql.RENAMED,
        fill_kept=script_sql.FILL_KEPT,
        change=script_sql.TO_SWAP if mode == "swap" else script_sql.TO_DROP,
        compare=sql(script_sql.COMPARE, **{name: base[name] for name in ("reason", "stale", "missing", "differs")}),
    )


def _back(script: Script) -> Names:
    target, sql = script.target, script.sql
    own = target.names()
    now = {"now": script_sql.NOW, "vector": script_sql.NOW, "source": own["archive"]}
    names: dict[str, Any] = {
        **_common(script),
        "now": literal(script_sql.NOW),
        "not_cut": literal(f"{target} is not cut over, nothing to undo"),
        "has_got": literal(f"{target} has got a column "),
        "archive_of_type": literal(f"column {quote(target.archive)} of {target} is of type "),
        "alter_archive": sql("ALTER TABLE {table} ALTER COLUMN {archive} "),
        "alter_source": sql("ALTER TABLE {table} ALTER COLUMN {source} "),
        "create_unconvert": sql(backtrigger.CREATE_UNCONVERT),
        "create_following": sql(backtrigger.CREATE_FOLLOWING, **now),
        "following": sql(backtrigger.FOLLOWING, **now),
        "count_pending": sql("SELECT count(*) FROM {table} WHERE {now} IS NOT NULL AND {archive} IS NULL", **now),
        "rebuild_pages": sql(script_sql.REBUILD_PAGES, **now),
        "put_back": sql(kept.PUT_BACK, page="@page@", end="@end@", same="@same@", **_columns_of_kept(), **now),
        "compare_back": sql(script_sql.COMPARE_BACK, **now),
        "label": literal(f"rebuilding {quote(target.source)} of {target.table}: "),
        "most_idle": MOST_IDLE,
        "still_pending": literal(f" rows of {target} still have no bytes, and passes over them don't make them fewer"),
        "past_the_trigger": literal(
            "A rule or trigger of the table keeps updates from them, or something writes past trigger"
            f" {quote(target.back)}; run the same script again when that has ended."
        ),
        "wrong_back": literal(f" rows of {target} {quote(target.archive)} is not what "),
        "mend_back": literal(
            f"If the vectors are right, UPDATE … SET {quote(target.archive)} = NULL for those rows; if the bytes are,"
            " mend the vectors. Then the script again."
        ),
        "verified": literal(f"every row of {target} is verified to the bit: "),
        "count_nulls": sql("SELECT count(*) FROM {table} WHERE {archive} IS NULL"),
        "nulls_shown": literal(f" rows of {target} have no {own['archive']}, which is to be NOT NULL"),
        "prove": sql("ALTER TABLE {table} ADD CONSTRAINT {left} CHECK ({archive} IS NOT NULL) NOT VALID"),
        "back_text": literal(target.back),
        "no_back_trigger": literal(f"trigger {quote(target.back)} of {target} is missing or disabled"),
        "drop_unconvert": DROP_CONVERT.format(call=literal(own["unconvert"] + "("), function=own["unconvert"]),
        "create_trigger": script.create_trigger,
        "may_be_newer": "true" if target.newer.index_name else "false",
        "old_name": literal(target.old.index),
        "had_privileges": literal(f" any more that had privileges on a column of {own['table']}"),
        "rename_newer": sql("ALTER INDEX {schema}.{newer} RENAME TO ", newer=quote(target.newer.index)),
        "is_undone": literal(
            f"the cutover of {target} is undone: {quote(target.source)} holds bytes again, and trigger"
            f" {quote(target.sync)} keeps {quote(target.vector)} equal to them"
        ),
        "no_more_vectors": literal(
            f"A writer that still sends vectors to {quote(target.source)} gets an error from now on."
        ),
        "vectors_alone": literal(
            f"A writer that still sends vectors to {quote(target.vector)} gets no error, and its rows no bytes."
        ),
    }
    base = script.names() | names
    of_vector, of_bytes = _grants(base, target.source), _grants(base, target.archive)
    base |= {
        "grants_to_vector": _exchange(base, own["vector"], present=of_vector, wanted=of_bytes),
        "grants_back": _exchange(base, own["source"], present=of_bytes, wanted=of_vector),
        "grants_of_mark": _exchange(base, own["source"], present=of_bytes, wanted=script_sql.GRANTS_OF_MARK),
        "say": "NOTICE",
    }
    base["gate_loudly"] = script_sql.GATE_BACK.format_map(base)
    base["say"] = "DEBUG"
    return _filled(
        base,
        gate_back=script_sql.GATE_BACK,
        find_key=script_sql.FIND_KEY,
        require_values=script_sql.REQUIRE_VALUES,
        whether_not_null=script_sql.WHETHER_NOT_NULL_BACK,
        is_ours=script_sql.IS_OURS,
        batch_statement=script_sql.REBUILD_BATCH,
        batches=BATCHES,
    )


def _of_kept(script: Script, names: Names) -> Names:
    """What differs where it is the table of kept bytes whose pages are gone through."""
    here = {
        "label": literal(f"putting bytes of {script.target.table} back: "),
        "walked": literal(script.target.names()["kept"]),
        "plan": script_sql.PLAN_OF_KEPT,
    }
    return _filled({**names, **here}, batch_statement=script_sql.PUT_BACK_BATCH, batches=BATCHES)


def _common(script: Script) -> Names:
    target, own = script.target, script.target.names()
    alter_comment = "COMMENT ON COLUMN {table}."
    return {
        "undo": UNDO,
        "all_rows": script_sql.ALL_ROWS,
        "archive_text": literal(target.archive),
        "source_shown": literal(own["source"]),
        "left_name": literal(target.left),
        "left_text": literal(f"{own['schema']}.{own['left']}"),
        "newer_text": literal(f"{own['schema']}.{quote(target.newer.index)}"),
        "newer": quote(target.newer.index),
        "unprove": script_sql.UNPROVE.format(
            table=own["table"], left=own["left"], table_text=literal(own["table"]), left_name=literal(target.left)
        ),
        "comment_source": script.sql(alter_comment + "{source} IS "),
        "comment_vector": script.sql(alter_comment + "{vector} IS "),
        "revoke_back": script.sql("REVOKE ALL ON FUNCTION {back_function}() FROM PUBLIC"),
    }


def _filled(names: Names, **parts: str) -> Names:
    """The names with these parts beside them, each of which may use those before it."""
    found = dict(names)
    for name, part in parts.items():
        found[name] = part.format_map(found)
    return found


def _named(target: Target) -> str:
    schema = quote(target.schema)
    return ", ".join(
        f"to_regclass({literal(f'{schema}.{quote(name)}')})" for name in (target.index, target.mirrored_index)
    )


def _columns_of_kept() -> dict[str, str]:
    return {"bytes": quote(kept.BYTES), "version": quote(kept.VERSION)}


def _has_newer(script: Script) -> bool:
    named, none = script.target.newer.index_name, script.settings.index == "none"
    return named is not None and not none and script.size <= INDEX_DIMENSIONS


def _grants(names: Names, column: str) -> str:
    return script_sql.GRANTS.format_map({**names, "column_text": literal(column)})


def _attributes(names: Names, column: str) -> str:
    more = {"column_text": literal(column), "grants": _grants(names, column)}
    return script_sql.ATTRIBUTES.format_map({**names, **more})


def _exchange(names: Names, column: str, *, present: str, wanted: str) -> str:
    on_column = literal(f" ({column}) ON TABLE {names['table']}")
    return script_sql.EXCHANGE.format(on_column=on_column, present=present, wanted=wanted)
