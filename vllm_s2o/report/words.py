"""Names, colours and numbers as charts and tables of results show them."""

from collections.abc import Iterable, Sequence

from .results import Row

NAMES = {
    "s2o": "S2O", "s2o_kv_head": "S2O, a ranking per KV head", "fa3_paged": "FA3 on pages", "fa3": "FA3", "fa2": "FA2",
    "pbs": "PBS-Attn", "flashprefill": "FlashPrefill", "flashprefill2": "FlashPrefill V2", "flexprefill": "FlexPrefill",
    "flash_attn": "dense (FLASH_ATTN)",
}  # fmt: skip
LOOK_OF = {
    "s2o": 0, "fa3_paged": 1, "flash_attn": 1, "dense": 1, "fa2": 2, "pbs": 3, "flashprefill": 4, "flexprefill": 5,
    "flashprefill2": 6, "fa3": 7,
}  # fmt: skip


def conditions(rows: Sequence[Row], names: Iterable[str]) -> str:
    """What all rows have in common, or the values that they have."""
    found = ((name, [value for value in dict.fromkeys(row[name] for row in rows) if value]) for name in names)
    return "; ".join(f"{name} {', '.join(values)}" for name, values in found if values) + "."


def name_of(provider: str) -> str:
    budget, _, ranked = provider.removeprefix("s2o_budget_").partition("_")
    if not budget.isdecimal():
        return NAMES.get(provider, provider)
    return f"S2O, {budget} % budget" + (", a ranking per KV head" if ranked == "kv_head" else "")


def ours(provider: str) -> bool:
    """Whether it is S2O, with whatever budget and ranking."""
    return provider.startswith("s2o")


def look_of(provider: str) -> int:
    if ours(provider):
        return 8 if provider.endswith("_kv_head") else 0
    return LOOK_OF.get(provider, 8)


def noted(row: Row) -> str:
    return f" ({row['note']})" if row["note"] else ""


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"
