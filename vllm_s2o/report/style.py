"""How the page looks, in light and in dark; shades of pictures for both."""

from .png import ramp

LIGHT = ramp(("#edf1f6", "#9cc2df", "#3f80b8", "#143c6e", "#060f22"))
DARK = ramp(("#20252e", "#24507f", "#3f8fc7", "#a6dbef", "#ffffff"))
"""Shades of a map, from little to much attention: on either page little is near the page's own colour."""

DRAWN_LINE = "#d4410b"
"""Where tiles stop, on a light page."""

LOOKS = 10
"""Colours that series have; their marks repeat sooner."""

_LIGHT = (
    "#c0304b", "#00707f", "#5f6b78", "#946000", "#6a4fb0", "#2c7a35", "#a1438f", "#3060b8", "#7a5c45", "#44484e",
)  # fmt: skip
_DARK = (
    "#ff8095", "#4fd0dd", "#aeb8c4", "#f0b445", "#b9a3ff", "#7bd787", "#f09ade", "#8ab4ff", "#d8b091", "#d6d9de",
)  # fmt: skip


def _colours(values: tuple[str, ...], **named: str) -> str:
    pairs = [*((f"c{look}", value) for look, value in enumerate(values)), *named.items()]
    return "".join(f"--{name}:{value};" for name, value in pairs)


_IN_LIGHT = _colours(
    _LIGHT, paper="#ffffff", ink="#1b1f24", soft="#57606a", rule="#d8dde3", faint="#e9ecf0", fill="#143c6e",
    line=DRAWN_LINE, middle="var(--ink)",
)  # fmt: skip
_IN_DARK = _colours(
    _DARK, paper="#14171b", ink="#e8eaed", soft="#a9b1bb", rule="#3a4048", faint="#2a2f36", fill="#a6dbef",
    line="#ffab2e", middle="var(--paper)",
)  # fmt: skip

_LOOKS = "".join(
    f".l.c{n},.x.c{n}{{stroke:var(--c{n})}}.m.c{n}:not(.x),svg .label.c{n}{{fill:var(--c{n})}}\n" for n in range(LOOKS)
)

STYLE = f"""
:root {{ color-scheme: light dark; {_IN_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_IN_DARK} }} .in-light {{ display: none }} }}
@media (prefers-color-scheme: light) {{ .in-dark {{ display: none }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1160px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }}
h2 {{ font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule) }}
h3 {{ font-size: 1.05rem; margin: 2rem 0 .25rem }}
p, dl {{ max-width: 75ch }}
.soft, figcaption span, footer {{ color: var(--soft) }}
dl > div {{ display: grid; grid-template-columns: 5rem 1fr; gap: 0 .75rem }}
dt {{ color: var(--soft) }} dd {{ margin: 0 }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem;
  align-items: start }}
figure {{ margin: .5rem 0; max-width: 36rem; min-width: 0 }}
figcaption b {{ display: block }} figcaption span {{ font-size: .9rem; display: block }}
figure > svg {{ display: block; width: 100%; height: auto; overflow: visible }}
svg text {{ font: 14px system-ui, sans-serif; fill: var(--soft) }}
svg .label {{ stroke: var(--paper); stroke-width: 4; paint-order: stroke; stroke-linejoin: round }}
svg .title {{ fill: var(--ink) }}
svg .grid {{ stroke: var(--faint); fill: none }} svg .axis {{ stroke: var(--soft); fill: none }}
svg .l {{ fill: none; stroke-width: 2 }} svg .dashed {{ stroke-dasharray: 6 4 }}
svg .x {{ fill: none; stroke-width: 2 }}
{_LOOKS}svg .cell {{ fill: var(--fill); stroke: var(--rule) }}
svg .chosen {{ fill: none; stroke: var(--line); stroke-width: 2.5 }}
svg .low {{ fill: var(--ink) }} svg .mid {{ fill: var(--middle) }} svg .high {{ fill: var(--paper) }}
svg .stop {{ fill: none; stroke: var(--line); stroke-width: 2 }}
svg .halo {{ fill: none; stroke: var(--paper); stroke-width: 5; stroke-opacity: .65 }}
svg .own {{ fill: none; stroke: var(--soft); stroke-dasharray: 3 3 }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .25rem 0; padding: 0;
  font-size: .9rem }}
.legend svg {{ width: 26px; height: 16px; vertical-align: middle }}
.legend i {{ display: inline-block; width: 26px; border-top: 2px solid var(--line); vertical-align: middle }}
.scale {{ display: flex; align-items: center; gap: .5rem; font-size: .9rem; color: var(--soft) }}
.scale img {{ height: .8rem; flex: 1; min-width: 4rem; max-width: 14rem }}
.scroll {{ overflow-x: auto; margin: .5rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .25rem }}
th, td {{ padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }}
th {{ font-weight: 600 }} tbody th {{ white-space: normal; min-width: 8rem }}
th:first-child, td.words {{ text-align: left }}
td:last-child, th:last-child {{ padding-right: 0 }}
details {{ margin: .5rem 0 }} summary {{ cursor: pointer }}
:focus-visible {{ outline: 2px solid var(--line); outline-offset: 2px }}
code {{ font: .92em ui-monospace, monospace }}
@media (max-width: 30rem) {{ svg .tick, svg .title {{ font-size: 17px }} }}
@media print {{ body {{ max-width: none }} details:not([open]) {{ display: none }} }}
"""
