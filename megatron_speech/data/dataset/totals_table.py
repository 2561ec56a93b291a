"""Datasets on the console: totals by language and source, and what was dropped by which rule."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_speech.console import tables
from megatron_speech.data.dataset.manifest import Manifest, Totals
from megatron_speech.wording import duration

COLUMNS = (
    "documents", "speech", "tokens", "audio tokens", "text tokens", "target tokens", "tokens/character", "unknown"
)  # fmt: skip

RULES = {
    "bad_json": "not a line of JSON",
    "missing_field": "a needed field is missing",
    "bad_field": "a field of a wrong type",
    "bad_turns": "turns that are no conversation",
    "not_finite": "NaN or infinity",
    "empty_text": "empty text",
    "no_tokens": "the text tokenizer yields nothing",
    "codes_missing": "no such file of codes",
    "codes_unreadable": "codes are not a readable .npy",
    "codes_shape": "codes of a wrong shape or type",
    "codes_empty": "codes without frames",
    "codes_length": "codes of another length than stated",
    "code_outside_codebook": "a code outside its codebook",
    "checksum": "codes differ from their checksum",
    "text_id_outside_tokenizer": "a text id outside the tokenizer",
    "bad_text": "text that is not UTF-8",
    "tar_key_again": "members of a sample that are not adjacent",
    "tar_duplicate_member": "a field twice in a sample",
    "tar_link": "a link in an archive, which holds no data",
    "tar_sparse": "a sparse file in an archive",
    "llasa_truncated": "speech cut off when the memmap was made",
    "llasa_shape": "ids that are not text, speech, padding",
    "no_reference": "no other recording to refer to",
    "no_neighbour": "no segment of the recording beside it",
}


def totals_table(manifest: Manifest) -> Table:
    """Documents, seconds and tokens by language and by source."""
    table = Table(title=f"{manifest.task}: documents by language and source")
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    groups = (("language", manifest.languages), ("source", manifest.sources), ("all", {"": manifest.totals}))
    for kind, totals in groups:
        for name, values in totals.items():
            table.add_row(escape(f"{kind} {name}".rstrip()), *_cells(values))
        table.add_section()
    return table


def _cells(totals: Totals) -> list[str]:
    counts = (totals.tokens, totals.audio_tokens, totals.text_tokens, totals.target_tokens)
    rates = (_rate(totals.fertility, ".3f"), _rate(totals.unknown_rate, ".3%"))
    return [f"{totals.documents:,}", duration(totals.seconds), *(f"{count:,}" for count in counts), *rates]


def _rate(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def drops_table(manifest: Manifest) -> Table:
    """Rows kept, and rows dropped by rule."""
    filters = manifest.filters
    table = Table(title=f"{filters.rows:,} rows")
    table.add_column("rule")
    table.add_column("meaning")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    rows = {"kept": filters.kept, **dict(sorted(filters.dropped.items(), key=lambda item: (-item[1], item[0])))}
    filter_rules = {rule["name"]: f"filter {rule['rule']}" for rule in manifest.options.get("filters", [])}
    for rule, count in rows.items():
        share = count / filters.rows if filters.rows else 0.0
        meaning = "gave at least one document" if rule == "kept" else RULES.get(rule) or filter_rules.get(rule, "")
        table.add_row(rule, meaning, f"{count:,}", f"{share:.2%}")
    return table


def print_report(manifest: Manifest, console: Console | None = None) -> None:
    """Both tables, the forms of the documents, and what else was noticed."""
    console = console or tables()
    console.print(totals_table(manifest))
    console.print(drops_table(manifest))
    forms = ", ".join(f"{count:,} {form}" for form, count in manifest.forms.items())
    console.print(f"forms: {forms}", markup=False, soft_wrap=True)
    for name, count in manifest.notices.items():
        console.print(f"note: {count:,} {name.replace('_', ' ')}")
